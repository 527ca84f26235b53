"""How often the published 95 % intervals hold the truth, by simulation: `python -m tests.experiments.coverage`.

Items are independent. Each has a chance of its own, drawn from Beta(m p, m (1 - p)), or the same p as all (`m` is None);
its score is the mean of `samples` answers. Of changes, the second model's chance is higher by the truth on average; the
samples of both are drawn apart, or none falls (`m` is 0: an item moves only up), which is the hardest world.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import beta

from polyphony.curricula.intervals import Interval, bounded_mean, changed

WORLDS = 2000
ITEMS = (10, 20, 50)
CHANCES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
SHIFTS = (0.0, 0.03, 0.1, 0.2, 0.3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Covered:
    """One kind of world."""

    items: int
    samples: int
    chance: float
    shift: float
    spread: float | None
    coverage: float
    width: float
    """Mean width; of means, as a multiple of the mean width of Clopper and Pearson's exact interval for 0 and 1."""


def of_means(seed: int = 0) -> list[Covered]:
    """Return what `bounded_mean` does in worlds of every kind."""
    rng, found = np.random.default_rng(seed), []
    for n, samples, p, spread in itertools.product(ITEMS, (1, 4), CHANCES, (None, 1.0)):
        scores = rng.binomial(samples, _chances(rng, n, p, spread))
        low, high = _bounds(scores, samples, _of_mean)
        right = (rng.random((WORLDS, n)) < p).sum(axis=1)
        exact = beta.ppf(0.975, right + 1, n - right), beta.ppf(0.025, right, n - right + 1)
        width = (high - low).mean() / (np.nan_to_num(exact[0], nan=1.0) - np.nan_to_num(exact[1])).mean()
        found.append(_covered(n, samples, p, 0.0, spread, low, high, truth=p, width=width))
    return found


def of_changes(seed: int = 0) -> list[Covered]:
    """Return what `changed` does in worlds of every kind."""
    rng, found = np.random.default_rng(seed), []
    for n, samples, p, shift, spread in itertools.product(ITEMS, (1, 4), CHANCES[::2], SHIFTS, (None, 1.0, 0.0)):
        if p + shift > 1:
            continue
        if spread == 0.0:
            moves = rng.binomial(samples, shift, (WORLDS, n))
        else:
            before = _chances(rng, n, p, spread)
            now = np.clip(before + shift / (1 - p) * (1 - before), 0.0, 1.0)
            moves = rng.binomial(samples, now) - rng.binomial(samples, before)
        low, high = _bounds(moves, samples, _of_change)
        found.append(_covered(n, samples, p, shift, spread, low, high, truth=shift, width=(high - low).mean()))
    return found


def _chances(rng: np.random.Generator, n: int, p: float, spread: float | None) -> np.ndarray:
    """Return the items' chances, [WORLDS, n]."""
    return np.full((WORLDS, n), p) if spread is None else rng.beta(spread * p, spread * (1 - p), (WORLDS, n))


def _bounds(counts: np.ndarray, samples: int, interval) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends in each world; an interval knows no order, so worlds that differ in it share one."""
    ends = np.array([interval(tuple(row), samples)[::2] for row in np.sort(counts, axis=1).tolist()])
    return ends[:, 0], ends[:, 1]


@cache
def _of_mean(counts: tuple[int, ...], samples: int) -> Interval:
    return bounded_mean([count / samples for count in counts])


@cache
def _of_change(counts: tuple[int, ...], samples: int) -> Interval:
    return changed([count / samples for count in counts], [0.0] * len(counts))


def _covered(n, samples, p, shift, spread, low, high, *, truth, width) -> Covered:
    holds = (low <= truth + 1e-12) & (truth <= high + 1e-12)
    return Covered(
        items=n,
        samples=samples,
        chance=p,
        shift=shift,
        spread=spread,
        coverage=float(holds.mean()),
        width=float(width),
    )


def table(rows: Iterable[Covered]) -> Iterator[str]:
    """Yield Markdown: per items and samples the lowest and mean coverage, and the smallest and largest width."""
    yield "| items | samples | worlds | lowest coverage | mean | width |"
    yield "|---|---|---|---|---|---|"
    for (n, samples), group in itertools.groupby(rows, key=lambda row: (row.items, row.samples)):
        kind = list(group)
        coverage, width = [row.coverage for row in kind], [row.width for row in kind]
        yield (
            f"| {n} | {samples} | {len(kind)} | {min(coverage):.3f} | {np.mean(coverage):.3f} "
            f"| {min(width):.2f} to {max(width):.2f} |"
        )


if __name__ == "__main__":
    for title, rows in (("Means, width in Clopper-Pearson's", of_means()), ("Changes", of_changes())):
        print(f"{title}\n")
        print("\n".join(table(rows)) + "\n")
