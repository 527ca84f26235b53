"""A command of the user's for every alarm: what it gets, that it is ended in time, and that its failures are counted."""

import json
import time

import pytest

from polyphony.trainer.run.alarm_command import AlarmCommand

ALARM = {"step": 3, "kind": "collapse", "domain": "math", "message": 'it\'s "low"', "remedy": "more rows"}


def test_it_gets_each_alarm_as_a_line_of_json_in_order(tmp_path):
    command = AlarmCommand(f"cat >> {tmp_path / 'told'}", timeout_s=10)
    for step in range(3):
        command.ring(ALARM | {"step": step})
    assert command.close() == ""
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert told == [ALARM | {"step": step} for step in range(3)]


def test_failures_are_said_and_counted(caplog):
    command = AlarmCommand("read line; case $line in *0*) exit 0;; esac; echo no such hook >&2; exit 3", timeout_s=10)
    for step in range(3):
        command.ring({"step": step})
    assert command.close() == "alarms.command: failed for 2 of 3 alarms"
    assert caplog.text.count("exit status 3: no such hook") == 2


def test_one_that_hangs_is_killed_with_what_it_started(tmp_path, caplog):
    command = AlarmCommand(f"(sleep 2; echo alive > {tmp_path / 'late'}) & sleep 60", timeout_s=0.3)
    command.ring(ALARM)
    time.sleep(0.1)
    began = time.monotonic()
    assert command.close() in (
        "alarms.command: failed for 1 of 1 alarms",
        "alarms.command: not run to its end for 1 alarms",  # on a slow machine
    )
    assert time.monotonic() - began < 2
    time.sleep(2.2)
    assert not (tmp_path / "late").exists() and "no end after 0.3 s" in caplog.text


@pytest.mark.parametrize(
    "command", [r"printf '\377\376' >&2; exit 3", "setsid sleep 20 & exit 3", "exec >&- 2>&-; exit 3"]
)
def test_what_one_says_or_leaves_behind_keeps_no_other_from_being_run(command, caplog):
    calls = AlarmCommand(command, timeout_s=10)
    began = time.monotonic()
    for step in range(2):
        calls.ring({"step": step})
    assert calls.close() == "alarms.command: failed for 2 of 2 alarms" and time.monotonic() - began < 8
    assert caplog.text.count("exit status 3") == 2


@pytest.mark.slow
def test_a_run_calls_it_for_what_rings(tmp_path, engine):
    from polyphony.launch.recipe import load_recipe
    from polyphony.launch.train import train
    from tests.conftest import RECIPES

    overrides = [f"alarms.command=cat >> {tmp_path / 'told'}", "tracking.wandb=null", "grpo.max_steps=6"]
    overrides += ["entropy.band=[0.99, 1.01]", "eval.samples=1", "grpo.learning_rate=3e-2"]  # it goes astray
    train(load_recipe(RECIPES / "debug.yaml", overrides), tmp_path / "run", engine=engine)
    rung = (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()
    assert rung and [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()] == [
        *map(json.loads, rung)
    ]
