"""What a run leaves behind: its folder, records, checkpoints' callbacks, trackers."""

import sys


def say(text: str) -> None:
    """Tell the person who runs this, on standard error: results go to standard output, this does not."""
    print(text, file=sys.stderr, flush=True)
