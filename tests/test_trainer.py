"""The trainer against the real TRL and the real vLLM, on the lab's policy."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import Decision, Domain
from polyphony.launch.lab.rewards import StoryRubric
from polyphony.launch.lab.world import rows
from polyphony.rewards.short_answer import Exact
from polyphony.trainer.engine.engine import InProcessEngine
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.policy import Policy
from tests.conftest import HOUSE

pytestmark = pytest.mark.slow
POLICY = str(HOUSE / "launch" / "lab" / "policy")


def config(tmp_path, **changes) -> GRPOConfig:
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "num_generations": 8,
        "max_completion_length": 32,
        "max_steps": 3,
        "learning_rate": 2e-4,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }
    return GRPOConfig(**settings | changes)


def domain(name: str, *, kind="structured", reward=None, train=True, **changes) -> Domain:
    return Domain(
        name=name,
        kind=kind,
        train=rows(domain=name, split="train", size=48) if train else None,
        heldout=rows(domain=name, split="heldout", size=8),
        reward=reward or Exact(),
        **changes,
    )


def both() -> list[Domain]:
    return [
        domain("arithmetic"),
        domain("stories", kind="open_ended", reward=StoryRubric()),
        domain("safety", train=False),
    ]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@dataclass
class Recording:
    """Plays a run's completions back to a stock trainer, in order."""

    rollouts: list

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        rollout = self.rollouts.pop(0)
        assert [list(ids) for ids in prompts] == [c.prompt.ids for c in rollout.rows.values()]
        ids = [c.ids for c in rollout.rows.values()]
        return prompts, ids, [[[p] for p in c.logps] for c in rollout.rows.values()], None


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_with_all_features_off_losses_are_those_of_stock_trl(tmp_path, engine, loss_type):
    off = {"curriculum": "joint", "update": {"drop_dead": "never"}}
    ours = DomainGRPOTrainer(POLICY, config(tmp_path, loss_type=loss_type), domains=both(), engine=engine, **off)
    rollouts = []
    keep = ours._roll_out
    ours._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    ours.train()

    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    prompts = [rollout.rows[i].prompt.prompt for rollout in rollouts for i in range(0, 32, 8)]

    def replayed(prompts, completions, **columns):
        return [rewards.pop(0) for _ in prompts]

    stock = GRPOTrainer(
        POLICY,
        replayed,
        args=config(tmp_path, loss_type=loss_type, shuffle_dataset=False),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    stock.vllm_generation, stock.use_vllm, stock._last_loaded_step = Recording(list(rollouts)), True, -1
    stock.train()
    assert losses(ours) == losses(stock)
    assert len(losses(ours)) == 3
    assert any(loss != 0 for loss in losses(ours))


def begins_right(completions, answer, **columns):
    return [float(c[0]["content"][:1] == a[:1]) for c, a in zip(completions, answer, strict=True)]


def brief(completion_ids, **columns):
    return [None if len(ids) > 16 else -len(ids) / 64 for ids in completion_ids]


def test_a_script_of_trls_with_one_import_changed_has_trls_losses(tmp_path, engine):
    data = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
        for row in rows(domain="arithmetic", split="train", size=48)
    ]
    script = {"model": POLICY, "reward_funcs": [begins_right, brief]}
    weighed = {"reward_weights": [1.0, 0.5]}
    off = {"engine": engine, "curriculum": "joint", "update": {"drop_dead": "never"}}
    ours = DomainGRPOTrainer(**script, args=config(tmp_path, **weighed), train_dataset=Dataset.from_list(data), **off)
    rollouts = []
    keep = ours._roll_out
    ours._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    ours.train()
    with pytest.raises(ValueError, match=r"evaluate\(\) of a trainer without held-out rows: give eval_dataset"):
        ours.evaluate()

    drawn = [rollout.rows[i].prompt for rollout in rollouts for i in range(0, 32, 8)]
    stock = GRPOTrainer(
        **script,
        args=config(tmp_path, **weighed, shuffle_dataset=False),
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "answer": p.columns["answer"]} for p in drawn]),
    )
    stock.vllm_generation, stock.use_vllm, stock._last_loaded_step = Recording(list(rollouts)), True, -1
    stock.train()
    assert losses(ours) == losses(stock)
    assert any(loss != 0 for loss in losses(ours)) and len(losses(ours)) == 3
    told = [[log[name] for log in ours.state.log_history[:3]] for name in ("reward", "domain/default/logged/brief")]
    assert told[0] == [log["reward"] for log in stock.state.log_history[:3]]
    assert told[1] == pytest.approx([log["rewards/brief/mean"] for log in stock.state.log_history[:3]])


