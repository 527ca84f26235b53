"""Families of models: four train here with the real vLLM, the others by `python -m tests.experiments.families`."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.grpo_config import GRPOConfig

from polyphony.launch.build import load_data
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.trainer.engine.vllm import said_of
from polyphony.trainer.policy import has_dropout
from polyphony.trainer.weight_names import checkpoint_names, load_converted
from tests.experiments.families import answer, trained
from tests.families import FAMILIES
from tests.forks import Fork


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt2"])
def test_a_family_trains_follows_and_resumes_with_vllm(tmp_path, name):
    child = Fork(answer, name, tmp_path, "float32", log=tmp_path / "log")
    assert child.wait() == 0, child.said[-3000:]
    found = json.loads((tmp_path / "results.jsonl").read_text())
    assert "said" not in found, child.said[-3000:]
    assert found["trains"] == 1
    assert found["check"]["passed"]
    assert found["sync"]["passed"]
    assert found["resumes"]


def test_a_weight_that_is_called_otherwise_on_disk_is_sent_by_that_name(tmp_path):
    def names(family):
        return checkpoint_names(AutoModelForCausalLM.from_pretrained(FAMILIES[family].make(tmp_path / family)))

    assert names("gpt_neox") == {"lm_head.weight": "embed_out.weight"}
    assert names("qwen3_moe") == names("llama") == {}  # fused experts are split on disk, and read whole
    assert checkpoint_names(torch.nn.Linear(1, 1)) == {}


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_moe"])
def test_weights_that_are_otherwise_on_disk_are_loaded_from_a_checkpoint(tmp_path, family):
    saved = AutoModelForCausalLM.from_pretrained(FAMILIES[family].make(tmp_path))
    other = AutoModelForCausalLM.from_config(saved.config)
    noise = torch.get_rng_state()
    load_converted(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(p, saved.state_dict()[name]) for name, p in other.state_dict().items())


@pytest.mark.parametrize(("family", "has"), [("gpt2", True), ("opt", True), ("llama", False), ("gpt_neox", False)])
def test_dropout_is_seen_in_a_layer_and_in_a_number(tmp_path, family, has):
    assert has_dropout(AutoModelForCausalLM.from_pretrained(FAMILIES[family].make(tmp_path))) == has


def test_dropout_is_said_and_may_be_turned_off(tmp_path):
    model = str(FAMILIES["gpt2"].make(tmp_path / "model"))
    with pytest.warns(UserWarning, match="the model has dropout"):
        trained(model, tmp_path / "run", engine="transformers")
    trainer = trained(model, tmp_path / "run", engine="transformers", disable_dropout=True)
    assert not has_dropout(trainer.model)


def test_code_of_a_model_is_run_where_it_is_trusted_and_nowhere_else(tmp_path):
    model = str(FAMILIES["own"].make(tmp_path / "model"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        trained(model, tmp_path / "refused", engine="transformers")
    trainer = trained(
        model,
        tmp_path / "run",
        engine="transformers",
        trust_remote_code=True,
        max_steps=1,
        beta=0.1,
        save_strategy="no",
    )
    assert type(trainer.processing_class).__name__ == "OwnTokenizer"
    assert type(trainer.model).__name__ == type(trainer.ref_model).__name__ == "OwnForCausalLM"
    trainer.train()
    assert trainer.state.global_step == 1


def test_vllms_reason_is_named_without_its_list_of_all_models():
    said = (
        "Value error, Model architectures ['Own'] are not supported for now. Supported architectures: dict_keys(['A'])"
    )
    assert said_of(said) == (
        "Model architectures ['Own'] are not supported for now. (vllm_model_impl: transformers has it run the model's own "
        "classes)"
    )
    assert said_of("Value error, no") == "no"


def test_a_recipe_says_whether_code_is_trusted(recipe, tmp_path):
    FAMILIES["own"].make(tmp_path / "own")
    data = load_recipe(recipe, ["model=own"])
    with pytest.raises(RecipeError, match="trust_remote_code"):
        load_data(data, GRPOConfig(bf16=False))
    trusted = load_recipe(recipe, ["model=own", "grpo.trust_remote_code=true"])
    assert trusted.trusts_code
    args = GRPOConfig(bf16=False, trust_remote_code=True, max_completion_length=8)
    assert (
        load_data(trusted, args).context
        == AutoConfig.from_pretrained(tmp_path / "own", trust_remote_code=True).max_position_embeddings
    )
