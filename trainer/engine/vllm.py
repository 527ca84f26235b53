"""One vLLM: start it, sample from it, load weights into it. The same in the trainer and in a worker.

Left out on purpose: who owns the engine and how weights travel to it (`trainer/engine/engine.py`,
`launch/cluster/ray_engine.py`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from polyphony.curricula.records import Completion
from polyphony.trainer.engine.adapters import AdapterShape
from polyphony.trainer.engine.cpu_build import prepare_cpu_build, unpacked
from polyphony.trainer.engine.lora import takes_adapters, unwrapped


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to be sampled."""

    prompt_ids: Sequence[int]
    seed: int
    max_tokens: int
    is_greedy: bool = False
    """Take the likeliest token each time, whatever the run's sampling; only an engine of ours can."""
    episode: int | None = None
    """Which of a batch's episodes it is a turn of; its turns share a beginning, which the engine has cached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How completions are sampled; one setting for the whole run, because importance correction depends on it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    structured_outputs_regex: str | None = None
    """What completions have to match."""
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of vLLM's SamplingParams (`stop`, `bad_words`, ..)."""

    @property
    def is_the_policys(self) -> bool:
        """Whether tokens come from the policy's own distribution at this temperature, nothing cut off or pushed."""
        is_whole = self.top_p >= 1 and self.top_k <= 0 and not self.min_p and self.repetition_penalty == 1
        return is_whole and not self.structured_outputs_regex and not self.generation_kwargs

    @property
    def more(self) -> dict[str, Any]:
        """What is asked of vLLM's SamplingParams beside temperature and truncation."""
        more = dict(self.generation_kwargs)
        structured: Any = more.get("structured_outputs")
        if self.structured_outputs_regex is not None:
            structured = {"regex": self.structured_outputs_regex}
        if isinstance(structured, Mapping):
            from vllm.sampling_params import StructuredOutputsParams  # slow to import

            more["structured_outputs"] = StructuredOutputsParams(**structured)
        return more


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What a vLLM engine is started with."""

    model: str
    dtype: str
    max_model_length: int | None
    """Tokens of the longest sequence; None takes the model's own limit, or as much of it as fits into a GPU's memory."""
    max_num_seqs: int
    gpu_memory_utilization: float
    on_cpu: bool
    tensor_parallel: int = 1
    longest: int = 0
    """Tokens that the longest prompt of the run and its completion will have, as far as known."""
    adapter: AdapterShape | None = None
    """What it makes room for, where vLLM can."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`; they win over what is chosen here."""


OnFinished = Callable[[int, Completion], None]
"""Called with the place of a request and its completion as soon as that is whole, in any order."""


CPU_BLOCK = 32
"""Tokens that are cached together, the least that vLLM's CPU build takes: of its 128 a turn would read most again."""
LONGEST_THAT_FITS = -1
"""As vLLM's `max_model_len`: the model's own limit, or what the memory for keys and values has room for, if less."""


WHICH = ("model_impl", "trust_remote_code")
"""Further arguments that say which class of a model vLLM runs."""


def completion_seed(run_seed: int, draw: int, prompt_id: str, refill_round: int, k: int) -> int:
    """Return the sampling seed of one completion: the same after a restart and under any layout of ranks."""
    key = f"{run_seed}/{draw}/{prompt_id}/{refill_round}/{k}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") & 0x7FFFFFFF


def start_llm(settings: EngineSettings, **changes: Any) -> Any:
    """Return a running `vllm.LLM` whose weights can be replaced in place; `changes` are further arguments of `LLM`.

    Raises ValueError for a model that vLLM does not take, and where it has no room for the longest completion of the run.
    """
    if settings.on_cpu:
        prepare_cpu_build()
    from vllm import LLM  # slow to import

    arguments: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_length or (None if settings.on_cpu else LONGEST_THAT_FITS),
        "max_num_seqs": settings.max_num_seqs,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel,
        "enforce_eager": settings.on_cpu,  # compiling costs 20 s on a CPU and gains nothing at that size
        "logprobs_mode": "processed_logprobs",  # importance correction needs what was really sampled from
        "seed": 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if settings.on_cpu:
        arguments["block_size"] = CPU_BLOCK
    try:
        which = {name: settings.more[name] for name in WHICH if name in settings.more}
        if settings.adapter is not None and takes_adapters(model=settings.model, dtype=settings.dtype, **which):
            arguments |= settings.adapter.arguments
        with with_descriptor():
            llm = LLM(**{**arguments, **changes, **settings.more})
    except ValidationError as error:
        raise ValueError(f"vLLM does not take {settings.model}: {said_of(error.errors()[0]['msg'])}") from error
    check_room(llm, settings.longest)
    return llm


