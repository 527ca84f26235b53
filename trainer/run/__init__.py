"""What a run leaves behind: its folder, records, checkpoints' callbacks, trackers."""

import contextlib
import sys


def say(text: str) -> None:
    """Tell the person who runs this, on standard error; where nobody can be told any more, go on: within a write, too."""
    with contextlib.suppress(OSError, RuntimeError):  # the latter where a signal came within a write
        print(text, file=sys.stderr, flush=True)
