"""Who shares parameters with whom: what experts of one base changed most, and whether they changed it alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch

from polyphony.trainer.merging.methods import largest
from polyphony.trainer.merging.settings import DENSITY
from polyphony.trainer.merging.sources import found, opened


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedParameters:
    """What two experts have in common. The core of one is, in each tensor, the tenth that it changed most."""

    first: str
    second: str
    core_overlap: float
    """Jaccard index of their cores, 0 to 1; two random ones have .05. NaN where neither changed anything."""
    sign_conflicts: float
    """Share of what is in both cores that they moved in opposite directions; NaN where nothing is in both."""
    cosine: float
    """Of their differences from the base, all tensors together, -1 to 1; NaN where one changed nothing."""


@dataclass(slots=True)
class _Sums:
    both: int = 0
    either: int = 0
    conflicts: int = 0
    product: float = 0.0


def shared_parameters(experts: Mapping[str, str], base: str) -> tuple[SharedParameters, ...]:
    """Return every pair of the experts, given by name where they are: a folder, an adapter, a name on the hub.

    One tensor is in memory at a time, of all of them. Raises ValueError as `merge` does.
    """
    sources, of_base = found(list(experts.values()), base)
    pairs: dict[tuple[str, str], _Sums] = defaultdict(_Sums)
    squares = dict.fromkeys(experts, 0.0)
    with opened(sources, of_base) as (checkpoints, start):
        assert start is not None
        for name in start.shapes:
            if not start.read(name).is_floating_point():
                continue
            zero = start.numbers(name)
            deltas = {e: c.numbers(name).sub_(zero) for e, c in zip(experts, checkpoints, strict=True)}
            cores = {expert: largest(delta, DENSITY["cpi"]) for expert, delta in deltas.items()}
            for expert, delta in deltas.items():
                squares[expert] += _product(delta, delta)
            for first, second in combinations(experts, 2):
                sums, both = pairs[first, second], cores[first] & cores[second]
                sums.both += int(both.sum())
                sums.either += int((cores[first] | cores[second]).sum())
                sums.conflicts += int((deltas[first].signbit() ^ deltas[second].signbit())[both].sum())
                sums.product += _product(deltas[first], deltas[second])
    return tuple(
        SharedParameters(
            first=first,
            second=second,
            core_overlap=_share(sums.both, sums.either),
            sign_conflicts=_share(sums.conflicts, sums.both),
            cosine=_share(sums.product, math.sqrt(squares[first] * squares[second])),
        )
        for (first, second), sums in pairs.items()
    )


def _product(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