def test_a_prompt_longer_than_the_context_is_refused_from_python_too(tmp_path):
    with pytest.raises(ValueError, match=r"exceed the context of 256 .*: nothing is left"):
        DomainGRPOTrainer(POLICY, config(tmp_path, max_completion_length=250), domains=both())


@pytest.mark.parametrize(
    ("look", "batch", "ranks", "message"),
    [
        (8, 16, 1, r"pool\.look: must be below num_generations=8, got 8"),
        (4, 12, 2, r"pool\.look=4: a rank's 12 rows of a draw .* must be whole groups of num_generations=8"),
    ],
)
def test_a_look_that_is_no_part_of_a_group_is_refused(look, batch, ranks, message):
    arguments = SimpleNamespace(per_device_train_batch_size=batch, steps_per_generation=1)
    policy = SimpleNamespace(trainer=SimpleNamespace(args=arguments), world_size=ranks)
    with pytest.raises(ValueError, match=message):
        PoolSettings(look=look).check_look(8, rank_rows=Policy.rank_rows.fget(policy))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_vllm": True, "vllm_mode": "server"},
            r"pool\.refill\.max_rounds=2 with several ranks on one engine of TRL's",
        ),
        ({"is_fsdp_enabled": True}, "engine transformers over ranks that split the policy's weights"),
        ({"is_deepspeed_enabled": True}, "engine transformers over ranks that split the policy's weights"),
        ({}, None),
    ],
)
def test_ranks_that_generate_together_are_asked_for_like_numbers(changes, message):
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    settings = {"use_vllm": False, "vllm_mode": "colocate", "is_fsdp_enabled": False}
    settings |= {"is_deepspeed_enabled": False, "accelerator": SimpleNamespace(state=state)}
    settings |= {"args": SimpleNamespace(vllm_tensor_parallel_size=1)}
    policy = SimpleNamespace(engine=None, world_size=2, trainer=SimpleNamespace(**{**settings, **changes}))
    joint = Policy.joint.fget(policy)  # type: ignore[misc]
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        PoolSettings(refill={"max_rounds": 2}).check_uneven(joint)
    PoolSettings(refill={"max_rounds": 0}).check_uneven(joint)


@pytest.mark.parametrize("look", [None, 4])
def test_weights_are_synced_once_a_draw_however_often_it_is_looked_at_and_refilled(look, tmp_path, engine):
    hopeless = domain("arithmetic", reward=lambda prompts, **columns: [0.0] * len(prompts))
    pool = PoolSettings(refill={"max_rounds": 2}, look=look)
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path), domains=[hopeless], engine=engine, pool=pool)
    synced: list[int] = []
    keep = trainer.policy.sync
    trainer.policy.sync = lambda: (synced.append(trainer.state.global_step), keep())  # type: ignore[method-assign]
    trainer.train()
    assert synced == [0, 1, 2]
    assert [entry["rollout/refill_rounds"] for entry in trainer.state.log_history if "loss" in entry] == [2, 2, 2]


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_replaced_groups_enter_entropy_only_as_the_policys_own(top_p, tmp_path, engine):
    """Every group is dead, so all but the last round's are replaced; their surprisal is pushed to what it never is."""
    hopeless = domain("arithmetic", reward=lambda prompts, **columns: [0.0] * len(prompts))
    settings = config(tmp_path, max_steps=1, learning_rate=0.0, top_p=top_p)
    pool = {"refill": {"max_rounds": 1}}
    trainer = DomainGRPOTrainer(POLICY, settings, domains=[hopeless], engine=engine, pool=pool)
    roll_out = trainer._roll_out

    def surprised(n_rows: int):
        rollout = roll_out(n_rows)
        replaced = tuple(replace(group, surprisals=(1e4,) * len(group.rewards)) for group in rollout.discarded)
        return replace(rollout, discarded=replaced)

    trainer._roll_out = surprised  # type: ignore[method-assign]
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["domain/arithmetic/entropy"] > 100) == (top_p == 1.0)
    assert log.get("domain/arithmetic/entropy_unmeasured", 0) == (0 if top_p == 1.0 else 8 * 4)


