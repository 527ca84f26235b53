"""One tensor of several experts becomes one. Arithmetic in float32, of mergekit where it has a method, of ours where not.

Ours are TIES (2306.01708), which so needs but a block of a tensor at a time and sorts little: the same numbers are kept, of
equals the first; interpolation towards the base (2109.01903, eq. 1); and core-parameter isolation (2508.21741) as we read
it: the tenth of each tensor that an expert changed most is its core, taken over as it is; where cores meet, from the expert
that changed the number more; the rest is SLERP of the experts, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyphony.trainer.merging.settings import MergeSettings

BLOCKWISE = ("linear", "task_arithmetic", "interpolate", "ties")
"""Methods that take each number by itself, so that a tensor can be merged a block at a time."""
OF_MERGEKIT = ("linear", "task_arithmetic", "dare_linear", "dare_ties", "slerp", "cpi")
"""Methods whose arithmetic is mergekit's, in whole or in part."""
BLOCK = 1 << 20
"""Numbers that are worked on at once there: 4 MB of float32, which a processor's cache holds."""
SAMPLE = 1 << 16
"""Numbers that tell about where a tensor's largest ones begin."""


def merge_tensor(
    experts: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    settings: MergeSettings,
    trims: Sequence[Trim] = (),
) -> torch.Tensor:
    """Return the merged tensor; all are float32 and of one shape, and the experts' are overwritten.

    Of a block of a tensor TIES has to be told what of each expert's whole tensor is kept.
    """
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
        trims = trims or [Trim.of(delta.numel(), settings.kept, delta.flatten().__getitem__) for delta in deltas]
        return _agreed([trim.cut(delta) for trim, delta in zip(trims, deltas, strict=True)], weights).add_(base)
    drops = {"density": settings.kept} if method.startswith("dare") else {}
    nothing = torch.zeros(()).expand(base.shape)  # a base that takes no memory: the differences are taken already
    return _mergekit([nothing, *deltas], method, {"weight": weights, **drops}).add_(base)


@dataclass(slots=True)
class Trim:
    """A tensor's largest magnitudes: its share of them, rounded down but one at least, fewer where fewer are not 0.

    Example: `Trim.of(4, 0.5, torch.tensor([1.0, -3.0, 2.0, 0.0]).__getitem__).limit == 2.0`
    """

    limit: float
    """Larger ones are kept."""
    equal: int
    """How many of those that equal it are, those that stand first."""

    @classmethod
    def of(cls, size: int, share: float, read: Callable[[slice], torch.Tensor]) -> Trim:
        """Find it exactly; `read` gives a part of the flat tensor. A sample says about where it is: few are sorted."""
        count = max(1, int(share * size))
        if count >= size:
            return cls(0.0, 0)
        step = (size // SAMPLE) | 1  # odd, so that it meets every column
        sample = np.sort(read(slice(None, None, step)).abs().numpy())[::-1]
        place, spread = count / step, 8 * math.sqrt(len(sample)) / 2  # 8 standard deviations, of a share of a half
        high = float(sample[max(0, int(place - spread) - 1)])
        low = float(sample[min(len(sample) - 1, int(place + spread) + 1)])
        for least, most in ((low, high), (0.0, math.inf)):  # the whole tensor where the sample was not like it
            above, found = 0, []
            for part in blocks(size):
                sizes = read(part).abs().numpy()
                above += int(np.count_nonzero(sizes > most))
                found.append(sizes[(sizes >= least) & (sizes <= most)])
            between = np.concatenate(found)
            if above < count <= above + len(between):
                break
        place = len(between) - (count - above)
        limit = float(np.partition(between, place)[place])
        return cls(limit, count - above - int(np.count_nonzero(between > limit)))

    def keeps(self, delta: torch.Tensor) -> torch.Tensor:
        """Return which numbers of a tensor, or of its next block, are among them."""
        size = delta.abs()
        kept = size > self.limit
        kept.view(-1)[self._equals(size)] = True
        return kept

    def cut(self, delta: torch.Tensor) -> torch.Tensor:
        """Return a tensor, or its next block, with 0 for the others."""
        kept = torch.nn.functional.hardshrink(delta, self.limit)
        equal = self._equals(delta.abs())
        kept.view(-1)[equal] = delta.flatten()[equal]
        return kept

    def _equals(self, size: torch.Tensor) -> torch.Tensor:
        if not (self.equal and self.limit > 0):
            return torch.zeros(0, dtype=torch.long)
        found = np.flatnonzero(size.numpy() == self.limit)[: self.equal]
        self.equal -= len(found)
        return torch.from_numpy(found)


def _agreed(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted mean of those that have the sign of the weighted sum, as mergekit does in more passes."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    sign, share = total.sign().add_(0.5).sign_(), torch.zeros_like(total)  # that of 0 is 1
    total.zero_()
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign().mul_(sign).clamp_(min=0)  # 1 or 0: arithmetic takes a fifth of the time of conditions
        total.addcmul_(delta, agrees, value=weight)
        share.add_(agrees, alpha=weight)
    return total.div_(share.clamp_(min=torch.finfo(share.dtype).tiny))


def largest(delta: torch.Tensor, share: float) -> torch.Tensor:
    """Return where a tensor's largest magnitudes are."""
    return Trim.of(delta.numel(), share, delta.flatten().__getitem__).keeps(delta)


def blocks(size: int) -> list[slice]:
    """Return parts of so many numbers in a row, each of at most `BLOCK`."""
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def _isolated(
    experts: Sequence[torch.Tensor], base: torch.Tensor, weights: Sequence[float], *, share: float
) -> torch.Tensor:
    mixed, total = experts[0], weights[0]
    for expert, weight in zip(experts[1:], weights[1:], strict=True):
        total += weight
        mixed = _slerp(mixed, expert, weight / total if total else 0.0)
    merged, most = mixed.clone(), torch.zeros_like(base)
    for expert in (expert for expert, weight in zip(experts, weights, strict=True) if weight):
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
