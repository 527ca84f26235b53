"""A run from Python is the run of a recipe; without `run` a script leaves what TRL leaves."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.records import Domain
from polyphony.curricula.schedulers.fixed import Joint
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.cli import main
from polyphony.launch.recipe import RecipeError, load_recipe, recipe_of_run
from polyphony.launch.report.run import read_run
from polyphony.launch.train import claim_folder, train
from polyphony.launch.verbs.evaluate import parse
from polyphony.rewards.short_answer import Exact
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.run.folder import Interrupted, RunFolder
from polyphony.trainer.run.outset import Cadence
from polyphony.trainer.run.provenance import settings_of_script
from polyphony.trainer.settings import TrainerSettings
from polyphony.trainer.slots import DrawPlan
from tests.conftest import POLICY

SCALE = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
GRPO = {**SCALE, "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False, "seed": 1}
TIMED = ("step_time", "tokens_per_s", "runtime", "per_second", "train_loss", "total_flos")
"""And what Transformers' own printer, which a recipe has not, takes out of its last log."""


class Fading:
    """Grades the first evaluation full, every later one 0: something is forgotten."""

    seen = 0

    def __call__(self, prompts, **columns):
        self.seen += 1
        return [float(self.seen <= 2)] * len(prompts)  # an evaluation asks of each half by itself


class Telling:
    """Logs what it is asked about."""

    def __call__(self, prompts, log_metric, **columns):
        log_metric("asked", len(prompts))
        return [0.0] * len(prompts)


class Told(TrainerCallback):
    """The machine is wanted back after the first step."""

    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


class Pulled(TrainerCallback):
    """The plug is pulled after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


class Logged(TrainerCallback):
    """A tracker of the user's."""

    def __init__(self):
        self.steps = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.steps.setdefault(state.global_step, {}).update(logs)


def sources(name: str, *, train: bool = True) -> dict:
    heldout, rows = ({"generator": "polyphony.launch.lab.world:rows", "domain": name, "split": split, "size": size}
                     for split, size in (("heldout", 8 if name == "safety" else 4), ("train", 16)))  # fmt: skip
    return {"kind": "structured", "heldout": heldout, **({"train": rows} if train else {})}


GUARD = Guardrail(domain="safety", max_drop=0.1)
SOURCES = {"arithmetic": sources("arithmetic"), "strings": sources("strings"), "safety": sources("safety", train=False)}


def script(tmp_path: Path, *, reward=None, **given) -> DomainGRPOTrainer:
    """Return the trainer of a script; what is not given is as in `by_recipe`."""
    domains = [Domain(name=name, reward="exact", **fields) for name, fields in SOURCES.items()]
    if reward is not None:
        domains[-1] = Domain(name="safety", reward=reward, **SOURCES["safety"])
    changes = given.pop("changes", {})
    args = {"logging_steps": 1, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "report_to": "none"}
    given = {"curriculum": "joint", "evaluation": {"samples": 1, "kl_items": 4}, "engine": "transformers"} | given
    args = GRPOConfig(output_dir=str(tmp_path / "trl"), disable_tqdm=True, **{**GRPO, **args, **changes})
    return DomainGRPOTrainer(str(POLICY), args, domains=domains, **given)


@pytest.fixture(scope="module")
def by_recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    document = {"name": "mine", "model": str(POLICY), "grpo": GRPO, "curriculum": {"scheduler": "joint"}}
    document |= {"domains": {name: {"reward": "exact", **fields} for name, fields in SOURCES.items()}}
    document |= {"eval": {"every": 1, "samples": 1, "kl_items": 4}, "checkpoint": {"keep": 1}}
    document |= {"rollouts": {"engine": "transformers"}, "guardrails": {"safety": {"max_drop": 0.5, "action": "stop"}}}
    (folder / "recipe.yaml").write_text(json.dumps(document))  # JSON is YAML
    train(load_recipe(folder / "recipe.yaml"), folder / "run")
    return RunFolder(folder / "run")


def numbers(folder: RunFolder) -> list[dict]:
    return [{k: v for k, v in line.items() if not any(t in k for t in TIMED)} for line in folder.read("metrics")]


