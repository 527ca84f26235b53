"""vLLM's CPU build, made to keep its weights where they can be replaced in place.

It repacks what it multiplies with: every Linear for oneDNN or AMX, dropping the weight itself, and the experts of a mixture.
Later loads land nowhere, or in the packed copy as if it were not, without an error.
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
    from vllm.model_executor.layers import utils as linears
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.platforms import current_platform

    ops._supports_onednn = False
    linears.check_cpu_sgl_kernel = lambda n, k, dtype: False  # AMX's, for bfloat16
    # counting token ranks is not worth the 25 s that compiling it takes
    current_platform.simple_compile_backend = "eager"
    pack = CPUUnquantizedExperts.process_weights_after_loading
    if not hasattr(pack, "__wrapped__"):
        CPUUnquantizedExperts.process_weights_after_loading = _keeping(pack)


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
