"""`polyphony launch local` with two trainer ranks: one is killed, the group ends with the reason, and the run goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from polyphony.launch.cli import main
from polyphony.launch.cluster.local import ranks_of
from tests.conftest import RECIPES
from tests.forks import forked_ranks, free_port

# eight rows a rank and micro-batch, as many as sixteen of one rank
QUICK = ["rollouts.engine=transformers", "tracking.wandb=null", "grpo.per_device_train_batch_size=8"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "polyphony.launch.cli", "launch", "local", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def steps(run) -> list[int]:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if "loss" in line]


def test_a_rank_is_found_beside_a_process_that_ends_while_it_is_asked(monkeypatch):
    ended = psutil.Popen([sys.executable, "-c", ""])
    ended.wait()
    with psutil.Popen(
        [sys.executable, "-c", "input()", "polyphony.launch.cli"],
        env={**os.environ, "RANK": "0"},
        stdin=subprocess.PIPE,
    ) as rank:
        monkeypatch.setattr(psutil.Process, "children", lambda process, recursive: [ended, rank])
        assert ranks_of(os.getpid()) == [rank]


@pytest.mark.slow
def test_a_killed_rank_ends_the_group_with_the_reason_and_the_run_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    changes = ["cluster.processes=2", f"cluster.port={free_port()}", "grpo.max_steps=12", "checkpoint.every=1"]
    changes += ["grpo.max_completion_length=8", "eval.samples=1"]
    started = [*command(str(RECIPES / "debug.yaml"), *QUICK, *changes, "eval.every=100"), "--out", str(run)]
    launcher = subprocess.Popen(
        started, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 300
    while len(steps(run)) < 2:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    agent = psutil.Process(launcher.pid).children()[0]
    ranks = ranks_of(agent.pid)
    assert {rank.environ()["RANK"] for rank in ranks} == {"0", "1"}
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said = launcher.communicate(timeout=120)[1]
    assert time.monotonic() - killed < 60
    assert launcher.returncode != 0
    assert "SIGKILL" in said  # torchrun's own account of the rank
    assert f"go on with --resume {run}" in said.splitlines()[-1]
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert main(["launch", "local", "--resume", str(run), "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    resume = words[words.index("polyphony.launch.cli") + 1 :]
    assert resume == ["train", "--resume", str(run)]
    for rank in forked_ranks(main, resume, log=tmp_path / "log", ACCELERATE_USE_CPU="true"):
        assert rank.wait() == 0, rank.said[-2000:]
    assert steps(run) == list(range(1, 13))
    assert (run / "final" / "model.safetensors").exists()
