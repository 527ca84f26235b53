"""`polyphony watch`: one run or several in a terminal, from another one, on a shared disk or when they are over.

It reads run folders and nothing else, as the report does; a folder is read anew only after something was written there.
Watching ends with the runs; one whose process was killed is seen to be over on the machine that it ran on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from polyphony.launch.report.numbers import Findings, find
from polyphony.launch.report.run import Series, read_run
from polyphony.launch.report.story import signed
from polyphony.trainer.run import visible
from polyphony.trainer.run.folder import LEDGERS, RunFolder
from polyphony.trainer.run.progress import track

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 9
"""Characters of a curve."""
WIDE = 98
"""Characters of one run; as many stand side by side as there is room for."""
NEWEST = 3
"""Alarms shown of a run."""
STRONGEST = 3
"""Effects of one domain on another that are shown of a run."""


def watch(runs: Sequence[Path], *, every_s: float = 2.0, once: bool = False, console: Console | None = None) -> None:
    """Show the runs until all are over, or once. Raises ValueError for a folder without any file of a run."""
    console = console or Console()
    seen = [Seen(run) for run in runs]
    if once or not console.is_terminal:
        console.print(_pictures(seen, console.width))
        return
    with Live(_pictures(seen, console.width), console=console, refresh_per_second=4, screen=False) as live:
        while not all(one.is_over for one in seen):
            time.sleep(every_s)
            live.update(_pictures(seen, console.width))


class Seen:
    """A run as it was when it was last written to."""

    def __init__(self, path: Path) -> None:
        self.folder, self.path = RunFolder(path), path
        self._written: tuple[float, ...] = ()
        self.findings: Findings = find(read_run(path))

    @property
    def is_over(self) -> bool:
        """Whether nobody writes there any more."""
        return self.findings.run.is_finished or bool(self.folder.is_left)

    def picture(self, width: int = WIDE) -> RenderableType:
        """Return the run as it is now, in so many characters a line."""
        files = [self.folder.recipe, self.folder.end, *map(self.folder.ledger, LEDGERS)]
        written = tuple(file.stat().st_mtime for file in files if file.exists())
        if written != self._written:
            self.findings, self._written = find(read_run(self.path)), written
        return picture(self.findings, width)


def _pictures(seen: Sequence[Seen], room: int) -> RenderableType:
    width = min(WIDE, room)
    pictures = [one.picture(width) for one in seen]
    return Columns(pictures, width=width) if room > 2 * width else Group(*pictures)


def picture(findings: Findings, width: int = WIDE) -> Panel:
    """Return one run: its newest alarms, a row a domain with its curves, then throughput and what moved what.

    In fewer than `WIDE` characters a line the curves are shorter, or left out, and then columns. What does not fit below is
    cut, so the alarms stand first.
    """
    run = findings.run
    of = f" of {run.planned_steps:,}" if run.planned_steps else ""
    left = {True: "stopped", False: "running", None: "running, or stopped"}[RunFolder(run.path).is_left]
    state = "over" if run.is_finished else left
    title = f"{run.title}  step {run.steps:,}{of}, {state}"
    curves = max(0, WIDTH - math.ceil((WIDE - width) / 3))
    shown = Group(*_alarms(findings), _table(findings, curves, width), *_lines(findings))
    return Panel(shown, title=Text(visible(title)), title_align="left", width=width)


HEADINGS = ("domain", "score", "", "lost", "entropy", "", "band", "reward", "", "share")
LEAST = {"reward": 72, "share": 72, "entropy": 56, "lost": 48}
"""Characters a line from which a column is shown; the others always are."""


def _table(findings: Findings, curves: int, width: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [n for n, heading in enumerate(HEADINGS) if LEAST.get(heading, 0) <= width and (heading or curves)]
    for heading in (HEADINGS[n] for n in shown):
        table.add_column(heading, justify="left" if heading in ("domain", "", "band") else "right", no_wrap=True)
    metrics = findings.run.metrics
    for name in findings.run.domains:
        scores = np.array([interval.mid for interval in findings.scores.get(name, ())])
        reward, sampled = metrics.get(f"domain/{name}/reward"), metrics.get(f"domain/{name}/entropy")
        held_out = np.array([row.entropy[name] for row in findings.evaluations if name in row.entropy])
        lost, nats = findings.final("drawdown", name), findings.entropy[name]
        cells = (
            Text(visible(name) + (" (watched)" if name in findings.run.watch_only else "")),
            _last(scores),
            curve(scores, curves),
            Text(signed(lost.mid), style="bold red" if lost.is_below_zero else ""),
            f"{nats.after:.2f}" if math.isfinite(nats.after) else "–",
            curve(held_out if len(held_out) else _values(sampled), curves),
            track(nats.at),
            _last(_values(reward)),
            curve(_values(reward), curves),
            _last(_values(metrics.get(f"curriculum/{name}/mixture"))),
        )
        table.add_row(*(cells[n] for n in shown))
    return table


def _values(series: Series | None) -> np.ndarray:
    return np.empty(0) if series is None else series.values


def _last(values: np.ndarray) -> str:
    return f"{values[-1]:.3f}" if len(values) and math.isfinite(values[-1]) else "–"


def curve(values: np.ndarray, width: int = WIDTH) -> str:
    """Return values [T] as a line of bars between their own least and largest; means where there are more than `width`."""
    values = values[np.isfinite(values)]
    if not len(values) or not width:
        return ""
    means = np.array([part.mean() for part in np.array_split(values, min(width, len(values)))])
    low, high = means.min(), means.max()
    heights = (means - low) / (high - low) * (len(BARS) - 1) if high > low else np.zeros(len(means))
    return "".join(BARS[round(height)] for height in heights)


def _lines(findings: Findings) -> list[Text]:
    run, lines = findings.run, []
    pace = [
        f"{run.metrics[key].values[-1]:,.{digits}f} {unit}"
        for key, digits, unit in (("rollout/tokens_per_s", 0, "tokens/s"), ("step_time", 2, "s a step"))
        if key in run.metrics
    ]
    if pace:
        lines.append(Text(", ".join(pace)))
    if moved := _moved(findings):
        lines.append(Text(visible(f"transfer: {moved}")))
    return lines


def _alarms(findings: Findings) -> list[Text]:
    rung, lines = findings.run.alarms, []
    for alarm in rung[-NEWEST:]:
        whose = " of ".join(str(alarm[key]) for key in ("kind", "domain") if alarm.get(key))
        told = f"step {alarm.get('step', '?')}: {whose}: {alarm.get('message', '')}"
        lines.append(Text(visible(told), style="bold red"))
    return lines + ([Text(f"{len(rung):,} alarms in all", style="red")] if len(rung) > NEWEST else [])


def _moved(findings: Findings) -> str:
    """Name the strongest effects of a domain on another whose interval leaves out zero."""
    table = findings.transfer
    if table is None:
        return ""
    sure = [
        (abs(table.effect[j, k]), f"{trained} → {domain} {signed(float(table.effect[j, k]))}")
        for j, trained in enumerate(table.trained)
        for k, domain in enumerate(table.domains)
        if trained != domain and (table.low[j, k] > 0 or table.high[j, k] < 0)
    ]
    return ", ".join(words for _, words in sorted(sure, reverse=True)[:STRONGEST])
