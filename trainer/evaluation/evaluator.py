"""Held-out evaluation: all domains in one pass, k samples an item, per-item scores kept.

One pass with our own accumulators, because TRL logs every dataset of a dict under the same key and the last one wins.
The same item gets the same sampling seeds at every evaluation, which makes differences between checkpoints paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from accelerate.utils import gather_object

from polyphony.curricula.records import Completion, Prompt
from polyphony.curricula.transfer.halves import taken
from polyphony.rewards.registry import as_score, declared_range
from polyphony.trainer.diversity_reward import Fusion
from polyphony.trainer.domains import DomainData
from polyphony.trainer.engine.vllm import Request, completion_seed
from polyphony.trainer.environments.episodes import Episodes
from polyphony.trainer.evaluation.answers import Answer, read_answer, varieties
from polyphony.trainer.evaluation.base_kl import BaseCompletion, BaseReference, LogProbabilities
from polyphony.trainer.evaluation.result import HeldoutResult, Record, join, once
from polyphony.trainer.policy import Policy
from polyphony.trainer.rollout_function import RolloutFunction
from polyphony.trainer.run import say
from polyphony.trainer.scoring import Scorer, together
from polyphony.trainer.settings import EvaluationSettings

EVALUATION_DRAW = -1
"""Stands for the draw in the seeds of held-out samples: no training completion shares them."""


@dataclass(kw_only=True, slots=True)
class Evaluator:
    """Score the policy on every domain's held-out set; collective over ranks.

    Example: `Evaluator(data=data, policy=policy, scorer=scorer, settings=settings, seed=1).run()`
    """

    data: DomainData
    policy: Policy
    scorer: Scorer
    settings: EvaluationSettings
    seed: int
    fusion: Fusion = field(default_factory=Fusion)
    """What tells the answers of a domain apart, where it rewards difference."""
    by: Episodes | RolloutFunction | None = None
    """What completes in the policy's place: episodes, where a domain acts, or a script's function."""
    base: BaseReference | None = None
    """What the base model said; set by `remember_base`, or restored."""
    cuts: bool = False
    """Whether scores outside [0, 1] are cut to it, and that is said: rewards of TRL's have no bounds to be mapped by."""
    _cut: set[str] = field(default_factory=set)
    _unpublished: Scorer = field(init=False)
    """Grades the items that decide, so that what its rewards log stays apart."""
    _mine: list[tuple[int, Prompt]] = field(default_factory=list)
    """This rank's items with their places among all; held-out prompts never change, so each is tokenised once."""
    _records: list[Record] = field(default_factory=list)
    """Of the last run, of all ranks."""

    def __post_init__(self) -> None:
        self._unpublished = self.scorer.apart()

    def run(self) -> HeldoutResult:
        """Evaluate all domains; collective over ranks, and every rank gets the whole result, or a GraderGoneError."""
        self._mine = self._mine or self._local_items()
        k = self.settings.samples
        prompts = [prompt for _, prompt in self._mine for _ in range(k)]
        requests = [
            Request(
                prompt_ids=prompt.ids,
                seed=completion_seed(self.seed, EVALUATION_DRAW, prompt.id, 0, i % k),
                max_tokens=self.data.limits[prompt.domain],
            )
            for i, prompt in enumerate(prompts)
        ]
        sampled = self._graded(prompts, requests, k)
        entropies = self.policy.entropy_sums(sampled[::k])
        told = partial(varieties, sampled, k=k, by_domain=self.fusion.by_domain)
        variety = together(told, self.fusion.slow, gather_object) or [None] * len(self._mine)
        answers = [self._answer(c) for c in sampled]
        shown = {name: self._published(name)[: self.settings.shown] for name in self.data.heldout}
        greedy = self._greedy([prompt for _, prompt in self._mine], requests[::k])
        records = [
            Record(
                place=place,
                domain=prompt.domain,
                item=prompt.id,
                scores=tuple(c.reward for c in sampled[j * k : (j + 1) * k]),
                entropy=entropies[j],
                answers=tuple(answers[j * k : (j + 1) * k]),
                greedy=greedy[j] if greedy else None,
                variety=variety[j],
                shown=_to_be_read(sampled[j * k]) if prompt.id in shown[prompt.domain] else None,
                ids=(
                    (list(sampled[j * k].prompt.ids), list(sampled[j * k].ids))
                    if sampled[j * k].tool_mask is None  # tokens that others wrote would count as the policy's
                    and prompt.id in self.data.heldout[prompt.domain].ids[: self.settings.kl_items]
                    else None
                ),
            )
            for j, (place, prompt) in enumerate(self._mine)
        ]
        self._records = once(gather_object(records))
        kl = self.base.kl(self._shared_log_probabilities) if self.base is not None else {}
        self.policy.rest()
        return join(self._records, list(self.data.heldout), kl)

    def _graded(self, prompts: Sequence[Prompt], requests: Sequence[Request], copies: int) -> list[Completion]:
        """Return the completions with their rewards; what a reward logs is kept of the items that are published alone."""
        complete = self.policy.complete if self.by is None else partial(self.by.complete, prompts)
        completions = self.policy.read(prompts, complete(requests, copies))
        published = {name: set(self._published(name)) for name in self.data.heldout}
        halves: tuple[list[int], list[int]] = ([], [])
        for i, prompt in enumerate(prompts):
            halves[prompt.id not in published[prompt.domain]].append(i)

        def score() -> list[float | None]:
            rewards: dict[int, float | None] = {}
            for scorer, places in zip((self.scorer, self._unpublished), halves, strict=True):
                rewards |= zip(places, scorer([completions[i] for i in places]), strict=True)
            return [rewards[i] for i in range(len(completions))]

        rewards = together(score, self.scorer.slow, gather_object)
        of = {
            name: {"range": declared_range(table.domain.reward, self.scorer.rewards[name])}
            for name, table in self.data.heldout.items()
        }
        scores = [as_score(of[c.prompt.domain], r) for c, r in zip(completions, rewards, strict=True)]
        if self.cuts:
            scores = [self._within(c.prompt.domain, score) for c, score in zip(completions, scores, strict=True)]
        return [replace(c, reward=score) for c, score in zip(completions, scores, strict=True)]

    def _within(self, domain: str, score: float | None) -> float | None:
        if score is None or 0 <= score <= 1:
            return score
        if domain not in self._cut:
            self._cut.add(domain)
            say(
                f"domain {domain!r}: a held-out reward of {score:g}: scores are cut to [0, 1]; a function's attribute "
                f"`range` maps them, and its mean stands beside them as heldout/{domain}/logged/.."
            )
        return min(max(score, 0.0), 1.0)

    def flush_logged(self) -> dict[str, float]:
        """Return what rewards logged of published items since the last call, as metrics; collective over ranks."""
        self._unpublished.logged.flush("heldout", gather_object)
        return self.scorer.logged.flush("heldout", gather_object)

    def logged_totals(self) -> Counter[tuple[str, str]]:
        """Return the sums of what was logged by domain and name, of all items, as far as flushed."""
        return self.scorer.logged.whole + self._unpublished.logged.whole

    def _answer(self, completion: Completion) -> Answer:
        name = completion.prompt.domain
        return read_answer(
            completion,
            reward=self.scorer.rewards[name],
            has_one_answer=self.data.heldout[name].domain.kind == "structured",
            decode=self.policy.decode,
        )

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
        requests = [replace(request, is_greedy=True) for request in requests]
        return [self._answer(c) for c in self._graded(prompts, requests, 1)]

    def _shared_log_probabilities(
        self, prompt_ids: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
    ) -> list[float]:
        return self._shared(self.policy.logps, prompt_ids, ids)

    def _shared(
        self, measure: LogProbabilities, prompt_ids: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """Split the rows over the ranks, evenly because the forward pass may be collective, and put them together."""
        share = -(-len(ids) // self.policy.world_size)
        places = [min(p, len(ids) - 1) for p in range(self.policy.rank * share, (self.policy.rank + 1) * share)]
        sums = measure([prompt_ids[p] for p in places], [ids[p] for p in places]) if ids else []
        return gather_object(sums)[: len(ids)]

    def _local_items(self) -> list[tuple[int, Prompt]]:
        """This rank's share of all items; padded by repeating, because generation and forward may be collective."""
        items = list(enumerate(prompt for table in self.data.heldout.values() for prompt in table))
        share = -(-len(items) // self.policy.world_size)
        padded = items + items[:1] * (share * self.policy.world_size - len(items))
        mine = padded[self.policy.rank * share : (self.policy.rank + 1) * share]
        asked = self.data.tokenized(prompt for _, prompt in mine)
        return [(place, prompt) for (place, _), prompt in zip(mine, asked, strict=True)]

    def _published(self, domain: str) -> tuple[str, ...]:
        """Return the ids of the domain's items that are published."""
        ids = self.data.heldout[domain].ids
        return taken(ids, ids, "report")


def _to_be_read(completion: Completion) -> Completion:
    """Return what of a completion is shown to people: no tokens, no columns."""
    prompt = replace(completion.prompt, columns={}, ids=())
    episode = completion.episode and replace(completion.episode, environment=None)
    return replace(completion, prompt=prompt, ids=(), logps=None, tool_mask=None, episode=episode)
