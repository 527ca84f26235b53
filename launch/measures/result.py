"""What is measured, as a line of a table: a value, the baseline measured by turns with it, and the target it is held to.

Everything that takes time is measured twice at once: by the clock, which targets are for, and by processor time, which
others on a busy machine disturb less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import psutil

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A bound on the ratio where there is a baseline, on the value where there is none."""

    relation: Literal["<=", ">="]
    limit: float

    def is_met(self, measured: float) -> bool:
        return measured <= self.limit if self.relation == "<=" else measured >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Timing:
    """A quantity measured once, by both clocks.

    Example: `timed(work).rate(512)` is 512 items over the seconds that `work` took.
    """

    clock: float
    cpu: float

    def rate(self, items: float) -> Timing:
        """Return items a second; infinitely many where processor time is too coarse to show them."""
        return Timing(items / self.clock, items / self.cpu if self.cpu else float("inf"))

    def scaled(self, factor: float) -> Timing:
        """Return the quantity in another unit, or for each of many items."""
        return Timing(self.clock * factor, self.cpu * factor)


def timed(work: Callable[[], object], cpu_s: Callable[[], float] = time.process_time) -> Timing:
    """Return the seconds that work takes; `cpu_s` tells the processor's, without more said those of this process."""
    began, cpu_began = time.perf_counter(), cpu_s()
    work()
    return Timing(time.perf_counter() - began, cpu_s() - cpu_began)


def tree_cpu_s() -> float:
    """Return the processor's seconds of this process, all below it, and those of them that have ended."""
    seconds, processes = 0.0, [psutil.Process(), *psutil.Process().children(recursive=True)]
    for process in reversed(processes):  # a parent after its children: it tells of those that have ended meanwhile
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:4])
    return seconds


def in_turns(ours: Callable[[], T], baseline: Callable[[], T], *, pairs: int) -> list[tuple[T, T]]:
    """Return what both gave, pair by pair: neither always comes second, and a pair before these warms up, ours first."""
    seen = []
    for i in range(pairs + 1):
        if i % 2 == 0:
            first = ours()
            seen.append((first, baseline()))
        else:
            first = baseline()
            seen.append((ours(), first))
    return seen[1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the table.

    Example: `repeated("report", "s", [timed(work)], target=Target(relation="<=", limit=10))`
    """

    name: str
    value: float
    unit: str
    cpu: float | None = None
    """The value by processor time; None for what is no matter of time."""
    baseline: float | None = None
    """The same quantity without us, from the same run; None where there is nothing to compare with."""
    ratio: float | None = None
    cpu_ratio: float | None = None
    target: Target | None = None
    repetitions: int = 1
    spread: tuple[float, float] | None = None
    """Smallest and largest ratio over the repetitions, or value where there is no baseline."""
    note: str = ""
    error: str = ""
    """Why there is no value, in one line; empty for what was measured."""
    untried: str = ""
    """Why it was not even tried, in one line."""

    @property
    def passed(self) -> bool | None:
        """None where there is no target."""
        if self.target is None:
            return None
        return self.target.is_met(self.value if self.ratio is None else self.ratio)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints: the fields and `passed`, the target as in the table, None for no value."""
        changed = {"target": None if self.target is None else str(self.target), "passed": self.passed}
        return asdict(self) | changed | ({"value": None} if self.error or self.untried else {})


def paired(
    name: str, unit: str, pairs: Sequence[tuple[Timing, Timing]], *, target: Target | None = None, note: str = ""
) -> Result:
    """Return medians over pairs of ours and the baseline, measured by turns.

    A ratio is the median of the pairs' own, so that a drift of the machine cancels.
    """
    ratios = [ours.clock / baseline.clock for ours, baseline in pairs]
    return Result(
        name=name,
        value=statistics.median(ours.clock for ours, _ in pairs),
        unit=unit,
        cpu=statistics.median(ours.cpu for ours, _ in pairs),
        baseline=statistics.median(baseline.clock for _, baseline in pairs),
        ratio=statistics.median(ratios),
        cpu_ratio=statistics.median(ours.cpu / baseline.cpu for ours, baseline in pairs),
        target=target,
        repetitions=len(ratios),
        spread=(min(ratios), max(ratios)),
        note=note,
    )


def repeated(
    name: str, unit: str, values: Sequence[float | Timing], *, target: Target | None = None, note: str = ""
) -> Result:
    """Return the median of repetitions that have no baseline; plain numbers are no matter of time."""
    plain = [value.clock if isinstance(value, Timing) else value for value in values]
    cpu = [value.cpu for value in values if isinstance(value, Timing)]
    return Result(
        name=name,
        value=statistics.median(plain),
        unit=unit,
        cpu=statistics.median(cpu) if cpu else None,
        target=target,
        repetitions=len(plain),
        spread=(min(plain), max(plain)) if len(plain) > 1 else None,
        note=note,
    )


def failed(name: str, error: BaseException) -> Result:
    """Return the line of a benchmark that gave no result."""
    return Result(name=name, value=float("nan"), unit="", error=" ".join(f"{type(error).__name__}: {error}".split()))


def untried(name: str, why: str) -> Result:
    """Return the line of what could not be measured here."""
    return Result(name=name, value=float("nan"), unit="", untried=why)


def read_result(fields: Mapping[str, Any]) -> Result:
    """Return a Result that came from another process, as `asdict` had it."""
    target, spread = fields["target"], fields["spread"]
    own = {"target": target and Target(**target), "spread": spread and tuple(spread)}
    return Result(**{**fields, **own})


HEADER = ("name", "value", "cpu", "baseline", "ratio", "cpu ratio", "target", "", "n", "spread", "note")


def table(results: Sequence[Result]) -> str:
    """Return the results as aligned text, one line each."""
    rows = [HEADER, *(_cells(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(result: Result) -> tuple[str, ...]:
    if result.error or result.untried:
        return (result.name, *[""] * 6, "FAILED" if result.error else "not run", "", "", result.error or result.untried)
    verdict = {True: "pass", False: "MISSED", None: ""}[result.passed]
    low_high = "" if result.spread is None else "{} to {}".format(*(_number(bound) for bound in result.spread))
    return (
        result.name,
        f"{_number(result.value)} {result.unit}",
        "" if result.cpu is None else _number(result.cpu),
        "" if result.baseline is None else f"{_number(result.baseline)} {result.unit}",
        *("" if ratio is None else f"{ratio:.3f}" for ratio in (result.ratio, result.cpu_ratio)),
        "" if result.target is None else str(result.target),
        verdict,
        str(result.repetitions),
        low_high,
        result.note,
    )


def _number(value: float) -> str:
    """Three decimals below ten, four significant digits above."""
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
