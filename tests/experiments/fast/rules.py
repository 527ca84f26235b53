"""Rules that lost in a study: the registered one names them, the product has them no more.

`OldAdaptive` was the scheduler `adaptive`: shares by learnability, progress and transfer of each domain, estimated anew at
every draw. `OwnCeiling` was it after that, which held a domain against its own best only where groups with signal had not
moved it; `Wanting` is the same with every domain held against the full score for good. `Patient` was it next: today's rule
with a level over two evaluations, which also let a domain go that had lost what it could.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.records import Decision, DomainStats, Evidence, graded, mean, null_of
from polyphony.curricula.schedulers.adaptive import PRACTICE, Adaptive, standard_error
from polyphony.curricula.schedulers.online_transfer import entropy_prior, score_prior
from polyphony.curricula.schedulers.shares import listed, normalised, softmax, uniform
from polyphony.curricula.schedulers.transfer_value import TransferValue
from polyphony.curricula.transfer.matrix import Probes

INFLATION = 0.02
"""Variance added to every domain at each draw (PAC)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnability:
    """Posterior mean and variance of each domain [K], and the last draws' rewards; state as JSON."""

    mean: list[float]
    variance: list[float]
    rewards: list[list[float | None]]
    """[K, up to window], oldest first; None where the domain was not drawn."""

    @classmethod
    def of(
        cls,
        state: Mapping[str, Any] | None,
        evidence: Evidence,
        *,
        window: int,
        start: tuple[float, float] = (0.0, 1.0),
    ) -> Learnability:
        """Return the posteriors after the last draw; `start` is their mean and variance before any.

        The observation of a domain is its mean |advantage| in the last draw.
        """
        size = len(evidence.domains)
        if state is None:
            empty: list[list[float | None]] = [[] for _ in range(size)]
            return cls(mean=[start[0]] * size, variance=[start[1]] * size, rewards=empty)
        rewards = _push(state["rewards"], [s.reward for s in evidence.last], window)
        total = sum(stats.groups for stats in evidence.last)
        means, variances = [], []
        for m, v, stats in zip(state["mean"], state["variance"], evidence.last, strict=True):
            advantage = stats.abs_advantage
            share = stats.groups / total * size if total and not math.isnan(advantage) else 0.0
            precision = 1 / v + share
            means.append((m / v + share * advantage) / precision if share else m)
            variances.append(1 / precision + INFLATION)
        return cls(mean=means, variance=variances, rewards=rewards)

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance, "rewards": self.rewards}

    def sample(self, rng: random.Random) -> np.ndarray:
        """Return one sample of every domain's posterior, [K]."""
        return np.array([rng.gauss(m, math.sqrt(v)) for m, v in zip(self.mean, self.variance, strict=True)])

    def progress(self) -> np.ndarray:
        """Return each domain's slope of the reward over the window, over the sum of their sizes, [K] in [-1, 1]."""
        slopes = np.array([_slope(each) for each in self.rewards])
        total = np.abs(slopes).sum()
        return slopes / total if total else slopes


def _push(history: list[list[float | None]], newest: list[float], window: int) -> list[list[float | None]]:
    return [[*each, null_of(value)][-window:] for each, value in zip(history, newest, strict=True)]


def _slope(values: list[float | None]) -> float:
    """Return the least-squares slope per draw; 0 below three values, where two points would always show one."""
    known = [(n, value) for n, value in enumerate(values) if value is not None]
    if len(known) < 3:
        return 0.0
    x, y = np.array(known, dtype=float).T
    x -= x.mean()
    return float(x @ y / (x @ x))


UNSEEN = (1.0, 0.04)
"""Mean and variance of learnability before a domain was drawn: the largest there is, so that each is tried."""