def assert_equal(ours: RunFolder, theirs: RunFolder) -> None:
    assert numbers(ours) == numbers(theirs)
    assert ours.decisions() == theirs.decisions()
    for name in ("samples", "evaluations", "alarms"):
        assert ours.read(name) == theirs.read(name)
    for whole in ("base", "transfer"):
        mine, other = (json.loads(getattr(folder, whole).read_text()) for folder in (ours, theirs))
        assert mine == other
    weights = [(folder.final / "model.safetensors").read_bytes() for folder in (ours, theirs)]
    assert weights[0] == weights[1]
    kept = [sorted(path.name for path in folder.checkpoints.glob("checkpoint-*")) for folder in (ours, theirs)]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_a_script_and_a_recipe_leave_the_same_run(by_recipe, tmp_path, capsys):
    logged, folder = Logged(), RunFolder(tmp_path / "run")
    guard = Guardrail(domain="safety", max_drop=0.5, action="stop")
    trainer = script(tmp_path, run=folder.path, guardrails=[guard], callbacks=[logged])
    assert folder.is_free  # a recipe may still have it
    before = trainer.evaluate()
    assert folder.is_free and "eval_heldout/safety/score" in logged.steps[0]
    trainer.train()
    assert_equal(folder, by_recipe)
    after = trainer.evaluate()
    assert {"eval_heldout/kl_current", "eval_heldout/arithmetic/kl_base"} <= set(after) - set(before)
    assert_equal(folder, by_recipe)
    assert [json.loads(f.end.read_text())["how"] for f in (folder, by_recipe)] == ["finished", "finished"]
    assert "heldout/safety/score" in logged.steps[0]  # the user's own tracker has the baseline
    assert not (tmp_path / "trl").exists()
    with pytest.raises(ValueError, match="holds a run; choose another, or go on with resume_from_checkpoint=True"):
        trainer.train()
    assert folder.has_ended
    theirs, ours = load_recipe(by_recipe.recipe), recipe_of_run(folder)
    for part in ("model", "domains", "curriculum", "eval", "entropy", "guardrails", "faults", "rollouts", "update"):
        assert getattr(ours, part) == getattr(theirs, part)
    assert parse([str(folder.path)]).models == (str(folder.final),)
    assert main(["report", str(folder.path)]) == 0
    assert "the entropy band" not in folder.report.read_text() and read_run(folder.path).planned_steps == 2
    assert (
        main(["plan", "--replay", str(folder.path), "--scheduler", "joint", "--out", str(tmp_path / "page.html")]) == 0
    )
    assert main(["train", "--resume", str(folder.path)]) == 2
    assert "a run from Python; its script goes on, train(resume_from_checkpoint=True)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_whose_plug_is_pulled_has_not_ended_and_goes_on_as_if_nothing_had_happened(by_recipe, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        script(tmp_path, run=str(folder.path), callbacks=[Pulled()]).train()
    assert not folder.has_ended and folder.read("decisions")[-1]["step"] == 2
    assert main(["report", str(folder.path)]) == 0
    assert folder.report.exists() and not folder.has_ended  # looking at a run does not end it
    folder.final.mkdir()  # as where a run is taken up that was over
    assert not read_run(folder.path).is_finished
    with pytest.raises(
        ValueError, match=r"holds a run with grpo.seed=1, now it is 2: go on with what it was made with"
    ):
        script(tmp_path, run=folder.path, changes={"seed": 2})
    with pytest.raises(ValueError, match=r"curriculum.scheduler='joint', now it is 'proportional'"):
        script(tmp_path, run=folder.path, curriculum="proportional")
    trainer = script(tmp_path, run=str(folder.path))
    with pytest.raises(ValueError, match=r"checkpoint-9'.*a run goes on from its newest, .*checkpoint-1"):
        trainer.train(resume_from_checkpoint=str(folder.checkpoints / "checkpoint-9"))
    trainer.train(resume_from_checkpoint=True)
    assert folder.has_ended and (folder.path / "attempt-1").is_dir()
    assert_equal(folder, by_recipe)


