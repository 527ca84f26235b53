"""`polyphony doctor --gpu`, as far as it goes without a card: its rows on the CPU, its processes, its table."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest
import torch

from polyphony.launch.cli import main
from polyphony.launch.measures import LAB
from polyphony.launch.measures.groups import GROUPS, rows_of, write
from polyphony.launch.measures.result import Result, failed, table
from polyphony.launch.verbs import doctor_gpu
from tests.test_bad_input import fails

FINE = Result(name="fine", value=2.0, unit="s", cpu=1.0)
ENDS = {
    "is killed": ("os.kill(os.getpid(), 9)", "its process ended by SIGKILL: on the way"),
    "fails": ("sys.exit('no engine')", "its process ended by exit code 1: no engine"),
    "hangs": ("time.sleep(600)", "not measured within 3 s"),
}


def test_without_a_card_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--gpu measures on a card, and PyTorch sees none here" in fails(capsys, "doctor", "--gpu")


@pytest.mark.parametrize(("end", "why"), ENDS.values(), ids=ENDS)
def test_what_ends_the_process_of_a_group_is_in_the_rows_it_had_not_come_to(tmp_path, capsys, end, why):
    folder = tmp_path / "group"
    line = json.dumps(asdict(FINE))
    child = f"import os, sys, time; open({str(folder / 'rows')!r}, 'w').write({line!r})"
    child += f"; print('on the way', flush=True); {end}"
    fine, lost = rows_of([sys.executable, "-c", child], ["fine", "lost"], folder, limit_s=3)
    assert fine == FINE
    assert lost.error == f"RuntimeError: {why}"
    assert "on the way" in capsys.readouterr().err


def test_a_row_that_fails_leaves_the_others(tmp_path):
    def broken():
        raise ValueError("no engine")

    write([("broken", broken), ("fine", lambda: FINE)], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(line["name"], line["error"]) for line in lines] == [("broken", "ValueError: no engine"), ("fine", "")]


def measured_by(monkeypatch, *, broken: str = "") -> tuple[list[Result], dict[str, float]]:
    """The rows where each group is measured at once, and the seconds that each had."""
    limits = {}

    def measure(group, policy, folder, *, effort, limit_s):
        limits[group] = limit_s
        made = [
            Result(name=name, value=3.0 if "colocate" in name else 2.0, unit="s", cpu=1.0) for name in GROUPS[group]
        ]
        return [failed(row.name, RuntimeError("ill")) if row.name == broken else row for row in made]

    monkeypatch.setattr(doctor_gpu, "measure", measure)
    return list(doctor_gpu.rows(dict.fromkeys(GROUPS, LAB), LAB, impossible=doctor_gpu.impossible())), limits


def test_what_cannot_be_measured_says_why_and_leaves_its_time_to_the_rest(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rows, limits = measured_by(monkeypatch)
    assert list(limits) == ["ours", "resume", "colocate"]
    assert sum(limits.values()) == pytest.approx(doctor_gpu.TOTAL_S)
    against = {row.name: row.ratio for row in rows if row.ratio is not None}
    assert against == dict.fromkeys([f"{name}, TRL's colocate" for name in ("step", "sync", "peak memory")], 2 / 3)
    shown = {line.split("  ")[0]: line for line in table(rows).splitlines()}
    assert shown["worker sync"].split()[2:5] == ["not", "run", "one"]
    assert "set RAY_ADDRESS" in shown["two-node sync"]
    assert not any(row.error for row in rows)


def test_all_groups_together_have_the_same_time(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _, limits = measured_by(monkeypatch)
    assert list(limits) == list(GROUPS)
    assert sum(limits.values()) == pytest.approx(doctor_gpu.TOTAL_S)


@pytest.mark.parametrize("broken", ["", "weight check"])
def test_a_failed_row_is_in_the_table_and_in_the_exit_code(monkeypatch, capsys, broken):
    rows, _ = measured_by(monkeypatch, broken=broken)
    monkeypatch.setattr(doctor_gpu, "check_card", lambda: None)
    monkeypatch.setattr(doctor_gpu, "measured", lambda: rows)
    assert main(["doctor", "--gpu"]) == bool(broken)
    said = capsys.readouterr().out
    assert said.startswith("ok ") and "RuntimeError: ill" in said if broken else "FAILED" not in said
    assert ("colocate step" in said) is bool(broken)  # with nothing to be compared to
    assert main(["doctor", "--gpu", "--json"]) == bool(broken)
    told = json.loads(capsys.readouterr().out)
    assert {"trl", "gpu"} <= {finding["name"] for finding in told["machine"]}
    assert [row["name"] for row in told["rows"]] == [row.name for row in rows]


@pytest.mark.slow
def test_on_a_cpu_a_resume_gets_to_the_same_weights_bit_for_bit(tmp_path):
    from polyphony.launch.measures.resume import recipe_of, resumed

    small = ["grpo.max_completion_length=8", "grpo.gradient_accumulation_steps=1"]
    small += [f"domains.{name}.heldout.size=4" for name in ("arithmetic", "stories", "safety")]
    row = resumed(recipe_of(LAB, "rollouts.engine=transformers", *small), tmp_path / "run")
    assert row.value == 0.0
    assert row.note == "step 2 of 4; same prompts and learning rates, weights bit for bit"
