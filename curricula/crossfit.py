"""What an order gains, without the winner's curse: chosen on one part of the evidence, valued on the other.

The plain gain of the best order over the mean order is positive under pure noise, because the order was chosen for
it. Here every item is valued under an order that was chosen on other items; with two seeds or more a probe, on other
seeds too, because a training's luck is the same for all items. B resamples, R trainings, J domains to be ordered, K
domains in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from curricula.chooser import Chooser
from curricula.effects import JOINT, LEVELS, Effects, Means, Part, bootstrap_weights
from curricula.intervals import UNDEFINED, Interval

FOLDS = 5
"""Parts of the items. With 2, the order is chosen on half of the evidence and is often not the one to be valued: where
the true gain is four standard errors, 73 % of 100 matrices were called a sequence, with 5 parts 82 %."""

TIE_RESAMPLES = 200
"""Resamples that say which pairs are tied within a part; each part asks only whether 95 % bounds straddle zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gains:
    """Mean over domains of the score that the chosen order gains."""

    over_mean_order: Interval
    over_joint: Interval | None
    """None where the file has no joint arm."""


def gains(effects: Effects, chooser: Chooser, *, resamples: int, rng: np.random.Generator) -> Gains:
    """Return the cross-fitted gains with 95 % intervals over items and seeds."""
    folds = min(FOLDS, *(items.shape[1] for items in effects.after))
    if folds < 2:
        return Gains(over_mean_order=UNDEFINED, over_joint=UNDEFINED if effects.rows_of(JOINT) else None)
    groups = _seed_groups(effects)
    orders = {}
    for fold, group in product(range(folds), range(len(groups))):
        part = Part(fold, folds, rest=True)
        point = square(effects, effects.means(part), groups[group])[0]
        drawn = effects.resample(TIE_RESAMPLES, rng=rng, part=part)
        drawn = effects.with_seed_noise(drawn, rng=rng)
        orders[fold, group] = chooser.choose(point, square(effects, drawn, groups[group]))
    stakes = [_Stakes.of(effects, [(orders[f, g], groups[-1 - g]) for g in range(len(groups))]) for f in range(folds)]
    over_mean = _interval(effects, [s.over_mean for s in stakes], resamples, rng)
    if not effects.rows_of(JOINT):
        return Gains(over_mean_order=over_mean, over_joint=None)
    return Gains(
        over_mean_order=over_mean, over_joint=_interval(effects, [s.over_joint for s in stakes], resamples, rng)
    )


def square(effects: Effects, means: Means, seeds: Sequence[int] | None = None) -> np.ndarray:
    """Return T [B, J, J] among the domains to be ordered."""
    columns = [effects.domains.index(name) for name in effects.trained]
    return effects.transfer(means, seeds=seeds)[:, :, columns]


def own_levels(effects: Effects, means: Means, seeds: Sequence[int] | None = None) -> np.ndarray:
    """Return s_i [B, J]: a domain's score after training on it alone."""
    columns = [effects.domains.index(name) for name in effects.trained]
    pairs = zip(effects.trained, columns, strict=True)
    return np.stack([means.after[:, effects.rows_of(name, seeds), k].mean(axis=1) for name, k in pairs], axis=1)


class _Linear(NamedTuple):
    """A value that is linear in mean scores: coefficients of the change and of the score after it, [R, K] each."""

    change: np.ndarray
    after: np.ndarray


class _Stakes(NamedTuple):
    over_mean: _Linear
    over_joint: _Linear

    @classmethod
    def of(cls, effects: Effects, orders: Sequence[tuple[np.ndarray, Sequence[int] | None]]) -> _Stakes:
        """Return what some orders, each valued on some seeds, gain on average: over the mean order, over joint."""
        shape = (len(effects.rows), len(effects.domains))
        kept, mean_order, levels, joint = (np.zeros(shape) for _ in range(4))
        columns = [effects.domains.index(name) for name in effects.trained]
        size = len(columns)
        for order, seeds in orders:
            rank = np.argsort(order)
            for j, name in enumerate(effects.trained):
                rows = effects.rows_of(name, seeds)
                share = 1 / len(rows) / size / len(orders)
                for i, column in enumerate(columns):
                    if i == j:
                        levels[rows, column] += share
                    else:
                        kept[rows, column] += share * (rank[j] > rank[i])
                        mean_order[rows, column] += share / 2
            rows = effects.rows_of(JOINT, seeds)
            for column in columns if rows else ():
                joint[rows, column] += 1 / len(rows) / size / len(orders)
        nothing = np.zeros(shape)
        return cls(_Linear(kept - mean_order, nothing), _Linear(kept, levels - joint))


def _interval(effects: Effects, folds: Sequence[_Linear], resamples: int, rng: np.random.Generator) -> Interval:
    """Return a cross-fitted value: every item contributes under the coefficients of its own fold."""
    mid, drawn = 0.0, np.zeros(resamples)
    for k, (before, after) in enumerate(zip(effects.before, effects.after, strict=True)):
        n = after.shape[1]
        own = np.arange(n) % len(folds)
        by_fold = np.stack([f.change[:, k] @ (after - before) + f.after[:, k] @ after for f in folds])
        worth = by_fold[own, np.arange(n)]
        mid += worth.mean()
        drawn += bootstrap_weights(resamples, np.full(n, 1 / n), rng=rng) @ worth
    pull = np.mean([f.change + f.after for f in folds], axis=0)
    drawn += (effects.noise.draws((resamples, *pull.shape), rng=rng) * pull).sum(axis=(1, 2))
    low, high = np.quantile(drawn, LEVELS)
    return Interval(float(low), float(mid), float(high))


def _seed_groups(effects: Effects) -> list[Sequence[int] | None]:
    """Return two disjoint groups of the seeds that every training has, or one group of all if there are not two."""
    common = set(effects.seeds)
    for label in effects.labels:
        common &= {effects.seeds[n] for n in effects.rows_of(label)}
    ordered = sorted(common)
    return [ordered[::2], ordered[1::2]] if len(ordered) > 1 else [None]
