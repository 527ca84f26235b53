"""A reward for difference in a real run: real TRL, real engine, real sentence embeddings."""

from __future__ import annotations

import json
import math

import pytest

from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import train
from tests.conftest import EXPERIMENTS

pytestmark = pytest.mark.slow

SMALL = [
    "domains.stories.heldout.size=8",
    "eval.every=2",
    "eval.samples=2",
    "grpo.max_steps=2",
    "grpo.logging_steps=1",
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory, engine):
    """The metrics of two steps on one open-ended domain."""
    out = tmp_path_factory.mktemp("stories") / "run"
    train(load_recipe(EXPERIMENTS / "stories.yaml", SMALL), out, engine=engine)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_update_gets_the_fused_reward_and_the_curriculum_the_quality(lines):
    for line in [line for line in lines if "loss" in line]:
        assert line["reward"] == pytest.approx(line["diversity/stories/reward"], abs=1e-5)  # what TRL learned from
        assert line["diversity/stories/reward"] < line["domain/stories/reward"]
        assert 1 <= line["diversity/stories/classes"] <= 8
        assert 0.1 <= line["diversity/stories/mean"] <= 1
        assert 0 <= line["diversity/stories/collapsed"] <= 1
        assert line["diversity/stories/failures"] == 0


def test_held_out_answers_are_counted_apart(lines):
    for line in [line for line in lines if "heldout/stories/score" in line]:
        assert 1 <= line["heldout/stories/classes"] <= 2
        assert 0 < line["heldout/stories/distinct_2"] <= 1
        assert line["heldout/stories/unique_correct"] >= 0


def test_advantages_are_centred_in_every_group_and_not_scaled(tmp_path, engine):
    from polyphony.launch.build import build_trainer

    trainer = build_trainer(load_recipe(EXPERIMENTS / "stories.yaml", SMALL), tmp_path, engine=engine)
    seen = []
    keep = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(keep(inputs)) or seen[-1]
    trainer.args.max_steps = 1
    trainer.train()
    advantages = seen[0]["advantages"].view(-1, 8)
    groups = list(trainer._rollout.groups.values())
    assert [len(group.fused.rewards) for group in groups] == [8] * 8
    for row, group in zip(advantages.tolist(), groups, strict=True):
        centre = math.fsum(group.fused.rewards) / 8
        assert row == pytest.approx([r - centre for r in group.fused.rewards], abs=1e-6)
