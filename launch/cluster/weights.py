"""How weights travel from the trainer to rollout workers: on CPU through Ray's object store, on GPU by one NCCL broadcast.

Through the object store they travel in buckets, and only those that changed.

On GPU the trainer is rank 0 of a group of its own with all workers; the group is opened anew where workers were replaced.
Not measured: nothing of NCCL here has run on a GPU; written against vLLM 0.22 to 0.31, `tests/gpu` runs it where there are
two.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import ray
import torch
from packaging.version import Version
from ray.exceptions import RayError

Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeights:
    """Parameters in one block of bytes, which Ray hands to every worker of a machine without a copy.

    Example: `dict(unpack(pack(model.named_parameters())))`
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    data: np.ndarray
    """uint8, [bytes of all parameters], in the order of `names`, each from a multiple of `ALIGNED` on."""

    def equals(self, other: PackedWeights) -> bool:
        """Whether these are the same parameters, bit for bit."""
        is_alike = (self.names, self.shapes, self.dtypes) == (other.names, other.shapes, other.dtypes)
        first = slice(2**12)  # where what was trained differs already
        return is_alike and all(np.array_equal(self.data[of], other.data[of]) for of in (first, slice(None)))


Buckets = tuple[ray.ObjectRef, ...]
"""Places of `PackedWeights` in the object store, which are all weights together."""
BUCKET = 2**26
"""Bytes of a bucket: as much, not all weights, is there once more while it is packed."""


