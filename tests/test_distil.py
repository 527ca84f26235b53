"""Distillation in real runs of the lab's policy: what is learned from, what balances domains, what a resume goes on with."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from polyphony.launch.build import build_trainer
from polyphony.launch.preflight import preflight
from polyphony.launch.recipe import RecipeError
from polyphony.launch.train import claim_folder, start
from polyphony.trainer.metrics import METRICS
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.teachers.distil import Distil
from tests.conftest import POLICY
from tests.taught import drawn, fill, recipe_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("shelf"))


def learned(trainer) -> torch.Tensor:
    """What the last draw would be learned from once more."""
    rows = list(trainer._rollout.rows.values())
    old, mask = trainer._row_logps, torch.zeros_like(trainer._row_logps)
    for i, row in enumerate(rows):
        mask[i, : len(row.ids)] = 1
    return trainer.distil(torch.zeros(len(rows)), old, mask, rows).advantages


def rows_of(trainer, domain) -> list[int]:
    return [i for i, row in enumerate(trainer._rollout.rows.values()) if row.prompt.domain == domain]


def last_logged(trainer) -> dict:
    return {k: v for line in trainer.state.log_history for k, v in line.items()}


@pytest.mark.parametrize(
    "kind", [[], ["lora={r: 2, target_modules: [q_proj]}"], ["grpo.temperature=0.5"]], ids=["full", "lora", "cool"]
)
def test_a_teacher_that_is_the_student_teaches_nothing(shelf, tmp_path, kind):
    teachers = {"now": {"model": "self"}, "then": {"model": "self@start"}, "again": {"model": str(POLICY)}}
    teachers |= {"wide": {"model": str(shelf / "padded")}, "idle": {"model": str(shelf / "idle")}}
    teachers |= {"moved": {"model": str(shelf / "moved")}}
    domains = {name: ("strings" if n % 2 else "arithmetic", name) for n, name in enumerate(teachers)}
    size = "grpo.per_device_train_batch_size=18"
    trainer = build_trainer(recipe_of(tmp_path, teachers, size, *kind, **domains), tmp_path / "run")
    # three rows a teacher, batched by themselves: the policy's own pass has all eighteen
    advantages = drawn(trainer)["advantages"]
    most = {name: float(advantages[rows_of(trainer, name)].abs().max()) for name in teachers}
    assert most.pop("moved") > 0.01  # so it is the adapter that was switched on, and off again for the base
    assert max(most.values()) < 1e-5, most
    assert last_logged(trainer)["distil/moved/kl"] != 0


def test_the_start_of_an_adapter_is_the_base_below_it(tmp_path):
    teachers = {"now": {"model": "self"}, "then": {"model": "self@start"}}
    domains = {"a": ("arithmetic", "now"), "b": ("strings", "then")}
    lora = "lora={r: 2, target_modules: [q_proj]}"
    trainer = build_trainer(recipe_of(tmp_path, teachers, lora, **domains), tmp_path / "run")
    torch.manual_seed(0)
    for key, parameter in trainer.model.named_parameters():
        if "lora_B" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    advantages = drawn(trainer)["advantages"]
    assert advantages[rows_of(trainer, "a")].abs().max() < 1e-5
    assert advantages[rows_of(trainer, "b")].abs().max() > 0.01
    rows = list(trainer._rollout.rows.values())
    told, base = trainer.distil.teachers.logps(rows), AutoModelForCausalLM.from_pretrained(POLICY)
    for i in rows_of(trainer, "b"):
        ids = torch.tensor([*rows[i].prompt.ids, *rows[i].ids])
        with torch.no_grad():
            logps = base(ids.unsqueeze(0)).logits[0, len(rows[i].prompt.ids) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, torch.tensor(rows[i].ids).unsqueeze(1)).squeeze(1)
        assert (told[i] - expected).abs().max() < 1e-4


def test_two_equal_teachers_are_one(shelf, tmp_path):
    expert, other = ({"model": str(shelf / "expert")} for _ in range(2))
    domains = {"a": ("arithmetic", "one"), "b": ("strings", "two")}
    trainer = build_trainer(recipe_of(tmp_path, {"one": expert, "two": other}, **domains), tmp_path / "run")
    two = drawn(trainer)["advantages"]
    teachers = trainer.distil.teachers
    teachers.lesson = replace(teachers.lesson, of_domain={"a": "one", "b": "one"})
    one = learned(trainer)
    assert one.abs().max() > 0.1
    assert (one - two).abs().max() < 1e-5


def test_what_is_logged_is_what_is_learned_from_and_the_gradient_is_that_of_it(shelf, tmp_path):
    overrides = ["distil.clip=0.5", "grpo.max_grad_norm=0", "grpo.learning_rate=0", "grpo.log_completions=true"]
    loaded = recipe_of(tmp_path, {"t": {"model": str(shelf / "expert")}}, *overrides, a=("arithmetic", "t"))
    trainer = build_trainer(loaded, tmp_path / "run")
    kept = {}

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            kept["is"] = torch.cat([p.grad.flatten().clone() for p in model.parameters()])

    trainer.add_callback(Gradient())
    output = drawn(trainer)
    advantages, mask = output["advantages"], output["completion_mask"]
    assert advantages.shape == mask.shape and advantages.abs().max() == 0.5
    means = ((advantages * mask).sum(1) / mask.sum(1)).tolist()
    assert list(trainer._logs["advantages"])[-len(means) :] == pytest.approx(means)
    mean = float(advantages.sum() / mask.sum())
    assert last_logged(trainer)["distil/a/advantage"] == pytest.approx(mean, rel=1e-5)
    emitted = {name.rsplit("/", 1)[1] for name in last_logged(trainer) if name.startswith("distil/")}
    assert emitted == set(METRICS["distil"])
    assert last_logged(trainer)["domain/a/frac_dead"] == 0  # each group is one completion, whose reward is logged
    assert "domain/a/reward" in last_logged(trainer)

    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], mask], dim=1)
    trainer.model.zero_grad()
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
    (-((advantages * logps * mask).sum(1) / mask.sum(1)).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert expected.norm() > 1e-3
    assert (kept["is"] - expected).norm() < 1e-4 * expected.norm()


def test_groups_of_others_learn_by_reward_and_rewards_may_be_added(shelf, tmp_path):
    overrides = ["grpo.num_generations=4", "grpo.per_device_train_batch_size=24", "distil.reward_weight=2"]
    teachers, domains = {"t": {"model": "self"}}, {"a": ("strings", "t"), "b": ("strings", None)}
    trainer = build_trainer(recipe_of(tmp_path, teachers, *overrides, **domains), tmp_path / "run")
    output = drawn(trainer)
    rewards = torch.tensor([[float(r) for r in group.rewards] for group in trainer._rollout.groups.values()])
    plain = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    assert plain.abs().max() > 0.5
    weight = torch.ones(24)
    weight[rows_of(trainer, "a")] = 2  # its teacher is the policy, and adds nothing
    expected = (plain * weight).unsqueeze(1) * output["completion_mask"]
    assert (output["advantages"] - expected).abs().max() < 1e-4


def test_the_factor_of_a_domain_without_a_teacher_is_logged_where_it_is_not_one(shelf, tmp_path):
    overrides = ["grpo.loss_type=dapo", "domains.a.max_completion_length=2", "grpo.num_generations=3"]
    teachers, domains = {"t": {"model": "self"}}, {"a": ("strings", "t"), "b": ("strings", None)}
    trainer = build_trainer(recipe_of(tmp_path, teachers, *overrides, **domains), tmp_path / "run")
    mask = drawn(trainer)["completion_mask"]
    tokens = {name: int(mask[rows_of(trainer, name)].sum()) for name in domains}
    logged = last_logged(trainer)
    for name in tokens:
        assert logged[f"distil/{name}/factor"] == pytest.approx(0.5 / (tokens[name] / sum(tokens.values())))
    assert [name for name in logged if name.startswith("distil/b/")] == ["distil/b/factor"]


def test_a_token_that_pads_the_policys_embedding_and_not_its_teachers_costs_the_row_its_advantage(shelf, tmp_path):
    teachers, overrides = {"t": {"model": str(POLICY)}}, [f"model={shelf / 'padded'}", "distil.max_missing=0.5"]
    trainer = build_trainer(recipe_of(tmp_path, teachers, *overrides, a=("strings", "t")), tmp_path / "run")
    sample = trainer.policy._turn

    def padded(ids, *rest):
        said, more = sample(ids, *rest)
        return [[703, *said[0][1:]], *said[1:]], more

    trainer.policy._turn = padded
    advantages = drawn(trainer)["advantages"]
    assert advantages[0].abs().max() == 0 and advantages.isfinite().all()
    assert last_logged(trainer)["distil/a/missing"] == 1
    rows = list(trainer._rollout.rows.values())[:1]  # as on a rank that has no other
    assert trainer.distil.teachers.logps(rows)[0].isnan().all()


def test_groups_of_a_taught_domain_are_whole_and_none_is_replaced(shelf, tmp_path):
    pool = ["pool={look: 2, refill: {max_rounds: 2}}", "grpo.num_generations=4", "grpo.per_device_train_batch_size=16"]
    overrides = [*pool, *(f"domains.{name}.reward=tests.taught:right" for name in "ab")]
    teachers, domains = {"t": {"model": str(shelf / "expert")}}, {"a": ("strings", "t"), "b": ("strings", None)}
    trainer = build_trainer(recipe_of(tmp_path, teachers, *overrides, **domains), tmp_path / "run")
    advantages = drawn(trainer)["advantages"]
    sizes = {name: [len(g.rewards) for g in trainer._rollout.sampled if g.domain == name] for name in domains}
    assert sizes["a"] == [4, 4] and len(sizes["b"]) > 2 and set(sizes["b"]) == {2}  # of the one without, as ever
    assert all(advantages[i].abs().max() > 0 for i in rows_of(trainer, "a"))


def test_a_domain_without_a_teacher_may_be_left_out(shelf, tmp_path):
    teachers, domains = {"t": {"model": str(shelf / "expert")}}, {"a": ("strings", "t"), "b": ("strings", None)}
    trainer = build_trainer(recipe_of(tmp_path, teachers, "distil.others=skip", **domains), tmp_path / "run")
    advantages = drawn(trainer)["advantages"]
    assert advantages[rows_of(trainer, "b")].abs().max() == 0 < advantages[rows_of(trainer, "a")].abs().max()
    logged = last_logged(trainer)
    assert (logged["domain/a/frac_dead"], logged["domain/b/frac_dead"]) == (0, 1)
    assert not any(name.startswith("distil/b/") for name in logged)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A run of a step in which one domain's answers are ten times longer, and all advantages of the teacher are one; what
    TRL got of the draw."""
    tmp_path = tmp_path_factory.mktemp("uneven")
    overrides = ["grpo.loss_type=dapo", "grpo.max_completion_length=64", "grpo.learning_rate=0"]
    overrides += ["domains.short.max_completion_length=2", "domains.long.max_completion_length=20"]
    domains = {"short": ("strings", "t"), "long": ("strings", "t")}
    trainer = build_trainer(recipe_of(tmp_path, {"t": {"model": "self"}}, *overrides, **domains), tmp_path / "run")
    trainer.policy._ends = set()
    sample = trainer.policy._turn

    def exactly(ids, *rest):
        return [[7] * 64 for _ in sample(ids, *rest)[0]], None

    trainer.policy._turn = exactly
    told = trainer.distil.teachers.policy
    trainer.distil.teachers.logps = lambda rows: [
        torch.tensor(of) + 1 for of in told.token_logps([r.prompt.ids for r in rows], [r.ids for r in rows])
    ]
    output = drawn(trainer)
    trainer.current_gradient_accumulation_steps = 1
    assert (output["advantages"] - learned(trainer)).abs().max() < 1e-6
    assert last_logged(trainer)["distil/short/factor"] == pytest.approx((3 / 6) / (6 / 66))
    return trainer, output


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo", "sapo", "cispo"])
def test_a_domains_tokens_weigh_its_share_of_the_completions(uneven, monkeypatch, loss_type):
    trainer, output = uneven
    mask, domains = output["completion_mask"], ("short", "long")
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    kept = trainer.distil
    distil = Distil(kept.settings, kept.teachers, domains=kept.domains, loss_type=loss_type)
    monkeypatch.setattr(trainer, "distil", distil)
    advantages = learned(trainer)
    lengths = {name: int(mask[rows_of(trainer, name)].sum()) for name in domains}
    assert lengths == {"short": 6, "long": 60}
    if loss_type == "cispo":  # whose loss is the advantage times the log-probability
        advantages = torch.where(mask.bool(), -advantages / trainer._row_logps, 0)
    losses = {}
    for name in domains:
        is_own = torch.zeros(len(mask), 1)
        is_own[rows_of(trainer, name)] = 1
        with torch.no_grad():
            losses[name] = -float(trainer._compute_loss(trainer.model, output | {"advantages": advantages * is_own}))
    whole = sum(losses.values())
    assert losses["short"] / whole == pytest.approx(0.5, abs=1e-4)
    if loss_type in ("grpo", "dapo"):  # whose weights sum to one
        assert whole == pytest.approx(1, abs=1e-4)
    factor = distil.flush()["distil/short/factor"]
    assert factor == (1 if loss_type in ("grpo", "sapo") else pytest.approx((3 / 6) / (6 / 66)))


