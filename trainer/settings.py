"""Settings of data, evaluation, checkpoints, update and faults, as a recipe or a script gives them. Imports no torch.

`TrainerSettings` has all of a trainer together, and refuses what contradicts.

Settings of what needs no torch stand beside the code that reads them: `curricula.records.Domain`,
`curricula.prompts.pool.PoolSettings`, `curricula.monitors.entropy_control.EntropySettings` and `guardrails.Guardrail`,
`rewards.diversity.Diversity`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import FULL_REWARD, AdvantageKind, Group, as_settings, settings
from polyphony.curricula.schedulers import find_scheduler
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.rewards.registry import named
from polyphony.trainer.run.folder import holds_transfer, read_transfer


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
class CheckpointSettings:
    """Checkpoints during training; the trained policy is saved to `final/` in any case."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; null: as often as held-out evaluations."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept. The one whose lowest domain score is highest is kept as well."""


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
"""Largest share of a domain's last 256 completions whose grading may fail, and of its held-out items."""


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


def with_probes(given: Any) -> tuple[Any, TransferMatrix | None]:
    """Read the probes that a scheduler's settings name; return what `as_scheduler` takes, and the probes.

    A setting `transfer`, a probe's file, is for schedulers that plan, and for the run, whatever its scheduler. Raises
    ValueError for a file that is not there or not whole.
    """
    if not isinstance(given, Mapping):
        return given, None
    rest = {name: value for name, value in given.items() if name != "transfer"}
    if (probes := given.get("transfer")) is None:
        return rest, None
    if not isinstance(probes, TransferMatrix):
        if not holds_transfer(Path(str(probes))):
            raise ValueError(f"curriculum.transfer: file {probes} does not exist; `polyphony probe` writes it")
        try:
            probes = read_transfer(Path(str(probes)))
        except ValueError as error:
            raise ValueError(f"curriculum.transfer: {error}") from error
    takes = getattr(find_scheduler(given.get("scheduler", "auto")), "__dataclass_fields__", {})
    return rest | ({"transfer": probes} if "transfer" in takes else {}), probes
