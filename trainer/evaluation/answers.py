"""What held-out evaluation keeps of one completion: score, answer, confidence and output style.

And how much the samples of an item differ, which needs at least two of them and enters no score, decision or update.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from polyphony.curricula.records import Completion, mean, passed
from polyphony.rewards.answers import final_answer
from polyphony.rewards.diversity import distinct_n, self_bleu, unique_classes, vendi
from polyphony.rewards.partitions import Same, answer_signature, connected
from polyphony.rewards.style import is_valid, style
from polyphony.trainer.diversity_reward import compared
from polyphony.trainer.metrics import key
from polyphony.trainer.settings import Diversity


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One completion, read."""

    score: float | None
    """None where the grader failed."""
    vote: str | None
    """A digest of what its reward reads in it: completions with the same answer have the same vote; None where the reward
    reads none."""
    confidence: float
    """Probability, as it was sampled from, that the policy gave to the tokens of the answer it gave, given what stands
    before them; NaN where the engine tells no log-probabilities, and in open-ended domains."""
    is_valid: bool
    style: str


def read_answer(
    completion: Completion, *, reward: Any, has_one_answer: bool, decode: Callable[[Sequence[int]], str]
) -> Answer:
    """Read one completion; `decode` turns token ids into text as the completion's text was made."""
    return Answer(
        score=completion.reward,
        vote=vote(completion, reward),
        confidence=answer_probability(completion, decode) if has_one_answer else math.nan,
        is_valid=is_valid(completion.text, reward, truncated=completion.truncated),
        style=style(completion.text),
    )


def vote(completion: Completion, reward: Any) -> str | None:
    """Return a digest of the answer that a reward reads in a completion (`reads`, see `polyphony.rewards.registry`)."""
    reads = getattr(reward, "reads", None)
    if reads is None:
        read = answer_signature(completion.text)
    else:
        read = reads(completion.text, completion.prompt.prompt, **completion.prompt.columns)
    return None if read is None else hashlib.sha256(repr(read).encode()).hexdigest()[:12]


def answer_probability(completion: Completion, decode: Callable[[Sequence[int]], str]) -> float:
    """Return exp of the summed log-probabilities of the answer's tokens; NaN without an answer or log-probabilities.

    The answer is what the completion marks as such, else its last line.
    """
    completion = completion.answer
    text, logps = completion.text, completion.logps
    answer = final_answer(text) or text.rstrip().rpartition("\n")[2].strip()
    start = text.rfind(answer)
    if logps is None or not answer or start < 0:
        return math.nan
    if answer == text.strip():
        return math.exp(sum(logps))
    first, last = token_span(completion.ids, start, start + len(answer), decode)
    return math.exp(sum(logps[first:last]))


def token_span(ids: Sequence[int], start: int, end: int, decode: Callable[[Sequence[int]], str]) -> tuple[int, int]:
    """Return the slice of tokens that holds the characters [start, end) of the decoded text."""

    def written(count: int) -> int:
        return len(decode(ids[:count]))

    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, start, key=written) - 1
    last = bisect.bisect_left(counts, end, key=written)
    return first, min(max(last, first + 1), len(ids))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variety:
    """Of the k samples of one item; NaN where it could not be told. The fields are metrics of `heldout/<d>`."""

    distinct_2: float
    """Different over all pairs of neighbouring words."""
    self_bleu: float
    """Mean BLEU of each sample against the others, 1 where all are alike."""
    vendi: float
    """Effective number of different samples by the words they share, from 1 to k."""
    unique_correct: float
    """Answers that say something else, among those with the full score."""
    classes: float
    """Answers that say something else, by the domain's partitioner; NaN in a domain without a diversity reward."""


def varieties(completions: Sequence[Completion], *, k: int, by_domain: Mapping[str, Diversity]) -> list[Variety]:
    """Return the variety of each item; its k samples stand together. Empty where k is 1.

    Answers are told apart by the domain's own partitioner where it has one, else by what they come to
    (`answer_signature`).
    """
    if k < 2:
        return []
    items = [completions[i : i + k] for i in range(0, len(completions), k)]
    told: dict[int, Same | None] = {}
    for name, diversity in by_domain.items():
        places = [i for i, item in enumerate(items) if item[0].prompt.domain == name]
        texts = [[c.to_compare(diversity.compare) for c in items[i]] for i in places]
        prompts = [items[i][0].prompt.prompt for i in places]
        told.update(zip(places, compared(name, diversity, texts, prompts), strict=True))
    return [_variety([c.text for c in item], [c.reward for c in item], told, i) for i, item in enumerate(items)]


def variety_metrics(variety: Mapping[str, Sequence[Variety]]) -> dict[str, float]:
    """Return the means over the items. NaN where nothing was told."""
    metrics = {}
    for name, of_items in variety.items():
        for metric in (f.name for f in fields(Variety)):
            known = [value for v in of_items if not math.isnan(value := getattr(v, metric))]
            metrics[key("heldout", metric, name)] = mean(known)
    return metrics


def _variety(texts: list[str], scores: Sequence[float | None], told: Mapping[int, Same | None], i: int) -> Variety:
    right, classes = math.nan, math.nan
    if i not in told:
        right = unique_classes([texts[i] for i in passed(scores)])
    elif (same := told[i]) is not None:
        places = passed(scores)
        right = len(set(connected([[same[a][b] for b in places] for a in places])))
        classes = len(set(connected(same)))
    words = {"distinct_2": distinct_n(texts, 2), "self_bleu": self_bleu(texts), "vendi": vendi(texts)}
    return Variety(unique_correct=right, classes=classes, **words)