def test_a_script_without_a_run_folder_is_told_that_nothing_is_learned(tmp_path, engine, caplog):
    hopeless = domain("arithmetic", reward=lambda prompts, **columns: [0.0] * len(prompts), max_completion_length=2)
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path, max_steps=9), domains=[hopeless], engine=engine)
    trainer.train()
    told = [
        line for line in caplog.messages if "no group of 8 draws had a gradient; in the last 0% all correct" in line
    ]
    assert len(told) == 1 and "What may help: all wrong: easier rows" in told[0]


def test_entropy_by_domain_adds_up_to_the_entropy_of_all_rows(tmp_path, engine):
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path, learning_rate=0.0, max_steps=1), domains=both(), engine=engine)
    trainer.train()
    log = trainer.state.log_history[0]
    tokens = {d: log[f"domain/{d}/mean_length"] * log[f"domain/{d}/n"] for d in ("arithmetic", "stories")}
    weighted = sum(log[f"domain/{d}/entropy"] * tokens[d] for d in tokens) / sum(tokens.values())
    # TRL averages two micro-batches, each by its own tokens, so the two agree only up to their different lengths
    assert weighted == pytest.approx(log["entropy"], rel=0.05)
    assert 0 < log["domain/arithmetic/entropy"] < math.log(trainer.model.config.vocab_size)
    assert "domain/safety/entropy" not in log


def test_entropy_is_that_of_the_policys_softmax(tmp_path, engine):
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path), domains=both(), engine=engine)
    ids, completion = [5, 6, 7], [8, 9]
    _, entropy, mask = trainer.policy.forward([ids], [completion])
    with torch.no_grad():
        logits = trainer.model(torch.tensor([ids + completion])).logits[0, 2:4]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert mask.tolist() == [[1, 1]]
    torch.testing.assert_close(entropy[0], expected, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class Watching:
    """A scheduler that remembers what it was shown."""

    seen: list

    def decide(self, evidence, state):
        self.seen.append(evidence)
        return Decision(mixture=(0.5, 0.5), reason="half and half")


def test_a_draw_is_decided_after_the_rewards_of_the_draw_before(tmp_path, engine):
    seen: list = []
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path), domains=both(), engine=engine, curriculum=Watching(seen))
    seen.clear()  # it was asked once while nothing was spent, to see whether it works
    trainer.train()
    assert [evidence.draw for evidence in seen] == [0, 1, 2]
    assert [evidence.last[0].groups for evidence in seen] == [0, 2, 2]


def test_a_domains_own_length_limit_holds(tmp_path, engine):
    short = [domain("arithmetic", max_completion_length=3), domain("stories", kind="open_ended", reward=StoryRubric())]
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path, max_steps=1), domains=short, engine=engine)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["domain/arithmetic/mean_length"] <= 3
    assert log["completions/max_length"] > 3


def test_a_grader_that_raises_costs_its_own_completion_only(tmp_path, engine):
    def fragile(prompts, completions, completion_ids, answer, **columns):
        if any("1" in text[0]["content"] for text in completions):
            raise ZeroDivisionError("a 1")
        return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]

    domains = [domain("arithmetic", reward=fragile), domain("stories", kind="open_ended", reward=StoryRubric())]
    trainer = DomainGRPOTrainer(
        POLICY, config(tmp_path, max_steps=1), domains=domains, engine=engine, max_grader_failures=1.0
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["domain/arithmetic/grader_failures"] < log["domain/arithmetic/n"]
    assert log["domain/stories/grader_failures"] == 0


def test_too_many_failures_of_a_grader_stop_the_run_with_the_domains_name(tmp_path, engine):
    def broken(prompts, completions, completion_ids, **columns):
        raise ZeroDivisionError

    trainer = DomainGRPOTrainer(POLICY, config(tmp_path), domains=[domain("arithmetic", reward=broken)], engine=engine)
    with pytest.raises(RuntimeError, match="domain 'arithmetic': the reward failed on 64 of the last 64 completions"):
        trainer.train()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, **columns: [1.0], "the reward returned 1 values for 32 completions"),
        (lambda prompts, **columns: [math.inf] * len(prompts), "the reward returned inf; a failed grading is None"),
    ],
)
def test_a_reward_that_breaks_its_contract_stops_the_run(tmp_path, engine, reward, message):
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path), domains=[domain("arithmetic", reward=reward)], engine=engine)
    with pytest.raises(ValueError, match=f"domain 'arithmetic': {message}"):
        trainer.train()


