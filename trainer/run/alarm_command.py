"""A command of the user's that is run for every alarm, from a thread that training does not wait for."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class AlarmCommand:
    """Run a shell command with an alarm as one line of JSON on its standard input, one alarm after the other.

    Example: `AlarmCommand("curl -sd @- https://example.org/hook", timeout_s=10).ring({"step": 3, "kind": "collapse"})`
    """

    def __init__(self, command: str, *, timeout_s: float) -> None:
        self.command, self.timeout_s = command, timeout_s
        self.rung = self.failed = 0
        self._alarms: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="alarms.command", daemon=True)
        self._thread.start()

    def ring(self, alarm: Mapping[str, Any]) -> None:
        """Have the command run with this alarm."""
        self._alarms.put(alarm)

    def close(self) -> str:
        """Wait for what is still to be run, but no longer than one command may take; return what failed, in words."""
        self._alarms.put(None)
        self._thread.join(self.timeout_s)
        told = [f"failed for {self.failed} of {self.rung}"] if self.failed else []
        if self._thread.is_alive():
            told.append(
                f"not run to its end for {self._alarms.qsize()}"
            )  # the mark of the end stands for the one that runs
        return f"alarms.command: {', '.join(told)} alarms" if told else ""

    def _serve(self) -> None:
        while (alarm := self._alarms.get()) is not None:
            self.rung += 1
            if why := self._run(json.dumps(alarm, default=str) + "\n"):
                self.failed += 1
                logger.warning("alarms.command failed (%s): %s", why, self.command)

    def _run(self, line: str) -> str:
        """Run the command; return why it failed, or nothing. What it starts is ended with it."""
        try:
            job = subprocess.Popen(
                self.command,
                shell=True,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        try:
            _, said = job.communicate(line, timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
            return f"no end after {self.timeout_s:g} s"
        return (
            f"exit status {job.returncode}{f': {said.strip()[-200:]}' if said.strip() else ''}"
            if job.returncode
            else ""
        )
