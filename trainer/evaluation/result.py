"""The result of one held-out evaluation: scores, entropies and answers per item, joined from all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyphony.curricula.records import Completion, Evaluation, graded, mean, passed, per_token
from polyphony.curricula.transfer.halves import Half, taken
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.evaluation.answers import Answer, Variety
from polyphony.trainer.evaluation.statistics import Answers

logger = logging.getLogger(__name__)

HALVES: tuple[Half, Half] = ("steer", "report")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutResult:
    """What one pass over the held-out sets gave, in the order of the sets."""

    items: Mapping[str, tuple[str, ...]]
    """Per domain, the ids of the items."""
    samples: Mapping[str, tuple[tuple[float | None, ...], ...]]
    """Per domain and item, the scores of its k samples; None where the grader failed."""
    entropy: Mapping[str, float]
    """Per domain, mean token entropy in nats of the first sample of every item."""
    variety: Mapping[str, tuple[Variety, ...]] = field(default_factory=dict)
    """Per domain and item, how much its samples differ; empty with one sample an item."""
    item_entropy: Mapping[str, tuple[tuple[float, int], ...]] = field(default_factory=dict)
    """Per domain and item, summed token entropy and token count of its first sample."""
    answers: Mapping[str, tuple[tuple[Answer, ...], ...]] = field(default_factory=dict)
    """Per domain and item, its k samples read."""
    greedy: Mapping[str, tuple[Answer, ...]] = field(default_factory=dict)
    """Per domain and item, what the policy says without chance; empty unless asked for."""
    base_kl: Mapping[str, Mapping[str, tuple[float, int]]] = field(default_factory=dict)
    """Per domain and item id, (nats, tokens) of KL(base || policy); empty until the base model was remembered."""
    shown: tuple[Completion, ...] = ()
    """A few of each domain, graded, for people to read; without their tokens."""

    def on(self, which: Half) -> HeldoutResult:
        """Return what it says of one half of the items."""

        def half(by_domain: Mapping[str, Sequence]) -> dict[str, Any]:
            return {name: taken(values, self.items[name], which) for name, values in by_domain.items() if values}

        items, pairs = half(self.items), half(self.item_entropy)
        measured = dict(self.entropy) | {name: per_token(of) for name, of in pairs.items()}
        return HeldoutResult(
            items=items,
            samples=half(self.samples),
            entropy={name: nats for name, nats in measured.items() if not math.isnan(nats)},
            variety=half(self.variety),
            item_entropy=pairs,
            answers=half(self.answers),
            greedy=half(self.greedy),
            base_kl={name: {i: kl[i] for i in items[name] if i in kl} for name, kl in self.base_kl.items()},
            shown=tuple(c for c in self.shown if c.prompt.id in items[c.prompt.domain]),
        )

    def as_evaluation(self, **about: Any) -> Evaluation:
        """Return the row of the transfer matrix, of all items; `about` are its other fields."""
        return Evaluation(
            scores=self.scores(),
            entropy=dict(self.entropy),
            entropy_items=dict(self.item_entropy),
            kl_items={name: tuple(kl.get(item) for item in self.items[name]) for name, kl in self.base_kl.items()},
            **about,
        )

    def read(self, domain: str) -> Answers:
        """Return a domain's answers, ready for statistics, in the order of its items."""
        kl = self.base_kl.get(domain)
        return Answers(
            sampled=self.answers[domain],
            greedy=self.greedy.get(domain),
            entropy=self.item_entropy.get(domain),
            kl=None if kl is None else [kl.get(item, (0.0, 0)) for item in self.items[domain]],
        )

    def scores(self) -> dict[str, tuple[float | None, ...]]:
        """Return the mean score of each item over its graded samples, in [0, 1]; None where none of them was.

        Raises ValueError for a sample's score outside [0, 1].
        """
        scores = {}
        for name, items in self.samples.items():
            means = (mean(graded(item)) for item in items)
            scores[name] = tuple(None if math.isnan(score) else score for score in means)
            known = [score for item in items for score in graded(item)]  # means would hide -1 and 1
            if known and (min(known) < 0 or max(known) > 1):
                raise ValueError(
                    f"domain {name!r}: held-out scores must lie in [0, 1], got {min(known):g} to {max(known):g}: say "
                    f"domains.{name}.reward.range: [lowest, highest], or a function's attribute `range`: it is mapped to it"
                )
        return scores

    def passed(self) -> dict[str, tuple[float | None, ...]]:
        """Return, per item, 1.0 if any sample has the full score, else 0.0: pass@k at k = all samples; None where no sample
        was graded."""
        return {
            name: tuple(float(bool(passed(item))) if any(s is not None for s in item) else None for item in items)
            for name, items in self.samples.items()
        }

    def check_failures(self, *, most: float) -> None:
        """Raise GraderGoneError where more than the share `most` of a domain's items could not be graded, or all of a half.

        Without such items it returns; with fewer, they are named to the log.
        """
        for name, items in self.samples.items():
            lost = [i for i, item in zip(self.items[name], items, strict=True) if all(s is None for s in item)]
            bare = lost and any(not set(taken(self.items[name], self.items[name], h)) - {*lost} for h in HALVES)
            told = f"domain {name!r}: {len(lost)} of {len(items)} held-out items could not be graded ({_few(lost)})"
            if bare or len(lost) > most * len(items):
                why = "none is left in one half" if bare else f"max_grader_failures allows a share of {most:g}"
                raise GraderGoneError(f"{told}; {why}")
            if lost:
                logger.warning("%s; their scores are null in this evaluation", told)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One item as its rank saw it."""

    place: int
    """Among the items of all domains."""
    domain: str
    item: str
    scores: tuple[float | None, ...]
    entropy: tuple[float, int]
    answers: tuple[Answer, ...]
    greedy: Answer | None
    variety: Variety | None
    shown: Completion | None
    ids: tuple[list[int], list[int]] | None
    """Prompt and first completion, where the distance to the base model is measured."""


def _few(ids: Sequence[str], most: int = 3) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def once(records: Sequence[Record]) -> list[Record]:
    """Return each item's record once, in the order of the sets."""
    by_place = {record.place: record for record in records}
    return [by_place[place] for place in sorted(by_place)]


def join(
    records: Sequence[Record], domains: Sequence[str], kl: Mapping[str, Mapping[str, tuple[float, int]]]
) -> HeldoutResult:
    """Return the result of all records, in the order of the sets."""
    of = {name: [r for r in records if r.domain == name] for name in domains}
    is_greedy = any(r.greedy is not None for r in records)
    return HeldoutResult(
        items={name: tuple(r.item for r in rs) for name, rs in of.items()},
        samples={name: tuple(r.scores for r in rs) for name, rs in of.items()},
        entropy={name: nats for name, rs in of.items() if not math.isnan(nats := per_token([r.entropy for r in rs]))},
        item_entropy={name: tuple(r.entropy for r in rs) for name, rs in of.items()},
        answers={name: tuple(r.answers for r in rs) for name, rs in of.items()},
        greedy={name: tuple(r.greedy for r in rs if r.greedy) for name, rs in of.items()} if is_greedy else {},
        base_kl=kl,
        variety={
            name: tuple(r.variety for r in rs if r.variety)
            for name, rs in of.items()
            if rs and rs[0].variety is not None
        },
        shown=tuple(r.shown for r in records if r.shown is not None),
    )
