"""Held-out evaluation: all domains in one pass, k samples an item, per-item scores kept.

One pass with our own accumulators, because TRL logs every dataset of a dict under the same key and the last one wins.
The same item gets the same sampling seeds at every evaluation, which makes differences between checkpoints paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from curricula.records import mean
from rewards.diversity import Diversity
from trainer.data import Prompt, PromptTable
from trainer.rollouts import Completion, Request, completion_seed
from trainer.scoring import Sample
from trainer.variety import Variety, varieties

EVALUATION_DRAW = -1
"""Stands for the draw in the seeds of held-out samples: no training completion shares them."""


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
    shown: tuple[tuple[Sample, float | None], ...] = ()
    """A few samples of each domain, for people to read."""

    def scores(self) -> dict[str, tuple[float, ...]]:
        """Return the mean score of each item over its graded samples, in [0, 1].

        Raises ValueError for a domain with an item that could not be graded at all, or a score outside [0, 1].
        """
        scores = {}
        for name, items in self.samples.items():
            graded = [[s for s in item if s is not None] for item in items]
            if not all(graded):
                failed = sum(not g for g in graded)
                raise ValueError(f"domain {name!r}: {failed} of {len(items)} held-out items could not be graded")
            scores[name] = tuple(mean(g) for g in graded)
            low, high = min(scores[name]), max(scores[name])
            if low < 0 or high > 1:
                raise ValueError(f"domain {name!r}: held-out scores must lie in [0, 1], got {low:g} to {high:g}")
        return scores

    def passed(self) -> dict[str, tuple[float, ...]]:
        """Return, per item, 1.0 if any sample has the full score, else 0.0: pass@k at k = all samples."""
        return {
            name: tuple(float(any(s is not None and s >= 1.0 for s in item)) for item in items)
            for name, items in self.samples.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """How held-out sets are scored."""

    samples: int = 4
    """Completions an item."""
    shown: int = 3
    """Items of each domain whose first completion is kept for people to read."""


@dataclass(kw_only=True, slots=True)
class Evaluator:
    """Score the policy on every domain's held-out set.

    Example: `Evaluator(tables=heldout, settings=settings, seed=1, ...).run()`
    """

    tables: Mapping[str, PromptTable]
    settings: EvaluationSettings
    seed: int
    tokenize: Callable[[Sequence[Prompt]], list[list[int]]]
    complete: Callable[[Sequence[Request]], list[Completion]]
    """Samples this rank's requests from the engine with the policy's present weights."""
    to_samples: Callable[[Sequence[Prompt], Sequence[Completion]], list[Sample]]
    score: Callable[[Sequence[Sample]], list[float | None]]
    entropy_sums: Callable[[Sequence[Sequence[int]], Sequence[Sample]], list[tuple[float, int]]]
    """Summed token entropy and token count of each sample under the policy."""
    limit: Callable[[str], int]
    """The domain's completion length in tokens."""
    gather: Callable[[list], list]
    """Joins the lists of all ranks in rank order."""
    rank: int = 0
    world_size: int = 1
    diversity: Mapping[str, Diversity] = field(default_factory=dict)
    """What tells the answers of a domain apart, where it rewards difference."""
    _prompt_ids: dict[str, list[int]] = field(default_factory=dict)

    def run(self) -> HeldoutResult:
        """Evaluate all domains; collective over ranks, and every rank gets the whole result."""
        local = self._local_items()
        k = self.settings.samples
        prompts = [prompt for _, prompt in local for _ in range(k)]
        ids = self._tokenized(prompts)
        requests = [
            Request(
                prompt_ids=prompt_ids,
                seed=completion_seed(self.seed, EVALUATION_DRAW, prompt.id, 0, i % k),
                max_tokens=self.limit(prompt.domain),
            )
            for i, (prompt, prompt_ids) in enumerate(zip(prompts, ids, strict=True))
        ]
        samples = self.to_samples(prompts, self.complete(requests))
        scores = self.score(samples)
        entropies = self.entropy_sums(ids[::k], samples[::k])
        variety = varieties(samples, scores, k=k, by_domain=self.diversity) or [None] * len(local)
        records = []
        for j, (place, prompt) in enumerate(local):
            shown = samples[j * k] if self._is_shown(prompt) else None
            of_item = tuple(scores[j * k : (j + 1) * k])
            records.append((place, prompt.domain, prompt.id, of_item, entropies[j], shown, variety[j]))
        return _join(self.gather(records), list(self.tables))

    def _local_items(self) -> list[tuple[int, Prompt]]:
        """This rank's share of all items; padded by repeating, because generation and forward may be collective."""
        items = list(enumerate(prompt for table in self.tables.values() for prompt in table))
        share = -(-len(items) // self.world_size)
        padded = items + items[:1] * (share * self.world_size - len(items))
        return padded[self.rank * share : (self.rank + 1) * share]

    def _tokenized(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Held-out prompts never change: tokenise each once."""
        new = [p for p in prompts if f"{p.domain}/{p.id}" not in self._prompt_ids]
        if new:
            for prompt, ids in zip(new, self.tokenize(new), strict=True):
                self._prompt_ids[f"{prompt.domain}/{prompt.id}"] = ids
        return [self._prompt_ids[f"{p.domain}/{p.id}"] for p in prompts]

    def _is_shown(self, prompt: Prompt) -> bool:
        return prompt.id in self.tables[prompt.domain].ids[: self.settings.shown]


def _join(records: list[tuple], domains: Sequence[str]) -> HeldoutResult:
    by_place = {record[0]: record for record in records}
    ordered = [by_place[place] for place in sorted(by_place)]
    of = {name: [r for r in ordered if r[1] == name] for name in domains}
    return HeldoutResult(
        items={name: tuple(r[2] for r in rs) for name, rs in of.items()},
        samples={name: tuple(r[3] for r in rs) for name, rs in of.items()},
        entropy={
            name: sum(r[4][0] for r in rs) / tokens for name, rs in of.items() if (tokens := sum(r[4][1] for r in rs))
        },
        variety={name: tuple(r[6] for r in rs) for name, rs in of.items() if rs and rs[0][6] is not None},
        item_entropy={name: tuple(r[4] for r in rs) for name, rs in of.items()},
        shown=tuple((r[5], r[3][0]) for r in ordered if r[5] is not None),
    )
