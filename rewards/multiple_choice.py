"""`multiple_choice`: the letter the completion commits to.

A choice of four pays a quarter for guessing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from polyphony.rewards.answers import answer_region, final_answer, unlatexed
from polyphony.rewards.short_answer import normalise

_LONE = re.compile(
    r"(?:(?:I choose )?(?:[Oo]ption|[Cc]hoice)|I choose)?[\s(\[*`]{0,4}([A-Za-z])[\s)\].:*`]{0,4}"
    r"(?:is (?:the )?(?:correct|right)(?: (?:answer|option|choice))?\.?)?"
)
_LEADING = re.compile(r"[(\[*]{0,3}([A-Z])(?:([)\].:,*]{1,3})\s*|\s+(-\s+)?)(\S.*)")
_TRAILING = re.compile(r"(\S.*?)\s*\(([A-Z])\)")
_FURTHER = re.compile(r"(?:or|and|nor)\b|\W{0,3}[A-Z]\b")


class MultipleChoice:
    """1.0 where the completion commits to the row's `answer`, a letter, else 0.0.

    With the column `choices` (the texts in order) the text of a choice counts as its letter. An answer that names two
    letters, or a letter and the text of another choice, commits to none.
    """

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: Any = None,
        *,
        answer: list,
        choices: list | None = None,
        **columns: Any,
    ) -> list[float | None]:
        rows = zip(prompts, completions, answer, choices or [None] * len(answer), strict=True)
        return [float(chosen_letter(c, texts, p) == _letter(a, texts)) for p, c, a, texts in rows]


def chosen_letter(completion: Any, choices: Sequence[str] | None, prompt: Any = None) -> str | None:
    """Return the letter that a completion commits to; None where it commits to none or to several.

    Without a mark the answer stands alone on the first or the last line; a list of all choices has two such lines.
    """
    marked = final_answer(completion, prompt)
    if marked is not None:
        return _letter_of(marked, choices) or _explained_letter(marked, choices)
    lines = [line for line in answer_region(completion, prompt).split("\n") if line.strip()]
    found = {_letter_of(line, choices) for line in (*lines[:1], *lines[-1:])} - {None}
    return found.pop() if len(found) == 1 else None


def _letter_of(answer: str, choices: Sequence[str] | None) -> str | None:
    """Return the letter of an answer that is a letter, the text of a choice, or both of the same choice."""
    answer = _plain(answer)
    if lone := _LONE.fullmatch(answer):
        return lone[1].upper()
    whole = _letter_of_text(answer, choices)
    if trailing := _TRAILING.fullmatch(answer):
        return trailing[2] if _letter_of_text(trailing[1], choices) == trailing[2] else whole
    leading = _LEADING.fullmatch(answer)
    if not leading or leading[1] in (whole, _letter_of_text(leading[4], choices)):
        return leading[1] if leading else whole
    if choices is None:
        return _explained_letter(answer, choices)
    return None if leading[2] else whole  # normalised, "A) Paris" is the text Paris


def _explained_letter(answer: str, choices: Sequence[str] | None) -> str | None:
    """Return the letter of an answer like `B. It lies in France`, whose words name no other choice."""
    leading = _LEADING.fullmatch(_plain(answer))
    if not leading or not (leading[2] or leading[3]) or _FURTHER.match(leading[4]):
        return None
    return None if _letter_of_text(leading[4], choices) else leading[1]


def _plain(answer: str) -> str:
    return "".join(c for c in " ".join(unlatexed(answer).split()) if c.isprintable()).strip("` ")


def _letter(answer: Any, choices: Sequence[str] | None) -> str:
    letters = string.ascii_uppercase[: len(choices)] if choices else string.ascii_uppercase
    letter = str(answer).strip().strip("().").upper()
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"multiple_choice: answer must be one letter of {letters[0]} to {letters[-1]}, got {answer!r}")
    return letter


def _letter_of_text(text: str, choices: Sequence[str] | None) -> str | None:
    given = normalise(text)
    matches = [
        letter
        for letter, choice in zip(string.ascii_uppercase, choices or (), strict=False)
        if normalise(choice) == given
    ]
    return matches[0] if given and len(matches) == 1 else None
