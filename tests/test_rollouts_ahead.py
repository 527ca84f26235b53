"""Rollouts ahead: a run that samples draws while it trains on others is the same whatever the clock says, kills included."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from polyphony.launch.build import build_trainer
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.train import train
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer import ahead, checkpoints
from polyphony.trainer.draws import Draws
from polyphony.trainer.run.folder import Interrupted, RunFolder
from polyphony.trainer.run.json_lines import read_object
from tests.conftest import RECIPES
from tests.test_resume import DEAD, REFILL, ROWS, drawn, lines, numbers

DEBUG = RECIPES / "debug.yaml"
RAY = "rollouts={engine: ray, workers: 1, ahead: %d}"
RECIPE = ["grpo.max_steps=6", "grpo.learning_rate=2e-3", "eval.every=3", "checkpoint.every=1", "checkpoint.keep=9"]
WHOLE = [*RECIPE, "tracking.wandb=null", "curriculum.scheduler=adaptive", *ROWS, *DEAD, *REFILL]


def recipe(*more: str, n: int = 2):
    return load_recipe(DEBUG, [RAY % n, *WHOLE, *more])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A worker that all runs share."""
    trainer = build_trainer(recipe(), tmp_path_factory.mktemp("worker"))
    yield trainer.policy.engine
    trainer.policy.close()


