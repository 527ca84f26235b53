"""Advantages where a recipe asks for others than TRL's: `mean_only`, the guard, rejection-sampling fine-tuning.

`group` is TRL's: (r - mean) / std of the group. `mean_only` leaves the division out (Dr. GRPO, arXiv:2503.20783; DARLING,
arXiv:2509.02534), so that small differences within a group are not scaled up. A lone success among G binary rewards gets
about sqrt(G - 1) from `group`; the guard caps it, and every success of a group that has hardly any. A success that shows
signs of a shortcut (arXiv:2605.28388) is suspected: the guard gives it advantage 0 and computes the advantages of the
others of its group without it.

In rejection-sampling fine-tuning the policy is trained on its own accepted samples only (RAFT, arXiv:2304.06767), on
the same draws, scores and update as GRPO: an accepted row gets advantage 1, any other 0, so that on policy the gradient
is that of the log-likelihood of the accepted samples.

B rows of this rank, G completions a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polyphony.curricula.records import AdvantageKind, Domain, Group, mean, passed
from polyphony.curricula.recovery import Recoveries
from polyphony.rewards.partitions import connected, find_partitioner
from polyphony.trainer.settings import RftSettings, UpdateSettings


def accepted(group: Group, settings: RftSettings, partitioner: Any = None) -> list[int]:
    """Return the places of the completions of one group that are trained on, in order."""
    rewards = {i: r for i, r in enumerate(group.rewards) if r is not None and r >= settings.accept_from}
    best = sorted(rewards, key=lambda i: -rewards[i])  # stable: the earlier of equals first
    if partitioner is not None and best:
        best = _first_of_classes(best, [group.texts[i] for i in best], partitioner)
    return sorted(best[: settings.top_k])


def _first_of_classes(places: Sequence[int], texts: Sequence[str], partitioner: Any) -> list[int]:
    same = partitioner.same([list(texts)], [None])[0]
    if same is None:  # it could not tell: nothing is thrown away
        return list(places)
    seen: set[int] = set()
    return [i for i, c in zip(places, connected(same), strict=True) if not (c in seen or seen.add(c))]


RARE = 0.25
"""Share of the graded completions up to which the successes of a group may all be accidents; a lone one always may."""


@dataclass(kw_only=True, slots=True)
class Advantages:
    """Turn the groups of a draw into advantages.

    Example: `Advantages(settings=settings, kinds=kinds, find_suspects=watch.suspects)(stock, groups, 0)`
    """

    settings: UpdateSettings
    kinds: Mapping[str, AdvantageKind]
    """Per domain."""
    taught: frozenset[str] = frozenset()
    """Domains with a teacher: each of their tokens is learned from, so none of their groups is dead."""
    find_suspects: Callable[[Group], Sequence[int]]
    """The places of a group's suspects (`ShortcutWatch.suspects`)."""
    recoveries: Recoveries = field(default_factory=Recoveries)
    """Of the run: a domain that is distilled to recover it is taught meanwhile."""
    partitioner: Any = None
    """Tells classes of accepted completions apart, for rft with `dedup`."""

    def __call__(self, stock: torch.Tensor, groups: Sequence[Group], first_row: int) -> torch.Tensor:
        """Return the advantages [B] of this rank's rows, from TRL's own [B] and the groups of all ranks.

        Each group has a member a row; `first_row` is the place of this rank's first row in the whole draw.
        """
        if self.settings.rft is not None:
            return self._accepted(stock, groups, first_row)
        values = stock.clone()
        row = -first_row
        for group in groups:
            size = len(group.rewards)
            if self.kinds[group.domain] == "mean_only":
                _put(values, row, dict(enumerate(mean_only(group.learned))))
            if not group.has_signal:
                _put(values, row, dict.fromkeys(range(size), 0.0))  # exactly, whatever rounding left
            if self.settings.guard is not None:
                self._guard(values, row, group)
            row += size
        return values

    @classmethod
    def of(
        cls,
        settings: UpdateSettings,
        domains: Sequence[Domain],
        find_suspects: Callable[[Group], Sequence[int]],
    ) -> Advantages:
        """Return the advantages of a run. Raises ValueError for an unknown `rft.dedup`."""
        dedup = settings.rft.dedup if settings.rft else None
        return cls(
            settings=settings,
            kinds={d.name: d.advantages or _default_kind(d, settings.advantages) for d in domains},
            taught=frozenset(d.name for d in domains if d.teacher is not None),
            find_suspects=find_suspects,
            partitioner=None if dedup is None else find_partitioner(dedup),
        )

    def is_useful(self, group: Group) -> bool:
        """Return whether a group can move the policy."""
        opened = self.recoveries.open
        if opened is not None and opened.teacher and opened.domain == group.domain:  # it is learned from token by token
            return True
        if self.settings.rft:
            return self.settings.rft.is_useful(group)
        is_left_out = self.settings.distil is not None and self.settings.distil.others == "skip"
        return group.domain in self.taught or (group.has_signal and not is_left_out)

    @property
    def is_stock(self) -> bool:
        """True where TRL's own advantages are what is wanted, bit for bit."""
        asks = self.settings.guard or self.settings.rft or self.settings.drop_dead != "never"
        return not asks and set(self.kinds.values()) == {"group"}

    def _guard(self, values: torch.Tensor, row: int, group: Group) -> None:
        guard = self.settings.guard
        assert guard is not None
        suspects = self.find_suspects(group) if guard.drop_shortcuts else ()
        if suspects:
            _put(values, row, centred_without(suspects, group.learned, _here(values, row, len(group.rewards))))
        rewards = [None if i in suspects else r for i, r in enumerate(group.rewards)]
        for i in (i for i in rare_successes(rewards) if 0 <= row + i < len(values)):
            values[row + i] = values[row + i].clamp(max=guard.cap)

    def _accepted(self, stock: torch.Tensor, groups: Sequence[Group], first_row: int) -> torch.Tensor:
        """Return 1 for accepted rows and 0 for others, scaled so that the mean over all rows of all ranks is 1."""
        rft = self.settings.rft
        assert rft is not None
        chosen: list[int] = []
        start = 0
        for group in groups:
            keeps = accepted(group, rft, self.partitioner)
            if self.settings.guard is not None and self.settings.guard.drop_shortcuts:
                suspects = self.find_suspects(group)
                keeps = [i for i in keeps if i not in suspects]
            chosen += [start + i for i in keeps]
            start += len(group.rewards)
        values = torch.zeros_like(stock)
        _put(values, -first_row, dict.fromkeys(chosen, start / max(1, len(chosen))))
        return values


