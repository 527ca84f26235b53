"""Rejection-sampling fine-tuning in a real run: what is accepted, what the gradient is, and the command from end to end."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from polyphony.launch.build import build_trainer
from polyphony.launch.cli import main
from polyphony.launch.recipe import load_recipe
from tests.conftest import RECIPES

pytestmark = pytest.mark.slow

RFT = ["algorithm=rft", "rft.top_k=2", "rft.dedup=exact", "tracking.wandb=null", "domains.stories.train=null"]


class Gradient(TrainerCallback):
    """Keeps what the optimizer is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.flat = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def test_the_gradient_is_that_of_the_likelihood_of_at_most_k_different_right_answers_a_prompt(tmp_path, engine):
    step = ["grpo.max_steps=1", "grpo.gradient_accumulation_steps=1", "grpo.learning_rate=0", "grpo.max_grad_norm=0"]
    recipe = load_recipe(RECIPES / "debug.yaml", [*RFT, *step, "grpo.per_device_train_batch_size=64", "eval.every=1"])
    trainer = build_trainer(recipe, tmp_path, engine=engine)
    drawn, gradient = [], Gradient()
    keep = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: drawn.append(keep(inputs)) or drawn[-1]
    trainer.add_callback(gradient)
    trainer.train()

    (output,), groups = drawn, list(trainer._rollout.groups.values())
    advantages = output["advantages"].view(-1, 8)
    assert advantages.sum() == pytest.approx(64)  # a mean of one
    for row, group in zip(advantages.tolist(), groups, strict=True):
        taken = [text for value, text in zip(row, group.texts, strict=True) if value]
        right = {text for text, reward in zip(group.texts, group.rewards, strict=True) if reward == 1.0}
        assert len(taken) == min(2, len(right))
        assert len(set(taken) & right) == len(taken)
    assert 0 < (advantages != 0).sum() < 32

    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = output["completion_mask"]
    attention = torch.cat([output["prompt_mask"], mask], dim=1)
    trainer.model.zero_grad()
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
    (-(output["advantages"].unsqueeze(1) * logps * mask).sum() / mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert expected.norm() > 1e-3
    assert (gradient.flat - expected).norm() < 1e-4 * expected.norm()


def test_the_command_trains_by_rft_and_refills_prompts_that_nobody_solved(tmp_path):
    # strings, where many groups have no right answer yet
    pool = [
        "pool={}",
        "domains.arithmetic.train={generator: polyphony.launch.lab.world:rows, domain: strings, split: train, size: 64}",
    ]
    pool += ["grpo.max_steps=4", "eval.every=2", "checkpoint.every=2"]
    assert main(["train", str(RECIPES / "debug.yaml"), *RFT, *pool, "--out", str(tmp_path / "run")]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in metrics} == {0, 1, 2, 3, 4}
    assert all(line["grad_norm"] > 0 for line in metrics if "grad_norm" in line)
    refills = [json.loads(line) for line in (tmp_path / "run" / "refills.jsonl").read_text().splitlines()]
    for refill in refills:
        causes = refill["dead"]["arithmetic"]
        assert causes["all_correct"] == 0 and causes["all_wrong"] > 0  # a solved group is useful here
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
