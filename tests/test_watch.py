"""Runs in a terminal: what one picture says, when a folder is read anew, and that watching ends with the runs."""

import io
import json
import os
import shutil
import socket
import subprocess
import threading

import numpy as np
import pytest
from rich.console import Console

from polyphony.launch.cli import main
from polyphony.launch.report.story import signed
from polyphony.launch.verbs import watch as verb
from polyphony.launch.verbs.watch import Seen, curve, watch
from polyphony.trainer.run.folder import RunFolder
from tests.benchmarks.synthetic_run import write_run


def shown(*runs, width=98, terminal=False, **more):
    out = io.StringIO()
    watch(runs, console=Console(file=out, width=width, force_terminal=terminal), **more)
    return out.getvalue()


def test_a_picture_has_every_domain_with_its_numbers_and_nothing_is_cut_off(tmp_path):
    run = write_run(tmp_path / "run", steps=40, eval_every=20, items=20)
    alarm = {"step": 20, "kind": "collapse", "domain": "facts", "message": "entropy fell", "remedy": "more rows"}
    (run / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    said, told = shown(run), Seen(run).findings
    assert "step 40" in said and "…" not in said and "\x1b" not in said
    for name in told.run.domains:
        (line,) = (line for line in said.splitlines() if line.startswith(f"│ {name} "))
        assert f"{told.scores[name][-1].mid:.3f}" in line
        assert ("(watched)" in line) == (name in told.run.watch_only)
        of = told.entropy[name]
        cells = line.replace(" (watched)", "").strip("│ ").split()
        assert [cell for cell in cells if "." in cell][:3] == [
            f"{told.scores[name][-1].mid:.3f}", signed(told.final("drawdown", name).mid), f"{of.after:.2f}"
        ]  # fmt: skip
        assert ("●" in line) and (0 <= of.at <= 1) == (of.place == "inside")
        if name not in told.run.watch_only:
            reward, share = (
                told.run.metrics.get(key.format(name)) for key in ("domain/{}/reward", "curriculum/{}/mixture")
            )
            assert f" {reward.values[-1]:.3f} " in line and (share is None or f"{share.values[-1]:.3f}" in line)
    assert "step 20: collapse of facts: entropy fell" in said


def test_a_terminal_that_is_full_shows_the_newest_alarms_whatever_it_cuts(tmp_path):
    names = [f"d{n}" for n in range(40)]
    run = write_run(tmp_path / "run", domains=names, watch_only=(), steps=20, items=20)
    alarms = [{"step": n, "kind": "stale", "message": f"\x1b[2J{n}"} for n in range(9)]
    (run / "alarms.jsonl").write_text("".join(json.dumps(alarm) + "\n" for alarm in alarms))
    said = shown(run).splitlines()
    assert [line.split("stale: ")[1].split()[0] for line in said[1:4]] == [rf"\x1b[2J{n}" for n in (6, 7, 8)]
    assert "9 alarms in all" in said[4] and "d39" in said[-2] + said[-3] + said[-4]


def test_names_and_words_of_a_run_are_no_markup(tmp_path):
    run = write_run(tmp_path / "run", domains=("a[/b]",), watch_only=(), steps=20, items=20)
    assert "a[/b]" in shown(run)


@pytest.mark.parametrize("width", [98, 80, 72, 56, 40])
def test_numbers_stand_whole_in_a_narrow_terminal(tmp_path, width):
    run = write_run(tmp_path / "run", steps=40, eval_every=20, items=20)
    said, told = shown(run, width=width), Seen(run).findings
    assert "…" not in said and max(map(len, said.splitlines())) <= width
    assert all(f"{told.scores[name][-1].mid:.3f}" in said for name in told.run.domains)


def test_runs_stand_side_by_side_where_there_is_room(tmp_path):
    runs = [write_run(tmp_path / name, steps=20, items=20) for name in ("one", "two")]
    wide, narrow = shown(*runs, width=200), shown(*runs, width=100)
    assert any("one" in line and "two" in line for line in wide.splitlines())
    assert not any("one" in line and "two" in line for line in narrow.splitlines())
    for width in (80, 98, 197):
        assert max(map(len, shown(*runs, width=width).splitlines())) <= width


def test_a_folder_is_read_anew_only_after_something_was_written(tmp_path, monkeypatch):
    run, reads = write_run(tmp_path / "run", steps=20, items=20), []
    monkeypatch.setattr(verb, "read_run", lambda path, keep=verb.read_run: reads.append(path) or keep(path))
    seen = Seen(run)
    for _ in range(3):
        seen.picture()
    before = len(reads)
    with (run / "metrics.jsonl").open("a") as ledger:
        ledger.write(json.dumps({"step": 21, "step_time": 7.25}) + "\n")
    assert seen.picture() and len(reads) == before + 1
    assert seen.findings.run.steps == 21


def test_in_a_terminal_it_ends_when_the_run_does(tmp_path):
    run = write_run(tmp_path / "run", steps=20, items=20)
    (run / "end.json").unlink(missing_ok=True)
    threading.Timer(0.4, (run / "end.json").write_text, ["{}"]).start()
    assert "over" in shown(run, terminal=True, every_s=0.1)


def test_watching_ends_with_a_run_whose_process_was_killed(tmp_path):
    run = write_run(tmp_path / "run", steps=20, items=20)
    shutil.rmtree(run / "final")
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = RunFolder(run)
    folder.lock.write_text(f"process {gone.pid} on {socket.gethostname()}")
    assert folder.is_left and ", stopped" in shown(run, terminal=True, every_s=0.1)
    folder.lock.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    assert folder.is_left is False and ", running " in shown(run)
    folder.lock.write_text(f"process {gone.pid} on another.machine")
    assert folder.is_left is None and "running, or stopped" in shown(run)


def test_a_folder_of_no_run_is_named(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}: no such run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([1, 1], "▁▁"), ([0, 1, float("nan"), 0.5], "▁█▅"), (range(18), "▁▂▃▄▅▅▆▇█")],
)
def test_a_curve_goes_from_its_least_to_its_largest(values, drawn):
    assert curve(np.array(list(values), dtype=float)) == drawn