@pytest.mark.slow
def test_a_guardrail_of_a_script_ends_its_run_and_the_end_says_so(tmp_path):
    folder = RunFolder(tmp_path)
    guard = Guardrail(domain="safety", max_drop=0.1, action="stop")
    script(tmp_path, run=tmp_path, guardrails=[guard], reward=Fading(), changes={"save_strategy": "no"}).train()
    end = json.loads(folder.end.read_text())
    assert (end["how"], end["step"]) == ("stopped", 1)
    assert end["why"].startswith("safety lost 1.000 since the baseline")
    assert folder.read("alarms")[-1]["message"].endswith("stopped the run")
    assert (folder.final / "model.safetensors").exists()


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_of_a_script_and_probes_are_adopted(by_recipe, tmp_path, capsys):
    probe = TransferMatrix.load(by_recipe.transfer)
    rows = tuple(replace(row, probe=True) for row in probe.rows[:2])
    replace(probe, rows=rows).save(tmp_path / "probe.json")
    curriculum = {"scheduler": "joint", "transfer": str(tmp_path / "probe.json")}
    folder, before = RunFolder(tmp_path / "run"), signal.getsignal(signal.SIGTERM)
    trainer = script(tmp_path, run=folder.path, curriculum=curriculum, callbacks=[Told()], faults={"grace_s": 60})
    with pytest.raises(Interrupted) as stopped:
        trainer.train()
    assert (stopped.value.code, stopped.value.step) == (143, 1)
    assert "checkpoint at step 1 saved; go on with train(resume_from_checkpoint=True)" in capsys.readouterr().err
    assert trainer.run.stopper.grace_s == 60 and signal.getsignal(signal.SIGTERM) is before
    assert (folder.checkpoints / "checkpoint-1").is_dir() and not folder.has_ended and not folder.final.exists()
    assert TransferMatrix.load(folder.transfer).rows[: len(rows)] == rows


@pytest.mark.slow
def test_without_run_trl_evaluates_at_its_own_steps_and_nothing_else_is_written(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "logging_steps": 2}
    trainer = script(tmp_path, changes=changes, reward=Telling())
    trainer.train()
    scores = trainer.evaluate()
    for metric in ("score", "pass_at_k", "entropy", "grader_failures", "logged/asked"):
        assert f"eval_heldout/safety/{metric}" in scores
    trained, evaluated = (entry for entry in trainer.state.log_history[:2])
    assert trained["domain/arithmetic/n"] + trained["domain/strings/n"] == 16  # of both steps: an evaluation takes none
    assert evaluated["eval_heldout/safety/score"] == scores["eval_heldout/safety/score"]
    assert not any(name.startswith(("domain/", "eval_rewards")) for name in evaluated)
    assert list((tmp_path / "trl").iterdir()) == []
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(2)]
    found = trainer.evaluate(eval_dataset=Dataset.from_list([row | {"domain": "arithmetic"} for row in rows]))
    assert {"eval_loss", "eval_reward", "eval_entropy"} <= set(found)
    with pytest.raises(ValueError, match="eval_dataset: column `domain` is None, expected one of"):
        trainer.evaluate(eval_dataset=Dataset.from_list(rows))


def plan(*, micro_batches_per_draw: int = 2) -> DrawPlan:
    return DrawPlan(
        prompts_per_draw=2,
        draws=60,
        steps=100,
        micro_batches_per_draw=micro_batches_per_draw,
        micro_batches_per_step=1,
    )


