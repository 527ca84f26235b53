"""From rows to T[j -> i]: what training on one domain did to each, with bootstrap intervals over items and seeds.

    T[j -> i] = a_i(after training on j alone) - a_i(before)

(Omni-Thinker, arXiv:2507.14783.) Evidence of j is its probes; where j was never probed, the stages of a run on j, each
against the evaluation before it. K domains, J trained ones, R trainings (a domain and a seed each), B resamples.

`SeedNoise` is how much a training's effects differ between seeds, beyond what a finite set of items explains. Entry by entry
of T there are S - 1 degrees of freedom, 1 with two seeds, so entries are pooled: those of all trained
domains together, those of a watched domain by itself. A watched domain is never practised and may swing by half its
score between seeds; pooled with the others it would hide every effect among them. S seeds, K domains, R trainings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from polyphony.curricula.intervals import paired, quantile
from polyphony.curricula.records import Evaluation, mean
from polyphony.curricula.transfer.forgetting import stages
from polyphony.curricula.transfer.matrix import TransferMatrix


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedNoise:
    """Standard deviation between seeds of each domain's score after a training.

    Example: `SeedNoise.estimate(changes, pools).draws((1000, 8, 4), rng=rng)`
    """

    sd: np.ndarray
    """[K]; 0 with one seed a domain: then intervals hold evaluation noise only."""
    correlation: float
    """Shared by the effects of one training on different trained domains, in [0, 1]."""
    seeds: int
    """Smallest number of seeds of any training."""

    @classmethod
    def estimate(cls, changes: Sequence[Sequence[np.ndarray]], pools: Sequence[int]) -> SeedNoise:
        """Estimate from the per-item changes [S, n] of every training and domain; `pools` [K] names each one's pool.

        The variance between seeds is that of a training's mean effects less what items alone would give.
        """
        pool = np.asarray(pools)
        seeds = [len(training[0]) for training in changes]
        repeated = [training for training in changes if len(training[0]) > 1]
        freedom = sum(len(training[0]) - 1 for training in repeated)
        if not freedom:
            return cls(sd=np.zeros(len(pool)), correlation=0.0, seeds=min(seeds, default=0))
        covariance = np.sum([_covariance(training) for training in repeated], axis=0) / freedom
        items = np.sum([[item_variance(each) for each in training] for training in repeated], axis=0) / freedom
        own = np.diag(covariance) - items
        variance = np.array([max(0.0, own[pool == name].mean()) for name in pool])
        return cls(sd=np.sqrt(variance), correlation=_correlation(covariance, variance, pool), seeds=min(seeds))

    def draws(self, shape: tuple[int, int, int], *, rng: np.random.Generator) -> np.ndarray:
        """Return draws [B, R, K] of what another seed of each training would have changed."""
        shared = rng.standard_normal(shape[:2])[..., None] * np.sqrt(self.correlation)
        own = rng.standard_normal(shape) * np.sqrt(1 - self.correlation)
        return self.sd * (shared + own)


def _covariance(training: Sequence[np.ndarray]) -> np.ndarray:
    """Return the seeds' sums of squares and products of mean changes, [K, K]."""
    deviations = np.stack([each.mean(axis=1) - each.mean() for each in training], axis=1)  # [S, K]
    return deviations.T @ deviations


def _correlation(covariance: np.ndarray, variance: np.ndarray, pool: np.ndarray) -> float:
    """Return the mean covariance between different domains of the largest pool over that pool's variance."""
    names, counts = np.unique(pool, return_counts=True)
    members = np.flatnonzero(pool == names[counts.argmax()])
    if len(members) < 2 or variance[members[0]] <= 0:
        return 0.0
    block = covariance[np.ix_(members, members)]
    return float(np.clip(block[~np.eye(len(members), dtype=bool)].mean() / variance[members[0]], 0, 1))


def item_variance(each: np.ndarray) -> float:
    """Return the part of the seeds' sum of squares that item noise alone would give: (S - 1) times the interaction's
    mean square over the number of items.
    """
    n = each.shape[1]
    if n < 2:
        return np.nan
    rest = each - each.mean(axis=1, keepdims=True) - each.mean(axis=0, keepdims=True) + each.mean()
    return float((rest**2).sum() / (n - 1) / n)


JOINT = ""
"""Stands for the joint run where a training is named by its domain."""


LEVELS = (0.025, 0.975)
"""Ends of a 95 % interval as quantiles of resamples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """Mean scores before and after each training [B, R, K], on one set of items or on B resamples of it."""

    base: np.ndarray
    """[B, K], before any training."""
    before: np.ndarray
    after: np.ndarray

    @property
    def change(self) -> np.ndarray:
        return self.after - self.before


class Part(NamedTuple):
    """Some of the items: every `folds`-th from `fold` on, or all but those (`rest`)."""

    fold: int
    folds: int
    rest: bool

    def mask(self, n: int) -> np.ndarray:
        """Return which of n items belong to the part."""
        return (np.arange(n) % self.folds == self.fold) != self.rest


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Ends of 95 % intervals, [J, K] each."""

    low: np.ndarray
    high: np.ndarray


