"""What we rely on in TRL 1.16: if one of these moves, the trainer has to be read again."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing

import pytest
import trl
from transformers import SchedulerType
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler

from polyphony.launch.grpo_fields import GROUP_SIZE, GRPO_KINDS, LIMITS, ONE_OF, OURS, complaint
from polyphony.rewards.registry import HOOKS
from tests.conftest import LATER


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(inspect.unwrap(function)).parameters if name != "self"]


def test_the_pinned_minor_version_is_installed():
    assert trl.__version__.split(".")[:2] == ["1", "16"]


def test_the_committed_fields_are_those_of_grpo_config():
    assert {field.name for field in dataclasses.fields(GRPOConfig) if field.init} - LATER == set(GRPO_KINDS)
    assert set(OURS) | set(LIMITS) <= set(GRPO_KINDS)
    assert GRPOConfig.num_generations == GROUP_SIZE


WORDS = {int: "a whole number", float: "a finite number", bool: "true or false"}


def test_the_committed_kinds_are_those_of_grpo_config():
    for name, hint in typing.get_type_hints(GRPOConfig).items():
        kinds = set(typing.get_args(hint) or (hint,))
        bare = kinds - {type(None)}
        known = WORDS.get(next(iter(bare)), "") if len(bare) == 1 else ""
        if name in GRPO_KINDS:
            assert GRPO_KINDS[name] == (known, bool(known) and type(None) in kinds), name


def test_what_grpo_config_has_by_default_is_allowed(tmp_path):
    defaults = GRPOConfig(output_dir=str(tmp_path), bf16=False)
    made_later = {"generation_batch_size", "steps_per_generation"}  # from each other
    named = {f.name for f in dataclasses.fields(GRPOConfig) if f.init} - made_later - LATER
    assert {name: said for name in named if (said := complaint(name, getattr(defaults, name)))} == {}


def test_the_committed_losses_are_those_that_the_trainer_computes():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    compared = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
    assert set(re.findall(r"\w+", " ".join(compared))) == set(ONE_OF["loss_type"])
    levels = re.findall(r"self\.importance_sampling_level == \"(\w+)\"", inspect.getsource(GRPOTrainer))
    assert set(levels) == set(ONE_OF["importance_sampling_level"])
    assert {one.value for one in SchedulerType} == set(ONE_OF["lr_scheduler_type"])


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (GRPOTrainer._generate_and_score_completions, ["inputs"]),
        (GRPOTrainer._generate, ["prompts"]),
        (GRPOTrainer._tokenize_prompts, ["prompts"]),
        (
            GRPOTrainer._generate_single_turn,
            ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        (
            GRPOTrainer._tool_call_loop,
            ["prompts", "prompt_ids", "completion_ids", "completions", "logprobs", "images", "multimodal_fields"],
        ),
        (GRPOTrainer._calculate_rewards, ["inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer._save_checkpoint, ["model", "trial"]),
        (GRPOTrainer._load_optimizer_and_scheduler, ["checkpoint"]),
        (
            GRPOTrainer._run_epoch,
            [
                "model",
                "epoch",
                "train_dataloader",
                "steps_in_epoch",
                "num_update_steps_per_epoch",
                "trial",
                "ignore_keys_for_eval",
                "start_time",
                "resume_from_checkpoint",
                "epochs_trained",
                "steps_trained_in_current_epoch",
            ],
        ),
        (GRPOTrainer.log, ["logs", "start_time"]),
        (VLLMGeneration._init_vllm, []),
        (VLLMGeneration.sync_weights, []),
        (VLLMGeneration.generate, ["prompts", "images", "num_generations", "profiler"]),
        (VLLMGeneration._iter_named_params, []),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_a_method_we_override_or_call_has_the_parameters_we_know(method, names):
    assert parameters(method) == names


def test_log_probabilities_are_asked_for_in_the_order_we_hand_over():
    names = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert names[:7] == [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ]


def test_a_prompt_stands_in_the_sampler_as_often_as_its_group_and_its_reuse_need():
    sampler = RepeatSampler(["a", "b"], mini_repeat_count=2, batch_size=2, repeat_count=2, shuffle=False)
    assert list(sampler) == [0, 0, 1, 1, 0, 0, 1, 1]


def test_a_reward_gets_the_hooks_that_trl_hands_over():
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert set(re.findall(r'\n {8,12}reward_kwargs\["(\w+)"\] = self', source)) == {*HOOKS, "environments"}
    assert parameters(GRPOTrainer._log_metric) == ["name", "value"]
    assert parameters(GRPOTrainer._log_completion_extra) == ["column", "values"]
