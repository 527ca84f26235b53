"""The recipe's sections that only launch acts on; those that others act on are declared there.

In order: what is practised when, what is kept and who is told; what a recipe says of a domain; who generates, who trains
where, and with which weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from polyphony.curricula.declarations import near, settings
from polyphony.curricula.records import Domain
from polyphony.rewards.registry import composed, named
from polyphony.trainer.merging.settings import Method
from polyphony.trainer.settings import MAX_GRADER_FAILURES, Diversity, WandbSettings


class CurriculumSection(BaseModel):
    """How much of each draw every domain gets. Keys beside these two are settings of the scheduler."""

    model_config = ConfigDict(extra="allow", frozen=True)
    scheduler: str = "auto"
    """A name from Schedulers below, or the import path `pkg.module:Class` of your own."""
    transfer: str | None = None
    """`transfer.json` of `polyphony probe`: measured transfer between domains, for schedulers that plan and for the
    report."""


@settings
class ProbeSection:
    """`polyphony probe`: train on one domain alone and measure the change of every domain's held-out score."""

    steps: int = Field(default=40, ge=1)
    """Optimizer steps of each single-domain run."""
    seeds: int = Field(default=2, ge=1)
    """Repetitions of each run; with one, intervals hold evaluation noise only, not that of training."""
    start: str = Field(default="base", validation_alias="from", serialization_alias="from")
    """The weights every probe run starts from: `base` (the recipe's model), `joint:<steps>` (after that many steps on all
    domains), or a checkpoint's folder. From the base model, part of what is measured is learning of the answer format;
    from a trained policy it is mostly forgetting, smaller and harder to measure. `base` is the default because in the lab
    its probes ranked 24 trained orders better (rank correlation .33 against .06; one world, one training seed, a
    learning rate that is too high: launch/lab/RESULTS.md)."""
    joint_arm: bool = True
    """Also train on all domains together for the same total of steps: the baseline of a sequence of domains."""
    placebo: bool = False
    """Also train on each domain's prompts with its rewards shuffled among the completions of each prompt: updates as
    large, on the same prompts, with as many dead groups, that teach nothing. What they change is damage by noise, and
    transfer is then told beyond it. One run a domain and seed, which doubles the cost of the single-domain runs: what noise
    does depends on the prompts that it comes from (how long the answers are, how many groups are dead), which one run over
    all domains could not tell apart, and both are compared seed by seed. Plans and schedulers decide by the whole change as
    ever: a run at this learning rate will see the noise too."""
    learning_rates: list[float] = Field(default_factory=list)
    """Rates to be tried beside `grpo.learning_rate`: each domain alone, and its placebo, for one seed, no joint run.
    Proposed is the highest of all rates below the lowest one that does harm: that moves the policy by more than 0.1 nats a
    token in a step, or with 95 % confidence lowers the very domain that is practised, or whose placebo lowers any other.
    Without `placebo` the last is not known."""
    keep: Literal["last"] | None = None
    """`last` keeps the weights that each domain alone and each seed ended with, in `kept/<domain>-<seed>`: with `lora` the
    adapter to what `provenance.json` beside it calls `start`, else the whole policy. Null keeps none."""
    merge: list[Method] = Field(default_factory=lambda: ["linear", "ties"])
    """With `keep`: merges of all domains' kept weights that are measured on the held-out sets, of each seed, with the
    method's own settings. They train nothing, each costs an evaluation."""
    ways: list[Literal["sequence", "groups", "distil"]] = Field(default_factory=list)
    """What else is trained and measured, of each seed, for `polyphony plan` to weigh against training on all domains at
    once: the order planned from the probes, a stage each; stages of several domains that do not conflict; a pupil that the
    kept weights teach, each its domain, for half the steps of the joint run. May be added, as may `merge` and `joint_arm`,
    to a probe that is done."""

    @field_validator("learning_rates")
    @classmethod
    def _are_rates(cls, rates: list[float]) -> list[float]:
        if not all(0 < rate <= 1 for rate in rates):
            raise ValueError("expected learning rates above 0, at most 1")
        return rates


@settings
class TrackingSection:
    """Trackers; others than W&B work through `grpo.report_to`, Trackio with the extra `trackio`."""

    wandb: WandbSettings | None = None
    """Null logs nothing to W&B."""


BY_ENVIRONMENT = object()
"""Stands for the reward that a domain leaves to its environment."""


