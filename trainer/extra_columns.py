"""Columns that rewards add to TRL's table of completions by `log_extra`, kept until the table is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyphony.curricula.records import Completion


class Extra:
    """What rewards say of each completion by TRL's `log_extra`, by column, from one draw to the next.

    Example: `extra.add("math", "seen", completions, ["4", None]); extra.flush(completions) == {"seen": ["4", None]}`
    """

    def __init__(self) -> None:
        self.columns: dict[str, dict[tuple[Any, ...], list[Any]]] = {}
        """By column and completion, one value for each time that the same was sampled; empty where no reward told any."""

    def add(self, domain: str, column: str, completions: Sequence[Completion], values: Sequence[Any]) -> None:
        """Take in a column. Raises ValueError where it has not one value a completion."""
        if len(values) != len(completions):
            raise ValueError(
                f"domain {domain!r}: log_extra got {len(values)} values of {column!r} for {len(completions)} completions"
            )
        told = self.columns.setdefault(column, {})
        for completion, value in zip(completions, values, strict=True):
            told.setdefault(_identity(completion), []).append(value)

    def flush(self, completions: Sequence[Completion]) -> dict[str, list[Any]]:
        """Return every column that there ever was, one value a completion, None where nothing was said; start anew."""
        found = {c: [_next(told.get(_identity(s))) for s in completions] for c, told in sorted(self.columns.items())}
        self.columns = {column: {} for column in self.columns}
        return found


def _next(values: list[Any] | None) -> Any:
    """Take the first; leave the last, which is also said of copies that fill a group."""
    return None if values is None else values.pop(0) if len(values) > 1 else values[0]


def _identity(completion: Completion) -> tuple[Any, ...]:
    return completion.prompt.domain, completion.prompt.id, *completion.ids
