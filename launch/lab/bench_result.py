"""What a benchmark returns: a value, the baseline measured beside it in the same run, and the target it is held to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A bound on the ratio where there is a baseline, on the value where there is none."""

    relation: Literal["<=", ">="]
    limit: float

    def is_met(self, measured: float) -> bool:
        return measured <= self.limit if self.relation == "<=" else measured >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the table.

    Example: `paired("step", "s", ours=[1.1, 1.0], baseline=[1.0, 1.0], target=Target(relation="<=", limit=1.05))`
    """

    name: str
    value: float
    unit: str
    baseline: float | None = None
    """The same quantity without us, from the same run; None where there is nothing to compare with."""
    ratio: float | None = None
    target: Target | None = None
    repetitions: int = 1
    spread: tuple[float, float] | None = None
    """Smallest and largest ratio over the repetitions, or value where there is no baseline."""
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """None where there is no target."""
        if self.target is None:
            return None
        return self.target.is_met(self.value if self.ratio is None else self.ratio)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints: the fields and `passed`, the target as in the table."""
        target = None if self.target is None else str(self.target)
        return asdict(self) | {"target": target, "passed": self.passed}


def paired(
    name: str, unit: str, *, ours: Sequence[float], baseline: Sequence[float], target: Target, note: str = ""
) -> Result:
    """Return medians over interleaved pairs; the ratio is the median of the pairs' own, so that a drift cancels."""
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    return Result(
        name=name,
        value=statistics.median(ours),
        unit=unit,
        baseline=statistics.median(baseline),
        ratio=statistics.median(ratios),
        target=target,
        repetitions=len(ratios),
        spread=(min(ratios), max(ratios)),
        note=note,
    )


def repeated(name: str, unit: str, values: Sequence[float], *, target: Target | None = None, note: str = "") -> Result:
    """Return the median of repetitions that have no baseline."""
    return Result(
        name=name,
        value=statistics.median(values),
        unit=unit,
        target=target,
        repetitions=len(values),
        spread=(min(values), max(values)) if len(values) > 1 else None,
        note=note,
    )


HEADER = ("name", "value", "baseline", "ratio", "target", "", "n", "spread", "note")


def table(results: Sequence[Result]) -> str:
    """Return the results as aligned text, one line each."""
    rows = [HEADER, *(_cells(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(result: Result) -> tuple[str, ...]:
    verdict = {True: "pass", False: "MISSED", None: ""}[result.passed]
    low_high = "" if result.spread is None else "{} to {}".format(*(_number(bound) for bound in result.spread))
    return (
        result.name,
        f"{_number(result.value)} {result.unit}",
        "" if result.baseline is None else f"{_number(result.baseline)} {result.unit}",
        "" if result.ratio is None else f"{result.ratio:.3f}",
        "" if result.target is None else str(result.target),
        verdict,
        str(result.repetitions),
        low_high,
        result.note,
    )


def _number(value: float) -> str:
    """Three decimals below ten, four significant digits above."""
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
