"""What ranks tell each other, over a process group of its own where a thread has one.

A draw that is generated while another is trained on talks among ranks beside the training; on one process group the two
would answer each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import accelerate.utils
import torch.distributed as dist

T = TypeVar("T")

_OF_THREAD = threading.local()


def own_group() -> Any:
    """Return a further process group of all ranks, for `apart`; None where there is one rank. Collective."""
    return dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None


@contextmanager
def apart(group: Any) -> Iterator[None]:
    """Have this thread's ranks talk over `group` meanwhile."""
    _OF_THREAD.group = group
    try:
        yield
    finally:
        _OF_THREAD.group = None


def gather_object(objects: list[T]) -> list[T]:
    """Return the lists of all ranks as one, in rank order; collective."""
    group = getattr(_OF_THREAD, "group", None)
    if group is None:
        return accelerate.utils.gather_object(objects)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, objects, group=group)
    return [one for of_rank in of_ranks for one in of_rank]


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank; collective."""
    shared, group = [value], getattr(_OF_THREAD, "group", None)
    if group is None:
        accelerate.utils.broadcast_object_list(shared, from_process=0)
    else:
        dist.broadcast_object_list(shared, src=0, group=group)
    return shared[0]
