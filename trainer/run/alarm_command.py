"""A command of the user's that is run for every alarm, from a thread that training does not wait for."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

END_S = 5.0
"""What is waited for a command that was killed."""


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
            try:
                why = self._run(json.dumps(alarm, default=str) + "\n")
            except Exception as error:  # whatever it is, the next alarm's command is run all the same
                why = f"{type(error).__name__}: {error}"
            if why:
                self.failed += 1
                logger.warning("alarms.command failed (%s): %s", why, self.command)

    def _run(self, line: str) -> str:
        """Run the command; return why it failed, or nothing. What it starts in its session is ended with it.

        It reads and writes files: a pipe that a process of its own holds open would be waited for.
        """
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as said:
            told.write(line.encode())
            told.seek(0)
            given = {"stdin": told, "stdout": subprocess.DEVNULL, "stderr": said}
            job = subprocess.Popen(self.command, shell=True, start_new_session=True, **given)
            try:
                code = job.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait(END_S)
                return f"no end after {self.timeout_s:g} s"
            said.seek(0)
            words = said.read().decode(errors="replace").strip()[-200:]
        return f"exit status {code}{f': {words}' if words else ''}" if code else ""
