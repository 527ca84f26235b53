"""How rows, evaluation, diversity, update and faults are set: what a recipe or a script says of them. Imports no torch.

Settings of what needs no torch stand where they act: `curricula.records.Domain`, `curricula.prompts.pool.PoolSettings`,
`curricula.monitors.entropy_control.EntropySettings` and `guardrails.Guardrail`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from polyphony.curricula.records import FULL_REWARD, AdvantageKind, Fused, Group, settings
from polyphony.rewards.partitions import Partitioner, Same, connected, find_partitioner
from polyphony.rewards.registry import named


@settings
class DataSettings:
    """How rows are taken in."""

    overlap: Literal["drop", "keep", "error"] = "drop"
    """What happens to training rows that repeat held-out rows."""
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    """Largest share of a domain's rows whose reference its reward cannot read; they are left out, past it the run is."""


@settings
class EvaluationSettings:
    """How held-out sets are scored, and how often in a run that keeps a folder."""

    every: int = Field(default=50, ge=1)
    """Optimizer steps between evaluations; there is always one before the first step and one after the last."""
    samples: int = Field(default=4, ge=1)
    """Completions an item."""
    shown: int = Field(default=3, ge=0)
    """Items of each domain whose first completion is kept for people to read."""
    greedy: bool = False
    """Also decode every item greedily, apart from the samples; `polyphony eval` always does."""
    kl_items: int = Field(default=64, ge=0)
    """Items of each domain on which the distance to the base model is measured: their forward passes are what it costs;
    0 leaves it out."""


@settings
class Diversity:
    """Reward an answer for being good and for being another than its siblings (DARLING, arXiv:2509.02534).

        div_i = (n - |class of i|) / (n - 1), at least `floor`;    r_i = shape(q_i) * div_i

    For open-ended domains: whole groups, gathered across ranks, with the qualities q that the domain's reward gave. Where
    answers are right or wrong, correctness is never traded for difference: `check_verifiable`.

    Example: `Diversity(floor=0.2).fused([[True, True], [True, True]], (1.0, 0.5)).rewards == (0.2, 0.1)`
    """

    partitioner: Any = "embedding"
    """A name of `PARTITIONERS`, an import path, `{name: .., **arguments}` or an object with `same`."""
    fuse: Literal["mul", "add"] = "mul"
    """`mul`: quality times difference. `add`: standardised quality of the group plus `coefficient` times difference."""
    distance: Literal["classes", "pairs"] = "classes"
    """`classes`: by the size of the own class, classes being transitively closed as in DARLING's code. `pairs`: the
    mean over the others, as in its paper; one false "same" then merges no classes."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """What a collapsed group keeps, by DARLING's code; 1 measures without rewarding."""
    shape: tuple[float, float] | None = None
    """What qualities 1 and 0 become before `mul`: (1, 0), which None stands for, gives a wrong answer nothing, (1, -1)
    discourages different wrong answers, (2, 1) encourages them. A structured domain must say it."""
    coefficient: float = Field(default=0.5, ge=0)
    """Of `add`: how many standard deviations of quality full difference is worth."""
    add_bias: bool = False
    """Subtract the group's lowest quality before `mul`: for reward models, whose scores may be negative."""

    @field_validator("partitioner")
    @classmethod
    def _may_be_one(cls, partitioner: Any) -> Any:
        return named(partitioner, method="same")

    @property
    def found(self) -> Partitioner:
        """The partitioner. Raises ValueError for one that does not exist."""
        return find_partitioner(self.partitioner)

    def fused(self, same: Same | None, qualities: Sequence[float | None]) -> Fused:
        """Return what becomes of one group; `same` says which texts say the same, None where that could not be told.

        A text alone keeps its quality. Raises ValueError on a negative quality under `mul` without `add_bias`.
        """
        if same is None:
            return Fused(rewards=(None,) * len(qualities), diversity=None, classes=None)
        diversity = self._diversity_of(same)
        return Fused(rewards=self._fuse(qualities, diversity), diversity=diversity, classes=tuple(connected(same)))

    def check_verifiable(self) -> None:
        """Raise ValueError where a wrong answer could earn as much as a right one by being different.

        For domains whose answers are right or wrong: they have to say what becomes of either, by `mul` and `shape`.
        """
        if self.shape is None or self.fuse != "mul":
            raise ValueError(
                "answers that are right or wrong need fuse: mul and an explicit shape, as [1, 0]: what right and wrong "
                "become before difference is multiplied in"
            )
        right, wrong = self.shape
        if not right * self.floor > max(wrong, 0.0):
            raise ValueError(
                f"shape [{right:g}, {wrong:g}] with floor {self.floor} lets a different wrong answer earn as much as a "
                "right one: right x floor must exceed wrong, and 0"
            )

    def _diversity_of(self, same: Same) -> tuple[float, ...]:
        """Return `div_i` of each text of a group."""
        n = len(same)
        if n == 1:
            return (1.0,)
        classes = connected(same)
        alike = [classes.count(c) for c in classes] if self.distance == "classes" else [sum(row) for row in same]
        return tuple(max((n - count) / (n - 1), self.floor) for count in alike)

    def _fuse(self, qualities: Sequence[float | None], diversity: Sequence[float]) -> tuple[float | None, ...]:
        known = [q for q in qualities if q is not None]
        if not known:
            return tuple(qualities)
        if self.fuse == "add":
            mean = sum(known) / len(known)
            std = math.sqrt(sum((q - mean) ** 2 for q in known) / len(known))
            scaled = [None if q is None else (q - mean) / std if std else 0.0 for q in qualities]
            return tuple(
                None if q is None else q + self.coefficient * d for q, d in zip(scaled, diversity, strict=True)
            )
        base = min(known) if self.add_bias else 0.0
        if min(known) < base:
            raise ValueError(f"diversity: mul needs qualities >= 0, got {min(known)}; use fuse: add, or add_bias")
        right, wrong = self.shape or (1.0, 0.0)
        return tuple(
            None if q is None else (wrong + (right - wrong) * (q - base)) * d
            for q, d in zip(qualities, diversity, strict=True)
        )


