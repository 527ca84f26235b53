"""What each completion's reward is worth to the update, where TRL's own answer is not the wanted one.

`group` is TRL's: (r - mean) / std of the group. `mean_only` leaves the division out (Dr. GRPO, arXiv:2503.20783; DARLING,
arXiv:2509.02534), so that a group that nearly agrees is not blown up. A lone success among G binary rewards gets about
sqrt(G - 1) from `group`; the guard caps it, and takes it away where the completion shows signs of a shortcut
(arXiv:2605.28388); likewise of every success of a group that has hardly any. B rows of this rank, G completions a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from curricula.records import Domain, Group, mean
from rewards.partitions import find_partitioner
from trainer.rft import RftSettings, accepted
from trainer.scoring import Graded

Kind = Literal["group", "mean_only"]

RARE = 0.25
"""Share of the graded completions up to which the successes of a group may all be accidents; a lone one always may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """What a rare success may do."""

    cap: float = 2.0
    """Largest advantage; sqrt(G - 1) passes it from G = 6 on. 2.0 is what the study's remedies were given."""
    drop_shortcuts: bool = True
    """Whether a rare success that shows signs of a shortcut loses its advantage; the failures keep theirs."""

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"guard: cap must be above 0, got {self.cap}")


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateSettings:
    """How rewards become an update."""

    advantages: Kind = "group"
    """For domains that do not say."""
    guard: Guard | None = None
    rft: RftSettings | None = None
    """Rejection-sampling fine-tuning instead of group advantages."""
    drop_dead: Literal["auto", "always", "never"] = "never"
    """Whether rows that cannot move the policy leave the update: `auto` where the gradient stays the same."""


@dataclass(kw_only=True, slots=True)
class Advantages:
    """Turn the groups of a draw into advantages.

    Example: `Advantages(settings=settings, kinds=kinds, is_shortcut=watch.is_shortcut)(stock, groups, members, 0)`
    """

    settings: UpdateSettings
    kinds: Mapping[str, Kind]
    """Per domain."""
    is_shortcut: Callable[[Graded], bool]
    partitioner: Any = None
    """Tells classes of accepted completions apart, for rft with `dedup`."""

    def __call__(
        self, stock: torch.Tensor, groups: Sequence[Group], members: Sequence[Sequence[Graded]], first_row: int
    ) -> torch.Tensor:
        """Return the advantages [B] of this rank's rows, from TRL's own [B] and the groups of all ranks.

        `members` are the completions of each group, `first_row` the place of this rank's first row in the whole draw.
        """
        if self.settings.rft is not None:
            return self._accepted(stock, members, first_row)
        values = stock.clone()
        row = -first_row
        for group, completions in zip(groups, members, strict=True):
            if self.kinds[group.domain] == "mean_only":
                _put(values, row, dict(enumerate(mean_only(group.learned))))
            if not group.has_signal:
                _put(values, row, dict.fromkeys(range(len(completions)), 0.0))  # exactly, whatever rounding left
            if self.settings.guard is not None:
                self._guard(values, row, rare_successes(group.rewards), completions)
            row += len(completions)
        return values

    @classmethod
    def of(
        cls, settings: UpdateSettings, domains: Sequence[Domain], is_shortcut: Callable[[Graded], bool]
    ) -> Advantages:
        """Return the advantages of a run. Raises ValueError for an unknown `rft.dedup`."""
        dedup = settings.rft.dedup if settings.rft else None
        return cls(
            settings=settings,
            kinds={d.name: d.advantages or _default_kind(d, settings.advantages) for d in domains},
            is_shortcut=is_shortcut,
            partitioner=None if dedup is None else find_partitioner(dedup),
        )

    @property
    def is_stock(self) -> bool:
        """True where TRL's own advantages are what is wanted, bit for bit."""
        asks = self.settings.guard or self.settings.rft or self.settings.drop_dead != "never"
        return not asks and set(self.kinds.values()) == {"group"}

    def _guard(self, values: torch.Tensor, row: int, rare: Sequence[int], group: Sequence[Graded]) -> None:
        guard = self.settings.guard
        assert guard is not None
        for i in (i for i in rare if 0 <= row + i < len(values)):
            is_dropped = guard.drop_shortcuts and self.is_shortcut(group[i])
            values[row + i] = 0.0 if is_dropped else values[row + i].clamp(max=guard.cap)

    def _accepted(self, stock: torch.Tensor, groups: Sequence[Sequence[Graded]], first_row: int) -> torch.Tensor:
        """Return 1 for accepted rows and 0 for others, scaled so that the mean over all rows of all ranks is 1."""
        rft = self.settings.rft
        assert rft is not None
        chosen: list[int] = []
        start = 0
        for group in groups:
            keeps = accepted(group, rft, self.partitioner)
            if self.settings.guard is not None and self.settings.guard.drop_shortcuts:
                rare = rare_successes([g.reward for g in group])
                keeps = [i for i in keeps if i not in rare or not self.is_shortcut(group[i])]
            chosen += [start + i for i in keeps]
            start += len(group)
        values = torch.zeros_like(stock)
        _put(values, -first_row, dict.fromkeys(chosen, start / max(1, len(chosen))))
        return values


def mean_only(rewards: Sequence[float | None]) -> list[float]:
    """Return r - mean over the rewards of the group that exist, [G]; 0 for the others."""
    centre = mean([r for r in rewards if r is not None])
    return [0.0 if r is None else r - centre for r in rewards]


def rare_successes(rewards: Sequence[float | None]) -> list[int]:
    """Return the places of the full rewards of a group that has hardly any, one or `RARE`; else none."""
    passed = [i for i, r in enumerate(rewards) if r is not None and r >= 1.0]
    graded = sum(r is not None for r in rewards)
    return passed if graded > 1 and len(passed) <= max(1, int(RARE * graded)) else []


def _default_kind(domain: Domain, kind: Kind) -> Kind:
    """Fused rewards are dense: dividing by a group's std blows up small differences (DARLING, arXiv:2509.02534)."""
    return kind if domain.diversity is None else "mean_only"


def _put(values: torch.Tensor, row: int, at: Mapping[int, float]) -> None:
    """Set the values of those rows, counted from `row`, that are this rank's."""
    for i, value in at.items():
        if 0 <= row + i < len(values):
            values[row + i] = value
