"""Steps that are not finite are left out, counted, and end the run after too many in a row."""

from __future__ import annotations

import json
import math

import pytest
import torch

from polyphony.launch.cli import main
from polyphony.trainer.finite import FiniteSteps, forget_gradients
from tests.conftest import RECIPES


def test_a_step_is_judged_by_its_gradient_and_by_the_losses_of_all_ranks():
    steps = FiniteSteps(most=3)
    assert steps.judge(grad_norm=1.0, all_losses_finite=True)
    assert not steps.judge(grad_norm=math.inf, all_losses_finite=True)
    assert not steps.judge(grad_norm=1.0, all_losses_finite=False)
    assert steps.in_a_row == 2
    assert steps.judge(grad_norm=0.0, all_losses_finite=True)
    assert (steps.in_a_row, steps.flush(), steps.flush()) == (0, 2, 0)


def test_one_bad_micro_batch_makes_the_step_bad():
    steps = FiniteSteps(most=3)
    for loss in (1.0, math.nan, 2.0):
        steps.see_loss(torch.tensor(loss))
    assert not steps.loss_is_finite


def test_an_optimizer_passes_over_what_has_no_gradient():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(torch.ones(2)).backward()
    optimizer.step()  # from here on there are moments that would move the weights by themselves
    before = model.weight.clone()
    model(torch.full((2,), math.nan)).backward()
    forget_gradients(model)
    optimizer.step()
    assert torch.equal(model.weight, before)


def broken_from(step: int, *, until: int):
    """Return a loss that is NaN in the optimizer steps from `step` up to, not with, `until`."""
    from polyphony.trainer.grpo import DomainGRPOTrainer

    true_loss = DomainGRPOTrainer._compute_loss

    def loss(self, *arguments, **named):
        value = true_loss(self, *arguments, **named)
        return value * math.nan if step <= self.state.global_step + 1 < until else value

    return loss


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("polyphony.trainer.grpo.DomainGRPOTrainer._compute_loss", broken_from(2, until=3))
    overrides = ["rollouts.engine=transformers", "grpo.max_steps=3", "tracking.wandb=null", "faults.max_skipped=1"]
    run = tmp_path / "run"
    assert main(["train", str(RECIPES / "debug.yaml"), *overrides, "--out", str(run)]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["faults/skipped_steps"] for line in lines if "faults/skipped_steps" in line][:3] == [0, 1, 0]
    from safetensors.torch import load_file

    assert all(torch.isfinite(t).all() for t in load_file(run / "final" / "model.safetensors").values())


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_keep_the_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("polyphony.trainer.grpo.DomainGRPOTrainer._compute_loss", broken_from(1, until=99))
    overrides = ["rollouts.engine=transformers", "tracking.wandb=null", "faults.max_skipped=1"]
    assert main(["train", str(RECIPES / "debug.yaml"), *overrides, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "step 2: loss or gradient is not finite, 2 in a row (faults.max_skipped=1)" in said
    kept = torch.load(next((tmp_path / "run").rglob("nonfinite-step-2-rank-0.pt")), weights_only=False)
    assert 0 < kept[0]["completion_ids"].shape[0] <= 16  # rows of dead groups have left the update
