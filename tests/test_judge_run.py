"""A run whose judge goes for good ends with a checkpoint, and goes on from it to the same end."""

from __future__ import annotations

import json
import zlib

import pytest

from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import train
from polyphony.rewards import endpoint
from polyphony.rewards.registry import GraderGoneError
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