def test_rows_on_which_a_teacher_fails_have_no_advantage_and_too_many_stop_the_run(shelf, tmp_path):
    teachers = {"t": {"model": str(shelf / "expert")}}
    trainer = build_trainer(recipe_of(tmp_path, teachers, "grpo.max_steps=1", a=("arithmetic", "t")), tmp_path / "one")
    score = trainer.distil.teachers.logps

    def broken(rows):
        first, *others = score(rows)
        return [first * math.nan, *others]

    trainer.distil.teachers.logps = broken
    output = drawn(trainer)
    assert output["advantages"].isfinite().all()
    assert output["advantages"][0].abs().max() == 0 < output["advantages"][1].abs().max()
    assert last_logged(trainer)["distil/a/missing"] == 1

    with pytest.raises(RuntimeError, match="teacher 't' are no numbers on 11 of the last 66 completions"):
        for _ in range(20):
            learned(trainer)


class PulledPlug(TrainerCallback):
    """Ends the process, nearly, after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_run_that_is_stopped_while_it_distils_goes_on_bit_for_bit(shelf, tmp_path):
    expert, context = shutil.copytree(shelf / "expert", tmp_path / "expert"), "{prompt} {answer} {attempt} {feedback}"
    teachers = {"t": {"model": str(expert)}, "own": {"model": "self@start", "context": context}}
    overrides = ["grpo.max_steps=3", "eval.every=3", "checkpoint.every=1", "grpo.learning_rate=1e-2"]
    loaded = recipe_of(tmp_path, teachers, *overrides, a=("arithmetic", "t"), b=("strings", "own"))
    for run in ("whole", "cut"):
        claim_folder(loaded, tmp_path / run, resume=False)
    start(loaded, tmp_path / "whole").train()
    trainer = start(loaded, tmp_path / "cut")
    trainer.add_callback(PulledPlug())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    weights = (expert / "model.safetensors").read_bytes()
    (expert / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(RecipeError, match=r"^teachers\.t: its weights are not those that the run began with"):
        start(loaded, tmp_path / "cut")
    assert "teachers.t: its weights are not" in next(preflight(loaded, run=RunFolder(tmp_path / "cut")))
    (expert / "model.safetensors").write_bytes(weights)
    start(loaded, tmp_path / "cut").train(resume_from_checkpoint=True)

    def numbers(run):
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k.startswith(("distil/", "domain/"))} for line in lines]

    assert numbers("cut") == numbers("whole")
    kls = [line["distil/a/kl"] for line in numbers("whole") if "distil/a/kl" in line]
    assert len(set(kls)) == 3
    weights = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1] != (POLICY / "model.safetensors").read_bytes()


def test_the_policy_comes_nearer_to_its_teacher(shelf, tmp_path):
    overrides = ["grpo.max_steps=6", "grpo.per_device_train_batch_size=24", "grpo.lr_scheduler_type=constant"]
    overrides += ["grpo.learning_rate=1e-3"]
    loaded = recipe_of(tmp_path, {"t": {"model": str(shelf / "expert")}}, *overrides, a=("strings", "t"))
    trainer = build_trainer(loaded, tmp_path / "run")
    trainer.train()
    kls = [line["distil/a/kl"] for line in trainer.state.log_history if "distil/a/kl" in line]
    assert sum(kls[-2:]) < 0.75 * sum(kls[:2]), kls