@pytest.fixture(scope="module")
def undisturbed(engine, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(recipe(), run, engine=engine)
    return run


def as_killed(run, copy, *, at: int):
    """Make a run as a kill after some step would have left it: with ledgers that go on."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("checkpoint-*"):
        if int(path.name.rsplit("-", 1)[1]) > at:
            shutil.rmtree(path)
    shutil.rmtree(copy / "final")
    for end in copy.glob("end*"):
        end.unlink()


def said(run) -> list[dict]:
    timed = ("rollout/wait_s", "rollout/dropped", "rollout/behind")
    return [{k: v for k, v in line.items() if k not in timed} for line in numbers(run)]


def check_alike(run, other) -> None:
    assert drawn(run) == drawn(other)
    assert lines(run, "refills") == lines(other, "refills")
    assert RunFolder(run).decisions() == RunFolder(other).decisions()
    assert said(run) == said(other)
    one, two = (path / "final" / "model.safetensors" for path in (run, other))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_a_decision_knows_of_draws_up_to_the_weights_that_sample(undisturbed):
    found = RunFolder(undisturbed).decisions()
    assert [line.get("unseen", 0) for line in found] == [0, 1, 2, 2, 2, 2]
    assert [line["rollout/behind"] for line in lines(undisturbed, "metrics") if "rollout/behind" in line] == [
        *(0, 1, 2, 2, 2, 2),
    ]
    # the third draw is the first to be chosen after one was seen
    assert [any(line["evidence"]["last"]["groups"]) for line in found] == [False, False, False, True, True, True]
    assert {line["round"] for line in lines(undisturbed, "refills")} == {1, 2, 3}


@pytest.mark.slow
def test_a_run_is_the_same_whatever_the_clock_says_and_wherever_it_is_killed(
    undisturbed, engine, tmp_path, monkeypatch
):
    make = Draws.make

    def delayed(self, choice, n_rows):
        time.sleep(0.4 * (choice.draw % 2))
        rollout = make(self, choice, n_rows)
        time.sleep(0.3 * (choice.draw % 3 == 1))
        return rollout

    monkeypatch.setattr(Draws, "make", delayed)
    as_killed(undisturbed, tmp_path / "run", at=2)
    kept = read_object(tmp_path / "run" / "checkpoints" / "checkpoint-2" / ahead.ahead_file(0))["draws"]
    assert list(kept) == ["2", "3"] and kept["2"]["weights"] == 0 and kept["3"]["weights"] == 1
    train(recipe(), tmp_path / "run", resume=True, engine=engine)
    check_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_what_a_draw_was_sampled_with_are_the_weights_of_so_many_draws_before(engine, tmp_path, monkeypatch):
    seen, kept, take = [], {}, ahead.Ahead._take_in

    def compared(self, landed):
        trainer, rows = self._policy.trainer, list(landed.rollout.rows.values())
        kept[trainer.state.global_step] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        present, told = kept[trainer.state.global_step], [torch.tensor(c.logps) for c in rows]
        off = []
        for weights in (kept[landed.weights], present):
            trainer.model.load_state_dict(weights)
            ours = self._policy.token_logps([c.prompt.ids for c in rows], [c.ids for c in rows])
            off.append(max(float((torch.tensor(a) - b).abs().max()) for a, b in zip(ours, told, strict=True)))
        seen.append((trainer.state.global_step - landed.weights, *off))
        return take(self, landed)

    monkeypatch.setattr(ahead.Ahead, "_take_in", compared)
    train(recipe(n=1), tmp_path / "run", engine=engine)
    assert [behind for behind, *_ in seen] == [0, 1, 1, 1, 1, 1]
    assert all(old < 2e-3 for _, old, _ in seen)
    assert all(new > 10 * old for _, old, new in seen[2:])


class Drop(TrainerCallback):
    """Does what a rollback does to draws in flight, at some step."""

    def __init__(self, trainer, at):
        self.trainer, self.at = trainer, at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.trainer.ahead.drop()


@pytest.mark.slow
def test_what_is_dropped_is_asked_again_with_the_weights_of_now(undisturbed, engine, tmp_path):
    trainer = build_trainer(recipe("eval.every=6"), tmp_path, engine=engine, run=RunFolder(tmp_path / "run"))
    trainer.add_callback(Drop(trainer, 3))
    trainer.train()
    run = tmp_path / "run"
    written = [line for line in lines(run, "metrics") if "rollout/dropped" in line]
    assert [line["rollout/dropped"] for line in written] == [0, 0, 2, 0, 0, 0]
    assert [line["rollout/behind"] for line in written] == [0, 1, 2, 0, 1, 2]
    # draws 4 and 5 were chosen before
    assert [line["prompts"] for line in RunFolder(run).decisions()][:5] == [
        line["prompts"] for line in RunFolder(undisturbed).decisions()
    ][:5]


@pytest.mark.slow
def test_a_signal_drops_what_does_not_end_in_half_of_the_grace_period(
    undisturbed, engine, tmp_path, monkeypatch, capsys
):
    make = Draws.make
    monkeypatch.setattr(
        Draws, "make", lambda self, choice, n: time.sleep(3 * (choice.draw == 5)) or make(self, choice, n)
    )
    monkeypatch.setattr(
        "polyphony.trainer.run.callbacks.Run.on_step_begin",
        lambda self, args, state, control, **kw: (
            os.kill(os.getpid(), signal.SIGTERM) if state.global_step == 3 else None
        ),
    )
    with pytest.raises(Interrupted, match="dropped; the run goes on from step 3"):
        train(recipe("faults.grace_s=2", "eval.every=6"), tmp_path / "run", engine=engine)
    assert max(map(checkpoints.checkpoint_step, checkpoints.whole_checkpoints(tmp_path / "run" / "checkpoints"))) == 3
    monkeypatch.undo()
    train(recipe("eval.every=6"), tmp_path / "run", resume=True, engine=engine)
    assert drawn(tmp_path / "run")[:4] == drawn(undisturbed)[:4] and len(drawn(tmp_path / "run")) == 6


@pytest.mark.slow
def test_a_disk_that_is_full_while_draws_are_stored_leaves_the_older_checkpoint(engine, tmp_path, monkeypatch):
    save = ahead.Ahead.save

    def full(self, checkpoint):
        if checkpoint.name == "checkpoint-2":
            raise OSError(28, "No space left on device")
        save(self, checkpoint)

    monkeypatch.setattr(ahead.Ahead, "save", full)
    with pytest.raises(
        RuntimeError, match=r"checkpoint-2 could not be saved .*No space.*complete checkpoint is checkpoint-1"
    ):
        train(recipe(), tmp_path / "run", engine=engine)
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-2").exists()


class Away:
    """A judge that is gone from some draw on, until it is back."""

    is_gone = False
    is_slow = True

    def __call__(self, prompts, trainer_state, **columns):
        if Away.is_gone and trainer_state.global_step == 3:
            raise GraderGoneError("the judge is gone")
        return [float(len(str(prompt)) % 2) for prompt in prompts]


@pytest.mark.slow
def test_a_draw_whose_grader_is_gone_is_asked_again_by_the_run_that_goes_on(engine, tmp_path):
    run, judged = tmp_path / "run", recipe("domains.arithmetic.reward=tests.test_rollouts_ahead:Away", "eval.every=6")
    Away.is_gone = True
    with pytest.raises(GraderGoneError, match="goes on with --resume, from checkpoint-5"):
        train(judged, run, engine=engine)
    kept = read_object(run / "checkpoints" / "checkpoint-5" / ahead.ahead_file(0))["draws"]
    assert not kept  # the sixth draw, which step 3 had chosen, failed
    Away.is_gone = False
    train(judged, run, resume=True, engine=engine)
    assert [line["draw"] for line in RunFolder(run).decisions()] == list(range(6))


@pytest.mark.slow
def test_draws_that_a_checkpoint_does_not_give_back_have_their_prompts_asked_again(
    undisturbed, engine, tmp_path, monkeypatch
):
    """As where a run goes on with other ranks."""
    run = tmp_path / "run"
    as_killed(undisturbed, run, at=4)
    monkeypatch.setattr(ahead.Ahead, "load", lambda self, checkpoint: None)
    train(recipe(), run, resume=True, engine=engine)
    again, before = (RunFolder(folder).decisions() for folder in (run, undisturbed))
    assert [line["prompts"] for line in again] == [line["prompts"] for line in before]


def test_what_does_not_go_together_is_refused_in_a_line(tmp_path):
    with pytest.raises(RecipeError, match=r"ahead belong to engine: ray, this recipe has engine: vllm"):
        load_recipe(DEBUG, ["rollouts.ahead=1"])
    with pytest.raises(RecipeError, match=r"rollouts\.ahead.*less than or equal to 8"):
        load_recipe(DEBUG, ["rollouts={engine: ray, ahead: 9}"])
    guarded = "guardrails={arithmetic: {max_drop: 0.1, action: recover}}"
    with pytest.raises(
        RecipeError, match=r"guardrails.arithmetic.action=recover with rollouts.ahead=2: .* or rollouts.ahead=0"
    ):
        recipe(guarded)
    with pytest.raises(RecipeError, match=r"rollouts\.ahead=1 with algorithm: sft"):
        load_recipe(DEBUG, ["rollouts={engine: ray, ahead: 1}", "algorithm=sft"])


def test_a_checkpoint_keeps_a_draw_as_it_was(tmp_path):
    from polyphony.curricula.records import Completion, Episode, Group, Prompt, Rollout

    prompt = Prompt(domain="math", id="a", prompt="2+2", ids=(5, 6), columns={"answer": "4"})
    told = Episode(messages=({"role": "assistant", "content": "4"},), turns=1, failures=("raised",), reward=0.5)
    rows = [
        Completion(
            ids=[1, 2], logps=[-0.25, -1e-9], version=3, prompt=prompt, text="4", reward=1.0, signs=("truncation",)
        ),
        Completion(ids=[2], tool_mask=[1], prompt=replace(prompt, ids=(5, 6, 7)), episode=told),
    ]
    group = Group.of(rows, draw=7)
    rollout = Rollout(rows=dict(enumerate(rows)), groups={0: group}, size=2, seconds=0.5, discarded=(group,), rounds=1)
    landed = ahead.Landed(
        rollout=rollout, weights=4, refills=[{"round": 1}], logged={("math", "x"): (1.5, 3)}, told={"seen": [None, "y"]}
    )

    class Rows(dict):
        ids = ("a",)

    class Data:
        def rows_of(self, domain):
            return Rows(a=prompt)

        def tokenized(self, prompts):
            return list(prompts)

    again = ahead.Landed.from_row(json.loads(json.dumps(landed.as_row())), Data())  # type: ignore[arg-type]
    assert again == landed
    assert list(again.rollout.rows[1].prompt.ids) == [5, 6, 7] and again.rollout.rows[0].prompt.columns == {
        "answer": "4"
    }
    Rows.ids = ()
    with pytest.raises(ValueError, match=r"domain 'math': row 'a' of a draw .* is no training row any more"):
        ahead.Landed.from_row(landed.as_row(), Data())  # type: ignore[arg-type]


def test_what_rewards_tell_is_what_a_checkpoint_has(tmp_path):
    import numpy as np

    told = {"seen": [np.float32(0.5), torch.tensor(2), (1, "x"), None, object]}
    plain = json.loads(json.dumps(told, default=ahead._plain))
    assert plain == {"seen": [0.5, 2, [1, "x"], None, "<class 'object'>"]}


def test_a_thread_that_is_closed_begins_nothing_more():
    from concurrent.futures import Future

    begun, first, second = [], Future(), Future()
    thread = ahead.DrawThread(None, torch.device("cpu"))
    thread.jobs.put((first, lambda: begun.append(1) or setattr(thread, "is_closed", True)))
    thread.jobs.put((second, lambda: begun.append(2)))
    thread.jobs.put(None)
    thread.start()
    thread.join(10)
    assert begun == [1] and isinstance(second.exception(0), ahead.DroppedError)


def test_a_small_pool_keeps_what_is_in_flight_from_other_draws_and_goes_on_where_all_is():
    from polyphony.curricula.prompts.pool import PoolSettings, PromptPool

    pool = PromptPool(["a", "b", "c", "d"], name="math", seed=1, settings=PoolSettings())
    pool.held = 1
    first, second = pool.draw(2), pool.draw(2)
    assert not set(first) & set(second) and not pool.reserve(2)
    again = PromptPool(["a", "b", "c", "d"], name="math", seed=1, settings=PoolSettings())
    again.held = 1
    again.load_state_dict(pool.state_dict())
    again.adopt(pool.columns())
    assert again.draw(2) == pool.draw(2) and set(pool.draw(4)) == {"a", "b", "c", "d"}
