"""Who generates, who trains where, and what a run puts up with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from polyphony.launch.sections.base import Section, default_of

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
