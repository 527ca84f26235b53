"""A worker process's own side (`-m polyphony.trainer.environments.worker_main`): it holds environments and is asked things.

The first line from stdin says what environments are made of, by domain; each further one is a thing that an instance is
asked, answered by a line as soon as it is done, in any order. It ends with its stdin, and takes what it started with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

from polyphony.trainer.environments.calls import Instance


class EnvironmentWorker:
    """The instances of one process, by seat."""

    def __init__(self, specs: Mapping[str, Any], replies: BinaryIO) -> None:
        self._specs, self._replies = specs, replies
        self._seats: dict[int, Instance] = {}
        self._idle: dict[str, list[Instance]] = {name: [] for name in specs}
        self._lock = threading.Lock()

    def take(self, job: Mapping[str, Any]) -> None:
        """Begin with a job, or free the seat of an episode that is over."""
        seat = job["seat"]
        if job["what"] == "close":
            if (instance := self._seats.pop(seat, None)) is not None:
                self._idle[job["domain"]].append(instance)
            return
        threading.Thread(target=self._answer, args=(job,), daemon=True).start()

    def _answer(self, job: Mapping[str, Any]) -> None:
        try:
            answer = {"value": self._instance(job["seat"], job["domain"]).ask(job["what"], job["given"])}
        except BaseException as error:  # a user's may raise anything; the episode ends with it
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.reply({"seat": job["seat"], **answer})

    def _instance(self, seat: int, domain: str) -> Instance:
        if seat not in self._seats:
            idle, spec = self._idle[domain], self._specs[domain]
            self._seats[seat] = idle.pop() if idle else Instance.made(spec["environment"], spec["tools"])
        return self._seats[seat]

    def reply(self, answer: Mapping[str, Any]) -> None:
        """Write a line to whoever started this."""
        line = json.dumps(answer).encode() + b"\n"
        with self._lock:
            self._replies.write(line)
            self._replies.flush()


def main() -> None:
    """Answer until stdin closes."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an environment prints is not an answer
    worker = EnvironmentWorker(json.loads(sys.stdin.buffer.readline()), replies)
    worker.reply({"ready": True})
    for line in sys.stdin.buffer:
        worker.take(json.loads(line))
    os.killpg(0, signal.SIGKILL)  # with whatever hangs, and what environments started


if __name__ == "__main__":
    main()
