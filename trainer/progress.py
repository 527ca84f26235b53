"""One line that says how far the run is and when it ends; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0
"""Seconds between plain lines: seldom enough for a log file, often enough to see life."""


class ProgressLine:
    """Show progress of one run, on standard error."""

    def __init__(self, label: str, total: int, *, console: Console | None = None) -> None:
        self.label = label
        self.total = total
        self.console = console or Console(stderr=True)
        self._started = time.monotonic()
        self._said = 0.0
        self._first: int | None = None
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=self.console)
            self._task = self._bar.add_task(label, total=total)
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done."""
        text = f"{self.label}  reward {metrics['reward']:.3f}" if "reward" in metrics else self.label
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        self._first = step if self._first is None else self._first
        if now - self._said >= PLAIN_EVERY_S or step == self.total:
            self._said = now
            done = step - self._first
            left = f", {(self.total - step) * (now - self._started) / done:.0f} s left" if done else ""
            self.console.print(f"{text}  step {step}/{self.total}{left}", highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
