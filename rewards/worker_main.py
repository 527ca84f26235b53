"""A worker's own side (`-m polyphony.rewards.worker_main module:function timeout_s memory_bytes`): read, answer, repeat.

The limit is one of processor time. Its signal is left to its default action, which ends the process: the kernel delivers
that even inside C code.
"""

from __future__ import annotations

import json
import os
import pkgutil
import resource
import signal
import sys

from polyphony.rewards.sandbox import confine


def main() -> None:
    """Answer jobs from stdin, one JSON a line, until it closes."""
    target, timeout_s, memory_bytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    function = pkgutil.resolve_name(target)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    confine.drop_capabilities()
    confine.filter_system_calls(confine.READ)
    _reply(replies, {"value": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})  # ready
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        try:
            answer = {"value": function(json.loads(line))}
        except Exception as error:  # whatever the library raises: the job has no answer, the next one may have
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(replies, answer)


def _reply(replies, answer) -> None:
    replies.write(json.dumps(answer).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
