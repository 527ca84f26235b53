from __future__ import annotations

import json

import pytest

from polyphony.trainer.checkpoints import (
    best_checkpoint,
    keep_newest,
    load_state,
    mark_best,
    remove_unfinished,
    whole_checkpoints,
)
from polyphony.trainer.run.folder import STATE_FILE


@pytest.fixture
def folder(tmp_path):
    """Three whole checkpoints, and one that was cut off while being saved."""
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / STATE_FILE).write_text(json.dumps({"curriculum": {"draws": step}}))
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "model.safetensors").write_text("half")
    return tmp_path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_ledgers_come_back_as_they_were_saved(folder):
    assert load_state(folder / "checkpoint-10") == {"draws": 10}


def test_a_checkpoint_without_its_mark_cannot_be_loaded(folder):
    with pytest.raises(ValueError, match=f"checkpoint-12 has no {STATE_FILE}: it was not saved to the end"):
        load_state(folder / "checkpoint-12")


def test_whole_checkpoints_are_found_in_order_of_their_steps(folder):
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


def test_only_unfinished_checkpoints_are_removed(folder):
    (folder / "best.json").write_text("{}")
    assert remove_unfinished(folder) == [folder / "checkpoint-12"]
    assert names(folder) == ["best.json", "checkpoint-10", "checkpoint-2", "checkpoint-4"]
    assert remove_unfinished(folder) == []


def test_the_newest_are_kept_and_the_best_with_them(folder):
    keep_newest(folder, 1, also=folder / "checkpoint-2")
    assert names(folder) == ["checkpoint-10", "checkpoint-12", "checkpoint-2"]


def test_no_best_means_no_exception(folder):
    keep_newest(folder, 2)
    assert names(folder) == ["checkpoint-10", "checkpoint-12", "checkpoint-4"]


def test_fewer_than_the_limit_stay(folder):
    keep_newest(folder, 9)
    assert len(whole_checkpoints(folder)) == 3


def test_a_run_that_never_saved_has_no_checkpoint(tmp_path):
    assert whole_checkpoints(tmp_path / "gone") == []
    assert remove_unfinished(tmp_path / "gone") == []


def test_the_best_is_the_first_with_the_highest_score(folder):
    assert best_checkpoint(folder) is None
    for step, score in ((2, 0.5), (4, 0.75), (10, 0.75)):
        mark_best(folder, folder / f"checkpoint-{step}", score)
    assert best_checkpoint(folder) == folder / "checkpoint-4"


def test_a_best_that_is_gone_is_none(folder):
    mark_best(folder, folder / "checkpoint-12", 0.9)
    assert best_checkpoint(folder) is None