@settings
class OldAdaptive:
    """p_k = (1 - floor) u_k / sum_j u_j + floor / K with the utility

        u_k = L_k (1 + P_k) (1 + strength X_k) F_k

    L: mean |A| of the domain's groups, its learnability (SEC, arXiv:2505.14970): one sample a draw of the posterior of
       PAC (arXiv:2608.30528), see `posterior`.
    P: |slope of the mean reward over the last `window` draws| over the sum of the same. PAC takes the signed slope;
       the size is used here, so that a domain that is being lost is practised too.
    X: transfer in [-1, 1], (V_k - mean V) / (mean |V| + mean sd of V), with V_k one posterior sample of what a step on k
    adds to
       the held-out scores of all domains, itself and watch-only ones included, see `transfer_value`: measured by the
       probes and then by this run's own evaluations. TAC (arXiv:2606.25178) multiplies learnability by gradient cosines;
       evaluations need no gradients and see watch-only domains.
    F: 2^E_k with E_k in [-1, 1], above 1 where k raises the entropy of domains below their band, see `transfer_value`; 1
    unless
       `entropy_control` names domains.

    No source has the four together; the product is ours.
    """

    transfer: Probes = None
    """A `TransferMatrix`, the path of a `transfer.json` (`curriculum.transfer`), or None: transfer is estimated from this
    run's evaluations alone."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Share of a draw spread evenly over the domains, so that each keeps being measured."""
    strength: float = Field(default=0.9, ge=0, lt=1)
    """Weight of transfer; below 1, so that transfer alone never takes a domain's share to 0."""
    focus: float = Field(default=0.2, gt=0)
    """Difference in score over which a domain's weight grows e times: with .2 a domain at .3 weighs 3 times one at .5."""
    alarm: float = Field(default=0.05, gt=0)
    """Drawdown that doubles a domain's weight: two standard errors of a paired difference of about 200 items."""
    window: int = Field(default=16, ge=3)
    """Draws over which the slope of the mean reward is fitted (PAC's W)."""
    entropy_band: tuple[float, float] = EntropySettings().band
    """Multiples of a domain's entropy at the run's first evaluation; a recipe says it in `entropy.band`."""
    entropy_control: tuple[str, ...] = ()
    """Domains, trained or only watched, whose entropy moves the shares; a recipe says it in `entropy.control`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the posterior samples, together with the draw's index."""
    values: TransferValue = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = TransferValue(
            scores=None if self.transfer is None else score_prior(self.transfer),
            entropies=None if self.transfer is None else entropy_prior(self.transfer),
            focus=self.focus,
            alarm=self.alarm,
            band=self.entropy_band,
            held=self.entropy_control,
        )
        object.__setattr__(self, "values", values)

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        rng = random.Random(f"{self.seed}/{evidence.draw}")
        known = Learnability.of(state.get("arms"), evidence, window=self.window, start=UNSEEN)
        assessed = self.values.assess(evidence, state.get("worth", {}))
        learnability = np.maximum(known.sample(rng), 1e-3)
        progress = known.progress()
        sampled = [rng.gauss(v, sd) for v, sd in zip(assessed["value"], assessed["value_sd"], strict=True)]
        transfer = _relative(np.array(sampled), np.array(assessed["value"]), np.array(assessed["value_sd"]))
        entropy = 2 ** np.clip(np.array(assessed["pull"]), -1, 1)
        utility = learnability * (1 + np.abs(progress)) * (1 + self.strength * transfer) * entropy
        size = len(evidence.domains)
        mixture = (1 - self.floor) * utility / utility.sum() + self.floor / size
        factors = {"learnability": learnability, "progress": progress, "transfer": transfer, "entropy": entropy}
        if (entropy == 1).all():
            del factors["entropy"]
        reason = "; ".join(f"{name} " + " ".join(f"{value:.2f}" for value in of) for name, of in factors.items())
        next_state = {"arms": known.as_json(), "worth": assessed}  # names of saved states, which old runs have too
        return Decision(mixture=tuple(mixture.tolist()), reason=reason, state=next_state)


def _relative(sampled: np.ndarray, value: np.ndarray, sd: np.ndarray) -> np.ndarray:
    scale = np.abs(value).mean() + sd.mean()
    return np.clip((sampled - sampled.mean()) / scale, -1, 1) if scale > 0 else np.zeros_like(value)


LATEST = 2
"""Evaluations whose mean was a domain's level: at 50 items each a standard error of .05 instead of .07."""
STILL = 3
"""Evaluations without a new best after which a domain stands still."""
BEFORE = 2
"""Evaluations before those: a best of one would be luck."""
FOUND = 0.05
"""Best level below which a domain has found nothing yet, so that it cannot stand still."""
PRACTISED = 8
"""Groups with signal within those evaluations: where there was nothing to learn from, standing still says nothing."""