@contextmanager
def with_descriptor() -> Iterator[None]:
    """Set a standard output aside that has no descriptor, such as a notebook's: vLLM asks for it when it starts."""
    try:
        sys.stdout.fileno()
        has_one = True
    except (AttributeError, OSError, ValueError):
        has_one = False
    if has_one:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def said_of(reason: str) -> str:
    """Return vLLM's reason without the list of all that it does take, and what helps against it."""
    reason = reason.removeprefix("Value error, ").partition(" Supported architectures:")[0]
    if "are not supported for now" in reason:
        return f"{reason} (vllm_model_impl: transformers has it run the model's own classes)"
    return reason


def load_weights(llm: Any, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace the engine's weights in place and forget the keys and values that belong to the old ones."""
    llm.apply_model(lambda model: _load(model, named))
    llm.reset_prefix_cache()


def _load(model: Any, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    with unwrapped(model) if hasattr(model, "lora_manager") else nullcontext(), unpacked(model):
        model.load_weights(named)  # a function of its own: what `apply_model` returns is kept and must be small


def sample(
    llm: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    on_finished: OnFinished | None = None,
    *,
    adapter: Any = None,
) -> list[Completion]:
    """Sample one completion a request, in order; `on_finished` gets each while the others are still sampled.

    `adapter` names the one that is laid over the weights, as `adapter_request` says.
    Out of memory, the requests are sampled in two halves, once. Raises RuntimeError where a half is too much as well.
    """
    try:
        return _sample(llm, requests, sampling, adapter, on_finished)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(requests) < 2:
            raise
    abort_all(llm)
    middle = len(requests) // 2
    try:
        return [c for half in (requests[:middle], requests[middle:]) for c in _sample(llm, half, sampling, adapter)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        abort_all(llm)
        raise RuntimeError(
            f"the rollout engine ran out of memory on {len(requests)} completions and again on half of them: lower "
            "max_completion_length or the generation batch, or change vllm_gpu_memory_utilization"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocator's refusal, of a GPU's or of the host's memory, from other errors."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def sampling_params(requests: Sequence[Request], sampling: Sampling) -> list[Any]:
    """Return vLLM's SamplingParams of each request."""
    from vllm import SamplingParams  # slow to import

    shared = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "logprobs": 0,
        "flat_logprobs": True,  # two lists in place of an object and a dict a token
        "detokenize": bool(sampling.generation_kwargs.get("stop")),  # what it is to stop at is text
        "skip_clone": True,  # made for one request
        **sampling.more,
    }
    greedy = shared | {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return [
        SamplingParams(seed=r.seed, max_tokens=r.max_tokens, **(greedy if r.is_greedy else shared)) for r in requests
    ]


def _sample(
    llm: Any, requests: Sequence[Request], sampling: Sampling, adapter: Any, on_finished: OnFinished | None = None
) -> list[Completion]:
    params = sampling_params(requests, sampling)
    check_room(llm, max((len(r.prompt_ids) + r.max_tokens for r in requests), default=0))
    prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
    if on_finished is None:
        outputs = llm.generate(prompts, sampling_params=params, use_tqdm=False, lora_request=adapter)
        return [completion_of(output.outputs[0]) for output in outputs]
    # a request's name is its number, behind which newer engines put a random tail that outputs do not have
    names = llm.enqueue(prompts, params, use_tqdm=False, lora_request=adapter)
    places = {name.partition("-")[0]: i for i, name in enumerate(names)}
    found: dict[int, Completion] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                place = places[output.request_id]
                found[place] = completion_of(output.outputs[0])
                on_finished(place, found[place])
    return [found[i] for i in range(len(requests))]


def check_room(llm: Any, longest: int) -> None:
    """Raise ValueError for a prompt and completion that vLLM would cut short without a word."""
    room = llm.model_config.max_model_len
    if longest > room:
        raise ValueError(
            f"the rollout engine has room for {room} tokens of prompt and completion, {longest} are asked for: raise "
            "vllm_gpu_memory_utilization or vllm_max_model_length, or lower max_completion_length"
        )


def abort_all(llm: Any) -> None:
    """Take back what an interrupted call left in the engine, and its cached blocks."""
    engine = llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)
    llm.reset_prefix_cache()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def completion_of(output: Any) -> Completion:
    """Return what vLLM sampled for one request."""
    ids = list(output.token_ids)
    # `logprobs=0` tells the sampled token alone, so the flat list has one entry a token
    assert len(output.logprobs.logprobs) == len(ids)
    return Completion(ids=ids, logps=output.logprobs.logprobs)
