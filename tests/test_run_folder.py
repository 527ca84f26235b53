from __future__ import annotations

import fcntl
import gc
import json
import os
from pathlib import Path

import pytest

from polyphony.curricula.files import replace_file, sealed, unsealed
from polyphony.trainer.run.changes import from_now_on
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import read_lines, read_object, uncollected, write_object


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def write(folder, name, *steps):
    for step in steps:
        folder.append(name, {"step": step, "value": step / 10})


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_what_is_appended_is_read_back(folder):
    folder.append("metrics", {"step": 1, "reward": 0.1, "note": "größer"})
    folder.append("metrics", {"step": 2})
    assert folder.read("metrics") == [{"step": 1, "reward": 0.1, "note": "größer"}, {"step": 2}]
    assert folder.read("decisions") == []


def test_a_last_line_that_was_cut_off_is_left_out(folder):
    write(folder, "metrics", 1, 2)
    with folder.ledger("metrics").open("a") as file:
        file.write('{"step": 3, "val')
    assert [line["step"] for line in folder.read("metrics")] == [1, 2]


def test_a_number_that_json_does_not_know_is_refused_and_nothing_is_written(folder):
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.append("metrics", {"step": 1, "reward": float("nan")})
    assert not folder.ledger("metrics").exists()


def test_a_cut_keeps_the_lines_up_to_its_step_and_the_tail_as_an_attempt(folder):
    write(folder, "metrics", 0, 1, 2, 3)
    write(folder, "decisions", 1, 2)
    replace_file(folder.transfer, "{}")
    attempt = folder.cut(2)
    assert attempt == folder.path / "attempt-1"
    assert steps(folder.ledger("metrics")) == [0, 1, 2]
    assert steps(attempt / "metrics.jsonl") == [3]
    assert steps(folder.ledger("decisions")) == [1, 2]
    assert not (attempt / "decisions.jsonl").exists()
    assert (attempt / "transfer.json").read_text() == "{}"


def test_a_cut_to_sizes_takes_what_was_written_of_the_step_since(folder):
    write(folder, "metrics", 0, 1)
    write(folder, "decisions", 1)
    sizes = folder.sizes()
    write(folder, "metrics", 1, 2)
    write(folder, "alarms", 1)
    attempt = folder.cut(1, sizes=sizes)
    assert [steps(folder.ledger(name)) for name in ("metrics", "decisions", "alarms")] == [[0, 1], [1], []]
    assert [steps(attempt / f"{name}.jsonl") for name in ("metrics", "alarms")] == [[1, 2], [1]]
    assert folder.cut(1, sizes=sizes) is None


def test_a_cut_takes_a_half_written_line_away_and_keeps_it(folder):
    write(folder, "metrics", 1)
    with folder.ledger("metrics").open("a") as file:
        file.write('{"step": 2, "val')
    attempt = folder.cut(1)
    assert steps(folder.ledger("metrics")) == [1]
    assert (attempt / "metrics.jsonl").read_text() == '{"step": 2, "val'
    write(folder, "metrics", 2)
    assert [line["step"] for line in folder.read("metrics")] == [1, 2]


def test_only_a_newline_ends_a_line(folder):
    said = "one\u2028two\u2029three\x85four\rfive"
    folder.append("samples", {"step": 1, "completion": said})
    folder.append("samples", {"step": 2, "completion": said})
    assert [line["completion"] for line in folder.read("samples")] == [said, said]
    folder.cut(1)
    assert folder.read("samples") == [{"step": 1, "completion": said}]


def test_a_line_that_was_cut_off_within_a_letter_is_cut_and_kept_too(folder):
    write(folder, "samples", 1)
    half = '{"completion": "é'.encode()[:-1]
    with folder.ledger("samples").open("ab") as file:
        file.write(half)
    attempt = folder.cut(1)
    assert steps(folder.ledger("samples")) == [1]
    assert (attempt / "samples.jsonl").read_bytes() == half


def test_a_broken_line_within_a_ledger_is_named_or_counted(folder):
    write(folder, "metrics", 1)
    with folder.ledger("metrics").open("a") as file:
        file.write("[]\n")
    write(folder, "metrics", 2)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is no JSON object"):
        folder.read("metrics")
    broken: list[int] = []
    assert [line["step"] for line in folder.read("metrics", broken)] == [1, 2]
    assert broken == [2]


