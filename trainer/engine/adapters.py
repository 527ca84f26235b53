"""Adapters sent as they are, in the place of all weights: which an engine takes, and their tensors.

vLLM takes plain LoRA, on linear layers but the output head. What else PEFT has is merged into copies (`merge.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.distributed import DistributedBackend

from polyphony.trainer.engine.merge import plain_name, whole_tensor

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""For which vLLM makes room."""
FACTORS = ("lora_A", "lora_B")
"""What a plain adapter trains of a layer, and how its tensors are called on the way: `<layer>.lora_A`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterShape:
    """What an engine has to make room for.

    Example: `AdapterShape(rank=12, layers=frozenset({"model.layers.0.mlp.up_proj"})).arguments["max_lora_rank"] == 16`
    """

    rank: int
    """The largest of all layers."""
    layers: frozenset[str]
    """The names of the adapted layers, as the policy has them without an adapter."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM`."""
        return {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(rank for rank in RANKS if rank >= self.rank),
            "lora_target_modules": sorted({layer.rpartition(".")[2] for layer in self.layers}),
        }


def shape_of(model: Any) -> tuple[AdapterShape | None, str]:
    """Return what of a policy is sent in the place of its weights; None, and why, where that is not enough.

    No reason is given for a policy without an adapter.
    """
    if not isinstance(model, PeftModel):
        return None, ""
    if why := _why_merged(model):
        return None, why
    layers = _layers(model)
    rank = max(layer.r[name] for layer, name in layers.values())
    return AdapterShape(rank=rank, layers=frozenset(layers)), ""


def _why_merged(model: PeftModel) -> str:
    adapter = model.active_adapters[0]
    config: Any = model.peft_config[adapter]
    if config.peft_type != PeftType.LORA:
        return f"vLLM takes no {config.peft_type.value}"
    if config.use_dora:
        return "vLLM takes no DoRA"
    head = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (type(layer) is not Linear or layer is head or layer.lora_variant):
            kind = "the output head" if layer is head else f"of the kind {type(layer).__name__}"
            return f"layer {plain_name(name)} is {kind}, for which vLLM takes none"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(f".{factor}.{adapter}.weight" in name for factor in FACTORS):
            return f"{plain_name(name, adapter)} is trained beside it"
    if (rank := max(layer.r[adapter] for layer, _ in _layers(model).values())) > RANKS[-1]:
        return f"its rank is {rank}, vLLM takes at most {RANKS[-1]}"
    return ""


def _layers(model: PeftModel) -> dict[str, tuple[Any, str]]:
    """Return the adapted layers by their names without an adapter, with that of the adapter."""
    adapter = model.active_adapters[0]
    found = ((plain_name(name), layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer))
    return {name: (layer, adapter) for name, layer in found if adapter in getattr(layer, "lora_A", {})}


def factors_of(model: PeftModel) -> Iterator[tuple[str, torch.nn.Parameter, float, int]]:
    """Return each factor's name, its parameter, and scale and rank of its layer."""
    for name, (layer, adapter) in _layers(model).items():
        for factor in FACTORS:
            parameter = getattr(layer, factor)[adapter].weight
            yield f"{name}.{factor}", parameter, layer.scaling[adapter], layer.r[adapter]


def adapter_tensors(model: PeftModel, accelerator: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return whole factors, the second of each layer with its scale (alpha / r) in it; collective over ranks.

    A tensor is whole only until the next one is asked for.
    """
    of_ranks = DistributedBackend(accelerator)
    for name, parameter, scale, _ in factors_of(model):
        with of_ranks.gather_params([parameter]):
            whole = whole_tensor(parameter, accelerator.device)
            yield name, whole * scale if name.endswith(FACTORS[1]) else whole
