"""Held-out evaluation: all domains in one pass, k samples an item, per-item scores kept.

One pass with our own accumulators, because TRL logs every dataset of a dict under the same key and the last one wins.
The same item gets the same sampling seeds at every evaluation, which makes differences between checkpoints paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from polyphony.rewards.diversity import Diversity
from polyphony.trainer.data import Prompt, PromptTable
from polyphony.trainer.engine.engine import Completion, Request, completion_seed
from polyphony.trainer.evaluation.answers import Answer, varieties
from polyphony.trainer.evaluation.base_kl import BaseCompletion, BaseReference, LogProbabilities
from polyphony.trainer.evaluation.result import HeldoutResult, Record, join, once
from polyphony.trainer.scoring import Sample
from polyphony.trainer.settings import EvaluationSettings

EVALUATION_DRAW = -1
"""Stands for the draw in the seeds of held-out samples: no training completion shares them."""


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
    log_probabilities: LogProbabilities
    read: Callable[[Sample, float | None], Answer]
    limit: Callable[[str], int]
    """The domain's completion length in tokens."""
    gather: Callable[[list], list]
    """Joins the lists of all ranks in rank order."""
    rank: int = 0
    world_size: int = 1
    base: BaseReference | None = None
    """What the base model said; set by `remember_base`, or restored."""
    diversity: Mapping[str, Diversity] = field(default_factory=dict)
    """What tells the answers of a domain apart, where it rewards difference."""
    _prompt_ids: dict[str, list[int]] = field(default_factory=dict)
    _records: list[Record] = field(default_factory=list)
    """Of the last run, of all ranks."""

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
        answers = [self.read(sample, score) for sample, score in zip(samples, scores, strict=True)]
        greedy = self._greedy([prompt for _, prompt in local], requests[::k])
        records = [
            Record(
                place=place,
                domain=prompt.domain,
                item=prompt.id,
                scores=tuple(scores[j * k : (j + 1) * k]),
                entropy=entropies[j],
                answers=tuple(answers[j * k : (j + 1) * k]),
                greedy=greedy[j] if greedy else None,
                variety=variety[j],
                shown=samples[j * k] if self._is_shown(prompt) else None,
                ids=(ids[j * k], samples[j * k].ids) if self._is_measured(prompt) else None,
            )
            for j, (place, prompt) in enumerate(local)
        ]
        self._records = once(self.gather(records))
        kl = self.base.kl(self._shared_log_probabilities) if self.base is not None else {}
        return join(self._records, list(self.tables), kl)

    def remember_base(self) -> BaseReference:
        """Take the policy as it is, and what it said at the last run, for the base model; collective over ranks."""
        kept = [(r.domain, r.item, *r.ids) for r in self._records if r.ids is not None]
        logps = self._shared_log_probabilities([row[2] for row in kept], [row[3] for row in kept])
        self.base = BaseReference(
            completions=tuple(
                BaseCompletion(domain=domain, item=item, prompt_ids=list(prompt_ids), ids=list(ids), logp=logp)
                for (domain, item, prompt_ids, ids), logp in zip(kept, logps, strict=True)
            )
        )
        return self.base

    def distance_to(self, other: LogProbabilities) -> dict[str, dict[str, tuple[float, int]]]:
        """Return (nats, tokens) of KL(policy || other) on what the policy said at the last run, by domain and item."""
        base, own = self.base, self.remember_base()
        self.base = base
        return own.kl(lambda prompt_ids, ids: self._shared(other, prompt_ids, ids))

    def _greedy(self, prompts: Sequence[Prompt], requests: Sequence[Request]) -> list[Answer]:
        """Return one greedy answer an item; none unless asked for."""
        if not self.settings.greedy:
            return []
        samples = self.to_samples(prompts, self.complete([replace(request, is_greedy=True) for request in requests]))
        return [self.read(s, score) for s, score in zip(samples, self.score(samples), strict=True)]

    def _shared_log_probabilities(
        self, prompt_ids: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
    ) -> list[float]:
        return self._shared(self.log_probabilities, prompt_ids, ids)

    def _shared(
        self, measure: LogProbabilities, prompt_ids: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """Split the rows over the ranks, evenly because the forward pass may be collective, and put them together."""
        share = -(-len(ids) // self.world_size)
        places = [min(p, len(ids) - 1) for p in range(self.rank * share, (self.rank + 1) * share)]
        sums = measure([prompt_ids[p] for p in places], [ids[p] for p in places]) if ids else []
        return self.gather(sums)[: len(ids)]

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

    def _is_measured(self, prompt: Prompt) -> bool:
        return prompt.id in self.tables[prompt.domain].ids[: self.settings.kl_items]

    def _is_shown(self, prompt: Prompt) -> bool:
        return prompt.id in self.tables[prompt.domain].ids[: self.settings.shown]
