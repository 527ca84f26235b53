"""What an order gains, without the winner's curse: chosen on one part of the evidence, valued on the other.

The plain gain of the best order over the mean order is positive under pure noise, because the order was chosen for
it. Here every item is valued under an order that was chosen on other items; with two seeds or more a probe, on other
seeds too, because a training's luck is the same for all items. An unbiased point, but what varies between the parts is
shared among them, so no interval is made of it: `gains` has that. R trainings, J domains to be ordered, K in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from polyphony.curricula.chooser import Chooser
from polyphony.curricula.effects import JOINT, Effects, Part

FOLDS = 5
"""Parts of the items. With 2, the order is chosen on half of the evidence and is often not the one to be valued."""

TIE_RESAMPLES = 200
"""Resamples that say which pairs are tied within a part; each part asks only whether 95 % bounds straddle zero."""


def crossfitted(effects: Effects, chooser: Chooser, *, rng: np.random.Generator) -> tuple[float, float]:
    """Return what the chosen order gains over the mean order and over joint training, in the mean score of J domains.

    NaN where a domain has fewer than two items; the second also where the file has no joint arm.
    """
    folds = min(FOLDS, *(items.shape[1] for items in effects.after))
    if folds < 2:
        return np.nan, np.nan
    groups = _seed_groups(effects)
    orders = {}
    for fold, group in product(range(folds), range(len(groups))):
        part = Part(fold, folds, rest=True)
        point = effects.square(effects.means(part), groups[group])[0]
        drawn = effects.resample(TIE_RESAMPLES, rng=rng, part=part)
        drawn = effects.with_seed_noise(drawn, rng=rng)
        orders[fold, group] = chooser.choose(point, effects.square(drawn, groups[group]))
    stakes = [_Stakes.of(effects, [(orders[f, g], groups[-1 - g]) for g in range(len(groups))]) for f in range(folds)]
    over_joint = _value(effects, [s.over_joint for s in stakes]) if effects.rows_of(JOINT) else np.nan
    return _value(effects, [s.over_mean for s in stakes]), over_joint


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


def _value(effects: Effects, folds: Sequence[_Linear]) -> float:
    """Return a cross-fitted value: every item contributes under the coefficients of its own fold."""
    total = 0.0
    for k, (before, after) in enumerate(zip(effects.before, effects.after, strict=True)):
        n = after.shape[1]
        by_fold = np.stack([f.change[:, k] @ (after - before) + f.after[:, k] @ after for f in folds])
        total += float(by_fold[np.arange(n) % len(folds), np.arange(n)].mean())
    return total


def _seed_groups(effects: Effects) -> list[Sequence[int] | None]:
    """Return two disjoint groups of the seeds that every training has, or one group of all if there are not two."""
    common = set(effects.seeds)
    for label in effects.labels:
        common &= {effects.seeds[n] for n in effects.rows_of(label)}
    ordered = sorted(common)
    return [ordered[::2], ordered[1::2]] if len(ordered) > 1 else [None]
