"""The policy and its engine: how it is started, when it gives memory back, and what it may be asked."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.records import Completion
from polyphony.launch.build import build_trainer, grpo_config, rollout_engine
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.trainer.checkpoints import save_final
from polyphony.trainer.engine.engine import Engine, InProcessEngine
from polyphony.trainer.engine.vllm import Request, Sampling
from tests.conftest import RECIPES

DEBUG = RECIPES / "debug.yaml"


class SleepyLLM:
    """Writes down what vLLM is asked to do with its memory and weights."""

    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")

    def apply_model(self, load):
        self.calls.append("load")

    def reset_prefix_cache(self):
        self.calls.append("forget")


class SleepyEngine(InProcessEngine):
    def _init_vllm(self):
        self.llm = SleepyLLM()
        self.rest()


def sleepy(**named) -> SleepyEngine:
    accelerator = SimpleNamespace(is_fsdp2=False, state=SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None))
    return SleepyEngine(
        torch.nn.Linear(1, 1), accelerator, None, sampling=Sampling(), max_model_length=None, max_num_seqs=1, **named
    )


def test_an_engine_that_may_sleep_holds_memory_from_a_sync_to_the_end_of_the_draw():
    engine = sleepy(enable_sleep_mode=True)
    assert engine.is_asleep
    engine.sync_weights()
    assert not engine.is_asleep
    engine.rest()
    engine.rest()
    assert engine.is_asleep
    # keys and values come back after the weights: both at once are not there while the policy is gathered
    assert engine.llm.calls == ["sleep 2", "wake weights", "load", "forget", "wake kv_cache", "sleep 2"]


def test_an_engine_stays_awake_by_default():
    engine = sleepy()
    engine.sync_weights()
    engine.rest()
    assert engine.llm.calls == ["load", "forget"]


def test_the_policy_is_synced_anew_to_an_engine_that_slept(engine, debug_recipe, tmp_path, monkeypatch):
    trainer = build_trainer(debug_recipe, tmp_path, engine=engine)
    trainer.policy.sync()
    version = engine.version
    request = Request(prompt_ids=[1, 2], seed=1, max_tokens=2)
    trainer.policy.complete([request], 1)
    assert engine.version == version
    monkeypatch.setattr(engine, "is_asleep", True)
    monkeypatch.setattr(engine, "sync_weights", lambda: setattr(engine, "is_asleep", False))
    trainer.policy.complete([request], 1)
    assert not engine.is_asleep


def test_an_engine_hears_of_a_rank_that_asks_for_nothing(engine, debug_recipe, tmp_path, monkeypatch):
    trainer = build_trainer(debug_recipe, tmp_path, engine=engine)
    assert trainer.policy.complete([], 1) == []
    version = engine.version
    trainer._last_loaded_step = -1
    heard = []
    monkeypatch.setattr(engine, "complete", lambda requests, on_finished: heard.append(requests) or [])
    trainer.policy.complete([], 1)
    # the ranks that do ask would wait for this one, in the sync as in an engine of all ranks
    assert engine.version == version + 1
    assert heard == [[]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["grpo.top_k=3", "grpo.top_p=0.9"], ["grpo.temperature=0.002"]], ids=lambda how: how[0]
)
def test_the_check_of_weights_passes_however_completions_are_sampled(engine, tmp_path, how):
    trainer = build_trainer(load_recipe(DEBUG, ["tracking.wandb=null", *how]), tmp_path, engine=engine)
    restricted = engine.sampling
    assert restricted == trainer.policy.sampling != Sampling()  # of this run, not of the one before
    try:
        assert trainer.policy.check().is_passed
        assert engine.sampling is restricted
    finally:
        engine.sampling = Sampling()


@pytest.mark.slow
def test_an_engine_hears_what_sampling_params_take(engine):
    kept, requests = engine.sampling, [Request(prompt_ids=[5, 9], seed=n, max_tokens=12) for n in range(8)]
    free = engine.complete(requests)
    try:
        stop = max(free, key=lambda c: len(c.ids)).ids[1]
        engine.sampling = Sampling(generation_kwargs={"stop_token_ids": [stop]})
        assert all(stop not in c.ids[:-1] for c in engine.complete(requests))
        text = engine.llm.get_tokenizer().decode([stop])
        engine.sampling = Sampling(generation_kwargs={"stop": [text]})
        assert all(stop not in c.ids[:-1] for c in engine.complete(requests))
        engine.sampling = Sampling(structured_outputs_regex="(4|5)+")
        decode = engine.llm.get_tokenizer().decode
        assert {mark for c in engine.complete(requests) for mark in decode(c.ids, skip_special_tokens=True)} <= {
            "4",
            "5",
        }
    finally:
        engine.sampling = kept


def test_a_request_that_would_be_cut_short_is_refused(engine):
    room = engine.llm.model_config.max_model_len
    with pytest.raises(ValueError, match=rf"room for {room} tokens of prompt and completion, {room + 1} are asked for"):
        engine.complete([Request(prompt_ids=[1] * room, seed=1, max_tokens=1)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.vllm_tensor_parallel_size=2", "grpo.vllm_tensor_parallel_size=2 without use_vllm: it belongs"),
        ("grpo.vllm_mode=server", "grpo.vllm_mode='server' without use_vllm: it belongs"),
        (
            "grpo.generation_kwargs={seed: 1}",
            "grpo.generation_kwargs.seed with an engine of ours: it is the engine's own",
        ),
        ("rollouts.engine_args={max_model_len: 9}", "use grpo.vllm_max_model_length"),
        ("rollouts.engine_args={tensor_parallel_size: 2}", "use rollouts.tensor_parallel"),
    ],
)
def test_what_an_engine_would_not_hear_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(DEBUG, [override])


def test_trls_own_engine_takes_its_own_keys():
    recipe = load_recipe(DEBUG, ["grpo.use_vllm=true", "grpo.vllm_mode=server"])
    assert recipe.grpo["vllm_mode"] == "server"
    with pytest.raises(RecipeError, match="engine_args are for engines of ours"):
        load_recipe(DEBUG, ["grpo.use_vllm=true", "rollouts.engine_args={enforce_eager: true}"])


def test_arguments_of_vllm_and_memory_reach_the_engines():
    factory = rollout_engine(load_recipe(DEBUG, ["rollouts.engine_args={enforce_eager: true}"]))
    assert (factory.func, factory.keywords) == (InProcessEngine, {"engine_args": {"enforce_eager": True}})
    pooled = rollout_engine(load_recipe(DEBUG, ["rollouts={engine: ray, engine_args: {quantization: fp8}}"]))
    # a worker has its GPU to itself
    assert pooled.keywords["gpu_memory_utilization"] == 0.9
    assert pooled.keywords["engine_args"] == {"quantization": "fp8"}
    lent = rollout_engine(load_recipe(DEBUG, ["rollouts.engine=ray", "grpo.vllm_gpu_memory_utilization=0.5"]))
    assert lent.keywords["gpu_memory_utilization"] == 0.5


def test_a_process_alone_takes_one_of_several_gpus(debug_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert GRPOConfig(output_dir=str(tmp_path), bf16=False).n_gpu == 4  # which TRL refuses: it would be DataParallel
    assert grpo_config(debug_recipe, tmp_path).n_gpu == 1


def test_steps_that_bfloat16_weights_would_lose_are_noticed(tmp_path):
    step = 1e-6
    assert torch.tensor(0.05, dtype=torch.bfloat16) + step == torch.tensor(0.05, dtype=torch.bfloat16)
    common = ["rollouts.engine=transformers", f"grpo.learning_rate={step}", "grpo.model_init_kwargs={dtype: bfloat16}"]
    full = build_trainer(load_recipe(DEBUG, common), tmp_path / "full")
    assert full.policy.loses_small_steps
    full.args.learning_rate = 1e-3
    assert not full.policy.loses_small_steps
    adapter = "lora={r: 4, alpha: 8, target_modules: [q_proj]}"  # PEFT keeps adapters in float32
    assert not build_trainer(load_recipe(DEBUG, [*common, adapter]), tmp_path / "lora").policy.loses_small_steps


def test_a_saved_policy_has_its_adapter_merged_and_the_trainer_keeps_it(tmp_path):
    adapter = "lora={r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"
    trainer = build_trainer(load_recipe(DEBUG, ["rollouts.engine=transformers", adapter]), tmp_path / "run")
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    save_final(trainer.policy, tmp_path / "final")
    trainer.model.eval()
    ids = torch.tensor([[1, 5, 7, 9]])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")(ids).logits
    assert torch.allclose(saved, trainer.model(input_ids=ids).logits, atol=1e-4)
    with trainer.model.disable_adapter():
        assert not torch.allclose(saved, trainer.model(input_ids=ids).logits, atol=1e-2)


class Counting(Engine):
    """An engine of a user's: every completion is one token, the number of the weight sync."""

    def _init_vllm(self):
        self.extra = dict(self.engine_args)

    def sync_weights(self):
        self.version += 1

    def complete(self, requests, on_finished=None):
        return [Completion(ids=[self.version], logps=[0.0], version=self.version) for _ in requests]


