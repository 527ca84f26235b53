"""Weights on their way to workers' GPUs, as far as it can be seen without one: what is announced, copied, and watched."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from polyphony.launch.cluster.ray_workers import forget_launcher
from polyphony.launch.cluster.weights import LOST, Announcement, copies

AMID_A_TRANSFER = """
import sys, time, ray
from polyphony.launch.cluster.weights import watched
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)  # also where a cluster was left running
@ray.remote
def receive(seconds, fails):
    time.sleep(seconds)
    if fails: raise ValueError("no memory left")
seconds, fails, timeout_s, main_s = float(sys.argv[1]), sys.argv[2] == "fails", float(sys.argv[3]), float(sys.argv[4])
ray.get(receive.remote(0, False))
with watched([receive.remote(0, False)], timeout_s=900, doing="receiving"):
    pass
print("a transfer that succeeds goes on", flush=True)
with watched([receive.remote(seconds, fails)], timeout_s=timeout_s, doing="receiving"):
    time.sleep(main_s)
"""


def merged_while_walked(weight: torch.Tensor, adapter: torch.Tensor):
    """Walk as TRL does over a policy with an adapter: merged before the first, unmerged after the last."""
    weight += adapter
    yield "w", weight
    weight -= adapter


def test_weights_are_announced_in_the_engines_type_and_in_order():
    named = [("a", torch.zeros(2, 3)), ("b", torch.zeros(4, dtype=torch.int64))]
    told = Announcement.of(named, dtype=torch.bfloat16)
    assert (told.names, told.shapes) == (["a", "b"], [[2, 3], [4]])
    assert told.dtype_names == ["bfloat16", "int64"]
    assert Announcement.of(named, dtype=None).dtype_names == ["float32", "int64"]
    assert [t.dtype for _, t in copies(named, dtype=torch.bfloat16)] == [torch.bfloat16, torch.int64]


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_what_is_sent_late_is_the_weight_with_its_adapter(dtype):
    weight = torch.ones(2)
    sent = list(copies(merged_while_walked(weight, torch.full((2,), 0.5)), dtype=dtype))
    assert weight.tolist() == [1.0, 1.0]
    assert sent[0][1].tolist() == [1.5, 1.5]


def test_a_worker_forgets_what_torchrun_told_the_trainer():
    told = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "h",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    environment = {**told, "CUDA_VISIBLE_DEVICES": "3", "HF_HOME": "/models"}
    forget_launcher(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "3", "HF_HOME": "/models"}


def amid_a_transfer(*arguments: str) -> tuple[subprocess.CompletedProcess, float]:
    started = time.monotonic()
    words = [sys.executable, "-c", AMID_A_TRANSFER, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    return done, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("1", "fails", "900", "900"), "a rollout worker was lost while receiving: "),
        (("900", "ends", "2", "900"), "rollout workers hang while receiving"),
    ],
    ids=["fails", "hangs"],
)
def test_after_one_transfer_a_trainer_that_sends_to_a_lost_worker_ends_within_bounds_and_says_why(arguments, reason):
    done, seconds = amid_a_transfer(*arguments)
    assert done.stdout == "a transfer that succeeds goes on\n"
    assert done.returncode == LOST
    assert reason in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("go on with --resume")
    assert seconds < 200
