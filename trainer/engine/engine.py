"""Engines that sample completions, behind TRL's interface: a seed for every completion, a number for every weight sync.

Subclasses of TRL's `VLLMGeneration`, so that importance-sampling correction and the parameter iteration (ZeRO-3 and FSDP
gathers) stay TRL's. An adapter is sent as it is where vLLM takes it, else merged by ours, into copies. The same code drives
the CPU and the CUDA build of vLLM.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from trl.generation.vllm_generation import VLLMGeneration

from polyphony.curricula.declarations import unknown
from polyphony.curricula.records import Completion
from polyphony.trainer.engine.adapters import AdapterShape, adapter_tensors, shape_of
from polyphony.trainer.engine.lora import adapter_request, load_adapter, why_not
from polyphony.trainer.engine.merge import base_parameters, merged_parameters
from polyphony.trainer.engine.turns import Turns, converse
from polyphony.trainer.engine.vllm import (
    EngineSettings,
    OnFinished,
    Request,
    Sampling,
    completion_seed,
    load_weights,
    sample,
    start_llm,
)
from polyphony.trainer.weight_names import checkpoint_names

MOST_TOKENS_A_STEP = 4096


@dataclass(kw_only=True, slots=True)
class EngineFaults:
    """Faults of an engine that were recovered from, counted since the last log."""

    workers_restarted: int = 0
    regenerated: int = 0
    """Completions sampled again because their worker was lost."""
    stale: int = 0
    """Completions of an older weight version: refused, or kept and importance-corrected, as the recipe says."""


class Engine(VLLMGeneration):
    """What the trainer asks of any engine of ours.

    Overrides the three methods that TRL's trainer calls: `_init_vllm` and `sync_weights` (by its subclasses) and
    `generate`.
    """

    max_completion_length: int
    """Tokens; set by the trainer, for the requests that come through TRL's own call."""
    version: int = 0
    """Weight syncs so far; the weights that a completion was sampled with are known by this number."""
    is_asleep: bool = False
    """True while it holds no weights: only a sync wakes it."""
    is_shared: bool = True
    """Whether all ranks have to call `complete` together, so that of several none can go on with a turn alone."""
    draws_ahead: int = 0
    """How many draws are sampled before the one that is trained on, while it is (`rollouts.ahead`)."""
    room: int | None = None
    """Tokens of the longest sequence; None where it does not say."""
    adapter: AdapterShape | None = None
    """What of the policy is sent in the place of its weights; None where they all are."""
    merged_because: str = ""
    """Why an adapter is merged into a copy of the base at each sync; empty where it is not, or there is none."""
    _holds_base: bool = False
    """Whether the base beneath the adapter is there; else the next sync sends it as well."""
    _names: dict[str, str] | None = None
    """Of parameters that a checkpoint calls otherwise; asked of the policy once."""

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        processing_class: Any,
        *,
        sampling: Sampling,
        max_model_length: int | None,
        max_num_seqs: int,
        dtype: str = "auto",
        longest: int = 0,
        engine_args: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        """Start it; `named` are `VLLMGeneration`'s, `engine_args` are arguments of `vllm.LLM`."""
        self.sampling = sampling
        self.dtype = dtype
        self.longest = longest
        self.engine_args = engine_args or {}
        self.faults = EngineFaults()
        super().__init__(
            model=model,
            accelerator=accelerator,
            processing_class=processing_class,
            max_model_length=max_model_length,
            max_num_seqs=max_num_seqs,
            **named,
        )

    def settings(self, *, tensor_parallel: int = 1) -> EngineSettings:
        """Return what the vLLM behind this engine is started with."""
        own = {"model_impl": self.model_impl, "trust_remote_code": self.trust_remote_code}
        return EngineSettings(
            model=self.model.name_or_path,
            dtype=self.dtype,
            max_model_length=self.max_model_length,
            max_num_seqs=self.max_num_seqs,  # type: ignore[arg-type]
            gpu_memory_utilization=self.gpu_memory_utilization,
            on_cpu=self.accelerator.device.type == "cpu",
            tensor_parallel=tensor_parallel,
            longest=self.longest,
            adapter=self.adapter,
            more={**own, **self.engine_args},
        )

    def attach(self, model: Any, accelerator: Any) -> None:
        """Serve another policy of the same architecture from now on; its weights arrive with the next sync."""
        self.model = model
        self.accelerator = accelerator
        self._names = None
        self._holds_base = False

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Be sent whole weights at the next sync, an adapter merged in them; afterwards the adapter by itself again."""
        adapter, self.adapter = self.adapter, None
        try:
            yield
        finally:
            self.adapter, self._holds_base = adapter, False

    def _choose(self, why_not: Callable[[AdapterShape], str] | None = None) -> None:
        """Decide what of the policy is sent; `why_not` asks the engine, once it runs."""
        self.adapter, self.merged_because = shape_of(self.model)
        if self.adapter is not None and why_not is not None and (why := why_not(self.adapter)):
            self.adapter, self.merged_because = None, why

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return TRL's iteration, by the names of a checkpoint.

        But for adapters, which TRL merges into the base itself and takes out again, rounding.
        """
        reshard(self.model)
        is_adapted = isinstance(self.model, PeftModel)
        walk = merged_parameters(self.model, self.accelerator) if is_adapted else super()._iter_named_params()
        return self._by_checkpoint(walk)

    def _base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return what is beneath the adapter, by the names of a checkpoint; collective over ranks."""
        reshard(self.model)
        return self._by_checkpoint(base_parameters(self.model, self.accelerator))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the adapter; collective over ranks."""
        reshard(self.model)
        return adapter_tensors(self.model, self.accelerator)

    def _by_checkpoint(self, walk: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        if self._names is None:
            self._names = checkpoint_names(self.model)
        names = self._names
        return ((names.get(name, name), tensor) for name, tensor in walk) if names else walk

    def complete(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Completion]:
        """Sample one completion a request, in order; every rank must call it.

        `on_finished` gets completions that are whole before the others are, as far as the engine can tell.
        """
        raise NotImplementedError

    def converse(self, turns: Turns) -> None:
        """Sample all turns, in batches of those that are ready at a time; one that can take requests up meanwhile does."""
        while asked := turns.waiting("all"):
            for (place, _), completion in zip(asked, self.complete([r for _, r in asked]), strict=True):
                turns.take(place, completion)

    def snapshot(self) -> Callable[[], None]:
        """Keep the policy's present weights; what is returned loads them, in any thread, at its time. Collective."""
        raise NotImplementedError(
            f"{type(self).__name__} keeps no weights for later (`snapshot`): at most one draw ahead"
        )

    def flush_faults(self) -> EngineFaults:
        """Return the counts since the last call."""
        faults, self.faults = self.faults, EngineFaults()
        return faults

    def rest(self) -> None:
        """Give GPU memory back until the next sync, where the recipe wants that; nothing for most."""

    def close(self) -> None:
        """Let go of what the engine holds outside this process; nothing for most."""

    def generate(self, prompts: list, images: Any, num_generations: int, profiler: Any = None) -> tuple:
        """Serve TRL's own call (an unchanged `GRPOTrainer` with this engine attached); seeds from the call's order."""
        if images is not None:
            raise ValueError("the engine serves text only; use vllm_mode colocate or server for images")
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


def reshard(model: torch.nn.Module) -> None:
    """Split again what FSDP2 has left whole: after a forward pass without a backward pass it keeps and uses a copy.

    TRL's iteration expects it split.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def classes_left_alone() -> Iterator[None]:
    """Keep vLLM from rewriting classes of Transformers meanwhile.

    Models that it has no class of its own for it runs by Transformers', and makes the decoder's class one that compiles
    itself: the policy, of that class as well, would no longer run. Such a model is run uncompiled in this engine, as vLLM
    does with those that it cannot compile.
    """
    from vllm.model_executor.models.transformers.base import Base  # slow to import

    decorate = Base._decorate_for_torch_compile
    Base._decorate_for_torch_compile = lambda self: None
    try:
        yield
    finally:
        Base._decorate_for_torch_compile = decorate


EngineFactory = Callable[..., Engine]
"""Takes what `Engine` is constructed with and returns one: an `Engine` class, or a function."""


class InProcessEngine(Engine):
    """A vLLM engine in the trainer's process; before a draw, the policy's weights are loaded in place."""

    is_shared = False
    _laid_on: Any = None
    """Names the adapter that is laid over the weights."""

    def _init_vllm(self) -> None:
        changes: dict[str, Any] = {}
        if self.accelerator.num_processes > 1:
            # each rank its own engine on its own GPU, in the process group that is there already (as TRL's colocate)
            os.environ["RANK"] = str(self.accelerator.process_index)
            os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
            os.environ["WORLD_SIZE"] = str(self.accelerator.num_processes)
            changes["distributed_executor_backend"] = "external_launcher"
        if self.accelerator.device.type != "cpu":
            # vLLM sets memory aside for the activations of so many tokens, 16,384 by default on a large card (TRL's figure)
            changes["max_num_batched_tokens"] = max(MOST_TOKENS_A_STEP, self.max_num_seqs or 0)
        if self.enable_sleep_mode:
            changes["enable_sleep_mode"] = True
        self._choose()
        with classes_left_alone():
            self.llm = start_llm(self.settings(), **changes)
        self._choose(partial(why_not, self.llm))
        self.room = self.llm.model_config.max_model_len
        self.rest()
        self.accelerator.wait_for_everyone()

    def attach(self, model: Any, accelerator: Any) -> None:
        """Serve another policy; its adapter as it is, where the engine was started with room for it."""
        super().attach(model, accelerator)
        self._choose(partial(why_not, self.llm))

    def rest(self) -> None:
        """Give back the memory of weights, keys and values until the next sync (`vllm_enable_sleep_mode`)."""
        if self.enable_sleep_mode and not self.is_asleep:
            self.llm.sleep(level=2)
            self.is_asleep, self._holds_base = True, False

    def sync_weights(self) -> None:
        """Load the policy's present weights; every rank must call it, because gathering them is collective."""
        if self.is_asleep:
            torch.cuda.empty_cache()  # what the update left in PyTorch's cache is the engine's now
            self.llm.wake_up(tags=["weights"])
        self.version += 1
        self._load()
        if self.is_asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.is_asleep = False

    def _load(self) -> None:
        if self.adapter is None:
            load_weights(self.llm, self._iter_named_params())
            self._laid_on = None
            return
        if not self._holds_base:
            load_weights(self.llm, self._base())
            self._holds_base = True
        load_adapter(self.llm, [(name, tensor.clone()) for name, tensor in self._tensors()], version=self.version)
        self._laid_on = adapter_request(self.version)

    def complete(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Completion]:
        """Sample one completion a request, in order."""
        if not requests:  # a rank without a row of this refill
            return []
        with self._chance_apart():
            completions = sample(self.llm, requests, self.sampling, on_finished, adapter=self._laid_on)
        return [replace(c, version=self.version) for c in completions]

    def converse(self, turns: Turns) -> None:
        """Sample all turns; each is begun as soon as it is asked for, while others are sampled."""
        with self._chance_apart():
            converse(self.llm, turns, self.sampling, version=self.version, adapter=self._laid_on)

    def _chance_apart(self) -> AbstractContextManager[None]:
        """Keep the generators that the engine shares with the trainer, whose shuffles must not depend on it, as they are."""
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        return torch.random.fork_rng(devices=devices)


def find_engine(name: str) -> EngineFactory:
    """Return what makes the engine of a name: `vllm`, or the import path `pkg.module:name` of a class or a function.

    Raises ValueError that names it and says what is allowed.
    """
    if name == "vllm":
        return InProcessEngine
    if ":" not in name:
        raise unknown("engine", name, ("vllm", "transformers"), "pkg.module:name")
    try:
        found: Any = pkgutil.resolve_name(name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(f"engine {name!r} cannot be imported: {error}") from error
    makes_one = issubclass(found, Engine) if isinstance(found, type) else callable(found)
    if not makes_one:
        raise ValueError(
            f"engine {name!r}: expected a subclass of polyphony.trainer.engine.engine:Engine, or a function that "
            f"returns an Engine, got {found!r:.60}"
        )
    return found
