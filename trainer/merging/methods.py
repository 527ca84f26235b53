"""One tensor of several experts becomes one. Arithmetic in float32, of mergekit where it has a method, of ours where not.

Ours are trimming to the largest differences (mergekit's sorts whole tensors; the same is kept, but that of equals the first
are), interpolation towards the base (2109.01903, eq. 1) and core-parameter isolation (2508.21741), as we read it: the tenth
of each tensor that an expert changed most is its core, taken over as it is; where cores meet, from the expert that changed
the number more; the rest is SLERP of the experts, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polyphony.trainer.merging.settings import MergeSettings

ELEMENTWISE = ("linear", "task_arithmetic", "interpolate")
"""Methods that take each number by itself, so that a tensor can be merged a block at a time."""
SAMPLE = 1 << 20
"""Numbers that tell about where a tensor's largest ones begin."""


def merge_tensor(experts: Sequence[torch.Tensor], base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """Return the merged tensor; all are float32 and of one shape, and the experts' are overwritten."""
    weights, method = settings.of(len(experts)), settings.method
    if method == "linear":
        return _mergekit(experts, "linear", {"weight": weights})
    if method == "slerp":
        return _slerp(experts[0], experts[1], weights[0])
    assert base is not None
    if method == "cpi":
        return _isolated(experts, base, weights, share=settings.kept)
    deltas = [expert.sub_(base) for expert in experts]
    if method == "interpolate":
        return torch.add(base, deltas[0], alpha=weights[0])
    if method == "ties":
        for delta in deltas:
            delta.mul_(largest(delta, settings.kept))
    drops = {"density": settings.kept} if method.startswith("dare") else {}
    nothing = torch.zeros(()).expand(base.shape)  # a base that takes no memory: the differences are taken already
    return _mergekit([nothing, *deltas], method, {"weight": weights, **drops}).add_(base)


def largest(delta: torch.Tensor, share: float) -> torch.Tensor:
    """Return where a tensor's largest magnitudes are: its `share`, rounded down but one at least.

    Fewer where fewer are not 0; of equal ones at the limit those that stand first.
    """
    size = delta.abs().flatten()
    count = max(1, int(share * size.numel()))
    limit = _nth_largest(size, count) if count < size.numel() else torch.zeros(())
    found = size > limit
    if limit > 0 and (short := count - int(found.sum())):
        found[(size == limit).nonzero().flatten()[:short]] = True
    return found.view(delta.shape)


def _nth_largest(size: torch.Tensor, n: int) -> torch.Tensor:
    """Return the n-th largest number, exactly: a sample tells about where it is, so that few have to be sorted."""
    step = (size.numel() // SAMPLE) | 1  # odd, so that it meets every column
    if step > 1:
        sample = size[::step].sort(descending=True).values
        place, spread = n / step, 8 * math.sqrt(len(sample)) / 2  # 8 standard deviations, of a share of a half
        high = sample[max(0, int(place - spread) - 1)]
        low = sample[min(len(sample) - 1, int(place + spread) + 1)]
        above = int((size > high).sum())
        between = size[(size >= low) & (size <= high)]
        if above < n <= above + len(between):
            return torch.kthvalue(between, len(between) - (n - above) + 1).values
    return torch.kthvalue(size, size.numel() - n + 1).values


def _isolated(
    experts: Sequence[torch.Tensor], base: torch.Tensor, weights: Sequence[float], *, share: float
) -> torch.Tensor:
    mixed, total = experts[0], weights[0]
    for expert, weight in zip(experts[1:], weights[1:], strict=True):
        total += weight
        mixed = _slerp(mixed, expert, weight / total if total else 0.0)
    merged, most = mixed.clone(), torch.zeros_like(base)
    for expert in experts:
        delta = expert - base
        size = delta.abs().mul_(largest(delta, share))
        wins = size > most
        merged[wins], most[wins] = expert[wins], size[wins]
    return merged


def _slerp(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    return _mergekit([first, second], "slerp", {"t": share})


def _mergekit(tensors: Sequence[torch.Tensor], method: str, parameters: Mapping[str, Any]) -> torch.Tensor:
    # the extra `merge`: without it interpolation and what is measured work
    from mergekit.merge_methods import merge_tensors

    base_index = None if method == "linear" else 0
    return merge_tensors(tensors, method, parameters=parameters, base_index=base_index)
