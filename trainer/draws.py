"""The walk of one draw: the curriculum names prompts, the engine samples their groups, the domains' rewards score them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from curricula.curriculum import Curriculum
from curricula.records import Group, PromptRef
from trainer.data import Prompt
from trainer.domains import DomainData
from trainer.fusion import Fusion
from trainer.rollouts import Completion, Request, completion_seed
from trainer.scoring import Sample, Scorer, check_failures, form_groups, grade


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One draw, generated and scored: what the overridden TRL methods hand over."""

    rows: list[dict[str, Any]]
    """This rank's rows in TRL's form."""
    prompt_ids: list[list[int]]
    completions: list[Completion]
    rewards: list[float | None]
    """What the update learns from, of all ranks in rank order."""
    groups: list[Group]
    """Of all ranks."""
    seconds: float


@dataclass(kw_only=True, slots=True)
class Draws:
    """Turn empty slots into rollouts, one draw at a time; collective over ranks.

    Example: `Draws(data=data, curriculum=curriculum, ...).roll_out(64).rewards`
    """

    data: DomainData
    curriculum: Curriculum
    scorer: Scorer
    fusion: Fusion
    """Adds what the domains with a diversity reward pay for difference."""
    seed: int
    group_size: int
    """Completions a prompt; a group may straddle ranks."""
    max_grader_failures: float
    complete: Callable[[Sequence[Request]], list[Completion]]
    """Samples this rank's requests with the policy's present weights."""
    to_samples: Callable[[Sequence[Prompt], Sequence[Completion]], list[Sample]]
    rank: int = 0
    world_size: int = 1
    listeners: list[Callable[[Sequence[PromptRef]], None]] = field(default_factory=list)
    """Called on rank 0 with the prompts of every draw before they are generated."""

    def roll_out(self, n_rows: int) -> Rollout:
        """Draw prompts for this rank's `n_rows` slots, generate their groups, score them."""
        draw = self.curriculum.draws
        refs = self._draw(n_rows)
        drawn = {ref: self.data.train[ref.domain][ref.id] for ref in set(refs)}
        prompts = [drawn[ref] for ref in refs]  # one object a group, which is tokenised once
        prompt_ids = self.data.tokenize(prompts)
        requests = [
            Request(
                prompt_ids=ids,
                seed=completion_seed(self.seed, draw, prompt.id, 0, i % self.group_size),
                max_tokens=self.data.limits[prompt.domain],
            )
            for i, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
        ]
        started = time.perf_counter()
        completions = self.complete(requests)
        seconds = time.perf_counter() - started
        samples = self.to_samples(prompts, completions)
        graded = gather_object(grade(samples, self.scorer(samples), with_texts=self.fusion.domains))
        groups = self.fusion(
            form_groups(graded, size=self.group_size, draw=draw),
            [g.text for g in graded],
            lambda group: self.data.train[group.domain][group.prompt_id].prompt,
        )
        check_failures(groups, most=self.max_grader_failures)
        return Rollout(
            rows=[{"prompt": prompt.prompt} for prompt in prompts],
            prompt_ids=prompt_ids,
            completions=completions,
            rewards=[reward for group in groups for reward in group.learned],
            groups=groups,
            seconds=seconds,
        )

    def _draw(self, n_rows: int) -> list[PromptRef]:
        """Return the prompt of each of this rank's rows; groups may straddle ranks, so rows are cut from the whole."""
        refs = [self.curriculum.draw(n_rows * self.world_size // self.group_size)]
        broadcast_object_list(refs, from_process=0)
        if self.rank == 0:
            for listen in self.listeners:
                listen(refs[0])
        rows = [ref for ref in refs[0] for _ in range(self.group_size)]
        return rows[self.rank * n_rows : (self.rank + 1) * n_rows]