def counting(*arguments, **named):
    return Counting(*arguments, **named)


def no_engine(*arguments, **named):
    return "none"


@pytest.mark.parametrize("name", ["Counting", "counting"])
def test_an_engine_is_taken_by_its_import_path(name, tmp_path):
    path = f"{__name__}:{name}"
    recipe = load_recipe(DEBUG, [f"rollouts.engine={path}", "rollouts.engine_args={seeds: 3}", "tracking.wandb=null"])
    trainer = build_trainer(recipe, tmp_path)
    assert isinstance(trainer.policy.engine, Counting)
    assert trainer.policy.engine.extra == {"seeds": 3}
    trainer.policy.sync()
    (completion,) = trainer.policy.complete([Request(prompt_ids=[1], seed=0, max_tokens=4)], 1)
    assert completion.ids == [1]


def test_what_makes_no_engine_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"function no_engine .* returned 'none', which is no Engine"):
        build_trainer(load_recipe(DEBUG, [f"rollouts.engine={__name__}:no_engine"]), tmp_path)


def test_an_engine_of_ones_own_excludes_that_of_trl():
    with pytest.raises(RecipeError, match=r"rollouts.engine a.b:C and grpo.use_vllm=true exclude each other"):
        load_recipe(DEBUG, ["rollouts.engine=a.b:C", "grpo.use_vllm=true"])


def test_without_an_engine_of_ours_trl_generates_and_lengths_are_cut(tmp_path):
    trainer = build_trainer(load_recipe(DEBUG, ["rollouts.engine=transformers", "tracking.wandb=null"]), tmp_path)
    request = Request(prompt_ids=[5, 6], seed=1, max_tokens=2)
    (completion,) = trainer.policy.complete([request], 1)
    assert 1 <= len(completion.ids) <= 2
    assert trainer.policy.complete([], 1) == []
    with pytest.raises(ValueError, match="greedy decoding needs an engine of ours"):
        trainer.policy.complete([replace(request, is_greedy=True)], 1)
    closed = []
    trainer.policy.close()  # there is none
    trainer.policy.engine = SimpleNamespace(close=lambda: closed.append(True))
    trainer.policy.close()
    assert closed == [True]
