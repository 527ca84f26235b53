"""What all sections share: the runs, the union of their domains, and which colour, dash and letter means what.

One run: a curve has its domain's colour. Several runs: the first keeps it, the others are told apart by tone, dash and
a letter at the line's end, so that a colour never means a domain here and a run there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from polyphony.curricula.intervals import Interval
from polyphony.launch.report.charts import BINS, Figure, Line, Mark, Occasion, Panel, draw_panel, fmt, padded, thin
from polyphony.launch.report.numbers import Findings

LIGHT = ("#2b51b3", "#f05315", "#0aa379", "#841471", "#8b80f6", "#4a5314", "#4981a6", "#4c2015")
DARK = ("#3278ee", "#ed6a3a", "#7bd68c", "#bc2888", "#cbcaf9", "#e1fe9f", "#70a9b4", "#9a5b24")
"""Eight hues, on light and on dark paper: contrast to the paper above 3, and any two differ by at least 0.1 in OKLab
for normal, protan and deutan eyes (matrices of Machado et al. 2009) and 0.07 for tritan ones."""
POINTS = 1000
"""Points of all domains' lines together, of one metric."""
WORDS = 80
"""Characters of an alarm under the pointer; the table has all."""
STRIPS = 30
"""Stages that are drawn below every panel."""
TONES = 3
"""After eight domains the hues come again nearer to the ink, then nearer to grey; labels tell them apart."""


class Panels(NamedTuple):
    """Figures that stand together."""

    figures: Sequence[Figure]
    heading: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """The runs of one report."""

    findings: Sequence[Findings]
    names: Sequence[str]
    """What tells the runs apart."""

    @property
    def domains(self) -> list[str]:
        """Every domain of any run, in the order of the first run that has it."""
        return list(dict.fromkeys(name for f in self.findings for name in f.run.domains))

    @property
    def is_single(self) -> bool:
        return len(self.findings) == 1

    @property
    def bins(self) -> int:
        """Points a line keeps at most: fewer where there are very many lines, so that the page stays small."""
        return max(12, min(BINS, POINTS // max(1, len(self.domains) * len(self.findings))))

    @property
    def x_range(self) -> tuple[float, float]:
        """Steps from 0 to the end of the longest run."""
        return 0, max(1, *(f.run.steps for f in self.findings))

    @property
    def letters(self) -> list[str]:
        """The letter of every run."""
        return [self.letter(n) for n in range(len(self.findings))]

    def colour(self, domain: str) -> str:
        """Return the domain's colour: its place in `domains` alone decides it."""
        return f"var(--c{self.domains.index(domain) % (len(LIGHT) * TONES)})"

    def letter(self, n: int) -> str:
        """Return the letter of run n, A first; nothing where there is only one run."""
        return "" if self.is_single else (chr(ord("@") + n // 26) if n >= 26 else "") + chr(ord("A") + n % 26)

    def line(
        self,
        n: int,
        colour: str,
        x: ArrayLike,
        y: ArrayLike,
        *,
        band: tuple[np.ndarray, np.ndarray] | None = None,
        what: str = "",
        mark: Mark = "line",
    ) -> Line:
        """Return a curve of run n in the style of its run; `colour` is that of the first run."""
        tones = (colour, "var(--ink)", "var(--muted)")
        run = "" if self.is_single else self.names[n]
        return Line(
            name=f"{run} {what}".strip(),
            x=np.asarray(x, dtype=float),
            y=np.asarray(y, dtype=float),
            band=band,
            colour=tones[min(n, 2)],
            dash=n % 4,
            end="" if mark == "dots" else self.letter(n),
            mark=mark,
        )

    def interval_line(self, n: int, colour: str, steps: Sequence[float], intervals: Sequence[Interval]) -> Line:
        """Return a curve of run n with its intervals as band, one dot a step."""
        low, mid, high = np.array(intervals, dtype=float).T
        return self.line(n, colour, steps, mid, band=(low, high), mark="both")

    def metric_lines(self, key: str, colour: str, *, what: str = "") -> list[Line]:
        """Return the curves of one metric, thinned, with the spread of what was averaged as their band."""
        lines = []
        for n, found in enumerate(self.findings):
            if key in found.run.metrics:
                x, y, low, high = thin(*found.run.metrics[key], bins=self.bins)
                lines.append(self.line(n, colour, x, y, what=what, band=(low, high)))
        return lines

    def domain_panels(
        self,
        lines_of: Callable[[str], list[Line]],
        *,
        heading: str = "",
        shares_y: bool = True,
        has_zero: bool = False,
        allowed_of: Callable[[str], tuple[float, float] | None] = lambda name: None,
    ) -> list[Panels]:
        """Return a group of one panel a domain, over the same range of steps, and of values unless `shares_y` is off.

        Empty where no domain has a curve.
        """
        lines = {name: [line for line in lines_of(name) if line.extremes()] for name in self.domains}
        extremes = [v for of_one in lines.values() for line in of_one for v in line.extremes()]
        if not extremes:
            return []
        figures = [
            draw_panel(
                Panel(
                    title=name,
                    domain=name,
                    chip=self.colour(name),
                    lines=of_one,
                    note=from_to(of_one[0]) if self.is_single and of_one else "",
                    x_range=self.x_range,
                    y_range=padded(extremes) if shares_y else None,
                    has_zero=has_zero,
                    allowed=allowed_of(name),
                    marks=self.marks(name),
                    ribbon=self.ribbon(),
                )
            )
            for name, of_one in lines.items()
        ]
        return [Panels([figure for figure in figures if figure], heading)]

    def metric_panels(self, key: str, titles: Mapping[str, str]) -> list[Panels]:
        """Return a group for each metric of `titles` that was logged by domain; `key` has places for {name}, {metric}."""
        return [
            group
            for metric, title in titles.items()
            for group in self.domain_panels(
                lambda name, metric=metric: self.metric_lines(key.format(name=name, metric=metric), self.colour(name)),
                heading=title,
            )
        ]

    def key_panels(self, titles: Mapping[str, str]) -> list[Panels]:
        """Return a group of one panel for each key of the whole run that was logged."""
        ink, ribbon = "var(--ink)", self.ribbon()
        panels = [
            Panel(title=title, lines=self.metric_lines(key, ink), x_range=self.x_range, ribbon=ribbon)
            for key, title in titles.items()
        ]
        figures = [figure for figure in map(draw_panel, panels) if figure]
        return [Panels(figures)] if figures else []

    def marks(self, domain: str) -> list[Occasion]:
        """Return a domain's first alarms; the table has them all."""
        found = [
            Occasion(
                x=float(alarm["step"]),
                what=f"{self.letter(n)} {alarm.get('kind', 'alarm')}: {alarm.get('message', '')}".strip()[:WORDS],
                whose=self.letter(n),
            )
            for n, found in enumerate(self.findings)
            for alarm in found.run.alarms
            if alarm.get("domain") == domain and isinstance(alarm.get("step"), (int, float))
        ]
        return found[:6]

    def ribbon(self) -> list[tuple[float, float, str]]:
        """Return the stages of the run as strips of the trained domain's colour; none for several runs, nor of very many."""
        if not self.is_single or len(self.findings[0].stages) > STRIPS:
            return []
        return [(a, b, self.colour(name)) for a, b, name in self.findings[0].stages if name in self.domains]


def from_to(line: Line) -> str:
    """Return where a curve starts and ends, as `0.25 → 0.61`."""
    values = line.y[np.isfinite(line.y)]
    return " → ".join(f"{v:.2f}".replace("-", "−") if abs(v) < 10 else fmt(v) for v in (values[0], values[-1]))
