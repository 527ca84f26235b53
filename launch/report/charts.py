"""Charts worked out: a panel of lines, a stack of shares, a whisker. Numbers in, places out; knows nothing of runs.

Geometry is SVG in a 1000 x 1000 box that stretches to the window, strokes do not scale, and every word is laid over it
in per cent: so a chart keeps its letters readable at any width. `hover` carries the values for the page's script;
without scripts each chart still has its title, axes, end labels and a sentence for screen readers. `parts.html` writes
a figure down.

Scales come first, from numbers to places: thinning, ranges, round ticks, and how a number is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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


Mark = Literal["line", "dots", "both"]
"""How a curve is drawn; dots suit measurements that are few and far between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve, [T]; NaN breaks it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None
    """Lower and upper edge, [T] each."""
    colour: str = "var(--ink)"
    dash: int = 0
    """Which dash pattern of the style sheet; 0 is solid."""
    end: str = ""
    """A short label where the line ends."""
    mark: Mark = "line"

    def extremes(self) -> list[float]:
        """Return the smallest and largest finite values, band included."""
        values = np.concatenate([a[np.isfinite(a)] for a in (self.y, *(self.band or ()))])
        return [float(values.min()), float(values.max())] if len(values) else []


class Occasion(NamedTuple):
    """Something that a panel shows as a vertical line."""

    x: float
    what: str
    whose: str = ""
    """A run's letter, where there are several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A small chart of curves over one x axis."""

    title: str
    lines: Sequence[Line]
    domain: str | None = None
    """Lets the page's filter hide it."""
    chip: str = ""
    """Colour of the square before the title."""
    note: str = ""
    """A few words after the title, such as the change from start to end."""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    allowed: tuple[float, float] | None = None
    """Where the curves should stay: drawn as a pale band with edges."""
    has_zero: bool = False
    marks: Sequence[Occasion] = ()
    ribbon: Sequence[tuple[float, float, str]] = ()
    """Strips along the bottom: (from x, to x, colour)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One band of a stack: its share [T]."""

    name: str
    share: np.ndarray
    colour: str


class Shape(NamedTuple):
    """One SVG element: its tag, its attributes (None is left out), and what it says when pointed at."""

    tag: Literal["path", "rect"]
    attributes: Mapping[str, str | None]
    title: str = ""


class Word(NamedTuple):
    """One word over a chart."""

    kind: str
    """A class of the style sheet."""
    place: str
    """As CSS."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart as it is written down."""

    title: str
    kind: Literal["panel", "stack"]
    domain: str | None
    chip: str
    note: str = ""
    label: str
    """What a screen reader says."""
    shapes: Sequence[Shape]
    """From the back to the front."""
    words: Sequence[Word]
    hover: str
    """Values for the page's script, JSON."""


def draw_panel(panel: Panel) -> Figure | None:
    """Return the figure of the panel's curves; None where no curve has a point."""
    lines = [line for line in panel.lines if line.extremes()]
    if not lines:
        return None
    x0, x1 = panel.x_range or span([v for line in lines for v in (line.x.min(), line.x.max())])
    y0, y1 = panel.y_range or padded([v for line in lines for v in line.extremes()] + list(panel.allowed or ()))
    to_x, to_y = scale(x0, x1, 0, 1000), scale(y0, y1, 1000, 0)
    shapes = _allowed(panel.allowed, to_y) if panel.allowed else []
    shapes += [_rule(float(to_y(t)), "zero" if t == 0 and panel.has_zero else "grid") for t in ticks(y0, y1)]
    shapes += [_box("stage", to_x(a), 975, to_x(b) - to_x(a), 25, f"fill:{colour}") for a, b, colour in panel.ribbon]
    shapes += [_path("mark", f"M{short(to_x(x))} 0V1000", title=what) for x, what, _ in panel.marks]
    shapes += [shape for line in lines for shape in _band(line, to_x, to_y)]
    shapes += [shape for line in lines for shape in _curve(line, to_x, to_y)]
    return Figure(
        title=panel.title,
        kind="panel",
        domain=panel.domain,
        chip=panel.chip,
        note=panel.note,
        label=_describe(panel.title, [(line.name, line.y[np.isfinite(line.y)]) for line in lines]),
        shapes=shapes,
        words=[*_axis_words(x0, x1, y0, y1), *_end_words(lines, to_y), *_mark_words(panel.marks, to_x)],
        hover=_json(
            r=[x0, x1], s=[_hover_line(line) for line in lines], m=[[round(x, 3), what] for x, what, _ in panel.marks]
        ),
    )


