"""What one draw gave: rows on their rank, groups of all ranks, and the whole groups that TRL wants of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

from polyphony.curricula.records import Group
from polyphony.trainer.data import Prompt
from polyphony.trainer.rollouts import Completion
from polyphony.trainer.scoring import Graded


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
