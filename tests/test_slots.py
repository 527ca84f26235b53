"""Draws, steps and boundaries, counted by hand for a batch of 8 completions in groups of 4."""

from __future__ import annotations

import pytest
from trl.trainer.grpo_config import GRPOConfig

from polyphony.trainer.slots import plan_draws, slot_arguments, slot_dataset


def config(tmp_path, **changes) -> GRPOConfig:
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 10, "bf16": False}
    return GRPOConfig(output_dir=str(tmp_path), **settings | changes)


ONE_STEP = {}
TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2}
FOUR_STEPS_A_DRAW = {"steps_per_generation": 4}
EACH_DRAW_TWICE = {"num_iterations": 2}
FOUR_DRAWS_A_STEP = {"gradient_accumulation_steps": 4, "steps_per_generation": 1}
THREE_TO_TWO = {"gradient_accumulation_steps": 3, "steps_per_generation": 2}


@pytest.mark.parametrize(
    ("changes", "prompts_per_draw", "draws"),
    [
        (ONE_STEP, 2, 10),
        (TWO_MICRO_BATCHES, 4, 10),
        (FOUR_STEPS_A_DRAW, 8, 3),  # 4 + 4 + 2 steps
        (EACH_DRAW_TWICE, 2, 5),
        (FOUR_DRAWS_A_STEP, 2, 40),
        (THREE_TO_TWO, 4, 15),  # 10 steps of 3 micro-batches, 2 a draw
    ],
)
def test_a_run_of_ten_steps_is_cut_into_draws(tmp_path, changes, prompts_per_draw, draws):
    plan = plan_draws(config(tmp_path, **changes), n_prompts=1000)
    assert (plan.steps, plan.prompts_per_draw, plan.draws) == (10, prompts_per_draw, draws)


@pytest.mark.parametrize(
    ("changes", "epochs", "draws", "steps"),
    [
        (ONE_STEP, 1, 5, 5),  # 10 prompts, 2 a draw
        (ONE_STEP, 2.5, 13, 13),  # 25 prompts
        (FOUR_STEPS_A_DRAW, 1, 2, 8),  # 8 a draw: the second is begun, and then all its steps are taken
        (EACH_DRAW_TWICE, 1, 5, 10),
        (FOUR_DRAWS_A_STEP, 1, 8, 2),  # 5 draws make 1.25 steps
        (THREE_TO_TWO, 1, 3, 2),  # 3 draws of 2 micro-batches, 3 a step
    ],
)
def test_an_epoch_is_as_many_prompts_drawn_as_there_are(tmp_path, changes, epochs, draws, steps):
    args = config(tmp_path, max_steps=-1, num_train_epochs=epochs, **changes)
    plan = plan_draws(args, n_prompts=10)
    assert (plan.draws, plan.steps) == (draws, steps)


@pytest.mark.parametrize(
    ("changes", "boundaries"),
    [
        (ONE_STEP, [1, 2, 3, 4, 5, 6, 7, 8]),
        (FOUR_STEPS_A_DRAW, [4, 8]),
        (EACH_DRAW_TWICE, [2, 4, 6, 8]),
        (FOUR_DRAWS_A_STEP, [1, 2, 3, 4, 5, 6, 7, 8]),
        (THREE_TO_TWO, [2, 4, 6, 8]),
    ],
)
def test_a_checkpoint_may_be_written_where_a_step_ends_with_its_draw(tmp_path, changes, boundaries):
    plan = plan_draws(config(tmp_path, **changes), n_prompts=10)
    assert [step for step in range(1, 9) if plan.is_boundary(step)] == boundaries


def test_there_is_one_empty_slot_for_every_prompt_to_be_drawn(tmp_path):
    slots = slot_dataset(plan_draws(config(tmp_path, **FOUR_STEPS_A_DRAW), n_prompts=10))
    assert slots["prompt"][:] == [""] * 24


def test_the_users_arguments_stay_as_they_were(tmp_path):
    args = config(tmp_path, max_steps=-1, num_train_epochs=1)
    ours = slot_arguments(args, plan_draws(args, n_prompts=10))
    assert (ours.max_steps, ours.ignore_data_skip, ours.shuffle_dataset) == (5, True, False)
    assert (args.max_steps, args.ignore_data_skip, args.shuffle_dataset) == (-1, False, True)
