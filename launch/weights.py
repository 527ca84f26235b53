"""How weights travel from the trainer to rollout workers: once through Ray's object store (CPU), or by NCCL (GPU)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource


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


class TrainerWeights(WeightSource):
    """The trainer's parameters as vLLM's weight transfer reads them; iterating is collective over trainer ranks."""

    def __init__(self, iterate: Any) -> None:
        self.iterate = iterate
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        """Return name, dtype and shape of every parameter; gathered once, they do not change."""
        if self._metadata is None:
            self._metadata = [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p in self.iterate()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.iterate())


class PoolClient:
    """What vLLM's trainer-side NCCL engine calls on the workers: each call reaches all of them and waits for all."""

    def __init__(self, handles: Sequence[Any], *, tensor_parallel: int) -> None:
        self.handles = handles
        self.tensor_parallel = tensor_parallel

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Give each worker its own ranks: the trainer is rank 0, worker i begins at 1 + i x tensor_parallel."""
        self._call(
            "init_weight_transfer_engine",
            [({**init_info, "rank_offset": 1 + i * self.tensor_parallel},) for i in range(len(self.handles))],
        )

    def start_weight_update(self) -> None:
        self._call("start_weight_update", [()] * len(self.handles))

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", [(update_info,)] * len(self.handles))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", [()] * len(self.handles))

    def _call(self, method: str, arguments: Sequence[tuple]) -> None:
        import ray

        calls = zip(self.handles, arguments, strict=True)
        ray.get([getattr(handle, method).remote(*given) for handle, given in calls])


def open_nccl(source: TrainerWeights, handles: Sequence[Any], *, tensor_parallel: int, is_sender: bool) -> Any:
    """Return vLLM's trainer-side NCCL engine, joined with all workers; `send_weights()` is collective over ranks."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
    from vllm.utils.network_utils import get_ip, get_open_port

    info = NCCLTrainerInitInfo(
        rank=0 if is_sender else 1,
        master_address=get_ip(),
        master_port=get_open_port(),
        world_size=1 + len(handles) * tensor_parallel,
    )
    client = PoolClient(handles, tensor_parallel=tensor_parallel)
    return NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
