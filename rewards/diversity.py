"""Reward an answer for being good and for being another than its siblings (DARLING, arXiv:2509.02534).

    div_i = (n - |class of i|) / (n - 1), at least `floor`;    r_i = shape(q_i) * div_i

For open-ended domains: the trainer hands over whole groups, gathered across ranks, with the qualities that the domain's
reward gave. Where answers are right or wrong, correctness is never traded for difference: `check_verifiable`.

How much samples repeat each other's words (what white space separates) is only measured, never rewarded: the judgement
whether two answers say the same is the partitioners'.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as checked

from polyphony.rewards.partitions import Partitioner, Same, connected, find_partitioner
from polyphony.rewards.registry import named

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


@dataclass(frozen=True, kw_only=True, slots=True)
class DiversityResult:
    """One entry a group, in the order given."""

    rewards: list[list[float | None]]
    """Quality and difference fused; None where the quality is None or the partitioner could not tell."""
    diversity: list[list[float] | None]
    """`div_i`, after the floor."""
    classes: list[list[int] | None]
    """The class of each text, numbered from 0."""


@checked(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Diversity:
    """Reward a good answer more if others of its group say something else: quality fused with difference (DARLING).

    Example: `Diversity(partitioner="exact")([["a", "a", "b"]], [[1.0, 0.5, 1.0]], ["p"]).rewards == [[0.5, 0.25, 1.0]]`
    """

    partitioner: Any = "embedding"
    """Tells which answers say the same: `embedding` (needs the extra `diversity`), `exact`, `normalised`,
    `answer_signature`, `classifier`, `judge`, an import path, or `{name: .., **arguments}`."""
    fuse: Literal["mul", "add"] = "mul"
    """`mul`: quality times difference. `add`: quality, standardised within the group, plus `coefficient` times
    difference."""
    distance: Literal["classes", "pairs"] = "classes"
    """`classes`: difference is the share of other answers outside one's own class; classes are transitively closed, as in
    DARLING's code. `pairs`: the mean over pairs, as in its paper; one false "same" then merges no classes."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Smallest difference, which a group whose answers all say the same keeps (0.1 in DARLING's code); 1 measures
    difference without rewarding it."""
    shape: tuple[float, float] | None = None
    """What qualities 1 and 0 become before `mul`. [1, 0], which null stands for, gives a wrong answer nothing, [1, -1]
    discourages different wrong answers, [2, 1] encourages them. A structured domain must say it, and is refused if a
    different wrong answer could earn as much as a right one."""
    coefficient: float = Field(default=0.5, ge=0)
    """Under `add`: full difference in standard deviations of quality."""
    add_bias: bool = False
    """Subtract the group's lowest quality before `mul`: for reward models, whose scores may be negative."""

    @field_validator("partitioner")
    @classmethod
    def _may_be_one(cls, partitioner: Any) -> Any:
        return named(partitioner, method="same")

    @property
    def found(self) -> Partitioner:
        """The partitioner. Raises ValueError for one that does not exist."""
        return find_partitioner(self.partitioner)

    def __call__(
        self, group_texts: Sequence[Sequence[str]], qualities: Sequence[Sequence[float | None]], prompts: Sequence[Any]
    ) -> DiversityResult:
        """Fuse: texts and qualities [groups][n], one prompt a group. Groups may differ in size; one of a single text
        keeps its quality. Raises ValueError on a negative quality under `mul` without `add_bias`."""
        return self.fuse_groups(self.found.same(group_texts, prompts), qualities)

    def fuse_groups(
        self, matrices: Sequence[Same | None], qualities: Sequence[Sequence[float | None]]
    ) -> DiversityResult:
        """Fuse groups that are partitioned already; None stands for a group that the partitioner could not tell."""
        diversity = [None if same is None else self.diversity_of(same) for same in matrices]
        fused = [self._fuse(q, d) for q, d in zip(qualities, diversity, strict=True)]
        classes = [None if same is None else connected(same) for same in matrices]
        return DiversityResult(rewards=fused, diversity=diversity, classes=classes)

    def check_verifiable(self) -> None:
        """Raise ValueError where a wrong answer could earn as much as a right one by being different.

        For domains whose answers are right or wrong: they have to say what becomes of either, by `mul` and `shape`.
        """
        if self.shape is None or self.fuse != "mul":
            raise ValueError(
                "answers that are right or wrong need fuse: mul and an explicit shape, as [1, 0]: what right and wrong "
                "become before difference is multiplied in"
            )
        right, wrong = self.shape
        if not right * self.floor > max(wrong, 0.0):
            raise ValueError(
                f"shape [{right:g}, {wrong:g}] with floor {self.floor} lets a different wrong answer earn as much as a "
                "right one: right x floor must exceed wrong, and 0"
            )

    def diversity_of(self, same: Same) -> list[float]:
        """Return `div_i` of each text of a group."""
        n = len(same)
        if n == 1:
            return [1.0]
        if self.distance == "classes":
            classes = connected(same)
            return [max((n - classes.count(c)) / (n - 1), self.floor) for c in classes]
        return [max((n - sum(row)) / (n - 1), self.floor) for row in same]

    def _fuse(self, qualities: Sequence[float | None], diversity: list[float] | None) -> list[float | None]:
        known = [q for q in qualities if q is not None]
        if diversity is None or not known:
            return [None] * len(qualities)
        if self.fuse == "add":
            mean = sum(known) / len(known)
            std = math.sqrt(sum((q - mean) ** 2 for q in known) / len(known))
            scaled = [None if q is None else (q - mean) / std if std else 0.0 for q in qualities]
            return [None if q is None else q + self.coefficient * d for q, d in zip(scaled, diversity, strict=True)]
        base = min(known) if self.add_bias else 0.0
        if min(known) < base:
            raise ValueError(f"diversity: mul needs qualities >= 0, got {min(known)}; use fuse: add, or add_bias")
        right, wrong = self.shape or (1.0, 0.0)
        return [
            None if q is None else (wrong + (right - wrong) * (q - base)) * d
            for q, d in zip(qualities, diversity, strict=True)
        ]


def unique_classes(texts: Sequence[str], partitioner: Any = "answer_signature") -> int:
    """Return how many classes the texts fall into."""
    same = find_partitioner(partitioner).same([texts], [""])[0] if texts else []
    return len(set(connected(same or [])))
