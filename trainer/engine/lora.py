"""vLLM's part of an adapter: whether it takes one, how it holds it, and how the base beneath it is loaded.

An adapter is handed over in memory, under the number of its sync, and requests name that number: an engine that does not
hold it fails, and what it remembers of prompts belongs to the adapter they were read with. Written for vLLM 0.31: one that
cannot be told in which layers to make room has adapters merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from polyphony.trainer.engine.adapters import FACTORS, AdapterShape

Named = Iterable[tuple[str, torch.Tensor]]


def takes_adapters(**arguments: Any) -> bool:
    """Whether vLLM's class of a model can have an adapter; `arguments` are those of `vllm.LLM` that say which it is."""
    from vllm import EngineArgs  # slow to import
    from vllm.model_executor.models import supports_lora

    if "lora_target_modules" not in {field.name for field in fields(EngineArgs)}:
        return False
    config = EngineArgs(**arguments).create_model_config()
    found, _ = config.registry.resolve_model_cls(config.architectures, config)
    return supports_lora(found)


def why_not(llm: Any, shape: AdapterShape) -> str:
    """Return why a running engine does not take such an adapter; empty where it does."""
    config = llm.llm_engine.vllm_config.lora_config
    if config is None:
        return f"the engine runs {', '.join(llm.model_config.architectures)} without adapters"
    if config.max_lora_rank < shape.rank:
        return f"the engine has room for rank {config.max_lora_rank}, the adapter's is {shape.rank}"
    missing = llm.apply_model(partial(_missing, layers=sorted(shape.layers)))[0]
    return f"vLLM has no layer {missing} to put it on" if missing else ""


def load_adapter(llm: Any, named: Named, *, version: int) -> None:
    """Have the engine hold this adapter alone, and forget the keys and values that belong to the one before.

    The tensors are the engine's from then on.
    """
    llm.apply_model(partial(_hold, named=list(named), version=version))
    llm.reset_prefix_cache()


def adapter_request(version: int) -> Any:
    """Return what names the adapter of a sync to the engine that was given it."""
    from vllm.lora.request import LoRARequest  # slow to import

    # no folder: one that is not held would be looked for there, which fails
    return LoRARequest(lora_name=f"sync-{version}", lora_int_id=version, lora_path=f"/not/held/sync-{version}")


def _missing(model: Any, layers: Sequence[str]) -> str:
    """Return the first layer that has no place; empty where all have one."""
    manager = model.lora_manager
    places = set(manager.modules)
    for name in list(places):
        parent, _, last = name.rpartition(".")
        places |= {f"{parent}.{part}" for part in manager.packed_modules_mapping.get(last, ())}
    return next((layer for layer, place in _places(model, layers).items() if place not in places), "")


def _places(model: Any, layers: Iterable[str]) -> dict[str, str]:
    """Return what vLLM calls each layer."""
    from vllm.lora.utils import parse_fine_tuned_lora_name  # slow to import

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    full = {layer: f"base_model.model.{layer}.{FACTORS[0]}.weight" for layer in layers}
    return {layer: parse_fine_tuned_lora_name(name, mapper)[0] for layer, name in full.items()}


def _hold(model: Any, named: Sequence[tuple[str, torch.Tensor]], version: int) -> None:
    from vllm.lora.lora_model import LoRAModel  # slow to import
    from vllm.lora.lora_weights import LoRALayerWeights

    manager, tensors, layers = model.lora_manager, dict(named), {}
    dtype = manager.lora_config.lora_dtype
    for layer, name in _places(model, {name.rpartition(".")[0] for name in tensors}).items():
        first, second = (tensors[f"{layer}.{factor}"].to("cpu", dtype) for factor in FACTORS)
        layers[name] = LoRALayerWeights(name, len(first), len(first), first, second, scaling=1.0)
    manager.remove_all_adapters()
    manager.add_adapter(LoRAModel(version, manager.lora_config.max_lora_rank, layers))
    manager.activate_adapter(version)


@contextmanager
def unwrapped(model: torch.nn.Module) -> Iterator[None]:
    """Have the layers of a model as they are called without adapters meanwhile, so that weights find them."""
    unwrap(model)
    try:
        yield
    finally:
        wrap(model)


def unwrap(model: Any) -> None:
    """Put the layers beneath adapters in their place."""
    _put(model, {name: layer.base_layer for name, layer in _wrappers(model).items()})


def wrap(model: Any) -> None:
    """Put back what holds adapters."""
    _put(model, _wrappers(model))


def _wrappers(model: Any) -> dict[str, Any]:
    return dict(model.lora_manager.modules) if hasattr(model, "lora_manager") else {}


def _put(model: Any, layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
