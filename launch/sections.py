"""The recipe's sections that only the launch wing acts on; those that others act on are declared there.

In order: what is practised when, what is kept and who is told; what a recipe says of a domain; who generates, who trains
where, and with which weights.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from polyphony.curricula.records import Domain, settings
from polyphony.rewards.registry import named
from polyphony.trainer.settings import MAX_GRADER_FAILURES, Diversity, WandbSettings


class CurriculumSection(BaseModel):
    """`scheduler` by registry name or import path; every other key is a setting of that scheduler."""

    model_config = ConfigDict(extra="allow", frozen=True)
    scheduler: str = "auto"
    transfer: str | None = None
    """A probe's `transfer.json`: what schedulers that plan start from, and what the report draws."""


@settings
class CheckpointSection:
    """What is saved on the way, beside `final/`."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; by default as often as evaluations."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; the best by worst domain is kept as well."""


@settings
class ProbeSection:
    """`polyphony probe`: what training on one domain alone does to every domain."""

    steps: int = Field(default=40, ge=1)
    """Optimizer steps of each single-domain run."""
    seeds: int = Field(default=2, ge=1)
    """Repetitions; with one, intervals know of evaluation noise only."""
    start: str = Field(default="base", validation_alias="from", serialization_alias="from")
    """`from` in a recipe, where every run starts: `base` (the recipe's model), `joint:<steps>` (after that many steps on
    all domains), or the folder of a checkpoint. From the base, transfer is partly format learning that later stages
    saturate; from a warmed policy it is erosion, smaller and harder to see. `base` because in the lab its probes ranked
    the 24 trained orders better (rank correlation .33 against .06; one world, one training seed:
    launch/lab/RESULTS.md)."""
    joint_arm: bool = True
    """Also train on all domains for the same total of steps: what a sequence has to beat."""


@settings
class TrackingSection:
    """Trackers of ours; others work through `grpo.report_to`."""

    wandb: WandbSettings | None = None


@settings
class RecipeDomain(Domain):
    """A domain as a recipe has it: its key is its name, and what it is scored on and by has to be said."""

    heldout: Any  # type: ignore[reportGeneralTypeIssues]  # required here
    reward: Any  # type: ignore[reportGeneralTypeIssues]
    diversity: Diversity | None = None

    @field_validator("heldout")
    @classmethod
    def _is_scored(cls, heldout: Any) -> Any:
        if heldout is None:
            raise ValueError("expected rows to be scored on")
        return heldout

    @field_validator("reward")
    @classmethod
    def _names_a_reward(cls, reward: Any) -> Any:
        return named(reward)

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


@settings
class RolloutsSection:
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
    max_grader_failures: float = Field(default=MAX_GRADER_FAILURES, ge=0, le=1)
    """Largest share of a domain's completions in one draw that its reward may fail on before the run stops."""

    @model_validator(mode="after")
    def _pool_needs_ray(self) -> RolloutsSection:
        pool = {"workers", "tensor_parallel", "max_staleness", "timeout_s", "start_timeout_s", "address"}
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
class SlurmSection:
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

    @field_validator("time")
    @classmethod
    def _is_slurms(cls, time: str) -> str:
        if not re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", time):
            raise ValueError("expected minutes, hours:minutes:seconds or days-hours, as sbatch takes them")
        return time


@settings
class ClusterSection:
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


@settings
class LoraSection:
    """Train low-rank adapters instead of all weights (PEFT); `final/` is merged."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    target_modules: str | list[str] = "all-linear"
