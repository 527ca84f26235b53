"""Transfer value: how much a step on each domain changes the held-out scores and entropies of all, from a run's evaluations.

    V_k = sum_i n_i B[k -> i],       n_i = exp(-a_i / focus) (1 + drawdown_i / alarm) 2^alarms_i,  scaled to mean 1

B is the posterior of `online_transfer`. The weight n_i is larger for a low score a_i and for a large drawdown from the
domain's best score (cross-fitted): what helps or harms the weakest domains counts most. It doubles with each broken
guardrail of i.

    E_k = sum_i s_i D[k -> i] / max |D|

D is the same posterior for entropies; s_i is how far i is below its band, relative to the band's edge, negative above the
band, and 0 where the entropy of i is not controlled.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyphony.curricula.records import Evaluation, Evidence
from polyphony.curricula.schedulers.online_transfer import Prior, Regression, flat_prior
from polyphony.curricula.transfer.forgetting import drawdown

logger = logging.getLogger(__name__)

OWN, OTHERS = 0.1, 0.05
"""Prior without probes, in score per interval between evaluations spent on one domain alone: what it adds to itself,
and the standard deviation of each effect. An interval usually moves a score by a few points."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferValue:
    """Values each domain by its effect on all; `assess` is a pure function of evidence and state."""

    scores: Prior | None
    """None: no probes, see `OWN`."""
    entropies: Prior | None
    focus: float
    alarm: float
    band: tuple[float, float]
    held: tuple[str, ...]
    """Domains whose entropy counts in E."""

    def assess(self, evidence: Evidence, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state brought up to the last evaluation; its `value`, `value_sd` and `pull` are V, sd(V), E [K].

        V is 0 and its deviation 0 before the first evaluation, E is 0 while every entropy that is held is inside its band.
        """
        seen, rows = state.get("seen", 0), evidence.evaluations
        if not rows:
            self._score_prior(evidence, evidence.domains, None)  # a transfer file of other domains is refused here
        if not rows or (len(rows) <= seen and not evidence.alarms):
            return dict(state) if state else _nothing(len(evidence.domains))
        alarms = [*state.get("alarms", []), *evidence.alarms]
        interval = state.get("interval") or next((r.step - rows[0].step for r in rows if r.step > rows[0].step), None)
        scored, measured = tuple(rows[0].scores), tuple(rows[0].entropy)
        sums = _load(state.get("scores"), len(scored), len(evidence.domains))
        nats = _load(state.get("entropies"), len(measured), len(evidence.domains))
        for n in range(max(1, seen), len(rows)):
            sums = sums.add_scores(rows[n - 1], rows[n], evidence.domains)
            nats = nats.add_entropies(rows[n - 1], rows[n], evidence.domains, measured)
        effects, sd = sums.posterior(self._score_prior(evidence, scored, interval))
        need = self._need(rows, alarms)
        changes, _ = nats.posterior(self._entropy_prior(evidence, rows[0], interval))
        largest = np.abs(changes).max(initial=0.0)
        self._say_unmeasured(rows, measured)
        pull = self._shortfall(rows, measured) @ changes / largest if largest else np.zeros(len(evidence.domains))
        return {
            "seen": len(rows),
            "interval": interval,
            "scores": sums.as_json(),
            "entropies": nats.as_json(),
            "value": (need @ effects).tolist(),
            "value_sd": np.sqrt(need**2 @ sd**2).tolist(),
            "pull": pull.tolist(),
            "alarms": alarms,
        }

    def _need(self, rows: tuple[Evaluation, ...], alarms: list[str]) -> np.ndarray:
        now = {name: rows[-1].mean_score(name) for name in rows[-1].scores}
        lowest = min(now.values())
        need = []
        for name, score in now.items():
            lost = -drawdown([row.scores[name] for row in rows]).mid
            # only ratios matter, so the lowest score stands for 1; a drawdown that is undefined raises no alarm
            fallen = 1 + lost / self.alarm if lost > 0 else 1.0
            need.append(np.exp((lowest - score) / self.focus) * fallen * 2 ** alarms.count(name))
        return np.array(need) / np.mean(need)

    def _say_unmeasured(self, rows: tuple[Evaluation, ...], measured: tuple[str, ...]) -> None:
        for name in measured:
            if name not in rows[-1].entropy:
                taken = "it is assumed in the middle of its band, and " if name in self.held else ""
                logger.warning(
                    "domain %r: its entropy was not measured at step %d: %sno entropy change of this interval is used",
                    name,
                    rows[-1].step,
                    taken,
                )

    def _shortfall(self, rows: tuple[Evaluation, ...], measured: tuple[str, ...]) -> np.ndarray:
        found = []
        for name in measured:
            if name not in self.held:
                found.append(0.0)
                continue
            low, high = (edge * rows[0].entropy[name] for edge in self.band)
            nats = rows[-1].entropy.get(name, (low + high) / 2)
            below = (low - nats) / low if low > 0 else 0.0
            above = (nats - high) / high if high > 0 else 0.0
            found.append(below if below > 0 else -above if above > 0 else 0.0)
        return np.array(found)

    def _score_prior(self, evidence: Evidence, scored: tuple[str, ...], interval: int | None) -> Prior:
        if self.scores is not None:
            return self.scores.select(evidence.domains, scored)
        return flat_prior(evidence.domains, scored, own=OWN / (interval or 1), sd=OTHERS / (interval or 1))

    def _entropy_prior(self, evidence: Evidence, first: Evaluation, interval: int | None) -> Prior:
        measured = tuple(first.entropy)
        if self.entropies is not None and set(measured) <= set(self.entropies.measured):
            return self.entropies.select(evidence.domains, measured)
        if self.entropies is not None:
            strange = sorted(set(measured) - set(self.entropies.measured))
            logger.warning("the probes measured no entropy of %s: their entropies are ignored", ", ".join(strange))
        sd = OTHERS * max(first.entropy.values(), default=1.0) / (interval or 1)
        return flat_prior(evidence.domains, measured, own=0.0, sd=max(sd, 1e-6))


def _nothing(domains: int) -> dict[str, Any]:
    return {"seen": 0, "value": [0.0] * domains, "value_sd": [0.0] * domains, "pull": [0.0] * domains}


def _load(state: Mapping[str, Any] | None, measured: int, trained: int) -> Regression:
    return Regression.empty(measured, trained) if state is None else Regression.from_json(state)
