"""`polyphony launch slurm` on a real Slurm of one node: the run, its preemption, and how it goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.conftest import HOUSE, RECIPES

pytestmark = pytest.mark.slow
DEBUG = str(RECIPES / "debug.yaml")
QUICK = ["rollouts.engine=transformers", "tracking.wandb=null", "eval.every=1000", "checkpoint.every=1000"]
QUICK += ["grpo.max_completion_length=8", "eval.samples=1"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of Slurm's commands, which are installed where that is possible."""
    if os.geteuid() != 0:
        pytest.skip("only root can bring up a Slurm node (tests/slurm_node.sh)")
    script = str(HOUSE / "tests" / "slurm_node.sh")
    if missing := missing_commands():
        if shutil.which("apt-get") is None:
            pytest.skip(f"{', '.join(missing)} not found, and no apt-get here to install slurm-wlm and munge")
        done = subprocess.run([script, "install"], capture_output=True, text=True, timeout=300, check=False)
        if missing := missing_commands():
            pytest.skip(f"{', '.join(missing)} not found; apt-get install slurm-wlm munge: {done.stderr[-500:]}")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([script, "up", str(folder)], check=True, timeout=120)
    yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([script, "down", str(folder)], check=True, timeout=60)


def missing_commands() -> list[str]:
    return [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]


def launched(slurm, *arguments: str) -> str:
    """Submit a run; return the job's number."""
    command = [sys.executable, "-m", "polyphony.launch.cli", "launch", "slurm", *arguments]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()[1].rstrip(";")


def state(slurm, job: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True, check=True)
    return next(word for word in shown.stdout.split() if word.startswith("JobState=")).removeprefix("JobState=")


def wait_until(is_so, *, timeout_s: float, log) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        said = log.read_text()[-2000:] if log.exists() else "no log"
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def steps(run) -> list[int]:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if "loss" in line]


def test_a_preempted_job_saves_is_queued_again_and_goes_on(slurm, tmp_path):
    run = tmp_path / "run"
    job = launched(slurm, DEBUG, *QUICK, "grpo.max_steps=40", "--out", str(run))
    log = run / "logs" / f"slurm-{job}.log"
    wait_until(lambda: len(steps(run)) >= 2, timeout_s=240, log=log)
    # what --signal=B:USR1@.. does before the time limit, and preemption does at any time
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm, check=True)
    wait_until(lambda: state(slurm, job) == "PENDING" or "requeue" in log.read_text(), timeout_s=120, log=log)
    taken = steps(run)
    assert (run / "checkpoints" / f"checkpoint-{taken[-1]}" / "polyphony.json").exists()
    assert 2 <= taken[-1] < 40
    # Slurm holds a requeued job back for two minutes: one that starts in the second in which it was ended is refused
    # by the node as already killed, since credentials are told apart by whole seconds, and fails without a word
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], env=slurm, check=True)
    wait_until(lambda: state(slurm, job) == "COMPLETED", timeout_s=300, log=log)
    said = log.read_text()
    assert "preempted: the trainer saves a checkpoint" in said
    assert f"SIGTERM: checkpoint at step {taken[-1]} saved" in said
    assert steps(run) == list(range(1, 41))
    assert (run / "final" / "model.safetensors").exists()


def test_a_job_brings_up_its_own_ray(slurm, tmp_path):
    run = tmp_path / "run"
    overrides = ["rollouts={engine: ray, workers: 1}", "tracking.wandb=null", "grpo.max_steps=1", "eval.samples=1"]
    overrides += ["grpo.max_completion_length=8"]
    job = launched(slurm, DEBUG, *overrides, "--out", str(run))
    log = run / "logs" / f"slurm-{job}.log"
    wait_until(lambda: state(slurm, job) in ("COMPLETED", "FAILED"), timeout_s=400, log=log)
    assert state(slurm, job) == "COMPLETED", log.read_text()[-2000:]
    assert steps(run) == [1]


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (
            ["export OTHER=$NOT_SET_ANYWHERE", "set -e; true", "false"],
            r"polyphony: cluster.slurm.setup\[2\] failed: false",
        ),
        (
            ["python=(no-such-python)", "srun() { echo told >&2; return 7; }"],
            "polyphony: Ray did not start on .*, exit status 7",
        ),
    ],
    ids=["setup", "ray"],
)
def test_what_fails_before_the_run_ends_the_job_with_its_line(slurm, tmp_path, setup, said):
    run = tmp_path / "run"
    overrides = ["rollouts={engine: ray, workers: 1}", f"cluster.slurm.setup={json.dumps(setup)}"]
    job = launched(slurm, DEBUG, *overrides, "--out", str(run))
    log = run / "logs" / f"slurm-{job}.log"
    wait_until(lambda: state(slurm, job) == "FAILED", timeout_s=60, log=log)
    assert re.fullmatch(said, log.read_text().splitlines()[-1])


def test_a_folder_that_a_node_does_not_have_is_named(slurm, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    command = [sys.executable, "-m", "polyphony.launch.cli", "launch", "slurm", DEBUG, "--out", str(tmp_path / "run")]
    shown = subprocess.run([*command, "--dry-run"], env=slurm, capture_output=True, text=True, check=True, cwd=away)
    away.rmdir()
    (tmp_path / "job").write_text(shown.stdout.replace(str(tmp_path / "run" / "logs"), str(tmp_path)))
    done = subprocess.run(
        ["sbatch", "--parsable", "job"], env=slurm, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    job, log = done.stdout.strip(), tmp_path / f"slurm-{done.stdout.strip()}.log"
    wait_until(lambda: state(slurm, job) == "FAILED", timeout_s=60, log=log)
    assert "polyphony: the folder that the job was sent from cannot be entered on" in log.read_text()


def test_what_slurm_refuses_is_one_line(slurm, tmp_path):
    command = [sys.executable, "-m", "polyphony.launch.cli", "launch", "slurm", DEBUG, "cluster.slurm.partition=none"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], env=slurm, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "sbatch refused" in done.stderr
    assert "partition" in done.stderr
