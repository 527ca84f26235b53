"""Kernels that DeepSpeed builds when it first needs them: locks that a killed build left behind.

torch (`FileBaton`) locks a build by a file that is there, open in the process that builds. A process killed
inside a build leaves the file, and whoever needs the kernel next waits for it without a word and without an end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

BUILD_S = 600.0
"""After so many seconds a lock that nobody here has open is no other machine's, either: the largest kernel takes minutes."""


def leave_no_killed_build(say: Callable[[str], None], *, patience_s: float = BUILD_S, poll_s: float = 1.0) -> None:
    """Remove locks of killed builds, waiting until each is `patience_s` old; call it before any rank of this machine runs.

    A lock that a process of this machine has open is left alone: its build will end. One that none has open may be that
    of another machine which shares the folder; hence the wait. `say` is told of every wait and removal.
    """
    for lock in locks():
        announced = False
        while (age := _age(lock)) is not None and not is_held(lock):
            if age >= patience_s:
                lock.unlink(missing_ok=True)
                what = "left by a build of a DeepSpeed kernel that was killed"
                say(f"polyphony launch: removed {lock}, {age:.0f} s old and {what}")
                break
            if not announced:
                say(
                    f"polyphony launch: {lock} is {age:.0f} s old and no process here has it open: another machine "
                    "builds this DeepSpeed kernel, or a killed build left it. "
                    f"Waiting until it is {patience_s:.0f} s old; delete it if nothing else runs"
                )
                announced = True
            time.sleep(poll_s)


def locks() -> list[Path]:
    """Return the locks of builds under torch's folder of extensions, `TORCH_EXTENSIONS_DIR` where that is set."""
    if own := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return sorted(Path(own).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root  # slow to import

    return sorted(Path(get_default_build_root()).glob("*/*/lock"))  # a folder for each Python and CUDA


def is_held(lock: Path) -> bool:
    """Whether a process of this machine, of those that may be looked into, has the file open."""
    path = str(lock.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == path for file in process.open_files()):
                return True
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            continue
    return False


def _age(lock: Path) -> float | None:
    """Seconds since the lock was made; None when it is gone."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
