"""How weights travel from the trainer to rollout workers on CPU: once through Ray's object store; GPUs: `launch/nccl.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeights:
    """All parameters in one block of bytes, which Ray hands to every worker of a machine without a copy.

    Example: `dict(unpack(pack(model.named_parameters())))`
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    data: np.ndarray
    """uint8, [bytes of all parameters], in the order of `names`."""


def pack(named: Iterable[tuple[str, torch.Tensor]]) -> PackedWeights:
    """Copy parameters into one block. Each is copied inside the loop: gathered and merged weights live no longer."""
    names, shapes, dtypes, blocks = [], [], [], []
    for name, parameter in named:
        tensor = parameter.detach().to("cpu").contiguous()
        names.append(name)
        shapes.append(tuple(tensor.shape))
        dtypes.append(tensor.dtype)
        blocks.append(tensor.reshape(-1).view(torch.uint8).numpy().copy())
    return PackedWeights(names=names, shapes=shapes, dtypes=dtypes, data=np.concatenate(blocks))


def unpack(packed: PackedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Return views into the block, by name."""
    whole, start = torch.from_numpy(packed.data), 0
    for name, shape, dtype in zip(packed.names, packed.shapes, packed.dtypes, strict=True):
        end = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        yield name, whole[start:end].view(dtype).reshape(shape)
        start = end
