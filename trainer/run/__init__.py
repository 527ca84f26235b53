"""What a run leaves behind: its folder, records, checkpoints' callbacks, trackers."""

import contextlib
import re
import sys

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor, or turn the text around them: all controls but tab and newline."""


def say(text: str) -> None:
    """Tell the person who runs this, on standard error; where nobody can be told any more, go on: within a write, too."""
    with contextlib.suppress(OSError, RuntimeError):  # the latter where a signal came within a write
        print(text, file=sys.stderr, flush=True)


def visible(text: str) -> str:
    r"""Return a text of a model's for a terminal or a page: what would act there stands as its escape, `\u202e`."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