@settings
class RecipeDomain(Domain):
    """One subject: trained if it has `train`, else only watched. Held-out rows and a reward are required."""

    heldout: Any  # type: ignore[reportGeneralTypeIssues]  # required here
    """Rows for held-out evaluation, at least two; in the same forms as `train`, never trained on."""
    reward: Any  # type: ignore[reportGeneralTypeIssues]
    """A registry name (rewards/README.md), an import path `pkg.module:name`, a mapping `{name, **arguments}`, or a list of
    these, each with a `weight`: their sum, each part logged by its name (`domain/<d>/logged/<name>`). May be left out where
    the environment has `get_reward`, whose reward is added to it."""
    tools: list[Any] | None = None  # type: ignore[reportIncompatibleVariableOverride]
    """What the policy may call: `python` (a program in the sandbox), import paths of functions, mappings `{name,
    **arguments}` of classes whose public methods are tools. With type hints and docstrings, as TRL has them."""
    diversity: Diversity | None = None
    """Without it the reward alone counts."""

    @field_validator("heldout")
    @classmethod
    def _is_scored(cls, heldout: Any) -> Any:
        if heldout is None:
            raise ValueError("expected rows to be scored on")
        return heldout

    @field_validator("train", "heldout")
    @classmethod
    def _is_a_source(cls, source: Any) -> Any:
        if source is None or (
            source.strip() if isinstance(source, str) else source and isinstance(source, Mapping | list)
        ):
            return source
        raise ValueError("expected a path, a list of them, or a mapping with `path`, `generator` or `environment`")

    @model_validator(mode="before")
    @classmethod
    def _may_leave_the_reward_to_its_environment(cls, given: Any) -> Any:
        """Fill in what stands for a reward that is left out; whether the environment has one is seen with its rows."""
        said = given if isinstance(given, Mapping) else getattr(given, "kwargs", None) or {}
        if said.get("environment") is None or said.get("reward") is not None:
            return given
        return {**said, "reward": BY_ENVIRONMENT}

    @field_validator("reward")
    @classmethod
    def _names_a_reward(cls, reward: Any) -> Any:
        if isinstance(reward, list):
            return composed(reward)
        return None if reward is BY_ENVIRONMENT else named(reward)

    @field_validator("environment")
    @classmethod
    def _names_an_environment(cls, environment: Any) -> Any:
        return None if environment is None else named(environment, method="reset")

    @field_validator("tools")
    @classmethod
    def _names_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        return None if tools is None else [named(tool) for tool in tools]

    @field_validator("diversity")
    @classmethod
    def _keeps_right_above_wrong(cls, diversity: Diversity | None, info: Any) -> Diversity | None:
        if diversity is not None and info.data.get("kind") == "structured":
            diversity.check_verifiable()
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


ENGINES = ("vllm", "ray", "transformers")
"""Engines that a recipe has by name."""


@settings
class RolloutsSection:
    """What samples completions."""

    engine: str = "vllm"
    """`vllm`: in the trainer's process; `ray`: a pool of workers; `transformers`: TRL generates with the policy itself; or
    the import path `pkg.module:name` of an `Engine` class, or of a function that returns one (trainer/README.md)."""
    workers: int = Field(default=1, ge=1)
    """Workers of `engine: ray`; each holds one vLLM."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs (CPU build: cores) of each worker."""
    ahead: int = Field(default=0, ge=0, le=8)
    """Draws that workers sample while earlier ones are trained on: draw d is chosen by what was known after draw
    d - ahead - 1, and sampled with the weights of then, whatever the clock says; TRL's importance correction makes up for
    it. Evaluations and checkpoints wait for what is in flight. 0: engine and trainer take turns."""
    max_staleness: int = Field(default=0, ge=0)
    """How many weight syncs a worker may be behind the ones its draw is for: its completions are kept and
    importance-corrected; older ones are refused and sampled again."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a worker that has not finished its share of a draw counts as hung and is replaced."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds a cluster and its workers may take to start; large models read their weights for minutes."""
    address: str | None = None
    """Address of the Ray cluster, `host:port` or `auto`; null: that in `RAY_ADDRESS`, or a cluster on this machine."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `vllm.LLM` (of your own engine), handed over untouched: `max_num_seqs`, `enforce_eager`,
    `kv_cache_dtype`, `quantization`. Memory, length and sleep have TRL's names: `grpo.vllm_gpu_memory_utilization`,
    `grpo.vllm_max_model_length`, `grpo.vllm_enable_sleep_mode`. With `lora`, `enable_lora: false` has the adapter merged
    into whole weights for the engine, which then generates a little faster and is sent more."""
    max_grader_failures: float = Field(default=MAX_GRADER_FAILURES, ge=0, le=1)
    """Largest share of a domain's last 256 completions whose grading may fail, and of its held-out items; past it the run
    stops, though not before 64 completions. What could not be graded is left out, counted and named."""

    @property
    def is_imported(self) -> bool:
        """Whether the engine is one of the user's, found by its import path."""
        return ":" in self.engine

    @field_validator("engine")
    @classmethod
    def _is_known(cls, engine: str) -> str:
        if engine not in ENGINES and not re.fullmatch(r"[\w.]+:[\w.]+", engine):
            meant = f"; {found}" if (found := near(engine, ENGINES)) else ""
            raise ValueError(f"expected {', '.join(ENGINES)} or an import path pkg.module:name{meant}")
        return engine

    @model_validator(mode="after")
    def _pool_needs_ray(self) -> RolloutsSection:
        pool = {"workers", "tensor_parallel", "ahead", "max_staleness", "timeout_s", "start_timeout_s", "address"}
        if self.engine != "ray" and (changed := sorted(n for n in pool if getattr(self, n) != getattr(ALONE, n))):
            raise ValueError(f"{', '.join(changed)} belong to engine: ray, this recipe has engine: {self.engine}")
        return self

    @model_validator(mode="after")
    def _engine_args_are_free(self) -> RolloutsSection:
        for name in self.engine_args:
            if name in NOT_FREE:
                raise ValueError(f"engine_args.{name} is set by Polyphony: use {NOT_FREE[name]}")
        return self


