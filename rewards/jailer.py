"""The process that forks a warden for each program: a jail's imports, most of what a start costs, are made once.

It is handed descriptors and settings, never a program or a test, so what it forks has no memory of either.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

_JAIL = Path(__file__).parent / "jail"
_PYTHON: str = getattr(sys, "_base_executable", sys.executable)
"""Outside of any virtual environment, whose place is nothing that a program has to know."""


class Jailer:
    """One such process, started when made. It ends when it is closed, and when its owner ends."""

    def __init__(self, *, in_bubblewrap: bool = False, packages: str = "") -> None:
        jail = "/jail" if in_bubblewrap else str(_JAIL)
        command = [_PYTHON, "-s", "-P", "-S", f"{jail}/__main__.py"]
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            _bubblewrap(packages) + command if in_bubblewrap else command,
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

    def jail(self, settings: str) -> tuple[int, int]:
        """Return the descriptors for requests to a new warden and for its replies. Raises OSError where there is none."""
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


_shared: dict[int, Jailer] = {}
_lock = threading.Lock()


def shared_jailer() -> Jailer:
    """Return this process's jailer, a new one where it ended."""
    with _lock:
        jailer = _shared.get(os.getpid())
        if jailer is None or not jailer.is_alive:
            jailer = _shared[os.getpid()] = Jailer()
            atexit.register(jailer.close)
        return jailer


def _environment() -> dict[str, str]:
    """Return all that a program sees of the environment: nothing of the caller's, and the same hash seed every time."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", **threads}


def _bubblewrap(packages: str) -> list[str]:
    found = shutil.which("bwrap") or "bwrap"
    command = [found, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--dev", "/dev"]
    command += ["--tmpfs", "/tmp", "--chdir", "/tmp"]
    command += ["--ro-bind", str(_JAIL), "/jail"]
    readable = ["/usr", sys.base_prefix, *([packages] if packages else [])]
    for path in dict.fromkeys(readable):
        command += ["--ro-bind", path, path]
    for link in ("/lib", "/lib64", "/bin"):
        if Path(link).is_symlink():
            command += ["--symlink", str(Path(link).readlink()), link]
        elif Path(link).exists():
            command += ["--ro-bind", link, link]
    return [*command, "--"]