def draw_stack(title: str, x: np.ndarray, layers: Sequence[Layer], *, notes: Sequence[tuple[float, str]] = (),
               domain: str | None = None, chip: str = "", bins: int = 160) -> Figure:  # fmt: skip
    """Return the figure of shares [T] stacked to their sum, in steps; `notes` are (from x, words) for the hover."""
    edges = np.unique(np.linspace(0, len(x), min(bins, len(x)) + 1).astype(int))
    starts, counts = edges[:-1], np.diff(edges)
    shares = np.stack([np.add.reduceat(layer.share, starts) / counts for layer in layers])
    total = float(shares.sum(axis=0).max()) or 1.0
    step = float(x[-1] - x[-2]) if len(x) > 1 and x[-1] > x[-2] else 1.0
    borders = np.append(x[starts], x[-1] + step)
    to_x, to_y = scale(borders[0], borders[-1], 0, 1000), scale(0, total, 1000, 0)
    tops = np.vstack([np.zeros(shares.shape[1]), np.cumsum(shares, axis=0)])
    names = [_layer_word(layer.name, shares[k], tops[k], borders, total) for k, layer in enumerate(layers)]
    return Figure(
        title=title,
        kind="stack",
        domain=domain,
        chip=chip,
        label=_describe(title, [(layer.name, share) for layer, share in zip(layers, shares, strict=True)]),
        shapes=[
            _path("layer", _steps(to_x(borders), to_y(top), to_y(bottom)), f"fill:{layer.colour}")
            for layer, top, bottom in zip(layers, tops[1:], tops, strict=False)
        ],
        words=[*_axis_words(borders[0], borders[-1], 0, total), *filter(None, names)],
        hover=_json(
            r=[float(borders[0]), float(borders[-1])],
            s=[[a.name, a.colour, plain(x[starts]), plain(shares[k]), [], []] for k, a in enumerate(layers)],
            w=[[float(at), words] for at, words in notes],
        ),
    )


def place_whisker(interval: tuple[float, float, float], span: tuple[float, float]) -> list[str]:
    """Return where zero and an interval's low, value and high lie on the common scale `span`, which includes 0."""
    return [short(place) for place in scale(*span, 20, 980)([0, *interval])]


def _path(kind: str, d: str, style: str | None = None, title: str = "") -> Shape:
    return Shape("path", {"class": kind, "style": style, "d": d}, title)


def _box(kind: str, x: Any, y: Any, width: Any, height: Any, style: str | None = None) -> Shape:
    places = {"x": short(x), "y": short(y), "width": short(width), "height": short(height)}
    return Shape("rect", {"class": kind, **places, "style": style})


