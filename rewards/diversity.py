"""How much the samples of a prompt repeat each other's words (what white space separates), and how many classes they are.

Only measured, never rewarded: the judgement whether two answers say the same is the partitioners'.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from polyphony.rewards.partitions import connected, find_partitioner

Gram = tuple[str, ...]


LONGEST = 4
"""Words of BLEU's longest n-gram."""


UNMATCHED = 0.1
"""Matches that stand for none: method 1 of Chen and Cherry (2014), as NLTK and sacreBLEU's `floor` have it."""


def ngrams(text: str, n: int) -> Counter[Gram]:
    """Count the sequences of n neighbouring words."""
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return unique over all n-grams of a prompt's samples; NaN where they have none."""
    total = sum((ngrams(text, n) for text in texts), Counter())
    return len(total) / total.total() if total else math.nan


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU of each text with the others as references, in [0, 1]; NaN for fewer than two texts.

    arXiv:1802.01886. A text of fewer than `LONGEST` words is compared up to its own length; one without words has 0.
    """
    if len(texts) < 2:
        return math.nan
    lengths = [len(text.split()) for text in texts]
    logs = np.zeros(len(texts))
    is_apart = np.zeros(len(texts), dtype=bool)
    for n in range(1, LONGEST + 1):
        counts = [ngrams(text, n) for text in texts]
        matches = _matches(counts)
        if n == 1:
            is_apart = np.array(matches) == 0
        for i, (count, matched) in enumerate(zip(counts, matches, strict=True)):
            if count:
                logs[i] += math.log((matched or UNMATCHED) / count.total())
    orders = np.clip(lengths, 1, LONGEST)
    scores = np.exp(logs / orders) * [_brevity(lengths, i) for i in range(len(texts))]
    return float(np.where(is_apart, 0.0, scores).mean())


def vendi(texts: Sequence[str]) -> float:
    """Return the effective number of different texts, from 1 to n: exp(-sum_i l_i log l_i), arXiv:2210.02410.

    l: eigenvalues of K / n, K the cosines of the texts' counts of words and of pairs of words. NaN for no text.
    """
    if not texts:
        return math.nan
    counts = [ngrams(text, 1) + ngrams(text, 2) or Counter({(): 1}) for text in texts]  # nothing is like nothing only
    similarity = np.array([[_dot(a, b) for b in counts] for a in counts], dtype=float)
    norms = np.sqrt(np.diagonal(similarity))
    eigenvalues = np.linalg.eigvalsh(similarity / np.outer(norms, norms) / len(texts))
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _matches(counts: Sequence[Counter[Gram]]) -> list[int]:
    """Return how many n-grams of each text the others hold, each as often as the one that has it most."""
    most: dict[Gram, tuple[int, int]] = {}
    for count in counts:
        for gram, number in count.items():
            first, second = most.get(gram, (0, 0))
            most[gram] = (number, first) if number > first else (first, max(second, number))
    return [
        sum(
            min(number, first if number < first else second)
            for gram, number in count.items()
            for first, second in [most[gram]]
        )
        for count in counts
    ]


def _brevity(lengths: Sequence[int], i: int) -> float:
    """Return BLEU's factor for a text shorter than the one of the others that is nearest in length."""
    own = lengths[i]
    nearest = min((*lengths[:i], *lengths[i + 1 :]), key=lambda length: (abs(length - own), length))
    return 0.0 if not own else min(1.0, math.exp(1 - nearest / own))


def _dot(a: Counter[Gram], b: Counter[Gram]) -> int:
    return sum(number * b[gram] for gram, number in a.items() if gram in b)


def unique_classes(texts: Sequence[str], partitioner: Any = "answer_signature") -> int:
    """Return how many classes the texts fall into."""
    same = find_partitioner(partitioner).same([texts], [""])[0] if texts else []
    return len(set(connected(same or [])))
