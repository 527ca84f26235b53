"""What a run did to each domain: backward and forward transfer, forgetting, drawdown, with paired intervals.

A run is its baseline, then its evaluations in order of step, as `TransferMatrix.runs` yields it. A stage is a stretch
of evaluations that trained one and the same domain. NaN where a quantity is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from polyphony.curricula.intervals import UNDEFINED, Interval, average, on_both, paired
from polyphony.curricula.records import Evaluation, mean
from polyphony.curricula.transfer.matrix import TransferMatrix


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of a run on one domain: positions, in the run, of the last row before it and of its own last row."""

    domain: str
    before: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The end of a run in four numbers (R[s, k]: score of domain k after stage s; S stages; row 0 the baseline)."""

    average: float
    """Mean over trainable domains of the last score (ACC of GEM, arXiv:1706.08840)."""
    bwt: float
    """Mean of R[S, k] - R[k, k] over the domains whose stage ended before the last one (GEM)."""
    fwt: float
    """Mean of R[k-1, k] - R[0, k] over the domains of the second and later stages (GEM)."""
    forgetting: Mapping[str, float]
    """Best minus last over the stage ends, for domains trained before the last stage (arXiv:1801.10112)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One point of the online curves: what had happened to each domain by one evaluation."""

    step: int
    bwt: Mapping[str, Interval]
    """Now minus the end of the domain's last finished stage; for a watch-only domain, now minus its baseline."""
    fwt: Mapping[str, Interval]
    """Before the domain was first practised minus baseline; `now` stands for it until then."""
    drawdown: Mapping[str, Interval]
    """Now minus the cross-fitted best evaluation so far: below 0 means that something was lost."""

    @property
    def mean_bwt(self) -> float:
        """Mean over the domains where it is defined."""
        return mean([b.mid for b in self.bwt.values() if not math.isnan(b.mid)])

    @property
    def worst_drawdown(self) -> float:
        """The largest loss as a positive number: minus the lowest drawdown; NaN if none is defined."""
        values = [d.mid for d in self.drawdown.values() if not math.isnan(d.mid)]
        return -min(values) if values else math.nan


def stages(run: Sequence[Evaluation]) -> list[Stage]:
    """Return the single-domain stages of a run in order; evaluations under mixtures and in recoveries belong to none."""
    found, position = [], 1
    for trained, rows in groupby(run[1:], key=lambda row: () if row.recovery else row.trained):
        length = len(list(rows))
        if len(trained) == 1:
            found.append(Stage(domain=trained[0], before=position - 1, end=position + length - 1))
        position += length
    return found


def measure(matrix: TransferMatrix) -> Measured | None:
    """Return what the stages in the file say, averaged over seeds; None where the file holds no stage of a run."""
    measured = [_measure_run(run, matrix.trainable) for run in matrix.runs() if stages(run)]
    if not measured:
        return None
    return Measured(
        average=mean([m.average for m in measured]),
        bwt=mean([m.bwt for m in measured]),
        fwt=mean([m.fwt for m in measured]),
        forgetting={name: mean([m.forgetting[name] for m in measured]) for name in matrix.trainable},
    )


def curves(run: Sequence[Evaluation], *, watch_only: Sequence[str] = (), level: float = 0.95) -> list[Moment]:
    """Return the online curves: one moment for each evaluation after the baseline, each from its own past alone."""
    return [moment(run[: n + 1], watch_only=watch_only, level=level) for n in range(1, len(run))]


def moment(run: Sequence[Evaluation], *, watch_only: Sequence[str] = (), level: float = 0.95) -> Moment:
    """Return what had happened to each domain by the last evaluation of `run`."""
    names = tuple(run[0].scores)
    past = stages(run)
    return Moment(
        step=run[-1].step,
        bwt={
            name: _since(0 if name in watch_only else _own_end(past, name, len(run) - 1), run, name, level)
            for name in names
        },
        fwt={name: UNDEFINED if name in watch_only else _forward(run, past, name, level) for name in names},
        drawdown={name: drawdown([row.scores[name] for row in run], level=level) for name in names},
    )


def drawdown(history: Sequence[Sequence[float | None]], *, level: float = 0.95) -> Interval:
    """Return the last row of `history` [evaluations, items] minus the cross-fitted best; UNDEFINED below two items.

    The best evaluation is chosen on every other item and valued on the rest, both ways, and the two are averaged:
    a plain best-so-far minus now grows with the number of evaluations under noise alone. The last row may be the best.
    """
    if len(history[0]) < 2:
        return UNDEFINED
    folds = [[row[start::2] for row in history] for start in (0, 1)]
    return average(_loss(folds[0], folds[1], level), _loss(folds[1], folds[0], level))


def _loss(choose: Sequence[Sequence[float | None]], value: Sequence[Sequence[float | None]], level: float) -> Interval:
    if any(None in row for row in choose):  # each is compared with the last on the items graded at both
        pairs = [on_both(row, choose[-1]) for row in choose]
        heights = [mean(then) - mean(now) if now else -math.inf for then, now in pairs]
    else:
        heights = [mean(row) for row in choose]  # type: ignore[arg-type]
    best = max(range(len(choose)), key=lambda n: (heights[n], n))
    return paired(value[-1], value[best], level=level)


def _own_end(past: Sequence[Stage], name: str, last: int) -> int | None:
    """Return where a domain's own last stage ended; None without one, and while it is the last thing that happened."""
    ends = [stage.end for stage in past if stage.domain == name]
    return ends[-1] if ends and ends[-1] < last else None


def _since(anchor: int | None, run: Sequence[Evaluation], name: str, level: float) -> Interval:
    if anchor is None:
        return UNDEFINED
    return paired(run[-1].scores[name], run[anchor].scores[name], level=level)


def _forward(run: Sequence[Evaluation], past: Sequence[Stage], name: str, level: float) -> Interval:
    if not past or past[0].domain == name:
        return UNDEFINED
    own = [stage for stage in past if stage.domain == name]
    until = own[0].before if own else len(run) - 1
    # practised under a mixture or by replay before: what that gave is no transfer
    until = max(n for n in range(until + 1) if run[n].exposure.get(name, 0) == run[0].exposure.get(name, 0))
    return paired(run[until].scores[name], run[0].scores[name], level=level) if until else UNDEFINED


def _measure_run(run: Sequence[Evaluation], names: Sequence[str]) -> Measured:
    past, last = stages(run), len(run) - 1
    ends = {stage.domain: stage.end for stage in past}  # a domain's last stage
    earlier = [name for name, end in ends.items() if end < last]
    forward = [_forward(run, past, name, 0.95).mid for name in ends]
    return Measured(
        average=mean([run[last].mean_score(name) for name in names]),
        bwt=mean([_change(run[last], run[ends[name]], name) for name in earlier]),
        fwt=mean([value for value in forward if not math.isnan(value)]),
        forgetting={name: _forgetting(run, past, name) if name in earlier else math.nan for name in names},
    )


def _forgetting(run: Sequence[Evaluation], past: Sequence[Stage], name: str) -> float:
    return max(-_change(run[-1], run[stage.end], name) for stage in past if stage.end < len(run) - 1)


def _change(now: Evaluation, before: Evaluation, name: str) -> float:
    scores = on_both(now.scores[name], before.scores[name])
    return mean(scores[0]) - mean(scores[1])
