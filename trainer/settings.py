"""Settings of data, evaluation, diversity, checkpoints, update and faults, as a recipe or a script gives them.

`TrainerSettings` has all of a trainer together, and refuses what contradicts. Imports no torch.

Settings of what needs no torch stand beside the code that reads them: `curricula.records.Domain`,
`curricula.prompts.pool.PoolSettings`, `curricula.monitors.entropy_control.EntropySettings` and `guardrails.Guardrail`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from polyphony.curricula.declarations import MOST, as_settings, nearest, settings
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import FULL_REWARD, AdvantageKind, Compared, Domain, Fused, Group
from polyphony.curricula.schedulers import find_scheduler
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.rewards.partitions import Partitioner, Same, connected, find_partitioner
from polyphony.rewards.registry import named
from polyphony.trainer.environments.settings import EnvironmentSettings, check_acting
from polyphony.trainer.guarded import check_recoveries
from polyphony.trainer.run.folder import holds_transfer, read_transfer
from polyphony.trainer.sft.settings import SftSettings
from polyphony.trainer.teachers.settings import DistilSettings, TeacherSettings, check_teachers


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
class Diversity:
    """Reward a good answer more if others of its group say something else: quality fused with difference (DARLING).

        div_i = (n - |class of i|) / (n - 1), at least `floor`;    r_i = shape(q_i) * div_i

    For open-ended domains: whole groups, gathered across ranks, with the qualities q that the domain's reward gave. Where
    answers are right or wrong, correctness is never traded for difference: `check_verifiable`. Source: arXiv:2509.02534.

    Example: `Diversity(floor=0.2).fused([[True, True], [True, True]], (1.0, 0.5)).rewards == (0.2, 0.1)`
    """

    partitioner: Any = "embedding"
    """Tells which answers say the same: `embedding` (needs the extra `diversity`), `exact`, `normalised`,
    `answer_signature`, `classifier`, `judge`, an import path, or `{name: .., **arguments}`."""
    compare: Compared = "answers"
    """What is compared in a domain that acts: the policy's last turn, or all that was said, tools' answers among it."""
    fuse: Literal["mul", "add"] = "mul"
    """`mul`: quality times difference. `add`: quality, standardised within the group, plus `coefficient` times
    difference."""
    distance: Literal["classes", "pairs"] = "classes"
    """`classes`: difference is the share of other answers outside one's own class; classes are transitively closed, as in
    DARLING's code. `pairs`: the mean over pairs, as in its paper; one false "same" then merges no classes."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Smallest difference, which a group whose answers all say the same keeps (0.1 in DARLING's code); 1 measures
    difference without rewarding it."""
    shape: tuple[float, float] | None = None
    """What qualities 1 and 0 become before `mul`. [1, 0], which null stands for, gives a wrong answer nothing, [1, -1]
    discourages different wrong answers, [2, 1] encourages them. A structured domain must say it, and is refused if a
    different wrong answer could earn as much as a right one."""
    coefficient: float = Field(default=0.5, ge=0)
    """Under `add`: full difference in standard deviations of quality."""
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

    accept_from: float = Field(default=FULL_REWARD, ge=-MOST)
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
    distil: DistilSettings | None = None
    """On-policy distillation: a recipe's `algorithm: distil`."""
    sft: SftSettings | None = None
    """Fine-tuning on a file of answers: a recipe's `algorithm: sft`. A `DomainGRPOTrainer` of such settings samples and
    evaluates, and is not trained."""
    teachers: dict[str, TeacherSettings] = Field(default_factory=dict)
    """By name; `domains.<d>.teacher` says which teaches a domain."""

    @field_validator("distil")
    @classmethod
    def _is_one_algorithm(cls, distil: DistilSettings | None, info: Any) -> DistilSettings | None:
        if distil is not None and info.data.get("rft") is not None:
            raise ValueError("rft and distil are two algorithms: give one")
        return distil

    @property
    def algorithm(self) -> str:
        """As a recipe calls it."""
        named = ((self.rft, "rft"), (self.distil, "distil"), (self.sft, "sft"))
        return next((name for given, name in named if given is not None), "grpo")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSettings:
    """All that is set of a trainer beside TRL's arguments.

    Example: `TrainerSettings.of(pool={"look": 4}).check([math], engine="vllm", of_trl={"num_generations": 8}.get)`
    """

    evaluation: EvaluationSettings
    entropy: EntropySettings
    pool: PoolSettings | None
    update: UpdateSettings
    faults: FaultSettings
    checkpoint: CheckpointSettings
    environments: EnvironmentSettings
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
            environments=as_settings(EnvironmentSettings, given.get("environments")),
            guardrails=tuple(as_settings(Guardrail, guardrail) for guardrail in guardrails),
            max_grader_failures=max_grader_failures,
        )

    def with_samples(self, asked: int | None) -> TrainerSettings:
        """Return settings by which held-out items are sampled as often as TRL's `num_generations_eval` asks for.

        Raises ValueError where `evaluation.samples` says otherwise.
        """
        given = self.evaluation.samples
        if asked is None or asked == given:
            return self
        if given != EvaluationSettings().samples:
            raise ValueError(f"num_generations_eval={asked} and evaluation.samples={given}: say one of them")
        return replace(self, evaluation=replace(self.evaluation, samples=asked))

    def check(self, domains: Sequence[Domain], *, engine: Any, of_trl: Callable[[str], Any]) -> None:
        """Raise ValueError for domains that there are not, and for what excludes another.

        `of_trl` returns the value of a field of TRL's arguments.
        """
        names = [domain.name for domain in domains]
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
        if self.pool is not None:
            self.pool.check_look(of_trl("num_generations"))
        if self.evaluation.greedy and (engine == "transformers" or of_trl("use_vllm")):
            by = "use_vllm (TRL's own engine)" if of_trl("use_vllm") else "engine transformers"
            raise ValueError(f"greedy evaluation needs an engine of ours; {by} samples everything alike")
        check_acting(domains, self.guardrails, algorithm=self.update.algorithm, engine=engine, of_trl=of_trl)
        if self.update.sft is None:
            check_teachers(self.update.teachers, self.update.distil, domains, of_trl, pool=self.pool)
        check_recoveries(self.guardrails, domains, self.update.distil, of_trl)

    @property
    def spare(self) -> dict[str, Any]:
        """By domain that is only watched, the rows to recover it with."""
        return {guardrail.domain: guardrail.prompts for guardrail in self.guardrails if guardrail.prompts is not None}


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
