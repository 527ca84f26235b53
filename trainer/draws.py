"""The walk of one draw: the curriculum names prompts, the engine samples their groups, the domains' rewards score them.

Groups that can teach nothing are replaced, in a bounded number of rounds, by groups of further prompts of the same domain.
With a look, a group whose first completions are all worth the same is left at these. That selects by rewards alone: where
they are 0 or 1, a group with both points, in expectation, where its prompt's policy gradient does, whatever their order. So
no direction changes, but prompts at which the policy nearly always fails, or never does, weigh less.
All is decided from what all ranks have gathered, so that all make the same number of rounds.

What a draw gave is a `Rollout`: rows on their rank, groups of all ranks, and the whole groups that TRL wants of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.records import Group, PromptRef
from polyphony.trainer.data import Prompt
from polyphony.trainer.diversity_reward import Fusion
from polyphony.trainer.domains import DomainData
from polyphony.trainer.engine.engine import Completion, Request, completion_seed
from polyphony.trainer.engine.vllm import OnFinished
from polyphony.trainer.scoring import (
    Ahead,
    Graded,
    Sample,
    Scorer,
    by_prompt,
    check_failures,
    form_group,
    grade,
    together,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One completion on the rank that it belongs to."""

    prompt: Prompt
    prompt_ids: list[int]
    completion: Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some groups of a draw, by their place in it."""

    rows: dict[int, Row]
    """Of this rank, by the row's place in the draw."""
    graded: dict[int, list[Graded]]
    """Of all ranks, [G] a group, fewer where a group was left after its look."""
    groups: dict[int, Group]
    seconds: float
    """Spent generating."""

    def part(self, places: Sequence[int], size: int) -> Batch:
        """Return the groups at these places."""
        return Batch(
            rows={i: row for i, row in self.rows.items() if i // size in places},
            graded={k: self.graded[k] for k in places},
            groups={k: self.groups[k] for k in places},
            seconds=0.0,
        )

    def joined(self, other: Batch) -> Batch:
        """Return both, the other's groups in the stead of one's own; the order of the draw is kept."""
        return Batch(
            rows=dict(sorted((self.rows | other.rows).items())),
            graded=dict(sorted((self.graded | other.graded).items())),
            groups=dict(sorted((self.groups | other.groups).items())),
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One draw, generated and scored: what the overridden TRL methods hand over."""

    batch: Batch
    """What goes on to the update."""
    size: int
    """Rows a group."""
    discarded: list[Batch] = field(default_factory=list)
    """Groups that taught nothing and were replaced, or came in vain as replacements."""
    rounds: int = 0
    """Refill rounds made."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """This rank's rows in TRL's form."""
        return [{"prompt": row.prompt.prompt} for row in self.batch.rows.values()]

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [row.prompt_ids for row in self.batch.rows.values()]

    @property
    def completions(self) -> list[Completion]:
        return [row.completion for row in self.batch.rows.values()]

    @property
    def groups(self) -> list[Group]:
        """Of all ranks, with what was sampled of each."""
        return list(self.batch.groups.values())

    @property
    def groups_of_rows(self) -> list[Group]:
        """Of all ranks, each with a member a row."""
        return [_filled_group(group, self.size) for group in self.groups]

    @property
    def members_of_rows(self) -> list[Sequence[Graded]]:
        """The completions of `groups_of_rows`."""
        return [_repeated(members, self.size) for members in self.batch.graded.values()]

    @property
    def rewards(self) -> list[float | None]:
        """What the update learns from, a reward a row of all ranks, in rank order."""
        return [reward for group in self.groups_of_rows for reward in group.learned]

    @property
    def all_graded(self) -> list[list[Graded]]:
        """Of all ranks, by group, those that were replaced too."""
        return [members for batch in (self.batch, *self.discarded) for members in batch.graded.values()]

    @property
    def discarded_groups(self) -> list[Group]:
        return [group for batch in self.discarded for group in batch.groups.values()]

    @property
    def discarded_completions(self) -> list[Graded]:
        return [g for batch in self.discarded for members in batch.graded.values() for g in members]


def filled(rows: dict[int, Row], left: Collection[int], look: int, size: int) -> dict[int, Row]:
    """Return the rows in order, where a group was left after its look with its completions once more in the empty places.

    TRL wants whole groups. What is repeated has no advantage, and stands for what was not sampled wherever a loss, a
    penalty or an entropy is averaged over all rows.
    """
    copies = {
        k * size + n: rows[k * size + n % look] for k in left for n in range(look, size) if k * size + n % look in rows
    }
    return dict(sorted((rows | copies).items()))


def _filled_group(group: Group, size: int) -> Group:
    """Return the group as its rows are: what `filled` repeats, repeated."""
    if len(group.rewards) == size:
        return group
    rewards, lengths, truncated = (_repeated(m, size) for m in (group.rewards, group.lengths, group.truncated))
    return replace(group, rewards=rewards, lengths=lengths, truncated=truncated)


def _repeated(members: Sequence[Any], size: int) -> tuple[Any, ...]:
    return tuple(islice(cycle(members), size))


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
    complete: Callable[[Sequence[Request], int, OnFinished | None], list[Completion]]
    """Samples this rank's requests, so many of each prompt in a row, with the policy's present weights, and tells of each
    that is finished."""
    to_samples: Callable[[Sequence[Prompt], Sequence[Completion]], list[Sample]]
    rank: int = 0
    world_size: int = 1
    look: int | None = None
    """Completions of a group that are sampled first; where these can teach nothing, the group is left at that."""
    refill_rounds: int = 0
    """Most rounds in which groups that teach nothing are replaced."""
    is_useful: Callable[[Group], bool] = lambda group: group.has_signal
    """Whether a group can move the policy."""
    inspect: Callable[[Sample], tuple[str, ...]] = lambda sample: ()
    """Finds signs of shortcuts in a completion."""
    with_texts: Collection[str] = ()
    """Domains whose texts all ranks get, beside those that compare them."""
    listeners: list[Callable[[Sequence[PromptRef]], None]] = field(default_factory=list)
    """Called on rank 0 with the prompts of every draw before they are generated."""
    refill_listeners: list[Callable[[int, Sequence[Group], Sequence[PromptRef]], None]] = field(default_factory=list)
    """Called on rank 0 before a refill is generated: its round, the groups to replace, the prompts found for them."""

    def roll_out(self, n_rows: int) -> Rollout:
        """Draw prompts for this rank's `n_rows` slots, generate their groups, score them, replace the useless ones."""
        draw = self.curriculum.draws
        refs = self._agreed(self.curriculum.draw(n_rows * self.world_size // self.group_size))
        for listen in self.listeners if self.rank == 0 else ():
            listen(refs)
        batch = self._sample(draw, 0, dict(enumerate(refs)), n_rows)
        check_failures(list(batch.groups.values()), most=self.max_grader_failures)
        discarded: list[Batch] = []
        rounds = 0
        while rounds < self.refill_rounds and (found := self._replacements(rounds + 1, batch.groups)):
            rounds += 1
            fresh = self._sample(draw, rounds, found, n_rows)
            better = [k for k, group in fresh.groups.items() if self.is_useful(group)]
            in_vain = [k for k in fresh.groups if k not in better]
            discarded += [batch.part(better, self.group_size), fresh.part(in_vain, self.group_size)]
            kept = fresh.part(better, self.group_size)
            batch = batch.joined(Batch(rows=kept.rows, graded=kept.graded, groups=kept.groups, seconds=fresh.seconds))
        return Rollout(batch=batch, size=self.group_size, discarded=discarded, rounds=rounds)

    def _replacements(self, refill_round: int, groups: Mapping[int, Group]) -> dict[int, PromptRef]:
        """Return a further prompt of the same domain for each useless group, as far as there are any."""
        useless = {k: group for k, group in groups.items() if not self.is_useful(group)}
        refs = self._agreed(self.curriculum.refill(Counter(group.domain for group in useless.values())))
        found: dict[int, PromptRef] = {}
        for k, group in useless.items():
            of_domain = [ref for ref in refs if ref.domain == group.domain and ref not in found.values()]
            if of_domain:
                found[k] = of_domain[0]
        for listen in self.refill_listeners if self.rank == 0 and useless else ():
            listen(refill_round, list(useless.values()), list(found.values()))
        return found

    def _sample(self, draw: int, refill_round: int, refs: Mapping[int, PromptRef], n_rows: int) -> Batch:
        """Generate and score the group of each place; this rank makes the rows that are its own.

        With a `look`, first that many completions of each, then the others of the groups that go on.
        """
        size, look = self.group_size, self.look or self.group_size
        this_round = Round(draw=draw, refill_round=refill_round, n_rows=n_rows, before=_copies_before(refs))
        rows, graded, seconds = self._generate(this_round, refs, range(look))
        going_on = {k: ref for k, ref in refs.items() if look < size and self._goes_on(graded[k])}
        if going_on:
            more_rows, more, more_seconds = self._generate(this_round, going_on, range(look, size))
            graded = {k: [*members, *more.get(k, ())] for k, members in graded.items()}
            rows, seconds = rows | more_rows, seconds + more_seconds
        groups = self.fusion(
            [form_group(members, draw=draw, look=self._selects(members)) for members in graded.values()],
            [g.text for members in graded.values() for g in members],
            lambda group: self.data.train[group.domain][group.prompt_id].prompt,
        )
        return Batch(
            rows=filled(rows, [k for k in refs if k not in going_on], look, size),
            graded=graded,
            groups=dict(zip(refs, groups, strict=True)),
            seconds=seconds,
        )

    def _goes_on(self, seen: Sequence[Graded]) -> bool:
        """Say whether a group may be useful, from its first completions: it is, or quality is not all that counts."""
        all_graded = all(g.reward is not None for g in seen)
        return not all_graded or seen[0].domain in self.fusion.domains or self.is_useful(form_group(seen, draw=0))

    def _selects(self, members: Sequence[Graded]) -> int | None:
        """Return the look after which rewards decided; None where all is sampled whatever the rewards."""
        return None if members[0].domain in self.fusion.domains else self.look

    def _generate(
        self, this: Round, refs: Mapping[int, PromptRef], members: range
    ) -> tuple[dict[int, Row], dict[int, list[Graded]], float]:
        """Return these members of each group: this rank's rows, the graded ones of all ranks, the seconds it took."""
        mine = range(self.rank * this.n_rows, (self.rank + 1) * this.n_rows)
        size = self.group_size
        places = [i for k in refs for i in range(k * size + members.start, k * size + members.stop) if i in mine]
        drawn = {ref: self.data.train[ref.domain][ref.id] for ref in {refs[i // size] for i in places}}
        prompts = [drawn[refs[i // size]] for i in places]  # one object a group, which is tokenised once
        prompt_ids = self.data.tokenize(prompts)
        requests = [
            Request(
                prompt_ids=ids,
                seed=completion_seed(self.seed, this.draw, prompt.id, this.refill_round, this.member(i, size)),
                max_tokens=self.data.limits[prompt.domain],
            )
            for i, prompt, ids in zip(places, prompts, prompt_ids, strict=True)
        ]
        started = time.perf_counter()
        ahead = Ahead(self.scorer, prompts, self.to_samples)
        completions = self.complete(requests, len(members), ahead.take if self.scorer.slow else None)
        seconds = time.perf_counter() - started
        samples = self.to_samples(prompts, completions)
        graded = gather_object(
            grade(
                samples,
                together(lambda: ahead.scores(samples), self.scorer.slow, gather_object),
                inspect=self.inspect,
                with_texts={*self.with_texts, *self.fusion.domains},
            )
        )
        made = {
            i: Row(prompt=prompt, prompt_ids=ids, completion=completion)
            for i, prompt, ids, completion in zip(places, prompts, prompt_ids, completions, strict=True)
        }
        return made, dict(zip(refs, by_prompt(graded, size=len(members)), strict=True)), seconds

    def _agreed(self, refs: list[PromptRef]) -> list[PromptRef]:
        """Return rank 0's prompts on every rank."""
        shared = [refs]
        broadcast_object_list(shared, from_process=0)
        return shared[0]


def _copies_before(refs: Mapping[int, PromptRef]) -> dict[int, int]:
    """Return, for each place, how often its prompt stands at an earlier one."""
    seen: Counter[PromptRef] = Counter()
    found = {}
    for place, ref in refs.items():
        found[place] = seen[ref]
        seen[ref] += 1
    return found
