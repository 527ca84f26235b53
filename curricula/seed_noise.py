"""How much a training's effects differ between seeds, beyond what a finite set of items explains.

Entry by entry of T there are S - 1 degrees of freedom, 1 with two seeds, so entries are pooled: those of all trained
domains together, those of a watched domain by itself. A watched domain is never practised and may swing by half its
score between seeds; pooled with the others it would hide every effect among them. S seeds, K domains, R trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
        items = np.sum([[_item_variance(each) for each in training] for training in repeated], axis=0) / freedom
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


def _item_variance(each: np.ndarray) -> float:
    """Return the part of the seeds' sum of squares that item noise alone would give: (S - 1) times the interaction's
    mean square over the number of items.
    """
    n = each.shape[1]
    if n < 2:
        return np.nan
    rest = each - each.mean(axis=1, keepdims=True) - each.mean(axis=0, keepdims=True) + each.mean()
    return float((rest**2).sum() / (n - 1) / n)
