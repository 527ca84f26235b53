"""Transfer re-estimated during a run: changes of score between its evaluations regressed on what was trained.

Between two evaluations, with x_k the steps spent on domain k (steps times its share of prompts),

    change_i = sum_k x_k B[k -> i] + noise,     B_i ~ N(prior_i, P_i),     noise ~ N(0, v_i)

so the posterior of B_i is a ridge regression towards the prior: precision P_i^-1 + X'X / v_i. There is no intercept:
the x_k of an interval sum to its steps, so a constant could not be told from the mean of B_i. Until mixtures have
varied enough, the prior dominates. Older intervals fade, because transfer changes as domains saturate.
K trainable domains, I domains that are measured (in scores or in entropy).

The prior is what a transfer file says about a run before it starts: the probes' effects per step (`Prior`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyphony.curricula.intervals import paired, quantile
from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.matrix import TransferMatrix

MISFIT = 0.5
"""Prior standard deviation of an effect in units of the effect: a probe's rate is half believed later in a run."""


ELSEWHERE = 0.02
"""And in score: a probe that found no effect may be two points off from where the run will be."""


def score_prior(matrix: TransferMatrix) -> Prior:
    """Return the prior of the scores, from the `steer` half. Raises ValueError for a probe without steps."""
    effects = Effects(matrix.on("steer"))
    bounds = effects.intervals()
    noise = np.hypot((bounds.high - bounds.low) / 2 / quantile(0.95), ELSEWHERE)
    return _prior(effects, effects.domains, effects.transfer(), noise)


def entropy_prior(matrix: TransferMatrix) -> Prior:
    """Return the prior of the entropies, in nats, for the domains whose entropy every training measured."""
    effects = Effects(matrix.on("steer"))
    change = effects.entropy_transfer()
    measured = [name for k, name in enumerate(effects.domains) if not np.isnan(change[:, k]).any()]
    columns = [effects.domains.index(name) for name in measured]
    level = np.array([_level(effects, name) for name in measured])
    noise = np.maximum(ENTROPY_NOISE * math.sqrt(2) * level, 1e-6)  # a level of 0 nats has no noise to divide by
    return _prior(effects, measured, change[:, columns], np.broadcast_to(noise, change[:, columns].shape))


def _prior(effects: Effects, measured: Sequence[str], change: np.ndarray, noise: np.ndarray) -> Prior:
    """Return the prior of effects [J, I] that were measured with `noise`."""
    steps = _steps(effects)
    rate, sd = change / steps[:, None], np.hypot(noise, MISFIT * change) / steps[:, None]
    return Prior(trained=effects.trained, measured=tuple(measured), mean=rate.T, sd=sd.T, steps=steps)


def _steps(effects: Effects) -> np.ndarray:
    """Return the mean number of steps that the trainings on each domain took, [J]."""
    taken = [
        np.mean([effects.rows[n].step - effects.before_rows[n][0].step for n in effects.rows_of(name)])
        for name in effects.trained
    ]
    for name, steps in zip(effects.trained, taken, strict=True):
        if steps <= 0:
            raise ValueError(f"domain {name!r}: its probe ends at the baseline's step, its effect a step is undefined")
    return np.array(taken)


def _level(effects: Effects, name: str) -> float:
    return float(np.mean([row.entropy[name] for row in effects.rows]))


FADING = 0.95
"""Weight of an interval at the next one: 14 evaluations halve it."""


SHARED = 0.3
"""Prior correlation of the effects that different domains have on one: some domains are fragile to all others."""


