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
        self.columns: dict[str, dict[tuple[Any, ...], Any]] = {}
        """Empty where no reward ever told any."""

    def add(self, domain: str, column: str, completions: Sequence[Completion], values: Sequence[Any]) -> None:
        """Take in a column. Raises ValueError where it has not one value a completion."""
        if len(values) != len(completions):
            raise ValueError(
                f"domain {domain!r}: log_extra got {len(values)} values of {column!r} for {len(completions)} completions"
            )
        told = self.columns.setdefault(column, {})
        told.update(zip(map(_identity, completions), values, strict=True))

    def flush(self, completions: Sequence[Completion]) -> dict[str, list[Any]]:
        """Return every column that there ever was, one value a completion, None where nothing was said; start anew."""
        found = {c: [told.get(_identity(s)) for s in completions] for c, told in sorted(self.columns.items())}
        self.columns = {column: {} for column in self.columns}
        return found


def _identity(completion: Completion) -> tuple[Any, ...]:
    return completion.prompt.domain, completion.prompt.id, *completion.ids
