"""One draw: the curriculum selects prompts, the engine samples their groups, the domains' rewards grade them.

Groups without a gradient are replaced, in a bounded number of rounds, by groups of other prompts of the same domain
(refill). With `look`, a group is stopped early if its first completions have equal rewards. This selects by rewards
alone: with rewards 0 and 1, the expected gradient of a group that has both points in the direction of its prompt's policy
gradient, whatever their order. So no prompt's direction changes, but prompts that nearly always fail, or never, get less
weight. Decisions use what all ranks have gathered, so that all make the same number of rounds.
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from polyphony.curricula.curriculum import Curriculum, Reserve
from polyphony.curricula.decision_log import Choice
from polyphony.curricula.records import Completion, Group, Prompt, Rollout, repeated
from polyphony.trainer.advantages import Advantages
from polyphony.trainer.diversity_reward import Fusion
from polyphony.trainer.domains import DomainData
from polyphony.trainer.engine.vllm import OnFinished, Request, completion_seed
from polyphony.trainer.environments.episodes import Episodes
from polyphony.trainer.extra_columns import Extra
from polyphony.trainer.policy import Policy
from polyphony.trainer.ranks import broadcast_object, gather_object
from polyphony.trainer.rollout_function import RolloutFunction
from polyphony.trainer.run.recorder import Recorder
from polyphony.trainer.scoring import EarlyGrading, Failures, Scorer, together
from polyphony.trainer.shortcuts import ShortcutWatch


def filled(rows: Mapping[int, Completion], left: Collection[int], look: int, size: int) -> dict[int, Completion]:
    """Return the rows in order; groups that were stopped early (`left`) are filled with copies of their completions.

    TRL needs whole groups. Copies have advantage 0, and stand for what was not sampled wherever a loss, a penalty or an
    entropy is averaged over all rows.
    """
    whole = {
        k * size + n: row
        for k in left
        if look < size and k * size in rows  # with early stop, a rank has whole groups
        for n, row in enumerate(repeated([rows[k * size + n] for n in range(look)], size))
    }
    return dict(sorted((dict(rows) | whole).items()))


NO_DRAW = -2
"""Stands for the draw in the seeds of a data set that TRL's `evaluate` was given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One round of generation in a draw: what the seeds of its completions are made of."""

    draw: int
    refill_round: int
    n_rows: int
    """Of this rank in the draw."""
    before: Mapping[int, int]
    """Of each group by its place, how many of the same prompt stand before it: a small domain's prompts come repeatedly."""

    def member(self, row: int, size: int) -> int:
        """Return which of its prompt's completions in this round a row is."""
        return self.before[row // size] * size + row % size


@dataclass(kw_only=True, slots=True)
class Draws:
    """Turn empty slots into rollouts, one draw at a time; collective over ranks.

    Example: `Draws(data=data, curriculum=curriculum, policy=policy, ...).roll_out(64).groups_of_rows`
    """

    data: DomainData
    curriculum: Curriculum
    policy: Policy
    """What samples, with its present weights; it knows the ranks and how many completions a group has."""
    scorer: Scorer
    fusion: Fusion
    """Adds the diversity reward, in domains that have one."""
    advantages: Advantages
    """Knows which groups can move the policy, and whether texts are compared for it."""
    shortcuts: ShortcutWatch
    """Finds signs of shortcuts in completions."""
    seed: int
    failures: Failures
    """Stops a run whose grader fails too often."""
    look: int | None = None
    """Early stop of groups: completions sampled first; the rest only if these may give a gradient. None: no early stop."""
    refill_rounds: int = 0
    """Most rounds in which groups without a gradient are replaced."""
    is_placebo: bool = False
    """Whether each group's rewards are shuffled among its completions: as large an update on the same prompts, with as many
    dead groups, whose expected direction is none."""
    tokens: int = 0
    """Sampled by all ranks in the draws so far."""
    by: Episodes | RolloutFunction | None = None
    """What completes in the policy's place: episodes, where a domain acts, or a script's function."""
    recorder: Recorder | None = None
    """Of a run: writes, on rank 0, every draw and every refill down before it is generated."""
    spares: Curriculum | Reserve | None = None
    """Where refills come from; None: the curriculum."""
    kept: list[dict[str, Any]] | None = None
    """Takes up refills in the place of the recorder."""

    def roll_out(self, n_rows: int) -> Rollout:
        """Draw prompts for this rank's `n_rows` slots, generate their groups, score them, replace the useless ones."""
        if not self.curriculum.aloft:  # left by a run that generated ahead
            self.choose(n_rows, unseen=0)
        choice = self.begin()
        return self.take(self.make(choice, n_rows))

    def choose(self, n_rows: int, *, unseen: int) -> Choice:
        """Have the curriculum choose the prompts of another draw: rank 0's, on every rank."""
        choice = self.curriculum.choose(n_rows * self.policy.world_size // self.policy.group_size, unseen=unseen)
        agreed = replace(choice, prompts=self._agreed(list(choice.prompts)))
        self.curriculum.aloft[-1] = agreed
        return agreed

    def begin(self) -> Choice:
        """Take the oldest draw that is chosen, and write down that it is trained on from now."""
        choice = self.curriculum.begin()
        if self.recorder is not None and self.policy.rank == 0:
            self.recorder.record_draw(self.policy.next_step, choice)
        return choice

    def make(self, choice: Choice, n_rows: int) -> Rollout:
        """Generate and score the groups of a draw, and replace the useless ones."""
        rollout = self._sample(choice.draw, 0, dict(enumerate(choice.prompts)), n_rows)
        while rollout.rounds < self.refill_rounds and (found := self._replacements(rollout)):
            fresh = self._sample(choice.draw, rollout.rounds + 1, found, n_rows)
            rollout = rollout.refilled(fresh, [k for k, g in fresh.groups.items() if self.advantages.is_useful(g)])
        return rollout

    def take(self, rollout: Rollout) -> Rollout:
        """Count what was sampled, and stop a run whose graders fail."""
        sampled = rollout.sampled
        self.failures.see(sampled)
        self.tokens += sum(sum(group.lengths) for group in sampled)
        return rollout

    def apart(self, choice: Choice) -> Draws:
        """Return what can `make` a draw while another is trained on: all that changes meanwhile is as it is now."""
        scorer = self.scorer.apart()
        scorer.extra, state = None if self.scorer.extra is None else Extra(), copy.copy(self.scorer.state_of())
        if state is not None:
            state.log_history = list(state.log_history)
        scorer.state_of = lambda: state
        spares = self.curriculum.reserve(choice, self.refill_rounds)
        return replace(self, scorer=scorer, shortcuts=self.shortcuts.as_now(), spares=spares, kept=[])

    def answer(self, rows: Sequence[Mapping[str, Any]], copies: int) -> Rollout:
        """Sample and grade one completion a row, `copies` of each in a row, of a data set that is no domain's.

        Nothing remembers them. Raises ValueError for a row whose column `domain` names none, where there are several.
        """
        prompts = self.data.tokenized(self.data.asked(row) for row in rows)
        requests = [
            Request(
                prompt_ids=prompt.ids,
                seed=completion_seed(self.seed, NO_DRAW, prompt.id, self.policy.rank, i),
                max_tokens=self.data.limits[prompt.domain],
            )
            for i, prompt in enumerate(prompts)
        ]
        read = self.policy.read(prompts, self._complete(prompts, requests, copies))
        scorer = self.scorer.apart()
        rewards = together(lambda: scorer(read), scorer.slow, gather_object)
        graded = [replace(c, reward=reward) for c, reward in zip(read, rewards, strict=True)]
        first = self.policy.rank * len(rows)  # a group may straddle ranks: each row is handed over as one of its own
        parts = [(first + i, Group.of([c], draw=NO_DRAW)) for i, c in enumerate(graded)]
        return Rollout(rows=dict(enumerate(graded)), groups=dict(gather_object(parts)), size=1, seconds=0.0)

    def _replacements(self, rollout: Rollout) -> dict[int, Prompt]:
        """Return a further prompt of the same domain for each useless group, as far as there are any."""
        useless = {k: group for k, group in rollout.groups.items() if not self.advantages.is_useful(group)}
        spares = self.curriculum if self.spares is None else self.spares
        prompts = self._agreed(spares.refill(Counter(group.domain for group in useless.values())))
        found: dict[int, Prompt] = {}
        for k, group in useless.items():
            of_domain = [p for p in prompts if p.domain == group.domain and p not in found.values()]
            if of_domain:
                found[k] = of_domain[0]
        if useless:
            self._note(refill_line(rollout.rounds + 1, list(useless.values()), list(found.values())))
        return found

    def _note(self, refill: dict[str, Any]) -> None:
        if self.kept is not None:
            self.kept.append(refill)
        elif self.recorder is not None and self.policy.rank == 0:
            self.recorder.record_refill(self.policy.next_step, refill)

    def _sample(self, draw: int, refill_round: int, prompts: Mapping[int, Prompt], n_rows: int) -> Rollout:
        """Generate and score the group of each place; this rank makes the rows that are its own.

        With `look`, first that many completions of each, then the rest of the groups that are not stopped early.
        """
        size = self.policy.group_size
        look = self.look or size
        this = Round(draw=draw, refill_round=refill_round, n_rows=n_rows, before=_copies_before(prompts))
        rows, groups, seconds = self._generate(this, prompts, range(look))
        going_on = {k: prompts[k] for k, group in groups.items() if look < size and self._goes_on(group)}
        if going_on:
            more_rows, more, more_seconds = self._generate(this, going_on, range(look, size))
            groups = {k: group.joined(more[k]) if k in more else group for k, group in groups.items()}
            rows, seconds = rows | more_rows, seconds + more_seconds
        if self.look is not None:  # selected by rewards, but in domains with a diversity reward
            groups = {
                k: group if group.domain in self.fusion.domains else replace(group, look=look)
                for k, group in groups.items()
            }
        fused = self.fusion(list(groups.values()), lambda g: self.data.rows_of(g.domain)[g.prompt_id].prompt)
        if self.is_placebo:  # by place: alike on every rank
            told = f"{self.seed}/{draw}/{refill_round}"
            fused = [g.shuffled(random.Random(f"{told}/{k}")) for k, g in zip(groups, fused, strict=True)]
        rows = filled(rows, [k for k in prompts if k not in going_on], look, size)
        return Rollout(rows=rows, groups=dict(zip(groups, fused, strict=True)), size=size, seconds=seconds)

    def _goes_on(self, seen: Group) -> bool:
        """Return whether a group may have a gradient by its first completions; always where a reward is missing or fused
        later."""
        return None in seen.rewards or seen.domain in self.fusion.domains or self.advantages.is_useful(seen)

    def _generate(
        self, this: Round, prompts: Mapping[int, Prompt], members: range
    ) -> tuple[dict[int, Completion], dict[int, Group], float]:
        """Return these members of each group: this rank's rows, the groups of all ranks, the seconds it took."""
        rank, size = self.policy.rank, self.policy.group_size
        mine = range(rank * this.n_rows, (rank + 1) * this.n_rows)
        places = [i for k in prompts for i in range(k * size + members.start, k * size + members.stop) if i in mine]
        names = dict.fromkeys(prompts[i // size] for i in places)
        drawn = self.data.tokenized([self.data.rows_of(name.domain)[name.id] for name in names])
        filled_in = dict(zip(names, drawn, strict=True))
        asked = [filled_in[prompts[i // size]] for i in places]
        requests = [
            Request(
                prompt_ids=prompt.ids,
                seed=completion_seed(self.seed, this.draw, prompt.id, this.refill_round, this.member(i, size)),
                max_tokens=self.data.limits[prompt.domain],
            )
            for i, prompt in zip(places, asked, strict=True)
        ]
        started = time.perf_counter()
        ahead = EarlyGrading(self.scorer, asked, self.policy.read)
        completions = self._complete(asked, requests, len(members), ahead.take if self.scorer.slow else None)
        seconds = time.perf_counter() - started
        read = self.policy.read(asked, completions)
        rewards = together(lambda: ahead.scores(read), self.scorer.slow, gather_object)
        signs = self.shortcuts.inspect(read)
        graded = [replace(c, reward=r, signs=s) for c, r, s in zip(read, rewards, signs, strict=True)]
        rows = dict(zip(places, graded, strict=True))
        return rows, self._gathered(this.draw, rows, len(members)), seconds

    def _complete(
        self, prompts: Sequence[Prompt], requests: Sequence[Request], copies: int, on_finished: OnFinished | None = None
    ) -> list[Completion]:
        if self.by is None:
            return self.policy.complete(requests, copies, on_finished)
        return self.by.complete(prompts, requests, copies, on_finished)

    def _gathered(self, draw: int, rows: Mapping[int, Completion], members: int) -> dict[int, Group]:
        """Return the groups of all ranks, of so many members each; tokens stay where they were made.

        Raises ValueError where one is not whole.
        """
        size = self.policy.group_size
        compared = self.fusion.compares(self.data.names if self.advantages.partitioner else ())
        parts = [
            (k, Group.of(of, draw=draw, compare=compared.get(of[0].prompt.domain)))
            for k, places in groupby(rows, key=lambda i: i // size)
            for of in [[rows[i] for i in places]]
        ]
        groups: dict[int, Group] = {}
        for k, part in gather_object(parts):
            groups[k] = groups[k].joined(part) if k in groups else part
        if odd := {k: len(group.rewards) for k, group in groups.items() if len(group.rewards) != members}:
            raise ValueError(f"groups of {members} completions were asked for; by their place, got {odd}")
        return groups

    def _agreed(self, prompts: list[Prompt]) -> list[Prompt]:
        """Return rank 0's prompts on every rank."""
        return broadcast_object(prompts)


def refill_line(refill_round: int, dead: Sequence[Group], by: Sequence[Prompt]) -> dict[str, Any]:
    """Return what is written of a refill: per domain the groups that taught nothing, by cause, and the prompts found."""
    names = ("all_correct", "all_wrong", "all_equal", "ungraded")
    causes: dict[str, dict[str, int]] = {}
    for group in dead:
        causes.setdefault(group.domain, dict.fromkeys(names, 0))[group.cause] += 1
    line = {"round": refill_round, "dead": causes, "short": len(dead) - len(by)}
    return line | {"prompts": [prompt.id for prompt in by]}


def _copies_before(prompts: Mapping[int, Prompt]) -> dict[int, int]:
    """Return, for each place, how often its prompt stands at an earlier one."""
    seen: Counter[Prompt] = Counter()
    found = {}
    for place, prompt in prompts.items():
        found[place] = seen[prompt]
        seen[prompt] += 1
    return found
