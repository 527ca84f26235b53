"""What the chosen order gains, with bounds that hold whichever order had been chosen.

    g(o) = 1/J sum_i sum_{j after i} T[j -> i]  -  the same for the mean order,        over a random order
    h(o) = 1/J sum_i [ s_i + sum_{j after i} T[j -> i] - joint_i ],                    over the joint arm
    q    = 95 % point of max_o g(o) under the noise of T alone (items and seeds drawn anew)

g(o) +- q holds for all orders at once with 95 % confidence, and so for the one that was chosen because its g looked best;
likewise h(o). An order turned round has -g, which is why one q serves both ends. In an earlier rule the bounds were those
of the cross-fitted value: too narrow, as its parts share their noise, and blinder, as each order is chosen on a part of
the evidence (`tests.experiments.decisions` measures both kinds of error). That value is still the point between them.
J domains to be ordered, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyphony.curricula.chooser import Chooser
from polyphony.curricula.crossfit import crossfitted
from polyphony.curricula.effects import JOINT, LEVELS, Effects, Means
from polyphony.curricula.intervals import UNDEFINED, Interval
from polyphony.curricula.orders import Objective, best_orders, over_mean_order


@dataclass(frozen=True, kw_only=True, slots=True)
class Gains:
    """Mean over domains of the score that the chosen order gains, with 95 % intervals."""

    over_mean_order: Interval
    over_joint: Interval | None
    """None where the file has no joint arm."""

    @property
    def are_shown(self) -> bool:
        """Whether each gain that was measured is above zero for sure."""
        return self.over_mean_order.is_above_zero and (self.over_joint is None or self.over_joint.is_above_zero)


def gains(effects: Effects, chooser: Chooser, order: np.ndarray, drawn: Means, *, rng: np.random.Generator) -> Gains:
    """Return what `order` [J] gains; `drawn` are B resamples of the means, with the noise of seeds."""
    has_joint = bool(effects.rows_of(JOINT))
    mid, mid_joint = crossfitted(effects, chooser, rng=rng)
    if np.isnan(mid):
        return Gains(over_mean_order=UNDEFINED, over_joint=UNDEFINED if has_joint else None)
    size, point = len(order), effects.means()
    transfer, noise = effects.square(point), effects.square(drawn) - effects.square(point)
    value = over_mean_order(transfer, order[None])[0] / size
    # more domains than are solved exactly are searched from `order`: the largest gain found is 1 to 2 % short then
    problems = Objective(after=noise.transpose(0, 2, 1))
    largest = over_mean_order(noise, best_orders(problems, start=order)) / size
    q = np.quantile(largest, 0.95)
    over_mean = _around(mid, value - q, value + q)
    if not has_joint:
        return Gains(over_mean_order=over_mean, over_joint=None)
    base, moved = _mean_order_over_joint(effects, point), _mean_order_over_joint(effects, drawn)
    shift, value = moved - base, value + base[0]
    low, high = np.quantile(shift - largest, LEVELS[0]), np.quantile(shift + largest, LEVELS[1])
    return Gains(over_mean_order=over_mean, over_joint=_around(mid_joint, value - high, value - low))


def _mean_order_over_joint(effects: Effects, means: Means) -> np.ndarray:
    """Return h of the mean order, [B]."""
    columns = [effects.domains.index(name) for name in effects.trained]
    joint = means.after[:, effects.rows_of(JOINT)].mean(axis=1)[:, columns].mean(axis=1)
    tables = effects.square(means)
    kept = (tables.sum(axis=(1, 2)) - np.trace(tables, axis1=1, axis2=2)) / 2 / len(columns)
    return effects.own_levels(means).mean(axis=1) + kept - joint


def _around(mid: float, low: float, high: float) -> Interval:
    """Return the interval; the point comes from parts of the evidence and the ends from all of it, so it is kept inside."""
    return Interval(float(low), float(min(max(mid, low), high)), float(high))