def cadence(tmp_path, evaluation=None, checkpoint=None, **changes) -> Cadence:
    arguments = GRPOConfig(output_dir=str(tmp_path), bf16=False, **changes)
    settings = TrainerSettings.of(evaluation=evaluation, checkpoint=checkpoint, max_grader_failures=0.5)
    return Cadence.of(arguments, plan(), settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_steps": 5}, "eval_steps=5 falls inside a draw; .* 2 optimizer steps: give a multiple of 2"),
        ({"evaluation": {"every": 5}}, "evaluation.every=5 falls inside a draw"),
        ({"save_steps": 15}, "save_steps=15 falls inside a draw"),
        ({"checkpoint": {"every": 15}}, "checkpoint.every=15 falls inside a draw"),
        ({"eval_steps": 0.05}, "eval_steps=5 falls"),
        (
            {"eval_steps": 0},
            "eval_steps=0 with run=: expected a whole number of steps, or a share of all between 0 and 1",
        ),
        ({"eval_steps": -2}, "eval_steps=-2 with run="),
        ({"eval_steps": 2.5}, "eval_steps=2.5 with run="),
        ({"save_steps": float("nan")}, "save_steps=nan with run="),
        ({"save_total_limit": 0}, "save_total_limit=0 with run=: expected at least 1"),
        ({"eval_steps": 4, "evaluation": {"every": 10}}, "eval_steps=4 and evaluation.every=10: say one of them"),
        (
            {"save_total_limit": 1, "checkpoint": {"keep": 3}},
            "save_total_limit=1 and checkpoint.keep=3: say one of them",
        ),
        ({"save_strategy": "epoch"}, "save_strategy='epoch' with run=: expected 'steps' or 'no'"),
    ],
)
def test_a_cadence_that_a_run_cannot_keep_is_named_with_what_is_allowed(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        cadence(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (50, 50, 2)),
        ({"eval_steps": 0.1, "save_total_limit": 3}, (10, 10, 3)),
        ({"evaluation": {"every": 20}, "checkpoint": {"every": 10, "keep": 1}}, (20, 10, 1)),
        ({"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", "save_steps": 5}, (4, 4, 2)),
        ({"save_steps": 501}, (50, 501, 2)),  # never comes
        ({"checkpoint": {"every": 500}}, (50, 500, 2)),  # TRL's default, but said
    ],
)
def test_the_cadence_is_that_of_trls_own_arguments_and_of_the_settings_beside(tmp_path, changes, expected):
    found = cadence(tmp_path, **changes)
    assert (found.evaluate_every, found.save_every, found.keep) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guardrails": [GUARD]}, "guardrails act at a run's evaluations: give run="),
        ({"guardrails": [GUARD, GUARD]}, "guardrails: one a domain, there are more of safety"),
        (
            {"guardrails": [{"domain": "safty", "max_drop": 0.1}]},
            "unknown domain 'guardrails.safty'; did you mean 'safety'",
        ),
        ({"guardrails": {"safety": {"max_drop": 0.1}}}, "guardrails: expected a list of them"),
        ({"entropy": {"control": {"maths": "adaptive"}}}, "unknown domain 'entropy.control.maths'; known: arithmetic"),
        ({"max_grader_failures": 1.5}, r"max_grader_failures: expected a share in \[0, 1\], got 1.5"),
        ({"evaluation": {"greedy": True}}, "greedy evaluation needs an engine of ours; engine transformers samples"),
        ({"pool": {"look": 4}}, "pool.look: must be below num_generations=4, got 4"),
        ({"pool": False}, "PoolSettings: expected a mapping of its fields, got False"),
        ({"engine": "vlm"}, "engine 'vlm' does not exist; did you mean 'vllm'. known: vllm, transformers"),
        ({"curriculum": False}, "curriculum: expected a scheduler, its name or a mapping of its settings, got False"),
        ({"curriculum": {"transfer": "gone.json"}}, "curriculum.transfer: file gone.json does not exist"),
        ({"run": "run", "changes": {"steps_per_generation": 2}}, "eval_steps=1 falls inside a draw"),
        ({"run": ""}, "run='': expected a folder"),
        ({"run": __file__}, "test_run.py is a file, expected a folder"),
        ({"run": f"{__file__}/run"}, "test_run.py is a file, expected a folder"),
        ({"run": Path(__file__).parent}, "tests is not empty; choose another"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda *_, **__: pytest.fail("weights would be loaded"))
    with pytest.raises(ValueError, match=message) as refused:
        script(tmp_path, reward=Exact(), **given)
    assert "\n" not in str(refused.value)


def test_a_folder_that_a_recipe_has_claimed_is_none_for_a_script(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda *_, **__: pytest.fail("weights would be loaded"))
    run = claim_folder(load_recipe(recipe), tmp_path / "run", resume=False)
    with pytest.raises(ValueError, match="holds the run of a recipe: --resume goes on with it; choose another"):
        script(tmp_path, run=run)


def test_what_only_a_script_knows_stands_in_words_and_is_named_where_it_is_needed(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2"}] * 3
    mine = Domain(name="mine", kind="open_ended", train=rows, heldout=tmp_path / "rows.jsonl", reward=Telling())
    said = settings_of_script(
        TrainerSettings.of(pool={"start": "pool.npz"}, max_grader_failures=0.5),
        model=str(POLICY),
        args=GRPOConfig(output_dir=str(tmp_path), bf16=False, max_steps=7, seed=5, model_init_kwargs={"dtype": object}),
        domains=[mine],
        curriculum=Joint(),
        engine=Telling(),
        cadence={"evaluate_every": 5, "save_every": 5, "keep": 2},
        peft_config=None,
        optimizers=(Telling(), None),
    )
    only = {"domains.mine.train", "domains.mine.reward", "rollouts.engine", "grpo.model_init_kwargs", "optimizers"}
    assert set(said["script"]) == only and said["domains"]["mine"]["train"] == "3 x builtins.list"
    folder = RunFolder(tmp_path)
    folder.settings.write_text(json.dumps(said | {"name": "mine"}))
    recipe = recipe_of_run(folder)
    assert (recipe.curriculum.scheduler, recipe.grpo["seed"], recipe.grpo["max_steps"]) == ("joint", 5, 7)
    assert recipe.pool.start == str(tmp_path / "pool.npz") and "model_init_kwargs" not in recipe.grpo
    with pytest.raises(
        RecipeError, match=r"is of a script, and only that knows domains.mine.train, domains.mine.reward"
    ):
        parse([str(tmp_path)])
