"""`exact`: the completion is the answer, letter for letter."""

from __future__ import annotations

from typing import Any

from polyphony.rewards.text import completion_text


class Exact:
    """1.0 where the completion, stripped of outer white space, equals the row's `answer`, else 0.0; None without one."""

    def __call__(self, prompts: list, completions: list, answer: list, **columns: Any) -> list[float | None]:
        return [
            None if a is None else float(completion_text(c).strip() == str(a).strip())
            for c, a in zip(completions, answer, strict=True)
        ]