ALONE = RolloutsSection(engine="ray")
"""What the keys of `engine: ray` are where nobody says them."""


@settings
class AlarmsSection:
    """What is done when an alarm rings, beside writing it to `alarms.jsonl` and telling W&B."""

    command: str | None = None
    """A shell command that gets the alarm as a line of JSON on its standard input: `step`, `kind`, `domain`, `message`,
    `remedy`. What it prints is not kept; its failures are counted and said."""
    limit_s: float = Field(default=10.0, gt=0)
    """Seconds after which the command is killed, with all that it started."""


@settings
class SlurmSection:
    """What `polyphony launch slurm` asks Slurm for."""

    partition: str | None = None
    """As `sbatch --partition`; null: the cluster's default."""
    account: str | None = None
    """As `sbatch --account`; null: yours."""
    time: str = "24:00:00"
    """Wall-clock limit; the job saves a checkpoint before it, and is queued again."""
    signal_s: int = Field(default=120, ge=10)
    """Seconds between the warning signal and the time limit or preemption; a draw and a checkpoint have to fit in."""
    exclusive: bool = True
    """Whether the nodes are the job's alone; shared ones need `--gres` or the like in `options`, and ports of their own."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines run on the first node, in the activated environment, such as `module load cuda`; one that fails ends the
    job. They may say how Python is called, `python=(apptainer exec --nv image.sif python)`, or redefine `srun`."""
    options: list[str] = Field(default_factory=list)
    """Further #SBATCH options, such as `--gres=gpu:8` or `--qos=long`."""
    template: str | None = None
    """A script of your own instead of `launch/cluster/slurm.sbatch`, with the same placeholders."""

    @field_validator("time")
    @classmethod
    def _is_slurms(cls, time: str) -> str:
        if not re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", time):
            raise ValueError("expected minutes, hours:minutes:seconds or days-hours, as sbatch takes them")
        return time


@settings
class ClusterSection:
    """How training is spread over GPUs and nodes; read by `polyphony launch`, not by `train`."""

    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """How trainer ranks share the policy's weights: `launch/accelerate/<strategy>.yaml`."""
    processes: int = Field(default=1, ge=1)
    """Trainer ranks on each trainer node, one a GPU; the node's other GPUs are for rollout workers."""
    trainer_nodes: int = Field(default=1, ge=1)
    """Nodes with trainer ranks."""
    rollout_nodes: int = Field(default=0, ge=0)
    """Nodes with rollout workers only; with 0 the workers share the trainer's nodes."""
    port: int = Field(default=29500, ge=1024, le=65535)
    """TCP port at which the trainer ranks find each other."""
    ray_port: int = Field(default=6379, ge=1024, le=65535)
    """TCP port of the Ray cluster that a Slurm job starts."""
    slurm: SlurmSection = SlurmSection()


@settings
class LoraSection:
    """Train low-rank adapters instead of all weights (PEFT); `final/` is merged, `final/adapter/` has the adapter alone."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapters. Up to 512 vLLM is sent the adapter by itself, of models that it has adapters for; what it cannot
    take (see `target_modules`) is merged into a copy of the base at each sync. Which, and why, is said where the weight
    sync is checked; what the merged `final/` scores beside the adapter, at the end."""
    alpha: int = Field(default=32, ge=1)
    """PEFT's `lora_alpha`: adapters are scaled by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter, as in PEFT. With embeddings or the output head among them it is sent merged."""


@settings
class AdapterSection:
    """Train another adapter of PEFT's than LoRA, in its place; `final/` is merged, `final/adapter/` has it alone."""

    kind: Literal["osf"]
    """`osf`: orthogonal subspace fine-tuning (arXiv:2504.07097). Of every layer the directions with the largest singular
    values are frozen, gradients are made orthogonal to them, and the rest is trained: structure against interference. What
    AdamW makes of an orthogonal gradient is so only nearly.
    It trains more numbers than LoRA, decomposes every layer at the start, and needs `cluster.strategy: ddp`."""
    frozen: float = Field(default=0.5, gt=0, lt=1)
    """Share of each layer's directions that stays as it is; PEFT's own is half."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter, as in PEFT."""
