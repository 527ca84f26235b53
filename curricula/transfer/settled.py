"""Whether probing more domains would still change the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from polyphony.curricula.transfer.budget import SETTLED, completed, probed, table
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.orders import Objective
from polyphony.curricula.transfer.planner import Plan, PlanSettings, make_plan

QUICK = PlanSettings(resamples=200)
SAME = 0.01
"""Mean score that orders may differ by, under what is known last, and be the same plan."""


def is_settled(matrix: TransferMatrix) -> bool:
    """Whether the last `SETTLED` plans are alike, each of one domain more, the first of two.

    Whether an order is promising is told of the domains probed alone: predicted rows share the luck of those that they are
    made of, which no bound knows. The order is of all domains, those not probed by what is predicted; two plans that promise
    nothing are alike whatever the order, for nobody would follow it.
    """
    names = probed(matrix)
    if len(names) < SETTLED + 1:
        return False
    parts = [_part(matrix, names[:n]) for n in range(len(names) - SETTLED + 1, len(names) + 1)]
    promises = {_of_measured(part).is_promising for part in parts}
    if promises != {True}:
        return len(promises) == 1
    orders = [make_plan(completed(part), QUICK).order for part in parts]
    places = np.array([[matrix.trainable.index(name) for name in order] for order in orders])
    transfer = table(completed(parts[-1]).on("steer"))
    values = Objective(after=np.repeat(transfer.T[None], SETTLED, axis=0)).value(places) / len(transfer)
    return float(np.ptp(values)) < SAME


def _part(matrix: TransferMatrix, names: tuple[str, ...]) -> TransferMatrix:
    rows = (row for row in matrix.probes if row.trained[0] in names)
    return replace(matrix, rows=(*matrix.baselines(probe=True), *rows))


def _of_measured(part: TransferMatrix) -> Plan:
    watched = tuple(name for name in part.domains if name not in probed(part))
    return make_plan(replace(part, watch_only=watched), QUICK)
