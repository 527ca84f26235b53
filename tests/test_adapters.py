"""Adapters sent as they are: which, their tensors, and an engine that lays them over its weights and forgets the old one."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import OSFConfig, get_peft_model
from safetensors.torch import load_file

from polyphony.launch.build import build_trainer
from polyphony.launch.recipe import load_recipe
from polyphony.trainer.engine.adapters import AdapterShape, adapter_tensors, shape_of
from polyphony.trainer.engine.engine import InProcessEngine
from polyphony.trainer.engine.lora import adapter_request, load_adapter
from polyphony.trainer.engine.merge import base_parameters
from polyphony.trainer.engine.vllm import Request, sample
from polyphony.trainer.engine.weight_check import changed_adapter
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import RECIPES
from tests.test_merge import LAYERS, adapted, base, one_rank, same, step

DEBUG = [RECIPES / "debug.yaml", ["tracking.wandb=null", "grpo.max_steps=2", "grpo.learning_rate=1e-2"]]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"use_rslora": True}, ""),
        ({"r": 512}, ""),
        ({"use_dora": True}, "vLLM takes no DoRA"),
        ({"r": 513}, "its rank is 513, vLLM takes at most 512"),
        ({"modules_to_save": ["norm"]}, "norm.weight is trained beside it"),
        ({"bias": "lora_only", "lora_bias": True}, "lora_B.default.bias is trained beside it"),
        ({"target_modules": ["embed_tokens"]}, "layer model.embed_tokens is of the kind Embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "layer lm_head is the output head"),
    ],
)
def test_what_vllm_takes_no_adapter_for_is_merged_and_why_is_said(changes, why):
    shape, said = shape_of(adapted(**changes))
    assert why in said
    assert (shape is None) == bool(why) == bool(said)


def test_a_policy_without_an_adapter_gives_no_reason_and_another_kind_its_name():
    assert shape_of(base()) == (None, "")
    osf = get_peft_model(base(), OSFConfig(effective_rank=0.5, target_modules=LAYERS, task_type="CAUSAL_LM"))
    assert shape_of(osf) == (None, "vLLM takes no OSF")


def test_an_engine_makes_room_for_the_largest_rank_and_the_layers_alone():
    shape, _ = shape_of(adapted(r=3, rank_pattern={"down_proj": 20}))
    assert shape == AdapterShape(
        rank=20,
        layers=frozenset(f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")),
    )
    assert shape.arguments["max_lora_rank"] == 32
    assert shape.arguments["lora_target_modules"] == ["down_proj", "q_proj"]


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}}]
)
def test_what_is_sent_is_what_the_adapter_adds_and_the_base_is_as_on_disk(changes):
    torch.manual_seed(0)
    model = adapted(**changes)
    step(model)
    sent = {name: tensor.clone() for name, tensor in adapter_tensors(model, one_rank())}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            adds = sent.pop(f"{name}.lora_B") @ sent.pop(f"{name}.lora_A")
            assert torch.allclose(adds, layer.get_delta_weight("default"), atol=1e-6)
    assert not sent
    assert same(dict(base_parameters(model, one_rank())), dict(base().named_parameters()))


def test_the_check_changes_every_factor_and_puts_it_back():
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with changed_adapter(model):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) != ("lora_" in name), name
    assert same(dict(model.state_dict()), before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer of the debug recipe with LoRA, after its run; the times that it sent the base; what it said."""
    folder, sent, told = RunFolder(tmp_path_factory.mktemp("adapter")), [], []
    recipe = load_recipe(DEBUG[0], [*DEBUG[1], "lora={r: 12}"])
    trainer = build_trainer(recipe, folder.path, run=folder)
    whole = trainer.policy.engine._base
    trainer.policy.engine._base = lambda: sent.append("base") or whole()
    trainer.run.say = told.append
    trainer.train()
    del trainer.policy.engine._base
    return trainer, sent, told


