"""Locks of kernel builds: torch's own lock, held, left behind, and left by another machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from polyphony.launch.cluster import launch, local
from polyphony.launch.cluster import local as kernels
from polyphony.launch.recipe import load_recipe
from tests.conftest import RECIPES

# torch's own lock, taken by a process that is killed while it has it
BUILDS = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("holds", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "fused_adam").mkdir()
    return tmp_path / "fused_adam" / "lock"


@pytest.fixture
def builder(lock):
    process = subprocess.Popen([sys.executable, "-c", BUILDS, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def old(lock, seconds: float = 2 * kernels.BUILD_S) -> None:
    then = time.time() - seconds
    os.utime(lock, (then, then))


def test_a_build_that_is_going_on_is_left_alone_however_long_it_takes(lock, builder):
    old(lock)
    said: list[str] = []
    kernels.leave_no_killed_build(said.append)
    assert lock.exists()
    assert said == []


def test_the_lock_of_a_killed_build_is_removed_and_named(lock, builder):
    builder.kill()
    builder.wait()
    old(lock)
    said: list[str] = []
    kernels.leave_no_killed_build(said.append)
    assert not lock.exists()
    (line,) = said
    assert str(lock) in line


def test_a_young_lock_may_be_another_machines_and_is_waited_for(lock):
    lock.touch()
    said: list[str] = []
    kernels.leave_no_killed_build(said.append, patience_s=0.3, poll_s=0.01)
    waits, removed = said
    assert "Waiting until" in waits
    assert "removed" in removed
    assert not lock.exists()


def test_another_machine_that_ends_its_build_ends_the_wait(lock):
    lock.touch()
    said: list[str] = []

    def says(line: str) -> None:
        said.append(line)
        lock.unlink()

    kernels.leave_no_killed_build(says, poll_s=0.01)
    assert len(said) == 1


def test_locks_are_found_in_torchs_own_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert kernels.locks() == [lock]


@pytest.mark.parametrize(("strategy", "clears"), [("zero2", True), ("ddp", False)])
def test_a_launch_under_deepspeed_begins_with_it(strategy, clears, lock, tmp_path, monkeypatch):
    lock.touch()
    old(lock)
    monkeypatch.setattr(local, "run", lambda command, run_folder: 0)
    recipe = load_recipe(RECIPES / "debug.yaml", [f"cluster.strategy={strategy}"])
    run = launch.Job(recipe=recipe, words=["debug.yaml"], out=tmp_path / "run", is_dry=False, resumes=False)
    assert launch.local(run, local.Machine()) == 0
    assert lock.exists() is not clears