def test_a_second_cut_at_the_same_step_finds_nothing_to_do(folder):
    write(folder, "metrics", 1, 2)
    folder.cut(1)
    assert folder.cut(1) is None
    assert [path.name for path in folder.path.glob("attempt-*")] == ["attempt-1"]


def test_attempts_are_numbered_on_even_where_an_early_one_was_deleted(folder):
    for number in (1, 2):
        write(folder, "metrics", 5)
        assert folder.cut(4) == folder.path / f"attempt-{number}"
    (folder.path / "attempt-1" / "metrics.jsonl").unlink()
    (folder.path / "attempt-1").rmdir()
    write(folder, "metrics", 5)
    assert folder.cut(4) == folder.path / "attempt-3"


def test_without_a_checkpoint_every_line_goes_and_none_is_lost(folder):
    write(folder, "metrics", 0, 1)
    attempt = folder.cut(-1)
    assert folder.read("metrics") == []
    assert steps(attempt / "metrics.jsonl") == [0, 1]


def test_lines_out_of_order_are_cut_by_their_step_and_kept_whole_in_the_attempt(folder):
    write(folder, "samples", 2, 1)
    attempt = folder.cut(1)
    assert steps(folder.ledger("samples")) == [1]
    assert steps(attempt / "samples.jsonl") == [2, 1]


def test_a_new_file_cannot_be_cut(folder):
    assert folder.cut(0) is None
    assert list(folder.path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "transfer.json"
    replace_file(path, "old")
    with pytest.raises(TypeError):
        replace_file(path, 5)  # what cannot be written, as when the disk is full
    assert path.read_text() == "old"
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["transfer.json"]


# --- whose folder it is -----------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_told_by_whom_and_readers_are_not(folder):
    with folder.lock.open("w") as file:  # what another process holds
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 7 on somewhere")
        file.flush()
        with pytest.raises(ValueError, match=r"is in use by process 7 on somewhere: wait"), folder.locked(say=print):
            pass
        assert folder.read("metrics") == []
    with folder.locked(say=print), folder.locked(say=print):  # a second lock of one process is the first
        assert folder.lock.read_text().startswith(f"process {os.getpid()} on ")
        child = os.fork()
        if not child:  # its copy of the lock is closed, or it would outlive its parent
            kept = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.samefile(folder.lock)]
            os._exit(len(kept))
        assert os.waitpid(child, 0)[1] == 0
    with folder.locked(say=print):
        pass


