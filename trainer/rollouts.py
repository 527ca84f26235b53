"""The engine that generates: an in-process vLLM behind TRL's own seam, one sampling seed for every completion.

A subclass of TRL's `VLLMGeneration`, so that importance-sampling correction and the parameter iteration (ZeRO-3, FSDP and
PEFT gathers) stay TRL's. The same code drives the CPU and the CUDA build of vLLM.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from trl.generation.vllm_generation import VLLMGeneration


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to be sampled."""

    prompt_ids: Sequence[int]
    seed: int
    max_tokens: int
    is_greedy: bool = False
    """Take the likeliest token each time, whatever the run's sampling; only an engine of ours can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What came back: token ids, and their log-probabilities under the sampling distribution (None if not told)."""

    ids: list[int]
    logps: list[float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How completions are sampled; one setting for the whole run, because importance correction depends on it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0


def completion_seed(run_seed: int, draw: int, prompt_id: str, refill_round: int, k: int) -> int:
    """Return the sampling seed of one completion: the same after a restart and under any layout of ranks."""
    key = f"{run_seed}/{draw}/{prompt_id}/{refill_round}/{k}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") & 0x7FFFFFFF


class InProcessEngine(VLLMGeneration):
    """A vLLM engine in the trainer's process; before a draw, the policy's weights are loaded in place.

    Overrides the three methods that TRL's trainer calls: `_init_vllm`, `sync_weights`, `generate`.
    """

    max_completion_length: int
    """Tokens; set by the trainer, for the requests that come through TRL's own call."""

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        processing_class: Any,
        *,
        sampling: Sampling,
        max_model_length: int | None,
        max_num_seqs: int,
        gpu_memory_utilization: float = 0.3,
        dtype: str = "auto",
    ) -> None:
        self.sampling = sampling
        self.dtype = dtype
        super().__init__(
            model=model,
            accelerator=accelerator,
            processing_class=processing_class,
            max_model_length=max_model_length,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
        )

    def _init_vllm(self) -> None:
        on_cpu = self.accelerator.device.type == "cpu"
        if on_cpu:
            # The CPU build repacks every Linear for oneDNN and drops the original weight, so that later loads land
            # nowhere without an error. Without oneDNN the weights stay where `load_weights` finds them.
            import vllm._custom_ops as ops
            from vllm.platforms import current_platform

            ops._supports_onednn = False
            # counting token ranks is not worth the 25 s that compiling it takes
            current_platform.simple_compile_backend = "eager"
        from vllm import LLM

        many_ranks = self.accelerator.num_processes > 1
        if many_ranks:
            os.environ["RANK"] = str(self.accelerator.process_index)
            os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
            os.environ["WORLD_SIZE"] = str(self.accelerator.num_processes)
        self.llm = LLM(
            model=self.model.name_or_path,
            dtype=self.dtype,  # type: ignore[arg-type]
            max_model_len=self.max_model_length,
            max_num_seqs=self.max_num_seqs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enforce_eager=on_cpu,  # compiling costs 20 s on a CPU and gains nothing at that size
            distributed_executor_backend="external_launcher" if many_ranks else None,
            logprobs_mode="processed_logprobs",  # importance correction needs what was really sampled from
            seed=0,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        self.accelerator.wait_for_everyone()

    def attach(self, model: Any, accelerator: Any) -> None:
        """Serve another policy of the same architecture from now on; its weights arrive with the next sync."""
        self.model = model
        self.accelerator = accelerator

    def sync_weights(self) -> None:
        """Load the policy's present weights; every rank must call it, because gathering them is collective."""
        self.llm.apply_model(self._load)
        self.llm.reset_prefix_cache()  # cached keys and values belong to the old weights

    def _load(self, engine_model: torch.nn.Module) -> None:
        engine_model.load_weights(self._iter_named_params())  # type: ignore[operator]

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Sample one completion a request, in order."""
        from vllm import SamplingParams

        shared = {
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "min_p": self.sampling.min_p or 0.0,
            "repetition_penalty": self.sampling.repetition_penalty,
            "logprobs": 0,
            "detokenize": False,
        }
        greedy = shared | {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        params = [
            SamplingParams(seed=r.seed, max_tokens=r.max_tokens, **(greedy if r.is_greedy else shared))
            for r in requests
        ]
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        # the engine shares the process's generators with the trainer, whose shuffles must not depend on it
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            outputs = self.llm.generate(prompts, sampling_params=params, use_tqdm=False)  # type: ignore[arg-type]
        return [_completion(output.outputs[0]) for output in outputs]

    def generate(self, prompts: list, images: Any, num_generations: int, profiler: Any = None) -> tuple:
        """Serve TRL's own call (an unchanged `GRPOTrainer` with this engine attached); seeds from the call's order."""
        if images is not None:
            raise ValueError("the in-process engine serves text only; use vllm_mode colocate or server for images")
        self._calls = getattr(self, "_calls", -1) + 1
        requests = [
            Request(
                prompt_ids=ids,
                seed=completion_seed(0, self._calls, str(i), 0, 0),
                max_tokens=self.max_completion_length,
            )
            for i, ids in enumerate(prompts)
        ]
        with profiler or nullcontext():
            completions = self.complete(requests)
        ids = [c.ids for c in completions]
        return prompts, ids, [[[p] for p in c.logps or []] for c in completions], [[[t] for t in seq] for seq in ids]


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    return Completion(ids=ids, logps=[at[t].logprob for t, at in zip(ids, output.logprobs, strict=True)])
