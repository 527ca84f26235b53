"""`short_answer`: the final answer, normalised, is the reference or an alias of it, or shares words with it (F1).
`exact`: the completion is the answer, letter for letter.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from polyphony.rewards.answers import answer_region, completion_text, final_answer, unlatexed


class Exact:
    """1.0 where the completion, stripped of outer white space, equals the row's `answer`, else 0.0; None without one."""

    def __call__(self, prompts: list, completions: list, answer: list, **columns: Any) -> list[float | None]:
        return [
            None if a is None else float(completion_text(c).strip() == str(a).strip())
            for c, a in zip(completions, answer, strict=True)
        ]


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


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
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_DASHES)
    folded = " ".join("".join(c for c in folded if unicodedata.category(c) != "Cf").split())
    folded = _GROUPED.sub("", folded)
    kept = {place for found in _SAYS_SOMETHING.finditer(folded) for place in range(*found.span())}
    plain = " ".join("".join(c for i, c in enumerate(folded) if i in kept or not _is_punctuation(c)).split())
    return " ".join(_ARTICLES.sub(" ", plain).split()) or plain or folded


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of token precision and recall of two normalised texts (SQuAD, arXiv:1606.05250)."""
    ours, theirs = Counter(answer.split()), Counter(reference.split())
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortAnswer:
    """Score a short answer against the row's `answer`: a string, or a list of aliases of which the best counts.

    The final answer is the last `<answer>` tag, the last box or the last "answer:" line; without any of them the whole
    completion after its thoughts.
    """

    match: Literal["exact", "f1"] = "exact"
    """`exact` gives 1 or 0; `f1` gives partial credit for shared words, which also pays for guessing several."""

    def __post_init__(self) -> None:
        if self.match not in ("exact", "f1"):
            raise ValueError(f"short_answer: match is exact or f1, got {self.match!r}")

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, *, answer: list, **columns: Any
    ) -> list[float | None]:
        return [self._score(p, c, aliases(a)) for p, c, a in zip(prompts, completions, answer, strict=True)]

    def _score(self, prompt: Any, completion: Any, references: list[str]) -> float:
        found = final_answer(completion, prompt)
        given = normalise(unlatexed(answer_region(completion, prompt) if found is None else found))
        if not given:
            return 0.0
        if self.match == "exact":
            return float(any(given == normalise(reference) for reference in references))
        return max(token_f1(given, normalise(reference)) for reference in references)


def aliases(answer: Any) -> list[str]:
    """Return the accepted answers of a row. Raises ValueError where there is none."""
    accepted = [str(a) for a in (answer if isinstance(answer, list | tuple) else [answer]) if a is not None]
    if not any(reference.strip() for reference in accepted):
        raise ValueError(f"short_answer: a row's answer must be a text or a list of aliases, got {answer!r}")
    return [reference for reference in accepted if reference.strip()]
