"""The recipe's sections, strict and frozen; `launch.recipe.Recipe` puts them together.

In order: what is practised when, how it is measured, what is kept and who is told; what a recipe says of a domain: its rows,
its reward, and how answers that differ are paid; who generates, who trains where, and what a run puts up with; which prompts
are worth their rollouts, and what of them reaches the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from polyphony.curricula.monitors.entropy_control import MOST, PUSH, RATE, Control, Means, Rows, controlled


class Section(BaseModel):
    """One section of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def named(spec: Any) -> Any:
    """Check what names an exchangeable part, and return it as it is."""
    if not isinstance(spec.get("name") if isinstance(spec, Mapping) else spec, str):
        raise ValueError("expected a name, pkg.module:name, or a mapping with `name`")
    return spec


def default_of(section: BaseModel, name: str) -> Any:
    """Return what a key of the section is where the recipe does not say."""
    return type(section).model_fields[name].default


class CurriculumSection(BaseModel):
    """`scheduler` by registry name or import path; every other key is a setting of that scheduler."""

    model_config = ConfigDict(extra="allow", frozen=True)
    scheduler: str = "auto"
    transfer: str | None = None
    """A probe's `transfer.json`: what schedulers that plan start from, and what the report draws."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EvalSection(Section):
    """Held-out evaluation of all domains."""

    every: int = Field(default=50, ge=1)
    """Optimizer steps between evaluations; there is always one before the first step and one after the last."""
    samples: int = Field(default=4, ge=1)
    """Completions an item."""
    shown: int = Field(default=3, ge=0)
    """Items of each domain whose completion is kept for people to read."""
    greedy: bool = False
    """Also decode every item greedily, apart from the samples; `polyphony eval` always does."""
    kl_items: int = Field(default=64, ge=0)
    """Items of each domain on which the distance to the base model is measured; 0 leaves it out."""


class CheckpointSection(Section):
    """What is saved on the way, beside `final/`."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; by default as often as evaluations."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; the best by worst domain is kept as well."""


class ProbeSection(Section):
    """`polyphony probe`: what training on one domain alone does to every domain."""

    steps: int = Field(default=40, ge=1)
    """Optimizer steps of each single-domain run."""
    seeds: int = Field(default=2, ge=1)
    """Repetitions; with one, intervals know of evaluation noise only."""
    start: str = Field(default="base", alias="from")
    """Where every run starts: `base` (the recipe's model), `joint:<steps>` (after that many steps on all domains), or
    the folder of a checkpoint. From the base, transfer is partly format learning that later stages saturate; from a
    warmed policy it is erosion, smaller and harder to see. `base` because in the lab its probes ranked the 24 trained
    orders better (rank correlation .33 against .06; one world, one training seed: launch/lab/RESULTS.md)."""
    joint_arm: bool = True
    """Also train on all domains for the same total of steps: what a sequence has to beat."""


class GuardrailSection(Section):
    """How much a domain, trained or only watched, may lose before something is done; judged with confidence."""

    max_drop: float = Field(ge=0, le=1)
    action: Literal["warn", "stop", "rollback"] = "warn"
    """`rollback` reloads the checkpoint whose worst domain was best, and the scheduler is told."""


class DataSection(Section):
    """How rows are taken in."""

    overlap: Literal["drop", "keep", "error"] = "drop"
    """What happens to training rows that repeat held-out rows."""
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    """Largest share of a domain's rows whose reference its reward cannot read; they are left out, past it the recipe is."""


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "polyphony"
    entity: str | None = None


class TrackingSection(Section):
    """Trackers of ours; others work through `grpo.report_to`."""

    wandb: WandbSection | None = None


class DiversitySection(Section):
    """How answers of a group that say something else than their siblings are rewarded (`polyphony.rewards.diversity`)."""

    partitioner: Any = "embedding"
    """What tells which answers say the same: registry name, import path, or `{name: .., **arguments}`."""
    fuse: Literal["mul", "add"] = "mul"
    distance: Literal["classes", "pairs"] = "classes"
    floor: float = Field(default=0.1, ge=0, le=1)
    """Difference that an answer keeps where all say the same; 1 measures without rewarding."""
    shape: tuple[float, float] | None = None
    """What quality 1 and quality 0 become before `mul`; a structured domain must say it."""
    coefficient: float = Field(default=0.5, ge=0)
    """Of `add`."""
    add_bias: bool = False

    @field_validator("partitioner")
    @classmethod
    def _names_a_partitioner(cls, partitioner: Any) -> Any:
        return named(partitioner)


class DomainSection(Section):
    """One domain; without `train` it is watch-only."""

    kind: Literal["structured", "open_ended"]
    train: Any = None
    """Path, `hf://org/name`, `{path, split, limit}` or `{generator: pkg.module:function, ..}`."""
    heldout: Any
    reward: Any
    """Registry name, import path, or `{name: .., **arguments}`."""
    weight: float = Field(default=1.0, ge=0)
    advantages: Literal["group", "mean_only"] | None = None
    """As the recipe's `advantages`, for this domain alone."""
    max_completion_length: int | None = Field(default=None, ge=1)
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    diversity: DiversitySection | None = None

    @field_validator("reward")
    @classmethod
    def _names_a_reward(cls, reward: Any) -> Any:
        return named(reward)

    @field_validator("diversity")
    @classmethod
    def _keeps_right_above_wrong(cls, diversity: DiversitySection | None, info: Any) -> DiversitySection | None:
        if diversity is not None and info.data.get("kind") == "structured":
            from polyphony.rewards.diversity import Diversity  # slow to import

            Diversity(**{**diversity.model_dump(), "partitioner": "exact"}).check_verifiable()
        return diversity


NOT_FREE = {
    "model": "model",
    "gpu_memory_utilization": "grpo.vllm_gpu_memory_utilization",
    "max_model_len": "grpo.vllm_max_model_length",
    "enable_sleep_mode": "grpo.vllm_enable_sleep_mode",
    "model_impl": "grpo.vllm_model_impl",
    "trust_remote_code": "grpo.trust_remote_code",
    "tensor_parallel_size": "rollouts.tensor_parallel",
    "seed": "grpo.seed",
    "logprobs_mode": "nothing (importance correction needs what was sampled from)",
    "distributed_executor_backend": "rollouts.engine",
    "weight_transfer_config": "rollouts.engine",
}
"""Arguments of `vllm.LLM` that a recipe sets elsewhere, and where."""


class RolloutsSection(Section):
    """Who generates."""

    engine: Literal["vllm", "ray", "transformers"] = "vllm"
    """`vllm`: in the trainer's process; `ray`: a pool of workers; `transformers`: no engine of its own."""
    workers: int = Field(default=1, ge=1)
    """Of `engine: ray`; each holds one vLLM."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs (CPU build: cores) of each worker."""
    max_staleness: int = Field(default=0, ge=0)
    """Completions of a worker that is up to so many weight syncs behind are kept and importance-corrected; older ones
    are refused and sampled again."""
    timeout_s: float = Field(default=600.0, gt=0)
    """A worker that has not finished its share of a draw after so many seconds counts as hung and is replaced."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """How long a cluster and its workers may take to come up; large models read their weights for minutes."""
    address: str | None = None
    """Of the Ray cluster, `host:port` or `auto`; by default `RAY_ADDRESS`, or a cluster of this machine."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `vllm.LLM`, handed over untouched: `max_num_seqs`, `enforce_eager`, `kv_cache_dtype`, `quantization`.
    Memory, length and sleep have TRL's names: `grpo.vllm_gpu_memory_utilization`, `vllm_max_model_length`,
    `vllm_enable_sleep_mode`."""
    max_grader_failures: float = Field(default=0.5, ge=0, le=1)
    """Largest share of a domain's completions in one draw that its reward may fail on before the run stops."""

    @model_validator(mode="after")
    def _pool_needs_ray(self) -> RolloutsSection:
        pool = {"workers", "tensor_parallel", "max_staleness", "timeout_s", "start_timeout_s", "address"}
        if self.engine != "ray" and (changed := sorted(n for n in pool if getattr(self, n) != default_of(self, n))):
            raise ValueError(f"{', '.join(changed)} belong to engine: ray, this recipe has engine: {self.engine}")
        return self

    @model_validator(mode="after")
    def _engine_args_are_free(self) -> RolloutsSection:
        for name in self.engine_args:
            if name in NOT_FREE:
                raise ValueError(f"engine_args.{name} is set by Polyphony: use {NOT_FREE[name]}")
        return self


class FaultsSection(Section):
    """What a run puts up with."""

    max_skipped: int = Field(default=3, ge=0)
    """Steps in a row whose loss or gradient is not finite; each is left out and counted, one more stops the run."""
    grace_s: float = Field(default=30.0, gt=0)
    """Seconds from SIGTERM to the kill that follows; 30 is the default of Slurm and of Kubernetes."""


class SlurmSection(Section):
    """What `polyphony launch slurm` asks Slurm for."""

    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    """Wall-clock limit; the job saves a checkpoint before it, and is queued again."""
    signal_s: int = Field(default=120, ge=10)
    """Seconds before the limit, or before a preemption, at which the job is told; a draw and a save have to fit in."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines before anything else: `module load ..`, `source venv/bin/activate`."""
    options: list[str] = Field(default_factory=list)
    """Further #SBATCH options, such as `--gres=gpu:8` or `--qos=long`."""


class ClusterSection(Section):
    """Who trains where; read by `polyphony launch`, not by `train`."""

    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """How trainer ranks share the policy: `launch/accelerate/<strategy>.yaml`."""
    processes: int = Field(default=1, ge=1)
    """Trainer ranks on each trainer node, one a GPU; the other GPUs are the rollout workers'."""
    trainer_nodes: int = Field(default=1, ge=1)
    rollout_nodes: int = Field(default=0, ge=0)
    """Nodes that hold nothing but rollout workers; with 0 they live beside the trainer."""
    port: int = Field(default=29500, ge=1024, le=65535)
    """Where the trainer ranks meet."""
    ray_port: int = Field(default=6379, ge=1024, le=65535)
    slurm: SlurmSection = SlurmSection()


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