ENTROPY_NOISE = 0.05
"""Standard error of a domain's mean entropy at an evaluation, as a share of its level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prior:
    """The prior of B before the run: normal, per step of training on one domain alone."""

    trained: tuple[str, ...]
    measured: tuple[str, ...]
    mean: np.ndarray
    """[I, K]; mean[i, k] is the effect of k on i."""
    sd: np.ndarray
    """[I, K]"""
    steps: np.ndarray
    """[K], of the probes that the rates were measured over; 1 where there were none."""

    def select(self, trained: Sequence[str], measured: Sequence[str]) -> Prior:
        """Return the prior for these domains in this order. Raises ValueError for one it knows nothing of."""
        if unknown := (set(trained) - set(self.trained)) | (set(measured) - set(self.measured)):
            raise ValueError(f"domains {sorted(unknown)} of this run are not in the transfer file")
        columns = [self.trained.index(name) for name in trained]
        at = np.ix_([self.measured.index(name) for name in measured], columns)
        return Prior(
            trained=tuple(trained),
            measured=tuple(measured),
            mean=self.mean[at],
            sd=self.sd[at],
            steps=self.steps[columns],
        )

    def precision(self, i: int) -> np.ndarray:
        """Return P_i^-1, [K, K]: effects of others on i are correlated, the effect of i on itself stands alone."""
        correlation = np.full((len(self.trained),) * 2, SHARED)
        if self.measured[i] in self.trained:
            own = self.trained.index(self.measured[i])
            correlation[own, :] = correlation[:, own] = 0.0
        np.fill_diagonal(correlation, 1.0)
        return np.linalg.inv(correlation * np.outer(self.sd[i], self.sd[i]))


def flat_prior(trained: Sequence[str], measured: Sequence[str], *, own: float, sd: float) -> Prior:
    """Return the prior of a run without probes: a domain changes itself by `own` a step, others not, each +- `sd`."""
    shape = (len(measured), len(trained))
    mean = np.array([[own if i == k else 0.0 for k in trained] for i in measured])
    return Prior(
        trained=tuple(trained), measured=tuple(measured), mean=mean, sd=np.full(shape, sd), steps=np.ones(len(trained))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Regression:
    """Fading sums over a run's intervals; goes into a scheduler's state as JSON.

    Example: `Regression.from_json(state).add_scores(before, now, ("math", "code")).as_json()`
    """

    gram: np.ndarray
    """X'X, [K, K]."""
    cross: np.ndarray
    """X'change for each measured domain, [I, K]."""
    variance: np.ndarray
    """Sum of the changes' noise variances, [I]."""
    weight: float
    """Intervals seen, faded."""

    @classmethod
    def empty(cls, measured: int, trained: int) -> Regression:
        return cls(
            gram=np.zeros((trained, trained)),
            cross=np.zeros((measured, trained)),
            variance=np.zeros(measured),
            weight=0.0,
        )

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Regression:
        """Read what `as_json` gave."""
        trained, measured = len(state["gram"]), len(state["variance"])
        return cls(
            gram=np.array(state["gram"]),
            cross=np.array(state["cross"]).reshape(measured, trained),
            variance=np.array(state["variance"]),
            weight=state["weight"],
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "gram": self.gram.tolist(),
            "cross": self.cross.tolist(),
            "variance": self.variance.tolist(),
            "weight": self.weight,
        }

    def add(self, practice: np.ndarray, changes: np.ndarray, variances: np.ndarray) -> Regression:
        """Return the sums with one more interval: practice [K] in steps, changes [I] and their noise variances [I]."""
        return Regression(
            gram=FADING * self.gram + np.outer(practice, practice),
            cross=FADING * self.cross + np.outer(changes, practice),
            variance=FADING * self.variance + variances,
            weight=FADING * self.weight + 1,
        )

    def add_scores(self, before: Evaluation, now: Evaluation, trained: Sequence[str]) -> Regression:
        """Return the sums with the score changes of one interval; unchanged where nothing was practised in it."""
        steps = _practice(before, now, trained)
        if steps is None:
            return self
        changes = [paired(now.scores[name], before.scores[name]) for name in now.scores]
        if any(math.isnan(change.mid) for change in changes):  # no item of a domain was graded at both ends
            return self
        deviations = np.array([(change.high - change.low) / 2 / quantile(0.95) for change in changes])
        return self.add(steps, np.array([change.mid for change in changes]), deviations**2)

    def add_entropies(
        self, before: Evaluation, now: Evaluation, trained: Sequence[str], measured: Sequence[str]
    ) -> Regression:
        """Return the sums with the entropy changes of one interval; unchanged unless all were measured at both ends."""
        steps = _practice(before, now, trained)
        if steps is None or not all(name in before.entropy and name in now.entropy for name in measured):
            return self
        changes = np.array([now.entropy[name] - before.entropy[name] for name in measured])
        levels = np.array([max(now.entropy[name], before.entropy[name], 1e-3) for name in measured])
        return self.add(steps, changes, 2 * (ENTROPY_NOISE * levels) ** 2)

    def posterior(self, prior: Prior) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of B, [I, K] each."""
        mean, sd = prior.mean.copy(), prior.sd.copy()
        for i in range(len(mean)) if self.weight else ():
            noise = self.variance[i] / self.weight
            precision = prior.precision(i)
            covariance = np.linalg.inv(precision + self.gram / noise)
            mean[i] = covariance @ (precision @ prior.mean[i] + self.cross[i] / noise)
            sd[i] = np.sqrt(np.diag(covariance))
        return mean, sd


def _practice(before: Evaluation, now: Evaluation, trained: Sequence[str]) -> np.ndarray | None:
    """Return the steps spent on each domain between two evaluations, [K].

    None where there was none, and where a rollback in between makes the change another one than practice made.
    """
    drawn = np.array([now.exposure.get(name, 0) - before.exposure.get(name, 0) for name in trained], dtype=float)
    if drawn.sum() <= 0 or now.step <= before.step or now.rolled_back:
        return None
    return drawn / drawn.sum() * (now.step - before.step)
