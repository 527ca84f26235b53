"""`math`: the final answer equals the reference, symbolically (math-verify), within a limit that really ends."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from polyphony.rewards.answers import Source, final_answer
from polyphony.rewards.short_answer import normalise
from polyphony.rewards.workers import JobError, shared_workers

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"([-+]?)(?:((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(?:/(\d+))?|\\[dt]?frac\{(\d+)\}\{(\d+)\})")
_TUPLE = re.compile(r"([(\[])([^()\[\]{}]+)([)\]])")
_UNIT = re.compile(r"(?:(?: ?\\text\{[^{}\d]*\}| (?:[ckm]?m|in|ft))(?:\^\{?[23]\}?)?| ?°[CF]?|(?: [A-Za-z]{3,})+)?")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_CHANGES_THE_NUMBER = re.compile(
    r"(?<!\\)\b(?:dozen|hundred|thousand|[mbtr]+illion|squared|cubed|minus|plus|times|over|factorial|sin|cos|tan|log|exp)\b",
    re.IGNORECASE,
)
_BASE = re.compile(r"\d_\{?(\d+)\}?$")
_UNICODE = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u00b2": "^2", "\u00b3": "^3", "\u221e": r"\infty ", "\u00d7": r"\times "}
)
_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # what only sets it, but for the `\\` that ends a row
        (r"(?<!\\)\\(?:[!,;: ()\[\]]|(?:left|right)(?![A-Za-z]))|\\?\$|(?<=\d)\{,\}(?=\d)", ""),
        (r"\u221a ?(\w+|\([^()]*\))", r"\\sqrt{\1}"),
        (r"\*\*", "^"),
        (r"(?<=\d)[eE]\+?(-?\d+)\b", r" \\times 10^{\1}"),
        (r"(?<=\d) (\d+)/(\d+)", r"\\frac{\1}{\2}"),  # a mixed number
        (r" ?(?:\\text\{ ?percent\}|\bpercent\b)", r"\\%"),
        (r"\s*,?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*", ", "),
        (r"\\varnothing\b", r"\\emptyset"),
    )
]
_WORDS = re.compile(r"\\text\{([A-Za-z ,.'-]+)\}|([A-Za-z'-]{4,}|[A-Za-z'-]+(?: [A-Za-z'-]+)+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Math:
    """1.0 where the completion's final answer equals the row's `answer`, else 0.0.

    None where the comparison met its limit or math-verify can not read the reference: the grader does not know.
    """

    sources: Sequence[Source] = ("tag", "boxed", "marker", "number")
    """Where the answer may stand, first match first; leave out `number` to ask for a marked answer."""
    timeout_s: float = 3.0
    """A comparison that simplifies at all does so in well under a second."""
    workers: int | None = None
    """Processes; None takes one a core, at most 16."""
    max_answer_chars: int = 1000
    """A longer final answer is none: it scores 0 without being read."""

    def __post_init__(self) -> None:
        unknown = set(self.sources) - {"tag", "boxed", "marker", "number"}
        if unknown or not self.sources:
            raise ValueError(f"math: sources are of tag, boxed, marker, number; got {self.sources!r}")
        if not self.timeout_s > 0:
            raise ValueError(f"math: timeout_s must be > 0, got {self.timeout_s}")

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, *, answer: list, **columns: Any
    ) -> list[float | None]:
        pairs = [
            (final_answer(completion, prompt, self.sources), _reference(reference))
            for prompt, completion, reference in zip(prompts, completions, answer, strict=True)
        ]
        quick = [self._at_sight(given, reference) for given, reference in pairs]
        open_pairs = list(dict.fromkeys(pair for pair, verdict in zip(pairs, quick, strict=True) if verdict is None))
        verdicts = dict(zip(open_pairs, self._compare(open_pairs), strict=True))
        scores = [verdicts[p] if verdict is None else verdict for p, verdict in zip(pairs, quick, strict=True)]
        return [None if score is None else float(score) for score in scores]

    def is_valid(self, text: str) -> bool:
        """Say whether a text commits to an answer."""
        return bool(final_answer(text, sources=self.sources))

    def _at_sight(self, given: str | None, reference: str) -> bool | None:
        """Return the verdict where nothing must be parsed; None where it must."""
        if not given or len(given) > self.max_answer_chars or _contradicts_itself(given):
            return False
        return equal_at_sight(given, reference)

    def _compare(self, pairs: list[tuple[str | None, str]]) -> list[bool | None]:
        workers = shared_workers(
            "polyphony.rewards.math_worker:equivalent", size=self.workers, timeout_s=self.timeout_s
        )
        jobs = [{"answer": undressed(given or ""), "reference": undressed(reference)} for given, reference in pairs]
        answers = workers.map(jobs)
        for (given, reference), verdict in zip(pairs, answers, strict=True):
            if verdict is None or isinstance(verdict, JobError):
                why = verdict or "the reference can not be read"
                logger.warning("math: no verdict on %.80r against %.80r: %s", given, reference, why)
        return [None if isinstance(verdict, JobError) else verdict for verdict in answers]


def equal_at_sight(given: str, reference: str) -> bool | None:
    """Compare numbers and words without algebra; None where one side is neither."""
    ours, theirs = undressed(given), undressed(reference)
    if ours == theirs:
        return True
    if _CHANGES_THE_NUMBER.findall(ours) != _CHANGES_THE_NUMBER.findall(theirs):
        return False  # math-verify drops words: 4 million would equal 4
    bases = [found[1] for side in (ours, theirs) if (found := _BASE.search(side))]
    if len(set(bases)) > 1:
        return False  # it drops the base of 1010_2 too
    number, expected = _numbers(ours), _numbers(theirs)
    if number and expected and (number == expected or "." not in ours + theirs):
        return number == expected
    words = _WORDS.fullmatch(theirs)
    # as algebra a word is the product of its letters, and equals its anagrams
    return normalise(_TEXT.sub(r"\1", ours)) == normalise(words[1] or words[2]) if words else None


def undressed(text: str) -> str:
    """Return the expression in the one spelling that math-verify reads, without spacing commands, `$` and `\\left`."""
    text = text.translate(_UNICODE)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text.strip()


def plain_number(text: str) -> Fraction | None:
    """Return the number or fraction that a text is, with or without a unit in words; None where it is anything else."""
    found = _NUMBER.match(text)
    if not found or not _UNIT.fullmatch(text, found.end()):
        return None
    sign, decimal, divisor, above, below = found.groups()
    if not int(divisor or below or 1):
        return None
    size = Fraction((decimal or above).replace(",", "")) / int(divisor or below or 1)
    return -size if sign == "-" else size


def _numbers(text: str) -> tuple[Any, ...]:
    """Return a number, or the brackets and numbers of a tuple; empty where the text is neither."""
    whole = _TUPLE.fullmatch(text)
    parts = [plain_number(part.strip()) for part in (whole[2].split(",") if whole else [text])]
    if None in parts:
        return ()
    return (whole[1], *parts, whole[3]) if whole and len(parts) > 1 else tuple(parts)


def _contradicts_itself(given: str) -> bool:
    """Say whether an equation claims that two different numbers are equal: `3 = 4` must not pass for either."""
    numbers = {plain_number(undressed(part)) for part in given.split("=")} - {None}
    return len(numbers) > 1


def _reference(answer: Any) -> str:
    """Return a row's reference as an expression. Raises ValueError where there is none."""
    text = "" if answer is None else str(answer).strip()
    if not text:
        raise ValueError(f"math: a row's answer must be an expression, got {answer!r}")
    return final_answer(text, sources=["boxed"]) or text.rpartition("####")[2].strip()
