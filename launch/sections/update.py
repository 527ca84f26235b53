"""Which prompts are worth their rollouts, and what of them reaches the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from polyphony.curricula.entropy_control import MOST, PUSH, RATE, Control, Means, Rows, controlled
from polyphony.launch.sections.base import Section, named


class RefillSection(Section):
    """Groups whose rewards are all equal are replaced within the draw by groups of further prompts of their domain."""

    max_rounds: int = Field(default=2, ge=0)
    """With half of the groups dead, two rounds leave about one in eight."""


class PoolSection(Section):
    """Choose prompts by what is known of their pass rates; without this section every prompt is drawn once a pass."""

    impossible_below: float = Field(default=0.05, gt=0, lt=1)
    """Pass rate below which, with 95 % confidence, a prompt is given up for long; takes about eight visits of eight."""
    defer_below: float = Field(default=0.125, gt=0, lt=1)
    """Posterior mean below which a prompt waits."""
    mastered_above: float = Field(default=0.9, gt=0, lt=1)
    """Posterior mean above which it is only reviewed."""
    discount: float = Field(default=0.99, ge=0.5, le=1)
    """Of earlier evidence at each visit."""
    sampling: str = "uniform"
    """Among the unseen and the active that do not rest: `uniform`, `thompson` (largest p (1 - p)), or an import path."""
    retry_share: float = Field(default=0.1, ge=0, le=1)
    """Largest share of a domain's prompts that are waiting ones whose turn has come."""
    retry_deferred: int = Field(default=10, ge=1)
    """Draws until a deferred prompt is tried again, longer after each further failure, and of rest after a group whose
    rewards were all alike; likewise the next two."""
    retry_mastered: int = Field(default=50, ge=1)
    retry_impossible: int = Field(default=100, ge=1)
    when_exhausted: Literal["continue", "stop"] = "continue"
    """Where every prompt of every domain is mastered or impossible: go on with the least bad, or stop with a message."""
    look: int | None = Field(default=None, ge=2)
    """Completions of a group that are sampled first; where these are all worth the same, the others are not sampled. Half of
    `grpo.num_generations` saves up to half of what dead groups cost; null samples every group whole."""
    refill: RefillSection = RefillSection()
    start: str | None = Field(default=None, alias="from")
    """`pool.npz` of a `screen`, or of an earlier run: what is known already, matched by the prompts' ids."""

    @model_validator(mode="after")
    def _is_a_band(self) -> PoolSection:
        if not self.impossible_below <= self.defer_below < self.mastered_above:
            raise ValueError("expected impossible_below <= defer_below < mastered_above")
        return self


class GuardSection(Section):
    """What a rare success may do (one of G is worth about sqrt(G - 1)), and what a suspicious one may not."""

    cap: float = Field(default=2.0, gt=0)
    """Largest advantage of a success in a group that has one, or a quarter at most."""
    drop_shortcuts: bool = True
    """Take out of its group every success with a sign that the domain's first established answers do not show."""


class UpdateSection(Section):
    """The update itself."""

    drop_dead: Literal["auto", "always", "never"] = "auto"
    """Leave out rows that cannot move the policy: `auto` where the gradient stays what it is, `always` or an error."""


class RftSection(Section):
    """`algorithm: rft`: train on accepted samples only."""

    accept_from: float = 1.0
    """Smallest reward of an accepted sample."""
    top_k: int | None = Field(default=None, ge=1)
    """Most samples a prompt, the best first."""
    dedup: Any = None
    """A partitioner's name: one sample of each semantic class."""

    @field_validator("dedup")
    @classmethod
    def _names_a_partitioner(cls, dedup: Any) -> Any:
        return dedup if dedup is None else named(dedup)


class LoraSection(Section):
    """Train low-rank adapters instead of all weights (PEFT); `final/` is merged."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    target_modules: str | list[str] = "all-linear"


class EntropySection(Section):
    """Token entropy of every domain, in multiples of the base model's at the run's first evaluation."""

    band: tuple[float, float] = (0.5, 1.5)
    """Where it should stay. Half: the structured domains of the lab lose that much while their score still rises."""
    control: Control | dict[str, Control] = "none"
    """What holds it there, for all domains or by domain (`{math: coefficient}`, the others not). `coefficient`: an entropy
    term in the loss, of each domain's own, fading inside the band. `sampling`: under the scheduler `adaptive`, a larger
    share for what moves the entropy back. `adaptive`: both, as far as the scheduler can."""
    push: float = Field(default=PUSH, ge=0)
    """Coefficient at once, for an entropy that is off by the base model's whole entropy."""
    rate: float = Field(default=RATE, gt=0)
    """Growth of the coefficient per draw for the same distance."""
    max_coefficient: float = Field(default=MOST, gt=0)
    """Either way; at 1 the term weighs as much as an advantage of 1."""
    rows: Rows = "unsolved"
    """Where a coefficient that raises entropy acts: in groups without a full reward, so that prompts that are solved may
    stay certain, or in `all` alike, which is TRL's own bonus."""

    def held(self, means: Means, domains: Sequence[str]) -> tuple[str, ...]:
        """Return the domains whose entropy is held by these means."""
        return controlled(self.control, means, domains)

    @property
    def asks_for_sampling(self) -> bool:
        """By that very word, so that a scheduler which cannot is an error; `adaptive` takes what there is."""
        return "sampling" in (self.control.values() if isinstance(self.control, dict) else [self.control])

    @field_validator("control", mode="before")
    @classmethod
    def _is_a_word(cls, control: Any) -> Any:
        words = get_args(Control)
        if any(word not in words for word in (control.values() if isinstance(control, dict) else [control])):
            raise ValueError(f"expected {', '.join(words[:-1])} or {words[-1]}, or one of them by domain")
        return control

    @field_validator("band")
    @classmethod
    def _holds_the_base_model(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= band[0] < 1 < band[1]:
            raise ValueError("expected multiples low < 1 < high of the base model's entropy")
        return band
