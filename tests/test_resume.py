"""Pull the plug, anywhere: the run that goes on draws what the undisturbed run would have drawn."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from polyphony.launch.cli import main
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import POLICY, RECIPES
from tests.forks import Fork

pytestmark = pytest.mark.slow
# few rows, so that the run crosses into a second pass over them: where stock TRL's resume repeats the first
ROWS = ["domains.arithmetic.train.size=32", "domains.stories.train.size=8"]
# every arithmetic group is dead, so that every draw is refilled as often as may be
DEAD = ["domains.arithmetic.reward=tests.test_resume:Hopeless", "guard.cap=2.0"]
REFILL = ["pool.refill.max_rounds=3", "pool.retry_deferred=2", "pool.look=4"]
RECIPE = ["grpo.max_steps=6", "eval.every=2", "checkpoint.every=2", "tracking.wandb=null", *ROWS, *DEAD, *REFILL]


class Hopeless:
    """Nothing is ever right."""

    def __call__(self, prompts, **columns):
        return [0.0] * len(prompts)


def started(folder) -> Fork:
    return Fork(main, ["train", str(RECIPES / "debug.yaml"), *RECIPE, "--out", str(folder)], log=folder.parent / "log")


def kill_when(folder, is_time) -> None:
    """Start a run and send it SIGKILL as soon as `is_time` says so."""
    process = started(folder)
    deadline = time.monotonic() + 300
    while process.is_running and not is_time(folder) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.is_running, f"the run ended before it could be killed: {process.said[-2000:]}"
    process.kill()


def lines(folder, name) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def drawn(folder) -> list[tuple]:
    return [(line["step"], line["draw"], line["mixture"], line["prompts"]) for line in RunFolder(folder).decisions()]


def numbers(folder) -> list[dict]:
    """All metrics but those that tell the time, and Transformers' own mean loss of the steps of this process."""
    timed = ("step_time", "tokens_per_s", "runtime", "per_second", "train_loss")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines(folder, "metrics")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = started(folder)
    assert process.wait() == 0, process.said[-3000:]
    return folder


def test_the_undisturbed_run_refills_and_draws_prompts_a_second_time(undisturbed):
    assert {line["round"] for line in lines(undisturbed, "refills")} == {1, 2, 3}
    prompts = [prompt for *_, drawn_prompts in drawn(undisturbed) for prompt in drawn_prompts]
    assert len(set(map(str, prompts))) < len(prompts)


def draws_written(n: int):
    def is_time(folder) -> bool:
        path = folder / "decisions.jsonl"
        return path.exists() and path.read_text().count("\n") >= n

    return is_time


def checkpoint_begun(folder) -> bool:
    """A checkpoint's folder is there, its mark is not yet."""
    return any(not (c / "polyphony.json").exists() for c in (folder / "checkpoints").glob("checkpoint-4"))


def in_a_refill(folder) -> bool:
    """The second refill of the third draw, between two checkpoints, is about to be generated."""
    path = folder / "refills.jsonl"
    return path.exists() and sum(line["step"] == 3 for line in lines(folder, "refills")) >= 2


@pytest.mark.parametrize(
    "is_time",
    [draws_written(1), in_a_refill, checkpoint_begun],
    ids=["before any checkpoint", "in the middle of a refill", "while saving"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(undisturbed, tmp_path, is_time):
    folder = tmp_path / "run"
    kill_when(folder, is_time)
    written = len(lines(folder, "decisions"))
    again = Fork(main, ["train", "--resume", str(folder)], log=tmp_path / "log")
    assert again.wait() == 0, again.said[-3000:]
    assert drawn(folder) == drawn(undisturbed)
    assert lines(folder, "refills") == lines(undisturbed, "refills")
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