def pack(named: Iterable[tuple[str, torch.Tensor]]) -> PackedWeights:
    """Copy parameters into one block. Each is copied inside the loop: gathered and merged weights live no longer."""
    names, shapes, dtypes, blocks = [], [], [], []
    for name, parameter in named:
        tensor = parameter.detach().to("cpu").contiguous()
        names.append(name)
        shapes.append(tuple(tensor.shape))
        dtypes.append(tensor.dtype)
        block = np.zeros(_room(tensor.nbytes), dtype=np.uint8)
        block[: tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()
        blocks.append(block)
    return PackedWeights(names=names, shapes=shapes, dtypes=dtypes, data=np.concatenate(blocks))


def put(named: Named, before: Buckets = ()) -> Buckets:
    """Put weights into the object store, at most `BUCKET` bytes together (a larger parameter is a bucket by itself).

    A bucket that is what it was `before` stays where it is: whoever has it need not be sent it again.
    """
    placed: list[ray.ObjectRef] = []
    for bucket in map(pack, parted(named, BUCKET)):
        old = before[len(placed)] if len(placed) < len(before) else None
        placed.append(old if old is not None and _is_there(bucket, old) else ray.put(bucket))
    return tuple(placed)


def _is_there(bucket: PackedWeights, old: ray.ObjectRef) -> bool:
    try:
        return bucket.equals(ray.get(old))
    except RayError:  # a node took it along: as good as changed
        return False


def parted(named: Named, most: int) -> Iterator[Named]:
    """Return parameters in turn, a bucket at a time; each bucket has to be read before the next one is asked for."""
    walk = iter(named)
    first = next(walk, None)

    def bucket() -> Named:
        nonlocal first
        size = 0
        while first is not None and (not size or size + first[1].nbytes <= most):
            size += first[1].nbytes
            yield first
            first = next(walk, None)

    while first is not None:
        yield bucket()


def unpack(packed: PackedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Return views into the block, by name."""
    whole, start = torch.from_numpy(packed.data), 0
    for name, shape, dtype in zip(packed.names, packed.shapes, packed.dtypes, strict=True):
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        yield name, whole[start : start + size].view(dtype).reshape(shape)
        start += _room(size)


ALIGNED = 16
"""Bytes: a view of wider numbers cannot begin anywhere."""


def _room(size: int) -> int:
    return -(-max(1, size) // ALIGNED) * ALIGNED


POLL_S = 0.5


LOST = 75
"""Exit code of a trainer that lost a worker amid a transfer: EX_TEMPFAIL, `--resume` goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """What workers are told before the weights come: all three in the order of sending."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    @classmethod
    def of(cls, named: Named, *, dtype: torch.dtype | None) -> Announcement:
        """Walk through parameters that will be sent as `dtype`; collective over trainer ranks, as gathering is."""
        names, dtypes, shapes = [], [], []
        for name, parameter in named:
            names.append(name)
            dtypes.append(str(_sent_as(parameter, dtype)).removeprefix("torch."))
            shapes.append(list(parameter.shape))
        return cls(names=names, dtype_names=dtypes, shapes=shapes)


def copies(named: Named, *, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Copy each parameter, in the engine's type, while it is whole.

    The transfer packs tensors long after they were yielded: by then a view would be of weights without their adapter.
    """
    for name, parameter in named:
        yield name, parameter.detach().to(_sent_as(parameter, dtype), copy=True)


def _sent_as(parameter: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype


class NcclSender:
    """The trainer's end of a group with all workers: rank 0; worker i begins at rank 1 + i x tensor_parallel.

    Example: `NcclSender(handles, tensor_parallel=1, timeout_s=600).send(announcement, copies(named, dtype=None), version=1)`
    """

    def __init__(self, handles: Sequence[Any], *, tensor_parallel: int, timeout_s: float) -> None:
        from vllm.utils.network_utils import get_open_port  # slow to import

        self.handles = list(handles)
        self.timeout_s = timeout_s
        # vLLM 0.28 took `packed` from every update into the handshake
        self.in_handshake, self.in_update = ({"packed": True}, {}) if _is_stateful() else ({}, {"packed": True})
        meeting = {
            "master_address": ray.util.get_node_ip_address(),
            "master_port": get_open_port(),
            "world_size": 1 + len(handles) * tensor_parallel,
        }
        calls = [
            handle.join.remote({**meeting, **self.in_handshake, "rank_offset": 1 + i * tensor_parallel})
            for i, handle in enumerate(handles)
        ]
        with watched(calls, timeout_s=timeout_s, doing="joining the trainer's NCCL group"):
            self.group = _endpoint()(meeting)

    def send(self, announcement: Announcement, named: Iterator[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Broadcast the weights of sync `version` to all workers."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer  # slow to import

        update = {**asdict(announcement), **self.in_update}
        calls = [handle.receive.remote(update, version) for handle in self.handles]
        torch.cuda.synchronize()  # the broadcast has streams of its own, which do not wait for the optimizer's
        with watched(calls, timeout_s=self.timeout_s, doing="receiving weights over NCCL"):
            packed_nccl_broadcast_producer(iterator=named, group=self.group, src=0, post_iter_func=itemgetter(1))


def _is_stateful() -> bool:
    import vllm  # slow to import

    return Version(vllm.__version__) >= Version("0.28.0")


def _endpoint() -> Callable[[dict], Any]:
    """Return what opens the trainer's end; vLLM 0.28 moved it."""
    if _is_stateful():
        from vllm.distributed.weight_transfer.nccl_common import trainer_init  # slow to import

        return trainer_init
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine  # slow to import

    return NCCLWeightTransferEngine.trainer_init  # type: ignore[attr-defined]


@contextmanager
def watched(calls: Sequence[ray.ObjectRef], *, timeout_s: float, doing: str) -> Iterator[None]:
    """Take part in what workers do at the same time; end the process if one fails or hangs meanwhile.

    Inside NCCL the main thread waits for all workers in C, where no exception reaches it.
    """
    is_over = threading.Event()
    deadline = time.monotonic() + timeout_s
    watch = threading.Thread(target=_watch, args=(list(calls), is_over, deadline, doing), daemon=True)
    watch.start()
    try:
        yield
        ray.get(list(calls), timeout=max(0.0, deadline - time.monotonic()))
    finally:
        is_over.set()
        watch.join()


def _watch(calls: list[ray.ObjectRef], is_over: threading.Event, deadline: float, doing: str) -> None:
    while not is_over.wait(POLL_S):
        done, calls = ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
        for call in done:
            try:
                ray.get(call)
            except RayError as error:
                _end(f"a rollout worker was lost while {doing}: {' '.join(str(error).split())[:500]}")
        if time.monotonic() > deadline:
            _end(f"rollout workers hang while {doing}: no end within rollouts.timeout_s")


def _end(reason: str) -> None:
    print(f"polyphony: {reason}; go on with --resume", file=sys.stderr, flush=True)
    os._exit(LOST)
