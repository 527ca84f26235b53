"""`short_answer`: the final answer, normalised, is the reference or an alias of it, or shares words with it (F1).
`exact`: the completion is the answer, letter for letter.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from polyphony.rewards.answers import accepted_answers, answer_region, bare, completion_text, final_answer, unlatexed


class Exact:
    """1.0 where the completion, stripped of outer white space, equals one of the row's accepted answers, else 0.0.

    None where the reference can not be read (`polyphony.rewards.answers`).
    """

    version: ClassVar[int] = 2

    def __call__(self, prompts: list, completions: list, answer: list, **columns: Any) -> list[float | None]:
        return [
            float(self.reads(c) in accepted) if (accepted := _letter_for_letter(a)) else None
            for c, a in zip(completions, answer, strict=True)
        ]

    def unreadable(self, answer: Any = None, **columns: Any) -> str | None:
        """Return why a row's reference has no shape that is read; None where it has."""
        return None if _letter_for_letter(answer) else f"{answer!r:.60} is no text and no list of such"

    def reads(self, completion: Any, prompt: Any = None, /, **columns: Any) -> str:
        """Return what a completion is taken to answer."""
        return completion_text(completion).strip()


def _letter_for_letter(answer: Any) -> list[str]:
    """Return the accepted answers; a text is one, even where it is JSON."""
    return [answer.strip()] if isinstance(answer, str) and answer.strip() else accepted_answers(answer)


_ARTICLES = re.compile(r"\b(?:a|an|the)\b(?=\s+\S)")  # what ends in one is a name: Vitamin A


_WHOLE_ARTICLES = re.compile(r"(?<!\S)(?:a|an|the)(?=\s+\S)")


_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))


_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


_SAYS_SOMETHING = re.compile(  # 3.14 is not 314, -5 not 5, 1/2 not 12, C++ not C
    r"(?<=\d)[.,:/^-](?=\d)|(?<![\w)])[-+]?\.?(?=\d)|(?<=[a-z])[+#]+(?![a-z\d])|(?<=\w)[=<>+*](?=\w)"
)


def normalise(text: str) -> str:
    """Return the text in lower case without punctuation, articles, invisible characters and extra white space.

    The normalisation of SQuAD (arXiv:1606.05250) after Unicode's NFKC, but for signs that make another number or name;
    letters that only look alike stay different. What would vanish altogether ("A", "+") keeps what the last harmless
    step left of it.
    """
    folded = _folded(text)
    plain = _without_punctuation(folded, "")
    return " ".join(_ARTICLES.sub(" ", plain).split()) or plain or folded


def spaced(text: str) -> str:
    """Return the text normalised as TriviaQA does (arXiv:1705.03551): what punctuation joins are words of their own."""
    folded = _folded(text)
    return _without_punctuation(_WHOLE_ARTICLES.sub(" ", folded), " ") or folded


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_DASHES)
    folded = " ".join("".join(c for c in folded if unicodedata.category(c) != "Cf").split())
    return _GROUPED.sub("", folded)


def _without_punctuation(folded: str, replacement: str) -> str:
    kept = {place for found in _SAYS_SOMETHING.finditer(folded) for place in range(*found.span())}
    letters = (c if i in kept or not _is_punctuation(c) else replacement for i, c in enumerate(folded))
    return " ".join("".join(letters).split())


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of token precision and recall of two normalised texts (SQuAD, arXiv:1606.05250)."""
    ours, theirs = Counter(answer.split()), Counter(reference.split())
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortAnswer:
    """Score a short answer against the row's `answer`: a text, or aliases of which the best counts.

    The final answer is the last `<answer>` tag, the last box or the last "answer:" line; without any of them the whole
    completion after its thoughts. None where the reference can not be read (`polyphony.rewards.answers`).
    """

    version: ClassVar[int] = 2

    match: Literal["exact", "f1"] = "exact"
    """`exact` gives 1 or 0; `f1` gives partial credit for shared words, which also pays for guessing several."""

    def __post_init__(self) -> None:
        if self.match not in ("exact", "f1"):
            raise ValueError(f"short_answer: match is exact or f1, got {self.match!r}")

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, *, answer: list, **columns: Any
    ) -> list[float | None]:
        return [self._score(p, c, accepted_answers(a)) for p, c, a in zip(prompts, completions, answer, strict=True)]

    def unreadable(self, answer: Any = None, **columns: Any) -> str | None:
        """Return why a row's reference has no shape that is read; None where it has."""
        return None if accepted_answers(answer) else f"{answer!r:.60} is no text and no list of such"

    def reads(self, completion: Any, prompt: Any = None, /, **columns: Any) -> str | None:
        """Return the normalised answer; None where nothing is left of it."""
        return normalise(self._given(completion, prompt)) or None

    def _given(self, completion: Any, prompt: Any) -> str:
        found = final_answer(completion, prompt)
        return unlatexed(answer_region(completion, prompt) if found is None else found)

    def _score(self, prompt: Any, completion: Any, references: list[str]) -> float | None:
        if not references:
            return None
        given = self._given(completion, prompt)
        ours = {normalise(given), spaced(given)} - {""}
        theirs = {read(unlatexed(bare(reference))) for reference in references for read in (normalise, spaced)}
        if self.match == "exact":
            return float(not ours.isdisjoint(theirs))
        return max((token_f1(a, b) for a in ours for b in theirs), default=0.0)
