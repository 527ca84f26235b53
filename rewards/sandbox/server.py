"""The process that forks a supervisor for each program: its imports, most of what a start costs, are made once.

It is handed descriptors and settings, never a program or a test, so what it forks has no memory of either.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent
_PYTHON: str = getattr(sys, "_base_executable", sys.executable)
"""Outside of any virtual environment, whose place is nothing that a program has to know."""


class ForkServer:
    """A fork server, started when made. It ends when it is closed, and when its owner ends."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it by what `on_host` or `in_bubblewrap` returns."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )
        theirs.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def is_ending(self) -> bool:
        """Say whether it ends within a moment: what it had in hand is lost before it counts as ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        return not self.is_alive

    def start(self, settings: str) -> tuple[int, int]:
        """Return the descriptors for requests to a new supervisor and its replies. Raises OSError where there is none."""
        theirs_in, requests = os.pipe()
        replies, theirs_out = os.pipe()
        try:
            socket.send_fds(self._control, [settings.encode()], [theirs_in, theirs_out])
        except OSError:
            os.close(requests)
            os.close(replies)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        return requests, replies

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


_shared: dict[int, ForkServer] = {}
_lock = threading.Lock()


def shared_server() -> ForkServer:
    """Return this process's server, a new one where it ended."""
    with _lock:
        server = _shared.get(os.getpid())
        if server is None or not server.is_alive:
            server = _shared[os.getpid()] = ForkServer(on_host())
            atexit.register(server.close)
        return server


def _environment() -> dict[str, str]:
    """Return all that a program sees of the environment: nothing of the caller's, and the same hash seed every time."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", **threads}


def on_host() -> list[str]:
    """Return the command of a server whose supervisors isolate their programs by themselves."""
    return _python(str(_FOLDER))


def in_bubblewrap(*, packages: str, size_bytes: int) -> list[str]:
    """Return the command of a server inside bubblewrap; its files, all in memory, may have `size_bytes`."""
    found = shutil.which("bwrap") or "bwrap"
    command = [found, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    # of devices the one that holds nothing; a whole /dev comes with a /dev/shm without limit
    command += ["--dev-bind", "/dev/null", "/dev/null", "--size", str(size_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    command += ["--ro-bind", str(_FOLDER), "/sandbox"]
    readable = ["/usr", sys.base_prefix, *([packages] if packages else [])]
    for path in dict.fromkeys(readable):
        command += ["--ro-bind", path, path]
    for link in ("/lib", "/lib64", "/bin"):
        if Path(link).is_symlink():
            command += ["--symlink", str(Path(link).readlink()), link]
        elif Path(link).exists():
            command += ["--ro-bind", link, link]
    return [*command, "--remount-ro", "/", "--", *_python("/sandbox")]


def _python(folder: str) -> list[str]:
    return [_PYTHON, "-s", "-P", "-S", f"{folder}/__main__.py"]
