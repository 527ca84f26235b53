"""Guardrails in a real run: stopping it, and taking it back to its best checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import train
from polyphony.trainer.checkpoints import roll_back
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import RECIPES

pytestmark = pytest.mark.slow


def alarms(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def recipe(action: str, *changes: str):
    """Steps so large that the watched domain is gone at the first look."""
    return load_recipe(
        RECIPES / "debug.yaml",
        [
            "tracking.wandb=null",
            f"guardrails={{safety: {{max_drop: 0.0, action: {action}}}}}",
            "grpo.learning_rate=0.05",
            "grpo.max_steps=4",
            "eval.every=1",
            "domains.safety.heldout.size=128",
            *(f"domains.{other}.heldout.size=4" for other in ("arithmetic", "stories")),
            *changes,
        ],
    )


def test_a_guardrail_stops_the_run_and_says_which_domain_and_how_much(tmp_path, engine):
    train(recipe("stop"), tmp_path / "run", engine=engine)
    (alarm,) = [alarm for alarm in alarms(tmp_path / "run") if "stopped the run" in alarm["message"]]
    assert alarm["domain"] == "safety"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == alarm["step"] < 4
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_guardrail_takes_the_run_back_and_tells_the_scheduler(tmp_path, engine):
    warm_up = ("grpo.lr_scheduler_type=constant_with_warmup", "grpo.warmup_steps=2")  # the first step moves nothing
    train(recipe("rollback", *warm_up), tmp_path / "run", engine=engine)
    first, *_ = [
        alarm for alarm in alarms(tmp_path / "run") if alarm["message"].endswith("rolled back to checkpoint-1")
    ]
    decisions = RunFolder(tmp_path / "run").decisions()
    (next_draw,) = [line for line in decisions if line["step"] == first["step"] + 1]
    assert next_draw["evidence"]["notes"][0].startswith("rolled back to checkpoint-1: safety lost")
    assert next_draw["evidence"]["alarms"] == ["safety"]
    rows = json.loads((tmp_path / "run" / "transfer.json").read_text())["rows"]
    marked = [row["step"] for row in rows if row.get("rolled_back")]
    assert marked[0] == first["step"] + 1  # what changed by then is not of practice alone
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] == "checkpoint-1"  # the one saved at the rollback was evaluated with other weights


def test_a_rollback_restores_weights_and_optimizer_and_leaves_the_steps(tmp_path, engine):
    from polyphony.launch.build import build_trainer

    trainer = build_trainer(recipe("warn", "grpo.learning_rate=1e-3", "checkpoint.every=2"), tmp_path, engine=engine)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    moved = dict(trainer.model.named_parameters())
    assert any(not torch.equal(saved[name], moved[name]) for name in saved)
    roll_back(trainer, tmp_path / "checkpoint-2")
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.named_parameters())
    assert trainer.state.global_step == 4
    assert trainer.curriculum.draws == 4
    assert trainer.policy.check().is_passed
