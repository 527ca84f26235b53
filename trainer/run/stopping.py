"""SIGTERM, SIGHUP and SIGINT: a checkpoint at the next draw's boundary, then the end; SIGINT twice: at once.

Slurm and Kubernetes send SIGTERM and, some seconds later, SIGKILL. Where the boundary does not come in time, the run ends
without a new checkpoint rather than in the middle of one. More of the same change nothing. SIGHUP, the end of a terminal, is
heard unless it was ignored at the start (`nohup`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from polyphony.trainer.run import say
from polyphony.trainer.slots import DrawPlan

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def largest(number: int) -> int:
    """Return the largest of what the ranks pass in; every rank must call it."""
    return max(gather_object([number]))


class StopOnSignal(TrainerCallback):
    """Listen while the run trains; all ranks stop after the same step.

    `agree` returns the largest of what the ranks pass in: a signal reaches them at different moments.
    """

    def __init__(self, plan: DrawPlan, *, grace_s: float, agree: Callable[[int], int] = largest) -> None:
        self.plan = plan
        self.grace_s = grace_s
        self.agree = agree
        self.received = 0
        self.stopped: tuple[int, int] | None = None
        """Signal and step of the checkpoint, once a signal has ended the run."""
        self._heard_at = 0.0
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []
        self._timer: threading.Timer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received, self.stopped, self._timer, self._heard_at = 0, None, None, 0.0
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in SIGNALS if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        number = self.agree(self.received)
        if number and not self._heard_at:
            self._heard_at = time.monotonic()
        if number and self.plan.is_boundary(state.global_step) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped = number, state.global_step
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rest()

    def rest(self) -> None:
        """Leave signals to whom they were left before; also where training failed."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def left_s(self) -> float | None:
        """Seconds that what is in flight has still to end, half of the grace period in all; None where nothing ends."""
        if self.stopped is None or self.stopped[0] == signal.SIGINT:  # nobody kills after that one
            return None
        return max(0.0, self._heard_at + self.grace_s / 2 - time.monotonic())

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            say("second interrupt: ending at once")
            os._exit(128 + number)
        if number == signal.SIGHUP:  # whoever writes to a terminal that is gone fails
            for descriptor in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        self._heard_at = time.monotonic() if not self.received else self._heard_at
        self.received = number
        if number != signal.SIGINT and self._timer is None:
            self._timer = threading.Timer(self.grace_s, self._give_up, [number])
            self._timer.daemon = True
            self._timer.start()
        again = "; once more to end at once" if number == signal.SIGINT else ""  # last: who reads may have stalled
        say(f"{signal.Signals(number).name}: saving a checkpoint after this draw, then ending{again}")

    def _give_up(self, number: int) -> None:
        if self._before:  # still training
            name = signal.Signals(number).name
            say(f"{name}: no draw ended within {self.grace_s:g} s; ending without a new checkpoint")
            os._exit(128 + number)
