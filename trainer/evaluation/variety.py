"""How much the samples of one held-out item differ: what a policy can still say, beside how well it says it.

Needs two samples an item at least; nothing here enters a score, a decision or an update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from polyphony.curricula.records import mean
from polyphony.curricula.transfer.halves import halves
from polyphony.rewards.diversity import Diversity, unique_correct
from polyphony.rewards.ngrams import distinct_n, self_bleu, vendi
from polyphony.rewards.partitions import Same, connected
from polyphony.trainer.diversity_reward import compared
from polyphony.trainer.metrics import key
from polyphony.trainer.scoring import Sample


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


def varieties(
    samples: Sequence[Sample], scores: Sequence[float | None], *, k: int, by_domain: Mapping[str, Diversity]
) -> list[Variety]:
    """Return the variety of each item; its k samples stand together. Empty where k is 1.

    Answers are told apart by the domain's own partitioner where it has one, else by what they come to
    (`answer_signature`).
    """
    if k < 2:
        return []
    items = [(samples[i : i + k], scores[i : i + k]) for i in range(0, len(samples), k)]
    told: dict[int, Same | None] = {}
    for name, diversity in by_domain.items():
        places = [i for i, (item, _) in enumerate(items) if item[0].prompt.domain == name]
        texts = [[s.text for s in items[i][0]] for i in places]
        prompts = [items[i][0][0].prompt.prompt for i in places]
        told.update(zip(places, compared(name, diversity, texts, prompts), strict=True))
    return [_variety([s.text for s in item], item_scores, told, i) for i, (item, item_scores) in enumerate(items)]


def variety_metrics(variety: Mapping[str, Sequence[Variety]], items: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the means over the `report` half; `items` names each domain's ids in order. NaN where nothing was told."""
    metrics = {}
    for name, of_items in variety.items():
        published = [v for v, side in zip(of_items, halves(items[name]), strict=True) if side == "report"]
        for metric in (f.name for f in fields(Variety)):
            known = [value for v in published if not math.isnan(value := getattr(v, metric))]
            metrics[key("heldout", metric, name)] = mean(known)
    return metrics


def _variety(texts: list[str], scores: Sequence[float | None], told: Mapping[int, Same | None], i: int) -> Variety:
    right, classes = math.nan, math.nan
    if i not in told:
        right = unique_correct(texts, scores)
    elif (same := told[i]) is not None:
        places = [j for j, score in enumerate(scores) if score is not None and score >= 1.0]
        right = len(set(connected([[same[a][b] for b in places] for a in places])))
        classes = len(set(connected(same)))
    words = {"distinct_2": distinct_n(texts, 2), "self_bleu": self_bleu(texts), "vendi": vendi(texts)}
    return Variety(unique_correct=right, classes=classes, **words)
