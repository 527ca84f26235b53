"""What the chosen order gains, with bounds that hold whichever order had been chosen.

    g(o) = 1/J sum_i sum_{j after i} T[j -> i]  -  the same for the mean order,        over a random order
    h(o) = 1/J sum_i [ s_i + sum_{j after i} T[j -> i] - joint_i ],                    over the joint run
    q    = 95 % point of max_o g(o) under the noise of T alone (items and seeds drawn anew)

g(o) +- q holds for all orders at once with 95 % confidence, and so for the one that was chosen because its g looked best;
likewise h(o). An order turned round has -g, which is why one q serves both ends. In an earlier rule the bounds were those
of the cross-fitted value: too narrow, as its parts share their noise, and blinder, as each order is chosen on a part of
the evidence (`tests.experiments.decisions` measures both kinds of error). That value is still the point between them.
J domains to be ordered, B resamples.

`crossfitted` has no winner's curse: an order is chosen on one part of the evidence and valued on the other. The plain
gain of the best order over the mean order is positive under pure noise, because the order was chosen for it. Here every
item is valued under an order that was chosen on other items; with two seeds or more a probe, on other seeds too,
because a training's luck is the same for all items. An unbiased point, but what varies between the parts is shared
among them, so no interval is made of it. R trainings, J domains to be ordered, K in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from polyphony.curricula.intervals import UNDEFINED, Interval
from polyphony.curricula.transfer.effects import JOINT, LEVELS, Effects, Means, Part
from polyphony.curricula.transfer.orders import Chooser, over_mean_order

FOLDS = 5
"""Parts of the items. With 2, the order is chosen on half of the evidence and is often not the one to be valued."""


TIE_RESAMPLES = 200
"""Resamples that say which pairs are tied within a part; each part asks only whether 95 % bounds straddle zero."""


def crossfitted(effects: Effects, chooser: Chooser, *, rng: np.random.Generator) -> tuple[float, float]:
    """Return what the chosen order gains over the mean order and over joint training, in the mean score of J domains.

    NaN where a domain has fewer than two items; the second also where the file has no joint run.
    """
    folds = min(FOLDS, *(items.shape[1] for items in effects.after))
    if folds < 2:
        return np.nan, np.nan
    groups = seed_groups(effects)
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


def seed_groups(effects: Effects) -> list[Sequence[int] | None]:
    """Return two disjoint groups of the seeds that every training has, or one group of all if there are not two."""
    common = set(effects.seeds)
    for label in effects.labels:
        common &= {effects.seeds[n] for n in effects.rows_of(label)}
    ordered = sorted(common)
    return [ordered[::2], ordered[1::2]] if len(ordered) > 1 else [None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gains:
    """Mean over domains of the score that the chosen order gains, with 95 % intervals."""

    over_mean_order: Interval
    over_joint: Interval | None
    """None where the file has no joint run."""

    @property
    def are_shown(self) -> bool:
        """Whether each gain that was measured is above zero for sure."""
        return self.over_mean_order.is_above_zero and (self.over_joint is None or self.over_joint.is_above_zero)


def gains(
    effects: Effects,
    chooser: Chooser,
    order: np.ndarray,
    drawn: Means,
    *,
    luckiest: np.ndarray,
    rng: np.random.Generator,
) -> Gains:
    """Return what `order` [J] gains; `drawn` are B resamples of the means, with the noise of seeds, and `luckiest` [B, J]
    the best order of each under that noise alone.
    """
    has_joint = bool(effects.rows_of(JOINT))
    mid, mid_joint = crossfitted(effects, chooser, rng=rng)
    if np.isnan(mid):
        return Gains(over_mean_order=UNDEFINED, over_joint=UNDEFINED if has_joint else None)
    size, point = len(order), effects.means()
    transfer, noise = effects.square(point), effects.square(drawn) - effects.square(point)
    value = over_mean_order(transfer, order[None])[0] / size
    largest = over_mean_order(noise, luckiest) / size
    q = np.quantile(largest, 0.95)
    over_mean = around(mid, value - q, value + q)
    if not has_joint:
        return Gains(over_mean_order=over_mean, over_joint=None)
    base, moved = _mean_order_over_joint(effects, point), _mean_order_over_joint(effects, drawn)
    shift, value = moved - base, value + base[0]
    low, high = np.quantile(shift - largest, LEVELS[0]), np.quantile(shift + largest, LEVELS[1])
    return Gains(over_mean_order=over_mean, over_joint=around(mid_joint, value - high, value - low))


def _mean_order_over_joint(effects: Effects, means: Means) -> np.ndarray:
    """Return h of the mean order, [B]."""
    columns = [effects.domains.index(name) for name in effects.trained]
    joint = means.after[:, effects.rows_of(JOINT)].mean(axis=1)[:, columns].mean(axis=1)
    tables = effects.square(means)
    kept = (tables.sum(axis=(1, 2)) - np.trace(tables, axis1=1, axis2=2)) / 2 / len(columns)
    return effects.own_levels(means).mean(axis=1) + kept - joint


def around(mid: float, low: float, high: float) -> Interval:
    """Return the interval; the point comes from parts of the evidence and the ends from all of it, so it is kept inside."""
    return Interval(float(low), float(min(max(mid, low), high)), float(high))
