"""What held-out evaluation keeps of one completion: score, what it comes to, how sure the policy was, and its form."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polyphony.rewards.answers import final_answer
from polyphony.rewards.partitions import answer_signature
from polyphony.rewards.style import is_valid, style
from polyphony.trainer.scoring import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One completion, read."""

    score: float | None
    """None where the grader failed."""
    vote: str
    """A digest of what it comes to: completions that give the same answer have the same vote."""
    confidence: float
    """Probability, at the run's temperature, that the policy gave to the tokens of the answer it gave, given what
    stands before them; NaN where the engine tells no log-probabilities, and in open-ended domains."""
    is_valid: bool
    style: str


def read_answer(
    sample: Sample, score: float | None, *, reward: Any, has_one_answer: bool, decode: Callable[[Sequence[int]], str]
) -> Answer:
    """Read one completion; `decode` turns token ids into text as the sample's text was made."""
    return Answer(
        score=score,
        vote=hashlib.sha256(repr(answer_signature(sample.text)).encode()).hexdigest()[:12],
        confidence=answer_probability(sample, decode) if has_one_answer else math.nan,
        is_valid=is_valid(sample.text, reward, truncated=sample.truncated),
        style=style(sample.text),
    )


def answer_probability(sample: Sample, decode: Callable[[Sequence[int]], str]) -> float:
    """Return exp of the summed log-probabilities of the answer's tokens; NaN without an answer or log-probabilities.

    The answer is what the completion marks as such, else its last line.
    """
    answer = final_answer(sample.text) or sample.text.rstrip().rpartition("\n")[2].strip()
    start = sample.text.rfind(answer)
    if sample.logps is None or not answer or start < 0:
        return math.nan
    if answer == sample.text.strip():
        return math.exp(sum(sample.logps))
    first, last = token_span(sample.ids, start, start + len(answer), decode)
    return math.exp(sum(sample.logps[first:last]))


def token_span(ids: Sequence[int], start: int, end: int, decode: Callable[[Sequence[int]], str]) -> tuple[int, int]:
    """Return the slice of tokens that holds the characters [start, end) of the decoded text."""

    def written(count: int) -> int:
        return len(decode(ids[:count]))

    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, start, key=written) - 1
    last = bisect.bisect_left(counts, end, key=written)
    return first, min(max(last, first + 1), len(ids))
