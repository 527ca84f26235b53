"""Get the result of a reward that may be asynchronous, wherever the caller stands."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def settled(results: Sequence[Any]) -> list[Any]:
    """Return the results, with those that are awaitable awaited together.

    In a thread of its own: the caller's may already run an event loop.
    """
    if not any(inspect.isawaitable(result) for result in results):
        return list(results)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _gather(results)).result()


async def _gather(results: Sequence[Any]) -> list[Any]:
    return list(await asyncio.gather(*(_finish(result) for result in results)))


async def _finish(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result