def logs(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.slow
def test_the_base_is_sent_once_and_the_engine_samples_from_the_policy(trained):
    trainer, sent, _ = trained
    assert trainer.policy.sends_adapter
    assert sent == ["base"]
    assert max(logs(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    assert any(t.any() for n, t in adapter_tensors(trainer.model, one_rank()) if "lora_B" in n)
    check = trainer.policy.check()
    assert check.is_passed
    assert "with the adapter's tensors changed" in str(check)
    assert str(check).endswith("what follows of it later is not checked")


def logps(policy, prompt: list[int], completion) -> list[float]:
    return policy.token_logps([prompt], [completion.ids])[0]


def furthest(policy, prompt, completion) -> float:
    return max(abs(a - b) for a, b in zip(completion.logps, logps(policy, prompt, completion), strict=True))


@pytest.mark.slow
def test_what_was_read_with_an_older_adapter_is_not_used_again(trained):
    """Blocks of a prompt are remembered by the adapter's name: under the old one, without a reset, they would be used."""
    policy, engine = trained[0].policy, trained[0].policy.engine
    size = engine.llm.llm_engine.vllm_config.cache_config.block_size
    prompt = [5 + i % 40 for i in range(size + 20)]
    request = Request(prompt_ids=prompt, seed=3, max_tokens=8)
    policy.sync()
    assert furthest(policy, prompt, engine.complete([request])[0]) < 1e-4
    with changed_adapter(trained[0].model):
        policy.sync()
        assert furthest(policy, prompt, engine.complete([request])[0]) < 1e-4
    kept, engine.llm.reset_prefix_cache = engine.llm.reset_prefix_cache, lambda: None
    try:
        tensors = list(adapter_tensors(trained[0].model, one_rank()))
        load_adapter(engine.llm, tensors, version=engine.version)  # another adapter, by the name of the one before
        stale = sample(engine.llm, [request], engine.sampling, adapter=adapter_request(engine.version))[0]
        policy.sync()  # a name of its own, still without a reset
        fresh = engine.complete([request])[0]
    finally:
        engine.llm.reset_prefix_cache = kept
    assert furthest(policy, prompt, stale) > 1e-2
    assert furthest(policy, prompt, fresh) < 1e-4


@pytest.mark.slow
def test_an_adapter_that_is_not_held_fails_loudly(trained):
    engine = trained[0].policy.engine
    trained[0].policy.sync()
    engine.llm.apply_model(lambda model: model.lora_manager.remove_all_adapters())
    with pytest.raises(Exception, match="sync-"):
        engine.complete([Request(prompt_ids=[5, 6], seed=1, max_tokens=2)])
    engine.llm.llm_engine.abort_request(list(engine.llm.llm_engine.output_processor.request_states), internal=True)


class StaleEngine(InProcessEngine):
    """Keeps the adapter that it has."""

    def sync_weights(self):
        pass


@pytest.mark.slow
def test_an_engine_that_keeps_an_old_adapter_fails_the_check(trained):
    policy = trained[0].policy
    policy.sync()
    policy.engine.__class__, kept = StaleEngine, policy.engine.__class__
    try:
        check = policy.check()
    finally:
        policy.engine.__class__ = kept
    assert not check.is_passed
    assert check.changed > check.allowed


@pytest.mark.slow
def test_merged_for_a_while_says_the_same_and_other_policies_are_served_by_the_same_engine(trained, tmp_path):
    policy, engine = trained[0].policy, trained[0].policy.engine
    requests = [Request(prompt_ids=[5, 9, 7], seed=i, max_tokens=8) for i in range(4)]
    apart = policy.complete(requests, 1)
    with policy.merged():
        merged = policy.complete(requests, 1)
    assert [c.ids for c in merged] == [c.ids for c in apart]
    assert policy.sends_adapter

    for more, why in (["lora={r: 64}"], "the engine has room for rank 16, the adapter's is 64"), ([], ""):
        other = build_trainer(load_recipe(DEBUG[0], [*DEBUG[1], *more]), tmp_path, engine=engine)
        assert (engine.adapter, engine.merged_because) == (None, why)
        check = other.policy.check()
        assert check.is_passed
        assert check.note == (f"the adapter is merged into a copy of the base at each sync: {why}" if why else "")
    engine.attach(trained[0].model, trained[0].accelerator)
    assert policy.check().is_passed


@pytest.mark.slow
def test_a_run_says_how_what_it_leaves_scores_beside_the_adapter(trained):
    assert trained[2] == [
        "final/, merged, beside the adapter that was trained: 0 of 48 held-out items differ (arithmetic +0.0000, stories "
        "+0.0000, safety +0.0000)"
    ]


@pytest.mark.slow
def test_a_run_that_goes_on_leaves_the_same_adapter_to_the_bit(trained, tmp_path):
    whole, engine = trained[0].run.folder, trained[0].policy.engine
    half = RunFolder(shutil.copytree(whole.path, tmp_path / "half"))
    for later in (half.checkpoints / "checkpoint-2", half.final):
        shutil.rmtree(later)
    trainer = build_trainer(load_recipe(DEBUG[0], [*DEBUG[1], "lora={r: 12}"]), half.path, run=half, engine=engine)
    assert trainer.policy.sends_adapter
    trainer.train(resume_from_checkpoint=True)
    ours, theirs = (load_file(run.final / "adapter" / "adapter_model.safetensors") for run in (half, whole))
    assert same(ours, theirs)
