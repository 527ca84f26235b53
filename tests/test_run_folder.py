from __future__ import annotations

import json

import pytest

from polyphony.curricula.files import replace_file
from polyphony.trainer.run.folder import RunFolder


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
