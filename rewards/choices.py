"""`multiple_choice`: the letter the completion commits to; and choice questions rewritten to ask for a short answer.

A choice of four pays a quarter for guessing. `short_form` asks for the text instead, among candidates that other
questions lend, as Omni-Thinker does with general QA (arXiv:2507.14783).
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from typing import Any

from rewards.answers import answer_region, final_answer, last_line
from rewards.short_answer import normalise

_LONE = re.compile(r"(?:[Oo]ption|[Cc]hoice|\\text\{)?[\s(\[*]{0,4}([A-Za-z])[\s)\].:}*]{0,4}")
_LEADING = re.compile(r"[(\[*]{0,3}([A-Z])[)\].:*]{1,3}\s+(\S.*)")


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
    """Return the letter that a completion commits to; None where it commits to none or to several."""
    answer = final_answer(completion, prompt)
    if answer is None:
        answer = last_line(answer_region(completion, prompt))
    lone = _LONE.fullmatch(answer)
    if lone:
        return lone[1].upper()
    leading = _LEADING.fullmatch(answer)
    if not leading:
        return _letter_of_text(answer, choices)
    if choices is None or _letter_of_text(leading[2], choices) == leading[1]:
        return leading[1]
    return None


def short_form(
    rows: Sequence[dict[str, Any]], rng: random.Random, *, distractors: int = 4, instruction: str = "Candidates"
) -> list[dict[str, Any]]:
    """Return the choice rows (`prompt`, `choices`, `answer` a letter) as rows for `short_answer`.

    The prompt lists the row's choices and `distractors` more, drawn from the other rows' choices, shuffled and without
    letters; the answer is the right choice's text. Raises ValueError where the other rows lend too few.
    """
    pool = list({normalise(text): text for row in rows for text in row["choices"]}.items())
    return [_short_row(row, pool, rng, distractors, instruction) for row in rows]


def _short_row(
    row: dict[str, Any], pool: list[tuple[str, str]], rng: random.Random, distractors: int, instruction: str
) -> dict[str, Any]:
    texts = list(row["choices"])
    gold = texts[string.ascii_uppercase.index(_letter(row["answer"], texts))]
    taken = {normalise(text) for text in texts}
    # at most len(taken) of the sample are the row's own, so enough strangers remain wherever the pool has them
    sample = rng.sample(pool, min(len(pool), distractors + len(taken)))
    lent = [text for key, text in sample if key not in taken][:distractors]
    if len(lent) < distractors:
        raise ValueError(f"short_form: {distractors} distractors asked, the other rows lend {len(lent)}")
    candidates = texts + lent
    rng.shuffle(candidates)
    kept = {key: value for key, value in row.items() if key != "choices"}
    return kept | {"prompt": f"{row['prompt']}\n{instruction}: {'; '.join(candidates)}", "answer": gold}


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
