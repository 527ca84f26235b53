"""Processes that tests kill or group: forked from one that has the libraries loaded, whose imports cost more than a run.

child = Fork(main, ["train", ...], log=tmp_path / "log")
child.kill()
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.forks_loaded"])


class Fork:
    """A call in a process of its own; what the call returns is the exit code."""

    def __init__(
        self, call: Callable[..., int | None], *arguments: Any, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.process = SERVER.Process(target=_run, args=(call, arguments, str(log), dict(environment or {})))
        self.process.start()

    @property
    def said(self) -> str:
        """What it has printed, on standard output and error."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def is_running(self) -> bool:
        return self.process.exitcode is None

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Pull the plug."""
        self.send(signal.SIGKILL)
        self.process.join()

    def wait(self, timeout_s: float = 300) -> int:
        """Return the exit code; one that takes longer is killed and fails the test."""
        self.process.join(timeout_s)
        if self.is_running:
            self.kill()
            raise AssertionError(f"it took more than {timeout_s:.0f} s: {self.said[-3000:]}")
        assert self.process.exitcode is not None
        return self.process.exitcode


def forked_ranks(call: Callable[..., int | None], *arguments: Any, log: Path, **environment: str) -> list[Fork]:
    """Start two ranks of a group as torchrun does; each has a log of its own."""
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    told |= environment
    return [
        Fork(
            call,
            *arguments,
            log=log.with_suffix(f".{rank}"),
            environment={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _run(call: Callable[..., int | None], arguments: tuple, log: str, environment: dict[str, str]) -> None:
    """Call with both streams in a file."""
    os.environ.update(environment)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(call(*arguments))
    finally:
        atexit._run_exitfuncs()  # as an interpreter does at its end, and multiprocessing does not
