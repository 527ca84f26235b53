"""Wait for a pipe with a deadline, whatever its number: `select` refuses descriptors above 1023."""

from __future__ import annotations

import math
import select
import time


def is_readable_by(fd: int, deadline: float) -> bool:
    """Wait until `fd` has something to read (or has closed) or `time.monotonic()` reaches the deadline."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil(1000 * (deadline - time.monotonic())))))
