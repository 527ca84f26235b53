"""Settings of data, evaluation, update and faults, as a recipe or a script gives them. Imports no torch.

Settings of what needs no torch stand beside the code that reads them: `curricula.records.Domain`,
`curricula.prompts.pool.PoolSettings`, `curricula.monitors.entropy_control.EntropySettings` and `guardrails.Guardrail`,
`rewards.diversity.Diversity`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from polyphony.curricula.records import FULL_REWARD, AdvantageKind, Group, settings
from polyphony.rewards.registry import named


@settings
class DataSettings:
    """How rows are read and checked."""

    overlap: Literal["drop", "keep", "error"] = "drop"
    """What happens to training rows that repeat a held-out prompt, or 13 words in a row of one: left out, kept with a
    warning, or refused."""
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    """Largest share of a domain's rows whose reference answer its reward cannot read. Up to it such rows are left out and
    named; past it the recipe is refused."""


@settings
class EvaluationSettings:
    """Held-out evaluation."""

    every: int = Field(default=50, ge=1)
    """Optimizer steps between evaluations; there is always one before the first step and one after the last."""
    samples: int = Field(default=4, ge=1)
    """Completions sampled for each item."""
    shown: int = Field(default=3, ge=0)
    """Items of each domain whose first completion is written to `samples.jsonl` for people to read."""
    greedy: bool = False
    """Also decode every item greedily, beside the samples; `polyphony eval` always does."""
    kl_items: int = Field(default=64, ge=0)
    """Items of each domain on which KL(base || policy) is measured, one forward pass each; 0 leaves it out."""


@settings
class Guard:
    """Limit the advantage of rare successes (one success in G has about sqrt(G - 1)) and exclude suspected shortcuts."""

    cap: float = Field(default=2.0, gt=0)
    """Largest advantage of a success in a group of which at most one, or a quarter, succeed. Without it sqrt(G - 1) is above
    2 from G = 6 on; 2.0 is the cap of the study whose remedies these are."""
    drop_shortcuts: bool = True
    """Leave a success out of its group if it shows a sign of a shortcut that the reference style does not show. The
    reference style is learned per domain from the first 64 correct completions of groups that are mostly correct. The
    group's other advantages are computed without it. False leaves only the cap: for policies that may find a legitimate
    shorter way."""


@settings
class RftSettings:
    """Rejection-sampling fine-tuning (`algorithm: rft`): train on accepted samples only."""

    accept_from: float = FULL_REWARD
    """Smallest reward of an accepted sample; 1 is the full reward."""
    top_k: int | None = Field(default=None, ge=1)
    """Most accepted samples of a prompt, best first; null: all."""
    dedup: Any = None
    """A partitioner (`exact`, `normalised`, `answer_signature`, ..) that keeps one sample of each set of samples that say
    the same; null keeps all."""

    @field_validator("dedup")
    @classmethod
    def _may_be_a_partitioner(cls, dedup: Any) -> Any:
        return None if dedup is None else named(dedup, method="same")

    def is_useful(self, group: Group) -> bool:
        """Whether a group has anything to be learned from."""
        return any(r >= self.accept_from for r in group.graded)


@settings
class RowSettings:
    """Which rows of a draw are in the forward and backward pass."""

    drop_dead: Literal["auto", "always", "never"] = "auto"
    """Leave out rows that contribute no gradient, those of groups with equal rewards: `auto` where the gradient stays
    exactly TRL's, `always` refuses a configuration where it would not, `never` keeps them."""


@settings
class UpdateSettings(RowSettings):
    """How rewards become an update; a recipe says the parts at its top: `advantages`, `guard`, `rft`."""

    advantages: AdvantageKind = "group"
    """For domains that do not say."""
    guard: Guard | None = None
    rft: RftSettings | None = None
    """Rejection-sampling fine-tuning instead of group advantages: a recipe's `algorithm: rft`."""


MAX_GRADER_FAILURES = 0.5
"""Largest share of a domain's completions in one draw whose grading may fail; past it the run stops."""


@settings
class FaultSettings:
    """Which faults a run tolerates."""

    max_skipped: int = Field(default=3, ge=0)
    """Most optimizer steps in a row whose loss or gradient is not finite: each is skipped and counted, one more stops the
    run."""
    grace_s: float = Field(default=30.0, gt=0)
    """Seconds between SIGTERM and the SIGKILL that follows, in which a checkpoint has to be saved; 30 is the default of
    Slurm and of Kubernetes."""


@settings
class WandbSettings:
    """Weights & Biases, served by a thread that training does not wait for."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """W&B's own modes; an offline run is uploaded by `wandb sync`."""
    project: str = "polyphony"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: your default."""
