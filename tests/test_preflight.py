"""What is said before a run begins: of values that were hardly meant so, and by `--dry-run` of all that a run will meet."""

from __future__ import annotations

import pytest
import torch

from polyphony.launch.build import grpo_config, remarks
from polyphony.launch.recipe import load_recipe


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_the_policy_takes_float32_and_it_is_said(tmp_path, recipe):
    told = load_recipe(recipe, ["grpo.bf16=null"])
    args = grpo_config(told, tmp_path)
    assert (args.bf16, args.fp16) == (False, False)
    assert remarks(told, args) == ["no GPU here: the policy takes float32"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], []),
        (["grpo.num_generations=8"], ["a draw holds 1 prompt (8 completions in groups of 8) for 2 trained domains: "]),
        (["grpo.beta=5"], ["grpo.beta=5 is far outside what is used, 0 to 0.1: "]),
        (
            ["grpo.learning_rate=0.1", "grpo.temperature=9"],
            ["grpo.learning_rate=0.1 is ", "grpo.temperature=9 is far "],
        ),
    ],
)
def test_what_was_hardly_meant_so_is_said(tmp_path, recipe, overrides, said):
    told = load_recipe(recipe, overrides)
    found = remarks(told, grpo_config(told, tmp_path))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True)), found
