"""Pull the plug, anywhere: the run that goes on draws what the undisturbed run would have drawn."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from polyphony.launch.cli import main
from tests.conftest import POLICY, RECIPES

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "polyphony.launch.cli", "train"]
# few rows, so that the run crosses into a second pass over them: where stock TRL's resume repeats the first
ROWS = ["domains.arithmetic.train.size=8", "domains.stories.train.size=8"]
RECIPE = [str(RECIPES / "debug.yaml"), "grpo.max_steps=6", "eval.every=2", "checkpoint.every=2", *ROWS]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments: str) -> None:
    subprocess.run([*COMMAND, *arguments], env=environment(), check=True, capture_output=True, timeout=300)


def kill_when(folder, is_time, *arguments: str) -> None:
    """Start a run and send it SIGKILL as soon as `is_time` says so."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not is_time(folder) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines(folder, name) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def drawn(folder) -> list[tuple]:
    return [(line["step"], line["draw"], line["mixture"], line["prompts"]) for line in lines(folder, "decisions")]


def numbers(folder) -> list[dict]:
    """All metrics but those that tell the time, and Transformers' own mean loss of the steps of this process."""
    timed = ("step_time", "tokens_per_s", "runtime", "per_second", "train_loss")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines(folder, "metrics")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(*RECIPE, "--out", str(folder))
    return folder


def draws_written(n: int):
    def is_time(folder) -> bool:
        path = folder / "decisions.jsonl"
        return path.exists() and path.read_text().count("\n") >= n

    return is_time


def checkpoint_begun(folder) -> bool:
    """A checkpoint's folder is there, its mark is not yet."""
    return any(not (c / "polyphony.json").exists() for c in (folder / "checkpoints").glob("checkpoint-4"))


@pytest.mark.parametrize(
    "is_time",
    [draws_written(1), draws_written(4), checkpoint_begun],
    ids=["before any checkpoint", "between", "while saving"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(undisturbed, tmp_path, is_time):
    folder = tmp_path / "run"
    kill_when(folder, is_time, *RECIPE, "--out", str(folder))
    written = len(lines(folder, "decisions"))
    run("--resume", str(folder))
    assert drawn(folder) == drawn(undisturbed)
    assert numbers(folder) == numbers(undisturbed)
    assert (
        json.loads((folder / "transfer.json").read_text())["rows"]
        == json.loads((undisturbed / "transfer.json").read_text())["rows"]
    )
    kept = sum(
        len(lines(attempt, "decisions"))
        for attempt in folder.glob("attempt-*")
        if (attempt / "decisions.jsonl").exists()
    )
    assert kept >= written - 4
    assert (folder / "final" / "model.safetensors").read_bytes() == (
        undisturbed / "final" / "model.safetensors"
    ).read_bytes()


def test_a_finished_run_that_is_resumed_takes_no_further_step(tmp_path, recipe):
    # a draw spans 4 steps, so the run ends inside one
    overrides = ["grpo.steps_per_generation=4", "eval.every=4", "grpo.lr_scheduler_type=constant"]
    overrides += [f"model={POLICY}", "rollouts.engine=transformers"]
    run = tmp_path / "run"
    assert main(["train", str(recipe), *overrides, "--out", str(run)]) == 0
    weights = (run / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "final")  # as if the machine had failed just before
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "final" / "model.safetensors").read_bytes() == weights
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]


# every group is dead, so that every draw is refilled as often as may be
REFILL = [*RECIPE[:-2], "domains.arithmetic.train.size=64", "domains.stories.train.size=64", "pool.refill.max_rounds=3"]
REFILL += ["domains.arithmetic.reward=tests.test_resume:Hopeless", "guard.cap=2.0", "pool.retry_deferred=2"]
REFILL += ["pool.look=4"]


class Hopeless:
    """Nothing is ever right."""

    def __call__(self, prompts, **columns):
        return [0.0] * len(prompts)


def in_a_refill(folder) -> bool:
    """The second refill of the third draw is about to be generated."""
    path = folder / "refills.jsonl"
    return path.exists() and sum(line["step"] == 3 for line in lines(folder, "refills")) >= 2


def test_a_run_killed_in_the_middle_of_a_refill_draws_and_refills_the_same(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(*REFILL, "--out", str(whole))
    kill_when(folder, in_a_refill, *REFILL, "--out", str(folder))
    run("--resume", str(folder))
    assert drawn(folder) == drawn(whole)
    assert lines(folder, "refills") == lines(whole, "refills")
    assert {line["round"] for line in lines(whole, "refills")} == {1, 2, 3}
    assert numbers(folder) == numbers(whole)
    assert (folder / "final" / "model.safetensors").read_bytes() == (whole / "final" / "model.safetensors").read_bytes()
