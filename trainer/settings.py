"""How entropy, evaluation and update are set: what a recipe or a script says of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from polyphony.curricula.monitors.entropy_control import MOST, PUSH, RATE, Control, Rows
from polyphony.curricula.records import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """How held-out sets are scored."""

    samples: int = 4
    """Completions an item."""
    shown: int = 3
    """Items of each domain whose first completion is kept for people to read."""
    greedy: bool = False
    """Also decode every item greedily, apart from the samples."""
    kl_items: int = 64
    """Items of each domain on which the distance to the base model is measured: their forward passes are what it costs;
    0 leaves it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropySettings:
    """What is allowed, and whether the trainer acts on it."""

    band: tuple[float, float] = (0.5, 1.5)
    """Multiples of each domain's entropy in the base model."""
    control: Control | Mapping[str, Control] = "none"
    """For all domains or by domain. `sampling` is the curriculum's (`entropy_control` of the scheduler `adaptive`)."""
    push: float = PUSH
    rate: float = RATE
    max_coefficient: float = MOST
    rows: Rows = "unsolved"


Kind = Literal["group", "mean_only"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """What a rare success may do, and what a suspicious one may not."""

    cap: float = 2.0
    """Largest advantage; sqrt(G - 1) passes it from G = 6 on. 2.0 is what the study's remedies were given."""
    drop_shortcuts: bool = True
    """Whether a success that shows signs of a shortcut leaves its group."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class RftSettings:
    """Which samples are accepted."""

    accept_from: float = 1.0
    """Smallest reward of an accepted sample; 1 is the full reward of a verifiable answer."""
    top_k: int | None = None
    """Most samples a prompt, the best first; None takes all accepted."""
    dedup: Any = None
    """A partitioner (`exact`, `normalised`, `answer_signature`, ..): one sample of each semantic class; None keeps all."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"rft: top_k must be at least 1, got {self.top_k}")

    def is_useful(self, group: Group) -> bool:
        """Whether a group has anything to be learned from."""
        return any(r >= self.accept_from for r in group.graded)
