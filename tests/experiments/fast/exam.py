"""Held-out evaluation in the fast lab: what a scheduler may read is sampled, what the study reads is expected.

The halves are the product's. Of the half that decides, each item gets one sampled completion, as in a run: scores and
entropies have the noise that a scheduler has to live with. Of the published half, an item with one right answer is scored
by that answer's probability, the mean of what sampling would score, without its noise; stories are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from polyphony.curricula.records import Evaluation, Prompt, mean, per_token
from polyphony.curricula.transfer.halves import Half, taken
from polyphony.trainer.domains import DomainData
from polyphony.trainer.engine.vllm import Request, completion_seed
from polyphony.trainer.evaluation.evaluator import EVALUATION_DRAW
from polyphony.trainer.scoring import Scorer
from tests.experiments.fast.loop import LabCompletion, LabPolicy, LabRun

PUBLISHED_SEED = 99
STORIES = 2
"""Samples of a published item that has no one right answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """What one half of the held-out items said, by domain.

    Example: `Exam(data, deciding=40, published=200).decide(policy, seed=1).scores["plus"]`
    """

    scores: dict[str, tuple[float, ...]]
    entropy: dict[str, float]
    """Nats per token, of what was sampled."""
    tokens: int
    """Sampled, or scored in their place."""


class Exam:
    """The held-out items of a world; tokenised once."""

    def __init__(self, data: DomainData, *, deciding: int, published: int) -> None:
        """Take up to so many items of each domain for either half."""
        self.data, self.scorer = data, Scorer(data.domains)
        self.deciding = self._items("steer", deciding)
        self.published = self._items("report", published)
        answers = [str(p.columns["answer"]) for p in self.published]
        told = data.tokenizer(answers, add_special_tokens=False)["input_ids"]
        self.answers = [[*ids, data.tokenizer.eos_token_id] for ids in told]  # type: ignore[misc]

    def _items(self, half: Half, most: int) -> list[Prompt]:
        found = []
        for table in self.data.heldout.values():
            found += self.data.tokenized(table[i] for i in taken(table.ids, table.ids, half)[:most])
        return found

    def decide(self, policy: LabPolicy, *, seed: int) -> Marks:
        """Score one sampled completion of every item that decides; the same item gets the same seed each time."""
        return self.sampled(policy, self.deciding, seed=seed)

    def publish(self, policy: LabPolicy, *, most: int | None = None) -> Marks:
        """Score the published items, of each domain `most`: expected where an answer is one string, else sampled."""
        chosen = [i for _, places in _by_domain(self.published) for i in places[:most]]
        is_open = {d.name: d.kind == "open_ended" for d in self.data.domains}
        exact = [i for i in chosen if not is_open[self.published[i].domain]]
        asked = [self.published[i] for i in exact]
        answers = [self.answers[i] for i in exact]
        chances = policy.decoder.answer_logps([p.ids for p in asked], answers)
        told = [self.published[i] for i in chosen if is_open[self.published[i].domain]]
        marks = self.sampled(policy, [p for p in told for _ in range(STORIES)], seed=PUBLISHED_SEED)
        scores = {name: tuple(math.exp(chances[i]) for i in places) for name, places in _by_domain(asked)}
        scores |= {
            name: tuple(mean(values[n : n + STORIES]) for n in range(0, len(values), STORIES))
            for name, values in marks.scores.items()
        }
        return Marks(scores=scores, entropy=marks.entropy, tokens=marks.tokens + sum(map(len, answers)))

    def entropy(self, policy: LabPolicy, *, most: int) -> Marks:
        """Sample `most` published items of each domain once, for their entropies."""
        chosen = [self.published[i] for _, places in _by_domain(self.published) for i in places[:most]]
        return self.sampled(policy, chosen, seed=PUBLISHED_SEED)

    def sampled(self, policy: LabPolicy, prompts: Sequence[Prompt], *, seed: int) -> Marks:
        """Score one completion a prompt; those of a domain stand together, a prompt that stands there again gets another."""
        repeats: dict[str, int] = {}
        requests = []
        for prompt in prompts:
            k = repeats[prompt.id] = repeats.get(prompt.id, -1) + 1
            asked = completion_seed(seed, EVALUATION_DRAW, prompt.id, 0, k)
            requests.append(Request(prompt_ids=prompt.ids, seed=asked, max_tokens=self.data.limits[prompt.domain]))
        completions = policy.read(prompts, policy.complete(requests, 1))
        rewards = self.scorer(completions)
        scores, entropy = {}, {}
        for name, places in _by_domain(prompts):
            scores[name] = tuple(rewards[i] or 0.0 for i in places)
            rows = [completions[i] for i in places]
            entropy[name] = per_token([(row.entropy, len(row.ids)) for row in rows if isinstance(row, LabCompletion)])
        return Marks(scores=scores, entropy=entropy, tokens=sum(len(c.ids) for c in completions))


def _by_domain(prompts: Sequence[Prompt]) -> list[tuple[str, list[int]]]:
    """Return each domain with the places of its prompts, which stand together."""
    return [(name, list(places)) for name, places in groupby(range(len(prompts)), key=lambda i: prompts[i].domain)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a run had cost and reached at one of its evaluations."""

    draws: int
    rollout_tokens: int
    scores: dict[str, float]
    """Published, of each domain."""


@dataclass(kw_only=True)
class Course:
    """A run with its evaluations: one before the first draw, then one every so many draws, none after the last.

    A stage that ends is evaluated at once, as in the product; the next one is then due so many draws later, and there are
    never more than under any other scheduler.
    """

    run: LabRun
    exam: Exam
    every: int
    shown: int = 100
    """Published items of a domain that are scored on the way."""
    tokens: float = math.inf
    """Rollout tokens after which no draw is made."""
    looks: list[Look] = field(default_factory=list)

    def finish(self) -> None:
        """Make every draw that is left."""
        curriculum = self.run.curriculum
        most, last = -(-self.run.draws // self.every), 0
        self._look()
        while self._goes_on:
            self.run.advance()
            is_due = curriculum.draws - last >= self.every or curriculum.stage_ends
            if is_due and len(curriculum.evaluations) < most and self._goes_on:
                last = curriculum.draws
                self._look()

    @property
    def _goes_on(self) -> bool:
        return self.run.curriculum.draws < self.run.draws and self.run.tokens.rollout < self.tokens

    def _look(self) -> None:
        run, curriculum = self.run, self.run.curriculum
        marks = self.exam.decide(run.policy, seed=run.seed)
        run.tokens.evaluation += marks.tokens
        before = curriculum.evaluations[-1].exposure if curriculum.evaluations else {}
        drawn = tuple(name for name, n in curriculum.drawn.items() if n > before.get(name, 0))
        curriculum.record(
            Evaluation(
                trained=(curriculum.stage,) if curriculum.stage else drawn,
                step=curriculum.draws,
                seed=run.seed,
                scores=marks.scores,
                entropy=marks.entropy,
                exposure=dict(curriculum.drawn),
            )
        )
        if self.shown:
            shown = self.exam.publish(run.policy, most=self.shown)
            run.tokens.published += shown.tokens
            scores = {name: mean(values) for name, values in shown.scores.items()}
            self.looks.append(Look(draws=curriculum.draws, rollout_tokens=run.tokens.rollout, scores=scores))
