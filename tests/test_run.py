"""A run from Python is the run of a recipe; without `run` a script leaves what TRL leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerCallback
from trl import GRPOConfig

from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.records import Domain
from polyphony.launch.cli import main
from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import train
from polyphony.rewards.short_answer import Exact
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.run.callbacks import Cadence
from polyphony.trainer.run.folder import RunFolder
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
        return [float(self.seen == 1)] * len(prompts)


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


SOURCES = {"arithmetic": sources("arithmetic"), "strings": sources("strings"), "safety": sources("safety", train=False)}


def script(tmp_path: Path, *, reward=None, **given) -> DomainGRPOTrainer:
    """Return the trainer of a script; what is not given is as in `by_recipe`."""
    domains = [Domain(name=name, reward="exact", **fields) for name, fields in SOURCES.items()]
    if reward is not None:
        domains[-1] = Domain(name="safety", reward=reward, **SOURCES["safety"])
    changes = given.pop("changes", {})
    args = {"logging_steps": 1, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "report_to": "none"}
    return DomainGRPOTrainer(
        str(POLICY),
        GRPOConfig(output_dir=str(tmp_path / "trl"), disable_tqdm=True, **{**GRPO, **args, **changes}),
        domains=domains,
        curriculum="joint",
        engine="transformers",
        evaluation={"samples": 1, "kl_items": 4},
        **given,
    )


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
    for name in ("decisions", "samples", "evaluations", "alarms"):
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
    trainer.train()
    assert_equal(folder, by_recipe)
    assert [json.loads(f.end.read_text())["how"] for f in (folder, by_recipe)] == ["finished", "finished"]
    assert "heldout/safety/score" in logged.steps[0]  # the user's own tracker has the baseline
    assert not (tmp_path / "trl").exists()
    with pytest.raises(ValueError, match="holds a run; choose another, or go on with resume_from_checkpoint=True"):
        trainer.train()
    assert folder.has_ended
    assert main(["report", str(folder.path)]) == 0
    assert "arithmetic" in folder.report.read_text()


@pytest.mark.slow
def test_a_run_whose_plug_is_pulled_has_not_ended_and_goes_on_as_if_nothing_had_happened(by_recipe, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        script(tmp_path, run=str(folder.path), callbacks=[Pulled()]).train()
    assert not folder.has_ended and folder.read("decisions")[-1]["step"] == 2
    assert main(["report", str(folder.path)]) == 0
    assert folder.report.exists() and not folder.has_ended  # looking at a run does not end it
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
def test_without_run_trl_evaluates_at_its_own_steps_and_nothing_else_is_written(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "logging_steps": 2}
    trainer = script(tmp_path, changes=changes)
    trainer.train()
    scores = trainer.evaluate()
    for metric in ("score", "pass_at_k", "entropy", "grader_failures"):
        assert f"eval_heldout/safety/{metric}" in scores
    trained, evaluated = (entry for entry in trainer.state.log_history[:2])
    assert trained["domain/arithmetic/n"] + trained["domain/strings/n"] == 16  # of both steps: an evaluation takes none
    assert evaluated["eval_heldout/safety/score"] == scores["eval_heldout/safety/score"]
    assert not any(name.startswith(("domain/", "eval_rewards")) for name in evaluated)
    assert list((tmp_path / "trl").iterdir()) == []
    with pytest.raises(ValueError, match="held-out sets belong to the domains"):
        trainer.evaluate(eval_dataset=[])


def plan(*, micro_batches_per_draw: int = 2) -> DrawPlan:
    return DrawPlan(
        prompts_per_draw=2,
        draws=60,
        steps=100,
        micro_batches_per_draw=micro_batches_per_draw,
        micro_batches_per_step=1,
    )


def arguments(tmp_path, **changes) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), bf16=False, **{"save_steps": 50} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_steps": 5}, "eval_steps=5 falls inside a draw; .* 2 optimizer steps: give a multiple of 2"),
        ({"save_steps": 15}, "save_steps=15 falls inside a draw"),
        ({"eval_steps": 0.05}, "eval_steps=5 falls"),
        ({"save_strategy": "epoch"}, "save_strategy='epoch' with run=: expected 'steps' or 'no'"),
    ],
)
def test_a_cadence_that_a_run_cannot_keep_is_named_with_what_is_allowed(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Cadence.of(arguments(tmp_path, **changes), plan())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (50, 2)),
        ({"eval_steps": 0.1, "save_total_limit": 3}, (10, 3)),
        ({"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", "save_steps": 5}, (4, 2)),
        ({"save_steps": 501}, (50, 2)),  # never comes
    ],
)
def test_the_cadence_is_that_of_trls_own_arguments(tmp_path, changes, expected):
    found = Cadence.of(arguments(tmp_path, **changes), plan())
    assert (found.evaluate_every, found.keep) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"guardrails": [Guardrail(domain="safety", max_drop=0.1)]},
            "guardrails act at a run's evaluations: give run=",
        ),
        ({"run": "run", "changes": {"steps_per_generation": 2}}, "eval_steps=1 falls inside a draw"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_weights_are_loaded(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        script(tmp_path, reward=Exact(), **given)