@settings
class Guard:
    """What a rare success may do (one of G is worth about sqrt(G - 1)), and what a suspicious one may not."""

    cap: float = Field(default=2.0, gt=0)
    """Largest advantage of a success in a group that has one, or a quarter at most; sqrt(G - 1) passes it from G = 6 on.
    2.0 is what the study's remedies were given."""
    drop_shortcuts: bool = True
    """Take out of its group every success with a sign that the domain's first established answers do not show."""


@settings
class RftSettings:
    """Rejection-sampling fine-tuning: which samples are accepted, to be trained on alone."""

    accept_from: float = FULL_REWARD
    """Smallest reward of an accepted sample, any number; by default those that pass."""
    top_k: int | None = Field(default=None, ge=1)
    """Most samples a prompt, the best first; None takes all accepted."""
    dedup: Any = None
    """A partitioner (`exact`, `normalised`, `answer_signature`, ..): one sample of each semantic class; None keeps all."""

    @field_validator("dedup")
    @classmethod
    def _may_be_a_partitioner(cls, dedup: Any) -> Any:
        return None if dedup is None else named(dedup, method="same")

    def is_useful(self, group: Group) -> bool:
        """Whether a group has anything to be learned from."""
        return any(r >= self.accept_from for r in group.graded)


@settings
class RowSettings:
    """Which rows of a draw are in the update: a recipe's `update`."""

    drop_dead: Literal["auto", "always", "never"] = "auto"
    """Leave out rows that cannot move the policy: `auto` where the gradient stays what it is, `always` or an error."""


@settings
class UpdateSettings(RowSettings):
    """How rewards become an update; a recipe says the parts at its top: `advantages`, `guard`, `rft`."""

    advantages: AdvantageKind = "group"
    """For domains that do not say."""
    guard: Guard | None = None
    rft: RftSettings | None = None
    """Rejection-sampling fine-tuning instead of group advantages: a recipe's `algorithm: rft`."""


MAX_GRADER_FAILURES = 0.5
"""Largest share of a domain's completions in one draw that its reward may fail on before the run stops."""


@settings
class FaultSettings:
    """What a run puts up with."""

    max_skipped: int = Field(default=3, ge=0)
    """Steps in a row whose loss or gradient is not finite; each is left out and counted, one more stops the run."""
    grace_s: float = Field(default=30.0, gt=0)
    """Seconds from SIGTERM to the kill that follows; 30 is the default of Slurm and of Kubernetes."""


@settings
class WandbSettings:
    """Where a run is tracked by Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "polyphony"
    entity: str | None = None