def test_a_file_system_without_locks_is_told(folder, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    said: list[str] = []
    with folder.locked(say=said.append):
        pass
    assert len(said) == 1 and "its file system has no locks" in said[0]


def test_what_was_claimed_for_a_run_that_never_began_is_free_and_is_given_up(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with folder.locked(say=print):
        folder.claim("name: x\n")
        folder.wandb.mkdir()
        (folder.wandb / "log").write_text("")
    assert folder.is_free
    (folder.path / "thesis.txt").write_text("years of work")
    assert not folder.is_free
    folder.give_up()
    assert [path.name for path in folder.path.iterdir()] == ["thesis.txt"]
    (folder.path / "thesis.txt").unlink()
    folder.give_up()
    assert not folder.path.exists()


def test_what_is_the_users_own_is_neither_written_over_nor_given_up(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder.wandb / "run-1").mkdir(parents=True)
    (folder.wandb / "run-1" / "log").write_text("of another run")
    assert folder.refuse_other({}) == {} and folder.users_own == [folder.wandb]
    own = folder.users_own
    with folder.locked(say=print):
        folder.claim("name: x\n")
    folder.give_up(keep=own)
    assert [path.name for path in folder.path.rglob("*")] == ["wandb", "run-1", "log"]
    folder.settings.write_text('{"editor": "mine"}')
    with pytest.raises(ValueError, match="is not empty; choose another"):
        folder.refuse_other({})


def test_a_recipe_that_was_edited_or_damaged_in_a_run_is_refused(folder):
    text = "name: x\nmodel: größer\n"
    folder.claim(text)
    folder.check_recipe()
    whole = folder.recipe.read_bytes()
    assert whole.endswith(text.encode())
    for damaged in (whole.replace(b"name: x", b"name: y"), whole[:-1], whole.replace(b"sha256 ", b"sha256 0")):
        folder.recipe.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not as the run wrote it: .* --resume .* key=value"):
            folder.check_recipe()
    folder.recipe.write_text(text)  # of an older version
    folder.check_recipe()


def test_what_cannot_change_the_past_may_be_another_and_what_it_changes_is_told(folder):
    then = {"grpo": {"max_steps": 10, "seed": 1}, "rollouts": {"max_grader_failures": 0.5}, "tracking": {"wandb": None}}
    now = {"grpo": {"max_steps": 20, "seed": 1}, "rollouts": {"max_grader_failures": 0.9}}
    changed = folder.changed(then, now | {"tracking": {"wandb": {"mode": "x"}}})
    assert list(changed) == ["grpo.max_steps", "rollouts.max_grader_failures", "tracking.wandb.mode"]
    told = from_now_on(changed, step=10)
    assert told[0] == (
        "grpo.max_steps: 10 until step 10, 20 from there on; so are the learning-rate curve, and the lengths of stages"
    )
    assert told[1] == "rollouts.max_grader_failures: 0.5 until step 10, 0.9 from there on"
    for key in ("seed", "max_steps_of_mine", "learning_rate"):
        with pytest.raises(ValueError, match=f"holds a run with grpo.{key}="):
            folder.changed(then, {**then, "grpo": {**then["grpo"], key: 2}})


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_cut_says_which_line_was_cut_off_and_takes_the_summary_of_an_ended_training_out(folder):
    write(folder, "metrics", 1, 2)
    folder.append("metrics", {"step": 2, "train_runtime": 3.0})
    with folder.ledger("alarms").open("a") as file:
        file.write('{"step": 1}\n{"st')
    said: list[str] = []
    folder.cut(2, say=said.append)
    assert steps(folder.ledger("metrics")) == [1, 2] and "train_runtime" not in folder.ledger("metrics").read_text()
    assert len(said) == 1 and "alarms.jsonl: line 2, the last, was cut off" in said[0]


@pytest.mark.parametrize("line", ['{"step": null}', '{"stop": 1}', '{"step": "1"}', '{"step": true}'])
def test_a_line_without_its_step_is_named(folder, line):
    write(folder, "samples", 1)
    with folder.ledger("samples").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl: line 2 has no step"):
        folder.cut(1)


def test_any_byte_of_a_sealed_object_that_changes_is_seen(tmp_path):
    path = tmp_path / "object.json"
    write_object(path, {"a": 1.5, "b": {"c": "größer"}})
    assert read_object(path) == {"a": 1.5, "b": {"c": "größer"}}
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found = read_object(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # of the seal itself: its reader meets a key that it does not know
            assert set(found) > {"a", "b"}
    assert unsealed(b'{"a": 1}') == b'{"a": 1}'  # of an older version
    assert json.loads(sealed('{"a":1}'))["a"] == 1


def test_draws_that_stand_on_a_line_which_is_lost_are_left_out_or_named(folder):
    whole = {"step": 1, "draw": 0, "mixture": {"a": 1.0}, "counts": {"a": 1}, "reason": "r", "stage": None}
    whole |= {"evidence": {"draw": 0, "domains": ["a"], "drawn": [0]}, "prompts": ["p"]}
    short = [{"step": n + 1, "draw": n, "prompts": [[0]], "evidence": {}} for n in (1, 2)]
    folder.append("decisions", whole, short[1])
    broken: list[int] = []
    assert [line["draw"] for line in folder.decisions(broken)] == [0]
    with pytest.raises(ValueError, match=r"decisions\.jsonl: draw 2 is told by what differs from the one before"):
        folder.decisions()
    folder.begin("decisions", whole, *short)
    replace_file(folder.prompts, json.dumps({"a": ["p"]}))
    assert [line["prompts"] for line in folder.decisions()] == [["p"]] * 3


def test_the_collector_rests_while_a_ledger_is_read_and_is_then_as_it_was():
    with uncollected(), pytest.raises(KeyError), uncollected():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_line_is_read_as_json_has_it(tmp_path):
    """What the fast parser refuses, and json does not, is read too."""
    path = tmp_path / "metrics.jsonl"
    given = '{"a": 0.1, "b": 1e-7, "c": 12345678901234567890123, "d": "\\ud800", "e": NaN, "f": [1, -0.0], "a": 0.3}'
    path.write_text(given + "\n")
    assert repr(read_lines(path)) == repr([json.loads(given)])
