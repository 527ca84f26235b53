"""Screening with the real engine: what can be learned from is found, an unfinished screening goes on, `train` uses it."""

from __future__ import annotations

import json

import pytest

from polyphony.curricula.prompts.estimate import State
from polyphony.curricula.prompts.pool_file import load_pools
from polyphony.launch.build import build_trainer
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.verbs.screen import describe, screen, screen_table
from polyphony.trainer.run.folder import POOL_FILE, RunFolder
from tests.conftest import EXPERIMENTS, RECIPES

pytestmark = pytest.mark.slow
FACTS = [
    "domains.facts.kind=structured",
    "domains.facts.train.generator=flawed:wrong_rows",
    "domains.facts.train.domain=facts",
    "domains.facts.heldout.generator=polyphony.launch.lab.world:rows",
    "domains.facts.heldout.domain=facts",
    "domains.facts.heldout.split=heldout",
    "domains.facts.reward=exact",
]
SMALL = [f"domains.{name}.{rows}" for name in ("strings", "facts") for rows in ("train.size=12", "heldout.size=4")]


def recipe(*overrides):
    return load_recipe(EXPERIMENTS / "worth.yaml", [*FACTS, *SMALL, *overrides])


@pytest.fixture(scope="module")
def screened(tmp_path_factory, engine):
    folder = tmp_path_factory.mktemp("screen") / "out"
    return folder, screen(recipe(), folder, engine=engine)


def test_prompts_with_wrong_references_are_dropped_and_listed_with_what_was_answered(screened):
    folder, summary = screened
    for found in summary["domains"].values():
        assert found["prompts"] == 12 and found["ungraded"] == 0
        assert found["drop"] >= 6  # half of the references are wrong
        assert found["keep"] + found["mastered"] + found["defer"] + found["drop"] == 12
        # eight visits for every hopeless prompt, one for every one that succeeded at once
        assert 8 * found["drop"] + 12 - found["drop"] <= found["visits"] <= 12 * 12
        assert sum(found["histogram"]) == 12
    listed = [json.loads(line) for line in (RunFolder(folder).ledger("impossible")).read_text().splitlines()]
    assert len(listed) == sum(found["drop"] for found in summary["domains"].values())
    wrong = [line for line in listed if line["reference"] == "?"]
    assert len(wrong) == 12
    assert all(line["answers"] and line["answers"][0][1] >= 2 for line in wrong)
    assert "pass rate" in screen_table(summary)


def test_a_screening_that_is_done_has_nothing_left_to_do(screened, engine, monkeypatch):
    folder, summary = screened
    monkeypatch.setattr("polyphony.launch.verbs.screen.Screening._visit", None)  # a visit would fail
    assert screen(recipe(), folder, engine=engine) == summary


def test_training_starts_from_what_was_screened(screened, engine, tmp_path):
    folder, summary = screened
    chosen = recipe(f"pool.from={folder / POOL_FILE}")
    trainer = build_trainer(chosen, tmp_path, engine=engine)
    assert trainer.curriculum.known == 24 == trainer.data.n_train
    for name, pool in trainer.curriculum.pools.items():
        assert describe(pool) == summary["domains"][name]
        drawn = pool.draw(summary["domains"][name]["keep"])
        assert {pool.state_of(i) for i in drawn} == {State.ACTIVE}


def test_a_pool_of_another_data_set_cannot_be_started_from(screened, engine, tmp_path):
    folder, _ = screened
    other = load_recipe(RECIPES / "debug.yaml", [f"pool.from={folder / POOL_FILE}"])
    with pytest.raises(RecipeError, match="is of another data set: it knows none of the training prompts"):
        build_trainer(other, tmp_path, engine=engine)


def test_a_screening_killed_while_it_wrote_an_answer_goes_on_and_reads_what_is_whole(tmp_path, engine, capsys):
    tiny = recipe("domains.strings.train.size=2", "domains.facts.train.size=2", "domains.facts.heldout.size=2")
    whole, folder = tmp_path / "whole", tmp_path / "out"
    screen(tiny, whole, most_visits=9, engine=engine)
    screen(tiny, folder, most_visits=4, engine=engine)
    path = RunFolder(folder).ledger("answers")
    path.write_bytes(path.read_bytes() + '{"domain": "facts", "id": "é'.encode()[:-1])
    screen(tiny, folder, most_visits=9, engine=engine)
    assert "going on: 4 of 4 prompts were visited before" in capsys.readouterr().err
    assert (RunFolder(folder).ledger("impossible")).read_text() == (RunFolder(whole).ledger("impossible")).read_text()
    assert len((RunFolder(folder).ledger("impossible")).read_text().splitlines()) >= 2


def test_a_damaged_pool_is_moved_aside_and_screening_starts_anew(tmp_path, engine, capsys):
    folder = tmp_path / "out"
    # the recipe may name already what this screening is to write
    tiny = recipe("domains.strings.train.size=2", "domains.facts.train.size=2", f"pool.from={folder / POOL_FILE}")
    screen(tiny, folder, most_visits=1, engine=engine)
    (folder / POOL_FILE).write_bytes(b"half a file")
    screen(tiny, folder, most_visits=1, engine=engine)
    assert (folder / f"{POOL_FILE}.aside-1").read_bytes() == b"half a file"
    assert "moved to" in capsys.readouterr().err
    assert load_pools(folder / POOL_FILE)["strings"].visits.tolist() == [1, 1]
