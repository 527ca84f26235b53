"""From numbers to places: thinning, ranges, round ticks, and how a number is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

BINS = 50
"""Points a line keeps at most: one every 4 pixels of a panel, so that noise becomes a band and a trend a line."""


Scale = Callable[..., np.ndarray]
"""Maps values to places along an axis."""


def thin(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (x, mean, low, high) of at most `bins` runs of neighbours, equal in count; NaN values are left out."""
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(y) <= bins:
        return x, y, y, y
    edges = np.linspace(0, len(y), bins + 1).astype(int)
    starts, counts = edges[:-1], np.diff(edges)
    mean = np.add.reduceat(y, starts) / counts
    return np.add.reduceat(x, starts) / counts, mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers inside [low, high], about `about` of them."""
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / about))
    # of two steps equally near to `about` ticks the wider: fewer words
    step = min((power * m for m in (10, 5, 2.5, 2, 1)), key=lambda step: abs((high - low) / step - about))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Return a range that holds the values with a little room; a flat line gets room above and below."""
    low, high = span(values)
    room = (high - low) * 0.06
    return low - room, high + room


def fmt(value: float) -> str:
    """Write a number for an axis or a sentence: three significant digits, thousands with a comma."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("-", "−")


def scale(a: float, b: float, to_a: float, to_b: float) -> Scale:
    """Return the linear map that takes `a` to `to_a` and `b` to `to_b`."""
    return lambda v: to_a + (np.asarray(v, dtype=float) - a) * ((to_b - to_a) / (b - a))


def span(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest value; around a single one, half of it to both sides, 0 to 1 where it is 0."""
    low, high = float(min(values)), float(max(values))
    if high > low:
        return low, high
    return (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)


def short(value: float | np.ndarray) -> str:
    """Write a coordinate with at most one decimal."""
    return f"{float(value):.1f}".rstrip("0").rstrip(".")


def plain(values: np.ndarray) -> list[float | None]:
    """Return values for the page's script: four significant digits, None where undefined."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]
