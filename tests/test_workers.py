import signal
import threading
import time

import psutil
import pytest

from polyphony.rewards.workers import JobError, KilledError, Workers


def ask(target, *jobs, timeout_s=1.0):
    workers = Workers(target, size=1, timeout_s=timeout_s)
    try:
        return workers.map(jobs)
    finally:
        workers.close()


def test_a_job_that_waits_is_not_charged_for_it():
    assert ask("time:sleep", 1.5, timeout_s=0.5) == [None]


@pytest.mark.slow
def test_a_job_that_sleeps_for_ever_meets_the_wall_twice_and_did_it_itself():
    start = time.monotonic()
    (found,) = ask("time:sleep", 600, timeout_s=0.2)
    assert isinstance(found, JobError) and not isinstance(found, KilledError)
    assert time.monotonic() - start > 5  # two limits of 2.8 s


@pytest.mark.parametrize(
    ("target", "job"),
    [
        ("math:factorial", 10**8),  # out of processor time
        ("builtins:bytearray", 1 << 40),  # out of memory
        ("signal:raise_signal", signal.SIGSEGV),
        ("signal:raise_signal", signal.SIGABRT),
        ("builtins:int", "no number"),
    ],
)
def test_what_a_job_brings_on_itself_is_its_own_doing(target, job):
    (found,) = ask(target, job)
    assert isinstance(found, JobError) and not isinstance(found, KilledError)


def test_one_that_is_killed_twice_says_nothing_about_its_job():
    (found,) = ask("signal:raise_signal", signal.SIGKILL)
    assert isinstance(found, KilledError)


def test_one_that_is_killed_once_is_tried_again():
    before = set(psutil.Process().children())
    workers = Workers("time:sleep", size=1, timeout_s=5.0)
    assert workers.map([0.0]) == [None]  # it is up
    (started,) = set(psutil.Process().children()) - before
    found = []
    thread = threading.Thread(target=lambda: found.extend(workers.map([2.0])))
    thread.start()
    time.sleep(1.0)  # it has begun the job
    started.kill()
    thread.join()
    workers.close()
    assert found == [None]


def test_what_the_owner_holds_is_not_taken_for_a_workers_memory():
    # a new process has the peak of the one that started it
    held = bytearray(5 << 28)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    (found,) = ask("signal:raise_signal", signal.SIGKILL)
    assert isinstance(found, KilledError)