class StaleEngine(InProcessEngine):
    """An engine that keeps its first weights, as the stock CPU build of vLLM does."""

    def sync_weights(self):
        pass


def test_an_engine_that_keeps_old_weights_fails_the_check_and_a_true_one_passes(tmp_path, engine):
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path), domains=both(), engine=engine)
    assert trainer.policy.check().is_passed
    kept = engine.__class__
    engine.__class__ = StaleEngine
    try:
        check = trainer.policy.check()
    finally:
        engine.__class__ = kept
    assert not check.is_passed
    assert check.changed > check.allowed


def test_a_run_whose_engine_falls_behind_stops(tmp_path, engine):
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path, learning_rate=0.05), domains=both(), engine=engine)
    trainer.policy.sync()
    kept = engine.__class__
    engine.__class__ = StaleEngine
    try:
        with pytest.raises(RuntimeError, match="the engine does not hold the policy's weights"):
            trainer.train()
    finally:
        engine.__class__ = kept
    assert trainer.state.global_step >= 1


def test_the_check_leaves_the_policy_as_it_was(tmp_path, engine):
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path), domains=both(), engine=engine)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.policy.check()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_seed_fixes_a_completion_whatever_stands_beside_it(tmp_path, engine):
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path), domains=both(), engine=engine)
    first, again = trainer.evaluator.run(), trainer.evaluator.run()
    assert first.samples == again.samples
    assert len({scores for items in first.samples.values() for scores in items}) > 1


def test_transformers_serves_as_engine_where_there_is_no_vllm(tmp_path):
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path, max_steps=1), domains=both(), engine="transformers")
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["domain/arithmetic/n"] == 16
    assert log["domain/arithmetic/entropy"] > 0
    assert trainer.policy.check() is None


def adapter_of(kind: str):
    from peft import LoraConfig, OSFConfig

    layers = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(r=4, **layers) if kind == "lora" else OSFConfig(effective_rank=0.5, **layers)


@pytest.mark.parametrize("kind", ["lora", "osf"])
def test_adapters_reach_the_engine_merged(tmp_path, engine, kind):
    lora = adapter_of(kind)
    changes = {"learning_rate": 1e-2, "max_steps": 2}
    trainer = DomainGRPOTrainer(POLICY, config(tmp_path, **changes), domains=both(), engine=engine, peft_config=lora)
    trainer.train()
    assert trainer.policy.check().is_passed
    assert (
        max(entry["sampling/sampling_logp_difference/max"] for entry in trainer.state.log_history if "loss" in entry)
        < 1e-3
    )


@pytest.mark.parametrize(("kind", "dtype"), [("lora", "float32"), ("lora", "bfloat16"), ("osf", "float32")])
def test_a_run_with_an_adapter_that_goes_on_from_a_checkpoint_ends_bit_for_bit_alike(tmp_path, engine, kind, dtype):
    lora = adapter_of(kind)
    changes = {"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    changes |= {"model_init_kwargs": {"dtype": dtype}}

    def run(folder, resume=None):
        args = config(folder, **changes)
        trainer = DomainGRPOTrainer(POLICY, args, domains=both(), engine=engine, peft_config=lora)
        trainer.train(resume_from_checkpoint=resume)
        logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
        return {n: p.clone() for n, p in engine._iter_named_params()}, [
            (logs[n]["loss"], logs[n]["reward"]) for n in (3, 4)
        ]

    weights, seen = run(tmp_path / "whole")
    other_weights, other_seen = run(tmp_path / "second half", str(tmp_path / "whole" / "checkpoint-2"))
    assert seen == other_seen
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


def test_a_reward_gets_what_trls_gets_and_its_columns_stand_in_trls_table(tmp_path, engine):
    seen = []

    def reward(completions, answer, id, domain, trainer_state, log_extra, log_metric, **columns):
        seen.append((trainer_state.global_step, set(domain), set(id)))
        log_extra("asked", list(id))
        return [float(len(text)) for text in completions]

    trainer = DomainGRPOTrainer(
        POLICY,
        config(tmp_path, max_steps=1, log_completions=True),
        domains=[domain("arithmetic", reward=reward)],
        engine=engine,
    )
    trainer.train()
    assert [(step, domains) for step, domains, _ in seen] == [(0, {"arithmetic"})]
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert set(table["asked"]) == seen[0][2] <= set(trainer.data.train["arithmetic"].ids)
    assert len(table) == 32
