from __future__ import annotations

import json
import random

import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.records import Domain
from polyphony.curricula.schedulers.fixed import Joint
from polyphony.trainer.checkpoint_mark import begin_mark, damage, discard, is_unfinished
from polyphony.trainer.checkpoints import (
    Found,
    best_checkpoint,
    best_to_go_back_to,
    forget_damaged_best,
    keep_newest,
    load_state,
    mark_best,
    save_ledgers,
    whole_checkpoints,
)
from polyphony.trainer.run.folder import STATE_FILE
from tests.experiments.damage import damages


@pytest.fixture
def folder(tmp_path):
    """Three whole checkpoints, and one that was cut off while being saved."""
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / STATE_FILE).write_text(json.dumps({"curriculum": {"draws": step}}))
    begin_mark(tmp_path / "checkpoint-12")
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


def settled(folder, **given) -> tuple[list[str], list[str]]:
    """Go on from the newest checkpoint that fits; return what was said, and what is there."""
    said: list[str] = []
    Found.of(folder, **given).settle(say=said.append)
    return said, names(folder)


def test_only_what_was_never_whole_is_removed_and_what_lost_its_mark_is_set_aside(saved):
    begin_mark(saved / "checkpoint-12")
    (saved / "checkpoint-12" / "model.safetensors").write_text("half")
    (saved / "checkpoint-13").mkdir()  # begun just before its end
    (saved / "checkpoint-4" / STATE_FILE).unlink()
    said, left = settled(saved)
    assert left == ["checkpoint-2", "checkpoint-4.aside-1"]
    assert said[0].startswith(f"checkpoint-4: {STATE_FILE} is missing; moved to checkpoint-4.aside-1")
    assert sorted(said[1:]) == [
        f"checkpoint-{n} was cut off while being saved, and never whole: removed" for n in (12, 13)
    ]
    assert settled(saved) == ([], left)
    (saved / "checkpoint-2" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        settled(saved)
    assert names(saved) == left


def test_a_whole_checkpoint_that_does_not_fit_is_set_aside_for_an_older_one(saved):
    said, left = settled(saved, misfit=lambda path: "lines of it are lost" if path.name == "checkpoint-4" else "")
    assert left == ["checkpoint-2", "checkpoint-4.aside-1"] and "checkpoint-4: lines of it are lost; moved" in said[0]


def test_a_deletion_that_is_cut_off_leaves_an_unfinished_one(saved, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        discard(saved / "checkpoint-2")
    assert is_unfinished(saved / "checkpoint-2") and not is_unfinished(saved / "checkpoint-4")


def test_the_newest_are_kept_and_the_best_with_them(folder):
    keep_newest(folder, 1, also={folder / "checkpoint-2"})
    assert names(folder) == ["checkpoint-10", "checkpoint-12", "checkpoint-2"]


def test_no_best_means_no_exception(folder):
    keep_newest(folder, 2)
    assert names(folder) == ["checkpoint-10", "checkpoint-12", "checkpoint-4"]


def test_fewer_than_the_limit_stay(folder):
    keep_newest(folder, 9)
    assert len(whole_checkpoints(folder)) == 3


def test_a_run_that_never_saved_has_no_checkpoint(tmp_path):
    assert whole_checkpoints(tmp_path / "gone") == []
    assert Found.of(tmp_path / "gone") == Found(None, {}, [])


def test_the_best_is_the_first_with_the_highest_score(folder):
    assert best_checkpoint(folder) is None
    for step, score in ((2, 0.5), (4, 0.75), (10, 0.75)):
        mark_best(folder, folder / f"checkpoint-{step}", score)
    assert best_checkpoint(folder) == folder / "checkpoint-4"


def test_a_best_that_is_gone_is_none(folder):
    mark_best(folder, folder / "checkpoint-12", 0.9)
    assert best_checkpoint(folder) is None


FILES = {"model.safetensors": b"weights", "optimizer.pt": b"moments", "scheduler.pt": b"rate", "rng_state.pth": b"dice",
         "trainer_state.json": b"{}", "global_step4/shard.pt": b"shard"}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints as they are saved now."""
    curriculum = Curriculum(
        domains=[Domain(name="a", kind="structured", train=[{}])],
        prompts={"a": ["p"]},
        scheduler=Joint(),
        total_draws=9,
    )
    for step in (2, 4):
        for name, content in FILES.items():
            path = tmp_path / f"checkpoint-{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        save_ledgers(tmp_path / f"checkpoint-{step}", curriculum, sizes={"metrics": 10})
    return tmp_path


@pytest.mark.parametrize("name", [*FILES, STATE_FILE])
def test_any_damage_of_any_file_is_named_and_the_run_goes_on_from_the_checkpoint_before(saved, name):
    path = saved / "checkpoint-4" / name
    whole = path.read_bytes()
    assert damage(saved / "checkpoint-4") == ""
    for kind, content in damages(whole, name, rng=random.Random(1), flips=40):
        path.unlink() if content is None else path.write_bytes(content)
        assert name in damage(saved / "checkpoint-4"), kind
        path.write_bytes(whole)
    path.write_bytes(whole[:-2])
    assert Found.of(saved).newest == saved / "checkpoint-2"
    said, left = settled(saved)
    assert len(said) == 1 and said[0].startswith("checkpoint-4: ") and name in said[0] and "moved to" in said[0]
    assert left == ["checkpoint-2", "checkpoint-4.aside-1"]
    (saved / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is whole \(checkpoint-2: optimizer.pt is missing\)"):
        settled(saved)
    assert "checkpoint-2" in names(saved)  # nothing is moved where nothing is left


def test_a_checkpoint_of_an_older_version_is_whole_where_nothing_is_missing(folder):
    for name in ("trainer_state.json", "scheduler.pt", "rng_state_0.pth", "optimizer.bin"):
        assert "is missing" in damage(folder / "checkpoint-10")
        (folder / "checkpoint-10" / name).write_text("")
    assert damage(folder / "checkpoint-10") == ""


def test_folders_of_the_users_own_are_left_alone(folder):
    for name in ("checkpoint-good", "checkpoint-4-copy", "best"):
        (folder / name).mkdir()
    (folder / "checkpoint-4-copy" / STATE_FILE).write_text("{}")
    keep_newest(folder, 1)
    discard(folder / "checkpoint-12")
    assert names(folder) == ["best", "checkpoint-10", "checkpoint-4-copy", "checkpoint-good"]


@pytest.mark.parametrize("text", ["", "[]", '{"checkpoint": 4}', '{"checkpoint": "checkpoint-4", "worst_domain_'])
def test_a_note_of_the_best_that_cannot_be_read_is_moved_aside(folder, text):
    (folder / "best.json").write_text(text)
    with pytest.raises(ValueError, match=r"best\.json"):
        best_checkpoint(folder)
    said: list[str] = []
    forget_damaged_best(folder, say=said.append)
    assert "best.json" in said[0] and "best.json.aside-1" in names(folder)
    mark_best(folder, folder / "checkpoint-4", 0.5)
    assert best_checkpoint(folder) == folder / "checkpoint-4"


def test_a_rollback_goes_to_a_best_checkpoint_that_is_whole_or_says_why_to_none(saved):
    assert best_to_go_back_to(saved) == (None, "no checkpoint to go back to")
    best = saved / "checkpoint-2"
    mark_best(saved, best, 0.5)
    assert best_to_go_back_to(saved) == (best, "")
    (best / "optimizer.pt").write_bytes(b"0")
    assert best_to_go_back_to(saved) == (None, "checkpoint-2, the best checkpoint: optimizer.pt is damaged")
    (best / STATE_FILE).write_text("{}")
    assert f"checkpoint-2, the best checkpoint: {STATE_FILE}: " in best_to_go_back_to(saved)[1]
    (saved / "best.json").write_text("")
    assert str(saved / "best.json") in best_to_go_back_to(saved)[1]


def test_a_note_of_a_best_that_is_gone_is_moved_aside_so_that_another_can_be_best(folder):
    mark_best(folder, folder / "checkpoint-12", 0.9)
    said = []
    forget_damaged_best(folder, say=said.append)
    assert "checkpoint-12 is gone" in said[0] and not (folder / "best.json").exists()