def mean_only(rewards: Sequence[float | None]) -> list[float]:
    """Return r - mean over the rewards of the group that exist, [G]; 0 for the others."""
    centre = mean([r for r in rewards if r is not None])
    return [0.0 if r is None else r - centre for r in rewards]


def rare_successes(rewards: Sequence[float | None]) -> list[int]:
    """Return the places of the full rewards of a group that has hardly any, one or `RARE`; else none."""
    full, graded = passed(rewards), sum(r is not None for r in rewards)
    return full if graded > 1 and len(full) <= max(1, int(RARE * graded)) else []


def centred_without(
    suspects: Sequence[int], learned: Sequence[float | None], here: Mapping[int, float]
) -> dict[int, float]:
    """Return the advantages of a group's rows on this rank with some taken out: 0 for these, the others centred anew.

    `learned` are the rewards of the whole group [G], `here` the advantages of those rows that are this rank's. What TRL
    divided by stays, whichever `scale_rewards` it was: (r - mean) / s becomes (r - mean of the others) / s. Rows that all
    lie on the mean say nothing of s and keep their 0.
    """
    centre = mean([r for r in learned if r is not None])
    others = [r for i, r in enumerate(learned) if r is not None and i not in suspects]
    if len(set(others)) < 2:
        return dict.fromkeys(here, 0.0)
    rewards = {i: reward for i in here if (reward := learned[i]) is not None}
    widest = max(rewards, key=lambda i: abs(here[i]), default=None)
    if widest is None or here[widest] == 0.0:
        return dict.fromkeys(here, 0.0)
    scale = (rewards[widest] - centre) / here[widest]
    return {i: 0.0 if i in suspects else (r - mean(others)) / scale for i, r in rewards.items()}


def _default_kind(domain: Domain, kind: AdvantageKind) -> AdvantageKind:
    """Fused rewards are dense: dividing by a group's std blows up small differences (DARLING, arXiv:2509.02534)."""
    return kind if domain.diversity is None else "mean_only"


def _here(values: torch.Tensor, row: int, size: int) -> dict[int, float]:
    """Return the values of those rows of a group, counted from `row`, that are this rank's."""
    return {i: float(values[row + i]) for i in range(size) if 0 <= row + i < len(values)}


def _put(values: torch.Tensor, row: int, at: Mapping[int, float]) -> None:
    """Set the values of those rows, counted from `row`, that are this rank's."""
    for i, value in at.items():
        if 0 <= row + i < len(values):
            values[row + i] = value
