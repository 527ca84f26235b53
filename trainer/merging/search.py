"""Weights of a merge chosen by a score: moves along one weight at a time, each half as far once none is better.

It knows no model: what a merge with some weights scores is asked of who calls it. A score that is measured on few items is
noisy, and the best of many is the luckiest too: it is for another half of the items to say what was won.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from polyphony.trainer.merging.settings import PROPORTIONS, SHARE, MergeSettings

Weights = tuple[float, ...]

STRONGEST = 1.5
"""Largest weight that is tried where it is a strength, not a share or a proportion."""
FIRST_STEP, LAST_STEP = 0.5, 0.125


def search_weights(
    score: Callable[[Weights], float], settings: MergeSettings, *, experts: int, most: int
) -> dict[Weights, float]:
    """Return the score of all weights that were tried, `most` at most, the settings' own first.

    The best are those with the highest score, of equal ones the first: `max(tried, key=tried.get)`.
    """
    best = settings.of(experts)
    tried = {best: score(best)}
    seen, step = {_as_one(best, settings)}, FIRST_STEP
    while step >= LAST_STEP:
        moved = False
        for weights in _moves(best, step, settings):
            if (key := _as_one(weights, settings)) in seen or (not any(weights) and settings.method not in SHARE):
                continue
            if len(tried) >= most:
                return tried
            seen.add(key)
            tried[weights] = score(weights)
            if tried[weights] > tried[best]:
                best, moved = weights, True
                break
        if not moved:
            step /= 2
    return tried


def with_weights(settings: MergeSettings, weights: Weights) -> MergeSettings:
    """Return the settings with other weights."""
    return replace(settings, weights=weights)


def _moves(weights: Weights, step: float, settings: MergeSettings) -> list[Weights]:
    top = 1.0 if settings.method in (*SHARE, *PROPORTIONS) else STRONGEST
    found = []
    for i, weight in enumerate(weights):
        for moved in (weight - step, weight + step):
            found.append((*weights[:i], min(max(moved, 0.0), top), *weights[i + 1 :]))
    return found


def _as_one(weights: Weights, settings: MergeSettings) -> Weights:
    """Return weights that stand for all that merge alike."""
    total = sum(weights) if settings.method in PROPORTIONS else 1.0
    return tuple(round(w / total, 6) for w in weights) if total else weights