class Patient(Adaptive):
    """Today's rule with the mean of two evaluations for a level, where falling counts as standing still."""

    def _followed(self, evidence: Evidence, state: Mapping[str, Any]) -> dict[str, Any]:
        k = len(evidence.domains)
        groups = [n + stats.groups for n, stats in zip(state.get("groups", [0] * k), evidence.last, strict=True)]
        best, unmoved = list(state.get("best", [None] * k)), list(state.get("unmoved", [0] * k))
        for row in evidence.evaluations[state.get("seen", 0) :]:
            for i, name in enumerate(evidence.domains):
                score = row.mean_score(name)
                if math.isnan(score):
                    continue
                if best[i] is None or score > best[i] + standard_error(best[i], items=_items(evidence, name)):
                    best[i], unmoved[i] = score, 0
                else:
                    unmoved[i] += min(groups[i], PRACTICE)
                groups[i] = 0
        return {"groups": groups, "best": best, "unmoved": unmoved, "seen": len(evidence.evaluations)}

    def _lacks(self, evidence: Evidence, followed: Mapping[str, Any]) -> list[float]:
        lacks = []
        for name, unmoved in zip(evidence.domains, followed["unmoved"], strict=True):
            history = _history(evidence, name)
            best = max(history, default=0.0)
            ceiling = best + (1 - best) * 2 ** (-unmoved / PRACTICE)
            lacks.append(max(0.0, ceiling - mean(history[-LATEST:])) if history else 1.0)
        return lacks


class OwnCeiling(Adaptive):
    """Today's rule with another ceiling: 1, and a domain's own best score from when it stands still.

    It stands still when no score of the last three evaluations is more than one standard error above the best before them,
    that best is above .05, and groups with signal were practised meanwhile.
    """

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        k = len(evidence.domains)
        live = [n + _live(stats) for n, stats in zip(state.get("live", [0.0] * k), evidence.last, strict=True)]
        marks = list(state.get("marks", []))
        marks += [live] * (len(evidence.evaluations) - state.get("seen", 0))
        assessed = self.values.assess(evidence, state.get("worth", {})) if self.values else {}
        kept = {"live": live, "marks": marks[-1 - STILL :], "seen": len(evidence.evaluations)}
        next_state = kept | ({"worth": assessed} if assessed else {})
        if not evidence.evaluations:
            return Decision(mixture=uniform(k), reason="no evaluation yet: uniform", state=next_state)
        histories = [_history(evidence, name) for name in evidence.domains]
        since = [now - then for now, then in zip(live, kept["marks"][0], strict=True)]
        still = [
            self._has_stopped(history, items=_items(evidence, name), groups=n)
            for name, history, n in zip(evidence.domains, histories, since, strict=True)
        ]
        lacks = [
            max(0.0, (max(history) if is_still else 1.0) - mean(history[-LATEST:])) if history else 1.0
            for history, is_still in zip(histories, still, strict=True)
        ]
        by_need = softmax(lacks, temperature=self.focus)
        weights = [w * f for w, f in zip(by_need, self._factors(assessed, k), strict=True)]
        mixture = tuple(self.floor / k + (1 - self.floor) * share for share in normalised(weights))
        standing = [name for name, is_still in zip(evidence.domains, still, strict=True) if is_still]
        reason = f"more to what lacks most: {listed(evidence.domains, lacks)}"
        reason += f"; at their own ceiling: {', '.join(standing)}" if standing else ""
        return Decision(mixture=mixture, reason=reason, state=next_state)

    def _has_stopped(self, history: Sequence[float], *, items: int, groups: float) -> bool:
        return groups >= PRACTISED and stands_still(history, items=items)


class Wanting(OwnCeiling):
    """Holds no domain against its own best level, however long it has stood still."""

    def _has_stopped(self, history: Sequence[float], *, items: int, groups: float) -> bool:
        return False


def stands_still(history: Sequence[float], *, items: int) -> bool:
    """Return whether a domain's scores, oldest first, have stopped rising; `items` are those of one evaluation.

    One standard error is that of a score of 0s and 1s at the best level, at least that of one at .01 or .99.
    """
    if len(history) < BEFORE + STILL:
        return False
    best = max(history)
    error = math.sqrt(max(best * (1 - best), 0.01) / items)
    return best > FOUND and max(history[-STILL:]) <= max(history[:-STILL]) + error


def _history(evidence: Evidence, name: str) -> list[float]:
    return [score for row in evidence.evaluations if not math.isnan(score := row.mean_score(name))]


def _items(evidence: Evidence, name: str) -> int:
    return max(1, len(graded(evidence.evaluations[-1].scores[name])))


def _live(stats: DomainStats) -> float:
    """Return how many groups of the last draw had signal."""
    return 0.0 if math.isnan(stats.frac_dead) else stats.groups * (1 - stats.frac_dead)
