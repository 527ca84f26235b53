"""What a run leaves behind: its folder, records, checkpoints' callbacks, trackers."""

import contextlib
import sys


def say(text: str) -> None:
    """Tell the person who runs this, on standard error; where nobody can be told any more, go on."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
