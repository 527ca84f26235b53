"""A run whose judge goes for good ends with a checkpoint, and goes on from it to the same end."""

from __future__ import annotations

import json
import re
import threading
import zlib
from functools import partial

import pytest

from polyphony.launch.cli import main
from polyphony.launch.lab.world import rows
from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import train
from polyphony.rewards import endpoint
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.run.folder import SUMMARY, RunFolder
from tests.conftest import RECIPES
from tests.test_judge import Server


def taste(body):
    """A judge of firm taste, which has no reasons."""
    return json.dumps({"score": 1 + zlib.crc32(body["messages"][1]["content"].encode()) % 10})


def reply(verdict):
    usage = {"prompt_tokens": 70, "completion_tokens": 5}
    return json.dumps({"choices": [{"message": {"content": verdict}}], "usage": usage}).encode()


def numbers(out, wanted=("reward", "loss", "domain/stories/reward", "domain/stories/n")):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], *(row.get(name) for name in wanted)] for row in rows]


@pytest.mark.slow
def test_a_run_whose_judge_is_gone_leaves_a_checkpoint_and_goes_on_from_it_to_the_same_end(
    tmp_path, engine, monkeypatch, capsys
):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    before_the_end = []

    def behave(body):
        is_gone = len(before_the_end) == 1 and len(server.bodies) > before_the_end[0]
        return (503, {}) if is_gone else reply(taste(body))

    with Server(behave) as server:
        judge = f"{{name: judge, endpoint: '{server.url}', model: j, client: {{patience_s: 3}}}}"
        overrides = [
            f"domains.stories.reward={judge}",
            "checkpoint.every=100",
            "eval.every=100",
            "grpo.max_steps=3",
            "tracking.wandb=null",
        ]
        recipe = load_recipe(RECIPES / "debug.yaml", overrides)
        train(recipe, tmp_path / "whole", engine=engine)
        assert f"judge: {75 * len(server.bodies):,} tokens for stories" in capsys.readouterr().err
        asked = len(server.bodies)
        server.bodies.clear()
        before_the_end.append(asked * 2 // 3)
        with pytest.raises(GraderGoneError, match=r"has answered nobody for .* the run goes on with --resume"):
            train(recipe, tmp_path / "run", engine=engine)
        (saved,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
        assert 1 <= int(saved.name.rpartition("-")[2]) < 3
        before_the_end.append(0)
        train(recipe, tmp_path / "run", engine=engine, resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def lines(out, name, but=()):
    path = out / f"{name}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = [row for row in found if SUMMARY not in row]  # of the steps of its own process
    return [{key: value for key, value in row.items() if not any(word in key for word in but)} for row in found]


ASIDE = ("time", "tokens_per_s", "judge_tokens")


class Mortal:
    """A judge whose server ends when a held-out story comes after so many draws of a run, and comes back when called."""

    def __init__(self, run):
        self.run, self.server, self.dies_after = run, None, None
        self.heldout = [row["prompt"] for row in rows(domain="stories", split="heldout", size=4)]

    def comes_back(self, *, dies_after=None):
        """Return its address, which stays the same."""
        self.dies_after, port = dies_after, self.server.http.server_port if self.server else 0
        self.server = Server(self.behave, port=port).__enter__()
        return self.server.url

    def goes(self):
        self.dies_after = -1
        threading.Thread(target=self.server.__exit__).start()  # what asks now waits for its reply

    def behave(self, body):
        draws = len(lines(self.run, "decisions"))
        if draws == self.dies_after and any(prompt in body["messages"][1]["content"] for prompt in self.heldout):
            self.goes()
        return None if self.dies_after == -1 else reply(taste(body))


SETTINGS = {
    "tracking.wandb": "null",
    "curriculum": "{scheduler: adaptive}",
    "guardrails": "{safety: {max_drop: 0.0, action: rollback}}",
    "eval.every": "1",
    "eval.samples": "1",
    "domains.arithmetic.heldout.size": "4",
    "domains.stories.heldout.size": "4",
    "domains.safety.heldout.size": "16",
    "grpo.max_steps": "3",
    "grpo.learning_rate": "0.05",
    "grpo.lr_scheduler_type": "constant_with_warmup",
    "grpo.warmup_steps": "1",
}


@pytest.mark.slow
def test_evaluations_that_a_judge_was_gone_for_are_made_up_and_the_run_is_as_if_it_had_been_there(
    tmp_path, engine, monkeypatch, capsys
):
    """It is gone at the start, where a guardrail takes the run back, and at the end."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("polyphony.launch.train.train", partial(train, engine=engine))
    run, whole = tmp_path / "run", tmp_path / "whole"
    judge = Mortal(run)
    spec = f"{{name: judge, endpoint: '{judge.comes_back()}', model: j, client: {{patience_s: 1, concurrency: 4}}}}"
    recipe = [str(RECIPES / "debug.yaml"), *(f"{key}={value}" for key, value in SETTINGS.items())]
    recipe.append(f"domains.stories.reward={spec}")
    assert main(["train", *recipe, "--out", str(whole)]) == 0
    back_at = next(alarm["step"] for alarm in lines(whole, "alarms") if "rolled back to" in alarm["message"])
    assert 1 < back_at < 3
    judge.dies_after = 0
    capsys.readouterr()
    assert main(["train", *recipe, "--out", str(run)]) == 1
    assert re.search(
        r"stopped: judge: \S+ has answered nobody .*; nothing is trained yet: begin anew", capsys.readouterr().err
    )
    assert not run.exists()
    judge.comes_back(dies_after=back_at)
    assert main(["train", *recipe, "--out", str(run)]) == 1
    resumable = f"the run goes on with --resume, from checkpoint-{back_at}, once it grades again"
    assert resumable in capsys.readouterr().err
    assert {row["step"] for row in lines(run, "transfer") if "step" in row} == set(range(back_at))
    assert main(["train", "--resume", str(run)]) == 1  # it is gone still
    assert resumable in capsys.readouterr().err
    judge.comes_back(dies_after=3)
    assert main(["train", "--resume", str(run)]) == 1
    assert "from checkpoint-3" in capsys.readouterr().err
    assert not (run / "end.json").exists()
    judge.comes_back()
    assert main(["train", "--resume", str(run)]) == 0
    judge.goes()
    for name in ("metrics", "transfer", "evaluations", "samples", "alarms"):
        assert lines(run, name, but=ASIDE) == lines(whole, name, but=ASIDE), name
    assert RunFolder(run).decisions() == RunFolder(whole).decisions()
    for name in ("checkpoints/best.json", "final/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
