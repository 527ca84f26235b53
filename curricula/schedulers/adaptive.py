"""`adaptive`: part of every draw evenly, the rest to the domains that lack most on the held-out half that decides."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from polyphony.curricula.declarations import settings
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.records import Decision, Evidence, graded
from polyphony.curricula.schedulers.online_transfer import entropy_prior, score_prior
from polyphony.curricula.schedulers.shares import listed, normalised, softmax, uniform
from polyphony.curricula.schedulers.transfer_value import TransferValue
from polyphony.curricula.transfer.matrix import Probes

logger = logging.getLogger(__name__)

PRACTICE = 64
"""Groups of a domain without a new best that halve what it is thought to be able to gain still."""
FALL = 2 * math.sqrt(2)
"""Standard errors below its best from which a domain has fallen: two of a difference, for the best is a lucky one."""
ALARM = 0.05
"""Drawdown that doubles a domain's weight in the worth of transfer: two standard errors of a paired difference of about 200
items."""


@settings
class Adaptive:
    """p_k = floor / K + (1 - floor) u_k / sum_j u_j with u_k = exp(d_k / focus) X_k F_k

    d: what the domain lacks, c_k - s_k or 0 if that is negative; s_k is its mean score at the last evaluation.
    c: how far it may rise, b_k + (1 - b_k) 2^(-n_k / 64) with b_k its best score. n_k are the groups of it that were
       practised since the last evaluation with a new best, one standard error above the one before; of the groups
       between two evaluations at most 64 count, so that one look never takes more than half, and none where the score
       has fallen below the best by more than two standard errors of a difference: that domain is not standing still, it
       is being lost. A domain whose answers are all wrong needs most at first, as it may have to find a form; one that
       practice does not move, with signal in its groups or without, is let go.
    X: 1 + strength x_k where a transfer file is given, with x_k in [-1, 1] the worth of a step on k to all domains, its
       difference from the mean over the mean size and deviation (see `transfer_value`); else 1.
    F: 2^E_k with E_k in [-1, 1], above 1 where k raises the entropy of domains below their band (see `transfer_value`),
       where `entropy_control` names domains; else 1.

    Before the first evaluation all shares are equal. The rule is ours; no source has it.
    """

    focus: float = Field(default=0.2, gt=0)
    """Difference in what is lacking over which a domain's weight grows e times."""
    floor: float = Field(default=0.5, ge=0, le=1)
    """Share of a draw spread evenly over the domains: half, so that none has less than half of what mixing gives it."""
    transfer: Probes = None
    """A `TransferMatrix`, the path of a `transfer.json` (`curriculum.transfer`), or None. It moves no share
    unless `strength` is above 0."""
    strength: float = Field(default=0.0, ge=0, lt=1)
    """Weight of measured transfer; 0 leaves it out."""
    entropy_band: tuple[float, float] = EntropySettings().band
    """Multiples of a domain's entropy at the run's first evaluation; a recipe says it in `entropy.band`."""
    entropy_control: tuple[str, ...] = ()
    """Domains, trained or only watched, whose entropy moves the shares; a recipe says it in `entropy.control`."""
    values: TransferValue | None = field(init=False, repr=False, compare=False)

    @field_validator("entropy_band")
    @classmethod
    def _is_a_band(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= band[0] < band[1]:
            raise ValueError("expected low < high, both >= 0")
        return band

    def __post_init__(self) -> None:
        values = TransferValue(
            scores=None if self.transfer is None else score_prior(self.transfer),
            entropies=None if self.transfer is None else entropy_prior(self.transfer),
            focus=self.focus,
            alarm=ALARM,
            band=self.entropy_band,
            held=self.entropy_control,
        )
        is_used = self.transfer is not None or self.entropy_control
        object.__setattr__(self, "values", values if is_used else None)

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        k = len(evidence.domains)
        if "arms" in state:
            logger.warning(
                "the run began by another rule that was called adaptive: it goes by held-out scores from here on"
            )
        found = self._followed(evidence, state)
        assessed = self.values.assess(evidence, state.get("worth", {})) if self.values else {}
        next_state = found | ({"worth": assessed} if assessed else {})
        if not evidence.evaluations:
            return Decision(mixture=uniform(k), reason="no evaluation yet: uniform", state=next_state)
        lacks = self._lacks(evidence, next_state)
        by_need = softmax(lacks, temperature=self.focus)
        weights = [w * f for w, f in zip(by_need, self._factors(assessed, k), strict=True)]
        mixture = tuple(self.floor / k + (1 - self.floor) * share for share in normalised(weights))
        unmoved = [name for name, n in zip(evidence.domains, found["unmoved"], strict=True) if n >= PRACTICE]
        reason = f"more to what lacks most: {listed(evidence.domains, lacks)}"
        reason += f"; practised without a new best: {', '.join(unmoved)}" if unmoved else ""
        return Decision(mixture=mixture, reason=reason, state=next_state)

    def _followed(self, evidence: Evidence, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return of each domain the groups since the last evaluation, the best score then and groups since it rose, [K]."""
        k = len(evidence.domains)
        groups = [n + stats.groups for n, stats in zip(state.get("groups", [0] * k), evidence.last, strict=True)]
        best, unmoved = list(state.get("best", [None] * k)), list(state.get("unmoved", [0] * k))
        seen = state.get("seen", 0) if "best" in state else 0
        for row in evidence.evaluations[seen:]:
            for i, name in enumerate(evidence.domains):
                score = row.mean_score(name)
                if math.isnan(score):
                    continue
                error = 0.0 if best[i] is None else standard_error(best[i], items=_items(evidence, name))
                if best[i] is None or score > best[i] + error:
                    best[i], unmoved[i] = score, 0
                elif score >= best[i] - FALL * error:
                    unmoved[i] += min(groups[i], PRACTICE)
                groups[i] = 0
        return {"groups": groups, "best": best, "unmoved": unmoved, "seen": len(evidence.evaluations)}

    def _lacks(self, evidence: Evidence, followed: Mapping[str, Any]) -> list[float]:
        """Return d_k, [K]; a domain without a score lacks all."""
        lacks = []
        for name, unmoved in zip(evidence.domains, followed["unmoved"], strict=True):
            history = _history(evidence, name)
            best = max(history, default=0.0)
            ceiling = best + (1 - best) * 2 ** (-unmoved / PRACTICE)
            lacks.append(max(0.0, ceiling - history[-1]) if history else 1.0)
        return lacks

    def _factors(self, assessed: Mapping[str, Any], k: int) -> Sequence[float]:
        """Return X_k F_k, [K]."""
        if not assessed:
            return (1.0,) * k
        value, deviation = np.array(assessed["value"]), np.array(assessed["value_sd"])
        scale = np.abs(value).mean() + deviation.mean()
        worth = np.clip((value - value.mean()) / scale, -1, 1) if scale > 0 else np.zeros(k)
        strength = self.strength if self.transfer is not None else 0.0
        return ((1 + strength * worth) * 2 ** np.clip(np.array(assessed["pull"]), -1, 1)).tolist()


def standard_error(score: float, *, items: int) -> float:
    """Return that of a mean of 0s and 1s; at least that of one at .01 or .99."""
    return math.sqrt(max(score * (1 - score), 0.01) / items)


def _history(evidence: Evidence, name: str) -> list[float]:
    return [score for row in evidence.evaluations if not math.isnan(score := row.mean_score(name))]


def _items(evidence: Evidence, name: str) -> int:
    return max(1, len(graded(evidence.evaluations[-1].scores[name])))