def _trace(x: np.ndarray, y: np.ndarray) -> str:
    parts, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            parts.append(f"{pen}{short(a)} {short(b)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _steps(borders: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> str:
    forth = "".join(f"H{short(a)}V{short(t)}H{short(b)}" for a, b, t in zip(borders, borders[1:], top, strict=False))
    back = "".join(f"V{short(t)}H{short(a)}" for a, t in zip(borders[:-1][::-1], bottom[::-1], strict=True))
    return f"M{short(borders[0])} {short(bottom[0])}{forth}{back}Z"


def _band(line: Line, to_x: Scale, to_y: Scale) -> Iterable[Shape]:
    low, high = line.band or (np.empty(0), np.empty(0))
    keep = np.isfinite(low) & np.isfinite(high)
    if keep.sum() >= 2:
        x = to_x(line.x[keep])
        there, back = _trace(x, to_y(high[keep])), _trace(x[::-1], to_y(low[keep][::-1]))
        yield _path("band", f"{there}L{back[1:]}Z", f"fill:{line.colour}")


def _curve(line: Line, to_x: Scale, to_y: Scale) -> Iterable[Shape]:
    x, y = to_x(line.x), to_y(line.y)
    if line.mark != "dots":
        yield _path(f"line dash{line.dash}", _trace(x, y), f"stroke:{line.colour}")
    if line.mark != "line" or np.isfinite(y).sum() == 1:
        dots = "".join(f"M{short(a)} {short(b)}h0" for a, b in zip(x, y, strict=True) if math.isfinite(b))
        yield _path("dot", dots, f"stroke:{line.colour}")


def _allowed(allowed: tuple[float, float], to_y: Scale) -> list[Shape]:
    top, bottom = float(to_y(allowed[1])), float(to_y(allowed[0]))
    return [_box("allowed", 0, top, 1000, bottom - top), _rule(top, "edge"), _rule(bottom, "edge")]


def _rule(y: float, kind: str) -> Shape:
    return _path(kind, f"M0 {short(y)}H1000")


def _axis_words(x0: float, x1: float, y0: float, y1: float) -> list[Word]:
    to_x, to_y = scale(x0, x1, 0, 100), scale(y0, y1, 100, 0)
    words = [Word("y", f"top:{short(to_y(t))}%", fmt(t)) for t in ticks(y0, y1)]
    return words + [Word("x", f"left:{short(to_x(t))}%", fmt(t)) for t in ticks(x0, x1, 3)]


def _end_words(lines: Sequence[Line], to_y: Scale) -> Iterable[Word]:
    """Label the ends of lines, pushed apart so that no two overlap."""
    ends = [(float(to_y(line.y[np.isfinite(line.y)][-1])), line) for line in lines if line.end]
    placed = -math.inf
    for y, line in sorted(ends, key=lambda pair: pair[0]):
        placed = max(y, placed + 90)
        yield Word("end", f"top:{short(placed / 10)}%;color:{line.colour}", line.end)


def _mark_words(marks: Sequence[Occasion], to_x: Scale) -> list[Word]:
    """Say above each vertical line whose it is; lines that stand too close for a letter each share a place."""
    places: list[tuple[float, list[str]]] = []
    for x, whose in sorted((float(to_x(x)), whose) for x, _, whose in marks if whose):
        if not places or x - places[-1][0] > 30:
            places.append((x, []))
        if whose not in places[-1][1]:
            places[-1][1].append(whose)
    return [Word("whose", f"left:{short(x / 10)}%", "".join(names)) for x, names in places]


def _layer_word(name: str, share: np.ndarray, base: np.ndarray, borders: np.ndarray, total: float) -> Word | None:
    """Put a layer's name in the middle of its longest thick stretch, if there is room for a word."""
    best = (0, 0)
    start = None
    for k, is_thick in enumerate([*(share > 0.13 * total), False]):
        if is_thick and start is None:
            start = k
        if not is_thick and start is not None:
            best, start = max(best, (start, k), key=lambda run: run[1] - run[0]), None
    width = (borders[best[1]] - borders[best[0]]) / (borders[-1] - borders[0]) if best[1] else 0.0
    if width < 0.12:
        return None
    middle = (best[0] + best[1]) // 2
    left = 100 * ((borders[best[0]] + borders[best[1]]) / 2 - borders[0]) / (borders[-1] - borders[0])
    top = 100 * (1 - (base[middle] + share[middle] / 2) / total)
    return Word("name", f"left:{short(left)}%;top:{short(top)}%", name)


def _hover_line(line: Line) -> list:
    low, high = (plain(line.band[0]), plain(line.band[1])) if line.band else ([], [])
    return [line.name, line.colour, plain(line.x), plain(line.y), low, high]


def _json(**values: Any) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)


def _describe(title: str, curves: Sequence[tuple[str, np.ndarray]]) -> str:
    ends = [f"{name} from {fmt(values[0])} to {fmt(values[-1])}".strip() for name, values in curves]
    return f"{title}: {'; '.join(ends)}"
