"""Adapters merged into copies, tensor by tensor: what an engine is sent and what a run leaves, with the base never written.

PEFT's own `merge` runs on a copy of each layer's base weight, with the adapter in float32, so that the cast to the base's
type comes last; that OSF's cannot be undone, a copy does not mind. It is the arithmetic of
`PeftModel.from_pretrained(base, "final/adapter").merge_and_unload()`: with the base read from disk, in the type and on the
kind of device that the policy was trained in, that gives the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.osf import layer as osf
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor
from trl.distributed import DistributedBackend

MERGED = (Linear, Embedding, osf.Linear)
"""Layers whose weights stay of the base's shape, unquantised."""
INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Starts of an adapter that leave the base as it is on disk; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) rewrite it."""
BASE = "base_layer."


def merged_parameters(model: PeftModel, accelerator: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return whole parameters by the names they have without an adapter; collective over ranks.

    A tensor is whole only until the next one is asked for.
    """
    of_ranks = DistributedBackend(accelerator)
    adapter = model.active_adapters[0]
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(f".{BASE}")[0]
        if owner in layers:
            # the first of its parameters brings all of the layer's, gathered and merged once
            if parameter is next(layers[owner].get_base_layer().parameters()):
                with of_ranks.gather_params(list(layers[owner].parameters())):
                    yield from _merged(layers[owner], plain_name(owner), accelerator.device)
        elif not _is_adapters(name, model, adapter):
            with of_ranks.gather_params([parameter]):
                yield plain_name(name, adapter), whole_tensor(parameter, accelerator.device)


def base_parameters(model: PeftModel, accelerator: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return whole parameters of the base beneath a plain adapter, as `merged_parameters` does."""
    of_ranks = DistributedBackend(accelerator)
    adapter = model.active_adapters[0]
    for name, parameter in model.named_parameters():
        if not _is_adapters(name, model, adapter):
            with of_ranks.gather_params([parameter]):
                yield plain_name(name, adapter), whole_tensor(parameter, accelerator.device)


def adapter_parameters(model: PeftModel, accelerator: Any) -> dict[str, torch.Tensor]:
    """Return copies of all that an adapter adds or trains, whole, by the model's own names; collective over ranks."""
    of_ranks = DistributedBackend(accelerator)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or model.prefix in name or ".modules_to_save." in name:
            with of_ranks.gather_params([parameter]):
                found[name] = whole_tensor(parameter, accelerator.device).to("cpu", copy=True)
    return found


def refuse_unmergeable(model: Any, accelerator: Any) -> None:
    """Raise ValueError for an adapter that cannot be merged without changing what was trained."""
    if not isinstance(model, PeftModel):
        return
    if len(model.active_adapters) != 1:
        raise ValueError(f"peft_config: active adapters {model.active_adapters}: expected one")
    config: Any = model.peft_config[model.active_adapters[0]]
    if config.peft_type not in (PeftType.LORA, PeftType.OSF):
        raise ValueError(
            f"peft_config: peft_type={config.peft_type.value}: expected LORA or OSF, merged at each weight sync"
        )
    if config.peft_type == PeftType.LORA and config.init_lora_weights not in INITS:
        raise ValueError(
            f"peft_config: init_lora_weights={config.init_lora_weights!r}: expected one that leaves the frozen base as on "
            f"disk, {', '.join(map(repr, INITS))}"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            _refuse_layer(plain_name(name), layer)
    _refuse_tied(model)
    if DistributedBackend(accelerator).fsdp_version == 1:
        raise ValueError("peft_config under fsdp_version=1: expected 2, whose parameters can be gathered one by one")


def _refuse_layer(name: str, layer: Any) -> None:
    if type(layer) not in MERGED:
        allowed = ", ".join(map(_kind, MERGED))
        raise ValueError(
            f"peft_config: layer {name} is a {_kind(type(layer))}, which is not merged into a plain weight: expected "
            f"{allowed}"
        )
    for adapter, variant in getattr(layer, "lora_variant", {}).items():
        if type(variant) is not layer.lora_variants[("use_dora",)]:
            raise ValueError(
                f"peft_config: adapter {adapter!r} of layer {name} is a {type(variant).__name__}: expected LoRA, rsLoRA "
                "or DoRA"
            )


def _kind(layer: type) -> str:
    return f"{layer.__module__.removeprefix('peft.tuners.').removesuffix('.layer')}.{layer.__name__}"


def _refuse_tied(model: PeftModel) -> None:
    """An adapter on one of two layers that share a weight: no merged weight is both."""
    holders = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].append(name)
    for names in holders.values():
        changed = [name for name in names if f".{BASE}" in name or ".original_module." in name]
        if changed and len(names) > 1:
            first = changed[0]
            others = ", ".join(plain_name(name) for name in names if name != first)
            raise ValueError(
                f"peft_config: {plain_name(first)} is shared with {others} and cannot be changed alone: leave it out of "
                "target_modules and modules_to_save"
            )


class _Copied(torch.nn.Module):
    """A layer for `functional_call`, which lends it other tensors in the place of its parameters."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> list[tuple[str, torch.Tensor]]:
        """Merge in place; return the base layer's tensors, which are the copies."""
        try:
            self.layer.merge()
            return [(name, tensor.data) for name, tensor in self.layer.get_base_layer().named_parameters()]
        finally:
            self.layer.merged_adapters.clear()
            if isinstance(self.layer, LoraLayer):
                self.layer._caches.clear()


def _merged(layer: Any, name: str, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    lent = {}
    for key, parameter in layer.named_parameters():
        tensor = whole_tensor(parameter, device)
        # a copy of the base; the adapter as PEFT reads it from disk, in float32
        lent[f"layer.{key}"] = tensor.clone() if key.startswith(BASE) else tensor.to(_read_as(tensor.dtype))
    for key, tensor in torch.func.functional_call(_Copied(layer), lent, ()):
        yield f"{name}.{key}", tensor


def _read_as(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def whole_tensor(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a parameter's whole tensor: FSDP2 splits it; what ZeRO-3 splits has been gathered."""
    if isinstance(parameter, DTensor):
        split: Any = parameter.to(device)
        return split.full_tensor().detach()
    return parameter.data


def _is_adapters(name: str, model: PeftModel, adapter: str) -> bool:
    """Whether a parameter is no part of the model once it is merged."""
    if ".original_module." in name:
        return True
    if ".modules_to_save." in name:
        return f".modules_to_save.{adapter}." not in name
    return model.prefix in name


def plain_name(name: str, adapter: str = "") -> str:
    """Return the name without PEFT's prefixes, and those of checkpointed activations."""
    name = name.removeprefix("base_model.model.").replace("_checkpoint_wrapped_module.", "")
    for inner in (f".{BASE}", ".original_module.", f".modules_to_save.{adapter}."):
        name = name.replace(inner, ".")
    return name
