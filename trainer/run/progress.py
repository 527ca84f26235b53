"""Progress of a run and its domains, live in a terminal; plain lines where there is none.

Everything shown is a metric that the run logs anyway, so watching costs nothing and shows nothing that is not on disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from polyphony.trainer.run import visible

PLAIN_EVERY_S = 10.0
"""Seconds between plain lines: seldom enough for a log file, often enough to see life."""
TRACK = 11
"""Characters of the little scale that shows an entropy in its band."""


class ProgressLine:
    """Show progress of one run, on standard error.

    Example: `ProgressLine("demo", 80, domains=["math"]).update(1, {"domain/math/reward": 0.5, "domain/math/n": 64})`
    """

    def __init__(self, label: str, total: int, *, domains: Sequence[str] = (), console: Console | None = None) -> None:
        self.label = label
        self.total = total
        self.domains = tuple(domains)
        self.console = console or Console(stderr=True)
        self._known: dict[str, float] = {}
        self._alarms: list[str] = []
        self._began = 0.0
        self._said, self._told = 0.0, -1
        self._first: int | None = None
        self._bar: Progress | None = None
        self._live: Live | None = None
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=self.console)
            self._task = self._bar.add_task(label, total=total)
            self._live = Live(self._bar, console=self.console, refresh_per_second=2)
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done; a domain keeps its last values until new ones come."""
        self._known.update(metrics)
        reward = mean_reward(self.domains, metrics)
        text = self.label if math.isnan(reward) else f"{self.label}  reward {reward:.3f}"
        if self._bar is not None and self._live is not None:
            if "rollout/tokens_per_s" in self._known:
                text += f"  {self._known['rollout/tokens_per_s']:,.0f} tokens/s"
            text += f"  {alarms}" if (alarms := self._told_alarms()) else ""
            self._bar.update(self._task, completed=step, description=text)
            self._live.update(Group(self._bar, domain_table(self.domains, self._known)))
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = step, now
        has_scores = any(f"heldout/{name}/score" in metrics for name in self.domains)
        if has_scores or now - self._said >= PLAIN_EVERY_S or (step == self.total and step != self._told):
            self._said, self._told = now, step
            done = step - self._first
            left = f", {(self.total - step) * (now - self._began) / done:.0f} s left" if done else ""
            each = [plain_domain(name, self._known) for name in self.domains]
            words = "; ".join(filter(None, [*each, self._told_alarms()]))
            line = f"{text}  step {step}/{self.total}{left}{f': {words}' if words else ''}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def ring(self, title: str) -> None:
        """Have an alarm stand in every further picture: how many there are, and the newest."""
        self._alarms.append(visible(title))

    def close(self) -> None:
        """Leave the last picture standing and give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def _told_alarms(self) -> str:
        n = len(self._alarms)
        return f"{n} alarm{'s' if n > 1 else ''}, {'the last ' if n > 1 else ''}{self._alarms[-1]}" if n else ""


def mean_reward(domains: Sequence[str], metrics: Mapping[str, float]) -> float:
    """Return the domains' mean reward, each weighted by its completions; NaN where none was drawn.

    Not TRL's `reward`: that is over the rows of the update, which refill and early stop have selected.
    """
    drawn = [n for n in domains if f"domain/{n}/reward" in metrics]
    counts = [metrics[f"domain/{n}/n"] for n in drawn]
    total = sum(metrics[f"domain/{n}/reward"] * count for n, count in zip(drawn, counts, strict=True))
    return total / sum(counts) if drawn else math.nan


def plain_domain(name: str, known: Mapping[str, float]) -> str:
    """Return what is known of a domain in a few words, first of its held-out items; empty where nothing is.

    Example: `math score 0.412 entropy 0.71 (in its band), in training reward 0.503 entropy 0.65`
    """
    held_out = _said(known, f"heldout/{name}", score=3, entropy=2)
    place = known.get(f"heldout/{name}/entropy_place", math.nan)
    if math.isfinite(place):
        held_out += f" ({'below' if place < 0 else 'above' if place > 1 else 'in'} its band)"
    trained = _said(known, f"domain/{name}", reward=3, entropy=2)
    parts = [*filter(None, [held_out, trained and f"in training {trained}"])]
    return f"{name} {', '.join(parts)}" if parts else ""


def _said(known: Mapping[str, float], family: str, **digits: int) -> str:
    there = {what: value for what in digits if math.isfinite(value := known.get(f"{family}/{what}", math.nan))}
    return " ".join(f"{what} {value:.{digits[what]}f}" for what, value in there.items())


def domain_table(domains: Sequence[str], known: Mapping[str, float]) -> Table:
    """Return a row a domain: score, drawdown and entropy held out, with its place in the band; in training
    reward, entropy and share."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("domain", "score", "drawdown", "entropy", "band", "reward", "in training", "share"):
        is_text = heading in ("domain", "band")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading == "domain")
    for name in domains:
        table.add_row(
            Text(name),
            _number(known.get(f"heldout/{name}/score")),
            _number(known.get(f"transfer/{name}/drawdown"), signed=True),
            _number(known.get(f"heldout/{name}/entropy")),
            track(known.get(f"heldout/{name}/entropy_place", math.nan)),
            _number(known.get(f"domain/{name}/reward")),
            _number(known.get(f"domain/{name}/entropy")),
            _number(known.get(f"curriculum/{name}/mixture")),
        )
    return table


def track(place: float) -> Text:
    """Return a small scale with a mark where an entropy lies: 0 is the band's low edge, 1 its high one; red outside."""
    if math.isnan(place):
        return Text("")
    is_inside = 0 <= place <= 1
    # the band takes the middle of the scale, so that there is room to be outside on either side
    at = round((min(max(place, -0.5), 1.5) + 0.5) / 2 * (TRACK - 1))
    first = (TRACK - 1) // 4
    last = TRACK - 1 - first
    at = min(max(at, first), last) if is_inside else min(at, first - 1) if place < 0 else max(at, last + 1)
    cells = ["─" if first <= k <= last else "·" for k in range(TRACK)]
    cells[at] = "●"
    return Text("".join(cells), style="green" if is_inside else "bold red")


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"