class Effects:
    """The trainings of a transfer matrix as arrays, ready to be averaged, resampled and split in folds.

    Example: `Effects(matrix.on("steer")).transfer()` is T [J, K].
    """

    def __init__(
        self, matrix: TransferMatrix, *, against: Literal["start", "placebo"] = "start", with_arms: bool = False
    ) -> None:
        """Against `placebo`, a training is compared with one on the same prompts with shuffled rewards, if all have one.

        Without arms, other ways to train all domains are no trainings: what the probes say does not depend on them.
        """
        is_plain = against == "start" or not matrix.placebo
        found = _trainings(matrix, with_arms=with_arms) if is_plain else _beyond_placebo(matrix)
        self.domains = matrix.domains
        self.trained = tuple(name for name in matrix.trainable if any(label == name for label, *_ in found))
        self.labels = tuple(label for label, *_ in found)
        self.seeds = tuple(seed for _, seed, _, _ in found)
        self.rows = tuple(after for *_, after in found)
        self._base_rows = matrix.baselines(probe=True)
        self.before_rows = tuple(before for _, _, before, _ in found)
        compared = [*self._base_rows, *self.rows, *(row for rows in self.before_rows for row in rows)]
        self._places = {name: _graded_in_all(compared, name) for name in self.domains}
        self.base = [self._item_means(self._base_rows, name) for name in self.domains]
        self.before = [
            np.array([self._item_means(before, name) for before in self.before_rows]) for name in self.domains
        ]
        self.after = [np.array([self._scores(row, name) for row in self.rows]) for name in self.domains]
        self.noise = self._seed_noise(matrix.trainable)

    @property
    def gaps(self) -> dict[str, str]:
        """Of domains with items that could not be graded in some row: how many are compared, in words."""
        of = {name: len(self._base_rows[0].scores[name]) for name in self.domains}
        return {n: f"{len(at)} of {of[n]} items" for n, at in self._places.items() if len(at) < of[n]}

    def _scores(self, row: Evaluation, name: str) -> np.ndarray:
        """Return the scores of the items that were graded in all rows; one that is NaN where there are none."""
        places = self._places[name]
        return np.array([row.scores[name][i] for i in places] if places else [math.nan], dtype=float)

    def _item_means(self, rows: Sequence[Evaluation], name: str) -> np.ndarray:
        return np.mean([self._scores(row, name) for row in rows], axis=0)

    def means(self, part: Part | None = None) -> Means:
        """Return the mean scores, B = 1, over all items or a part of them."""
        return self._weighted([_equal_shares(items.shape[1], part)[None] for items in self.after])

    def resample(self, size: int, *, rng: np.random.Generator, part: Part | None = None) -> Means:
        """Return B = `size` bootstrap means: items weighed anew, the same for all trainings (they are paired)."""
        return self._weighted(
            [bootstrap_weights(size, _equal_shares(items.shape[1], part), rng=rng) for items in self.after]
        )

    def with_seed_noise(self, drawn: Means, *, rng: np.random.Generator) -> Means:
        """Return the bootstrap means with the noise of other seeds added after each training."""
        return replace(drawn, after=drawn.after + self.noise.draws(drawn.after.shape, rng=rng))

    def rows_of(self, label: str, seeds: Sequence[int] | None = None) -> list[int]:
        """Return the positions of a domain's trainings (or of the `JOINT` run, or of an arm by its `label_of`), of all
        seeds or of those given."""
        pairs = enumerate(zip(self.labels, self.seeds, strict=True))
        return [n for n, (name, seed) in pairs if name == label and (seeds is None or seed in seeds)]

    def transfer(self, means: Means | None = None, *, seeds: Sequence[int] | None = None) -> np.ndarray:
        """Return T, [J, K], or [B, J, K] for the means of a bootstrap; averaged over seeds."""
        change = (means or self.means()).change
        table = np.stack([change[:, self.rows_of(name, seeds)].mean(axis=1) for name in self.trained], axis=1)
        return table[0] if means is None else table

    def square(self, means: Means, seeds: Sequence[int] | None = None) -> np.ndarray:
        """Return T among the trained domains alone, [B, J, J]."""
        columns = [self.domains.index(name) for name in self.trained]
        return self.transfer(means, seeds=seeds)[:, :, columns]

    def own_levels(self, means: Means) -> np.ndarray:
        """Return s_i [B, J]: a domain's score after training on it alone."""
        pairs = [(name, self.domains.index(name)) for name in self.trained]
        return np.stack([means.after[:, self.rows_of(name), k].mean(axis=1) for name, k in pairs], axis=1)

    def intervals(self, *, resamples: int = 1000, seed: int = 0) -> Bounds:
        """Return the 95 % intervals of T: items and, where there are several, seeds drawn anew."""
        rng = np.random.default_rng(seed)
        drawn = self.with_seed_noise(self.resample(resamples, rng=rng), rng=rng)
        low, high = np.quantile(self.transfer(drawn), LEVELS, axis=0)
        return Bounds(low=low, high=high)

    def transfer_interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds of T's intervals as they are published, two arrays [J, K].

        Paired by item as in `intervals.paired`, which unlike a bootstrap does not take a few items that all moved the
        same way for certainty; the noise between seeds is added in quadrature.
        """
        shape = (len(self.trained), len(self.domains))
        bounds = np.empty((2, *shape))
        for j, name in enumerate(self.trained):
            rows = self.rows_of(name)
            for i in range(len(self.domains)):
                after, before = (of[i][rows].mean(axis=0) for of in (self.after, self.before))
                low, mid, high = paired(after, before, level=level)
                between = quantile(level) * float(self.noise.sd[i]) / math.sqrt(len(rows))
                bounds[:, j, i] = mid - math.hypot(mid - low, between), mid + math.hypot(high - mid, between)
        return bounds[0], bounds[1]

    def entropy_transfer(self) -> np.ndarray:
        """Return dH[j -> i] in nats, [J, K]: entropy after training on j minus before; NaN where not measured."""
        changes = np.array(
            [
                [after.entropy.get(name, math.nan) - _entropy(before, name) for name in self.domains]
                for after, before in zip(self.rows, self.before_rows, strict=True)
            ]
        )
        return np.stack([changes[self.rows_of(name)].mean(axis=0) for name in self.trained])

    def entropies(self) -> tuple[np.ndarray, np.ndarray]:
        """Return entropy before any training and after training on the domain itself, nats, two arrays [J]."""
        base = [_entropy(self._base_rows, name) for name in self.trained]
        own = [mean([self.rows[n].entropy.get(name, math.nan) for n in self.rows_of(name)]) for name in self.trained]
        return np.array(base), np.array(own)

    def _weighted(self, weights: list[np.ndarray]) -> Means:
        def reduce(scores: list[np.ndarray]) -> np.ndarray:
            return np.stack([w @ items.T for w, items in zip(weights, scores, strict=True)], axis=-1)

        return Means(base=reduce(self.base), before=reduce(self.before), after=reduce(self.after))

    def _seed_noise(self, trainable: Sequence[str]) -> SeedNoise:
        rows = [self.rows_of(label) for label in dict.fromkeys(self.labels)]
        changes = [[after[r] - before[r] for after, before in zip(self.after, self.before, strict=True)] for r in rows]
        watched = [0 if name in trainable else 1 + k for k, name in enumerate(self.domains)]
        return SeedNoise.estimate(changes, pools=watched)


def label_of(row: Evaluation) -> str:
    """Return what a training is named by: its domain, JOINT, or what makes an arm differ from others."""
    if row.arm:
        return json.dumps(row.arm, sort_keys=True)
    return row.trained[0] if len(row.trained) == 1 else JOINT


def _trainings(
    matrix: TransferMatrix, *, with_arms: bool = False
) -> list[tuple[str, int, tuple[Evaluation, ...], Evaluation]]:
    """Return (label, seed, rows before, row after) of each training that counts as evidence."""
    start = matrix.baselines(probe=True)
    found = []
    for row in (*matrix.probes, *matrix.joint_arm, *(matrix.arms if with_arms else ())):
        own = tuple(base for base in start if base.seed == row.seed)
        found.append((label_of(row), row.seed, own or start, row))
    probed = {label for label, *_ in found}
    for run in matrix.runs():
        for stage in stages(run):
            if stage.domain not in probed:
                found.append((stage.domain, run[-1].seed, (run[stage.before],), run[stage.end]))
    return found


def _beyond_placebo(matrix: TransferMatrix) -> list[tuple[str, int, tuple[Evaluation, ...], Evaluation]]:
    """Return the trainings on one domain, their placebos as what was before; of the same seed where there is one."""
    found = []
    for label, seed, before, after in _trainings(matrix):
        of_label = tuple(row for row in matrix.placebo if row.trained == (label,))
        own = tuple(row for row in of_label if row.seed == seed)
        if label != JOINT:  # which has none
            found.append((label, seed, own or of_label or before, after))
    return found


def bootstrap_weights(size: int, shares: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """Return Dirichlet(1, .., 1) weights of the items with a share, [B, n], rows summing to 1.

    The Bayesian bootstrap (Rubin, 1981): the variance of drawing items with replacement to within 1 + 1/n, and
    several times as fast.
    """
    weights = np.where(shares > 0, rng.standard_exponential((size, len(shares))), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _graded_in_all(rows: Sequence[Evaluation], name: str) -> range | list[int]:
    items = range(len(rows[0].scores[name]))
    if not any(None in row.scores[name] for row in rows):
        return items
    return [i for i in items if all(row.scores[name][i] is not None for row in rows)]


def _entropy(rows: Sequence[Evaluation], name: str) -> float:
    return mean([row.entropy.get(name, math.nan) for row in rows])


def _equal_shares(n: int, part: Part | None) -> np.ndarray:
    chosen = np.ones(n) if part is None else part.mask(n).astype(float)
    return chosen / chosen.sum()
