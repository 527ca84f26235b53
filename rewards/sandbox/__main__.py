"""Wait for descriptors, and fork a supervisor for each pair: what a sandbox needs is imported once, here."""

import contextlib
import os
import signal
import socket
import sys

sys.path.insert(0, __file__.rpartition("/")[0])

import supervisor  # the file beside this one


def _reap(number, frame):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become_supervisor(requests, replies, settings):
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(requests, 0)
        os.dup2(replies, 1)
        os.closerange(3, max(requests, replies) + 1)
        supervisor.main(settings)  # type: ignore[attr-defined]
    finally:
        os._exit(0)


def main():
    """Serve until the other end of the socket on descriptor 0 is closed."""
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        settings, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 2)
        if not settings:
            return
        requests, replies = descriptors
        if not os.fork():
            _become_supervisor(requests, replies, settings.decode())
        for descriptor in descriptors:
            os.close(descriptor)


main()
