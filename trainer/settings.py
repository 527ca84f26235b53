"""How rows, evaluation, checkpoints, update and faults are set: what a recipe or a script says of them. Imports no torch.

`TrainerSettings` has all of a trainer together, and refuses what contradicts.

Settings of what needs no torch stand where they act: `curricula.records.Domain`, `curricula.prompts.pool.PoolSettings`,
`curricula.monitors.entropy_control.EntropySettings` and `guardrails.Guardrail`, `rewards.diversity.Diversity`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import FULL_REWARD, AdvantageKind, Group, as_settings, settings
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
class CheckpointSettings:
    """What a run saves on the way, beside `final/`."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; by default as often as evaluations."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; the best by worst domain is kept as well."""


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


def nearest(name: str, known: Collection[str]) -> str:
    """Say which of the known names was meant, or list them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSettings:
    """All that is set of a trainer beside TRL's arguments.

    Example: `TrainerSettings.of(pool={"look": 4}).check(["math"], engine="vllm", of_trl={"num_generations": 8}.get)`
    """

    evaluation: EvaluationSettings
    entropy: EntropySettings
    pool: PoolSettings | None
    update: UpdateSettings
    faults: FaultSettings
    checkpoint: CheckpointSettings
    guardrails: tuple[Guardrail, ...]
    max_grader_failures: float

    @classmethod
    def of(cls, *, pool: Any = None, guardrails: Any = (), max_grader_failures: float, **given: Any) -> TrainerSettings:
        """Return settings that are given as instances, as mappings of their fields or as None. Raises ValueError."""
        if isinstance(guardrails, str | Mapping) or not isinstance(guardrails, Sequence):
            raise ValueError(f"guardrails: expected a list of them, got {guardrails!r}")
        if not (isinstance(max_grader_failures, int | float) and 0 <= max_grader_failures <= 1):
            raise ValueError(f"max_grader_failures: expected a share in [0, 1], got {max_grader_failures!r}")
        return cls(
            evaluation=as_settings(EvaluationSettings, given.get("evaluation")),
            entropy=as_settings(EntropySettings, given.get("entropy")),
            pool=None if pool is None else as_settings(PoolSettings, pool),
            update=as_settings(UpdateSettings, given.get("update")),
            faults=as_settings(FaultSettings, given.get("faults")),
            checkpoint=as_settings(CheckpointSettings, given.get("checkpoint")),
            guardrails=tuple(as_settings(Guardrail, guardrail) for guardrail in guardrails),
            max_grader_failures=max_grader_failures,
        )

    def check(self, names: Sequence[str], *, engine: Any, of_trl: Callable[[str], Any]) -> None:
        """Raise ValueError for domains that there are not, and for what excludes another.

        `of_trl` returns the value of a field of TRL's arguments.
        """
        asked = self.entropy.control if isinstance(self.entropy.control, Mapping) else {}
        limited = Counter(guardrail.domain for guardrail in self.guardrails)
        for key, of_domains in {"guardrails": limited, "entropy.control": asked}.items():
            for name in of_domains:
                if name not in names:
                    raise ValueError(f"unknown domain '{key}.{name}'; {nearest(name, names)}")
        if twice := [name for name, n in limited.items() if n > 1]:
            raise ValueError(f"guardrails: one a domain, there are more of {', '.join(twice)}")
        for name in ("entropy_coef", "use_adaptive_entropy", "use_liger_kernel"):
            if self.entropy.held("coefficient", names) and (value := of_trl(name)):
                raise ValueError(f"entropy.control and {name}={value} exclude each other; leave out one")
        look, size = self.pool and self.pool.look, of_trl("num_generations")
        if look is not None and look >= size:
            raise ValueError(f"pool.look: must be below num_generations={size}, got {look}")
        if self.evaluation.greedy and (engine == "transformers" or of_trl("use_vllm")):
            by = "use_vllm (TRL's own engine)" if of_trl("use_vllm") else "engine transformers"
            raise ValueError(f"greedy evaluation needs an engine of ours; {by} samples everything alike")
