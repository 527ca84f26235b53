"""How requests are dealt out among workers: groups stay whole, and the longest work goes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyphony.trainer.engine.vllm import Request


def whole_groups(requests: Sequence[Request]) -> list[list[int]]:
    """Return the places of neighbouring requests of one prompt, group by group: a worker computes a prompt once."""
    groups: list[list[int]] = []
    for place, request in enumerate(requests):
        before = requests[groups[-1][0]].prompt_ids if groups else None
        if before is not None and (before is request.prompt_ids or list(before) == list(request.prompt_ids)):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def cost(requests: Sequence[Request], group: Sequence[int]) -> int:
    """Return the tokens that a group takes at most: its prompt once, and every completion up to its own limit."""
    return len(requests[group[0]].prompt_ids) + sum(requests[place].max_tokens for place in group)


def spread(costs: Sequence[int], n_workers: int) -> list[list[int]]:
    """Return, per worker, the numbers of its groups: the costliest first, each to the worker with least to do.

    Longest-processing-time-first, within 4/3 of the best split (Graham 1969, "Bounds on multiprocessing timing
    anomalies"). Ties go to the lower number, so that the same draw is always split alike.
    """
    loads = [0] * n_workers
    shares: list[list[int]] = [[] for _ in range(n_workers)]
    for group in sorted(range(len(costs)), key=lambda g: (-costs[g], g)):
        worker = loads.index(min(loads))
        loads[worker] += costs[group]
        shares[worker].append(group)
    return [sorted(share) for share in shares]
