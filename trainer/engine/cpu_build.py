"""vLLM's CPU build, made to keep its weights where they can be replaced in place.

It repacks what it multiplies with: every Linear for oneDNN or AMX, dropping the weight itself, and the experts of a mixture.
Later loads land nowhere, or in the packed copy as if it were not, without an error. And adapters are made fast enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

PACKED = ("w13_weight", "w2_weight", "w13_bias")
"""What the experts of a mixture repack or pad."""


def prepare_cpu_build() -> None:
    """Have what is loaded from now on keep its weights; to be called before an engine is made."""
    import vllm._custom_ops as ops  # slow to import
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.model_executor.layers import utils as linears
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.platforms import current_platform

    ops._supports_onednn = False
    linears.check_cpu_sgl_kernel = lambda n, k, dtype: False  # AMX's, for bfloat16
    # counting token ranks is not worth the 25 s that compiling it takes
    current_platform.simple_compile_backend = "eager"
    add = PunicaWrapperCPU.add_lora_linear
    if not hasattr(add, "__wrapped__"):
        PunicaWrapperCPU.add_lora_linear = _without_copies(add)
    pack = CPUUnquantizedExperts.process_weights_after_loading
    if not hasattr(pack, "__wrapped__"):
        CPUUnquantizedExperts.process_weights_after_loading = _keeping(pack)


def _without_copies(add: Any) -> Any:
    """Multiply with an adapter as it is where there is one for all: vLLM copies it for every token, four times slower."""

    @wraps(add)
    def add_one(
        adapters: Any, y: torch.Tensor, x: torch.Tensor, first: Any, second: Any, scale: float, slices: Any, **more: Any
    ) -> None:
        tokens = adapters.token_lora_indices
        if len(first[0]) > 1 or (not adapters.no_lora and bool((tokens < 0).any())):
            add(adapters, y, x, first, second, scale, slices, **more)
        elif not adapters.no_lora:
            rows, inputs, start = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), 0
            for a, b, size in zip(first, second, slices, strict=True):
                rows[:, start : start + size].addmm_(inputs @ a[0, 0].T, b[0, 0].T, alpha=scale)
                start += size

    return add_one


def _keeping(pack: Any) -> Any:
    @wraps(pack)
    def pack_and_keep(experts: Any, layer: Any) -> None:
        plain = {name: getattr(layer, name).data for name in PACKED if hasattr(layer, name)}
        pack(experts, layer)
        layer.__dict__["_plain_experts"] = (experts, plain)

    return pack_and_keep


@contextmanager
def unpacked(model: torch.nn.Module) -> Iterator[None]:
    """Have the experts of a mixture as a checkpoint has them meanwhile, then pack what was loaded."""
    layers = [layer for layer in model.modules() if "_plain_experts" in layer.__dict__]
    for layer in layers:
        _, plain = layer.__dict__["_plain_experts"]
        for name, tensor in plain.items():
            getattr(layer, name).data = tensor
    yield
    for layer in layers:
        experts, _ = layer.__dict__["_plain_experts"]
        experts.process_weights_after_loading(layer)
