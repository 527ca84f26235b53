"""The benchmarks' record and table, and that each one runs; what they measure is for `make bench`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict

import psutil
import pytest

from polyphony.launch.measures import LAB, Effort
from polyphony.launch.measures.groups import GROUPS
from polyphony.launch.measures.result import (
    Result,
    Target,
    Timing,
    in_turns,
    paired,
    read_result,
    repeated,
    table,
    tree_cpu_s,
)
from tests.benchmarks import commands, gpu, run

AT_MOST = Target(relation="<=", limit=1.05)

NOT_HERE = {
    "adapter sync": "a policy of 0.1 billion parameters; `test_adapters` has an engine with an adapter",
    "adapter worker sync": "brings up a Ray cluster; `test_ray_engine` sends an adapter through one",
    "ahead": "brings up a Ray cluster and trains; `test_rollouts_ahead` does",
    "demo": "trains for minutes, which is what it measures",
    "gpu": "needs a GPU; without one it is four processes with an engine each, minutes of starting",
    "merge": "two more processes that import torch; `test_merging` merges in this one",
    "workers": "brings up a Ray cluster; `test_ray_engine` samples through one",
    "worker sync": "brings up a Ray cluster; `test_ray_engine` syncs through one",
}
"""Benchmarks that the tests do not run, and why."""


def clocked(*pairs):
    """Pairs of seconds that took the processor half of the time."""
    return [tuple(Timing(seconds, seconds / 2) for seconds in pair) for pair in pairs]


def test_the_ratio_is_the_median_of_the_pairs_so_that_a_drift_of_the_machine_cancels():
    # the machine gets four times slower on the way; ours takes a tenth more in every pair but one
    result = paired("step", "s", clocked((1.1, 1.0), (2.2, 2.0), (4.0, 4.0)), target=AT_MOST)
    assert (result.value, result.baseline, result.cpu) == (2.2, 2.0, 1.1)
    assert result.ratio == pytest.approx(1.1)
    assert result.spread == pytest.approx((1.0, 1.1))
    assert result.repetitions == 3
    assert result.passed is False


@pytest.mark.parametrize(
    ("relation", "measured", "expected"),
    [("<=", 1.05, True), ("<=", 1.06, False), (">=", 0.9, True), (">=", 0.89, False)],
)
def test_a_target_includes_its_limit(relation, measured, expected):
    assert Target(relation=relation, limit=1.05 if relation == "<=" else 0.9).is_met(measured) is expected


def test_processor_time_has_a_ratio_of_its_own():
    result = paired("step", "s", [(Timing(2.0, 1.0), Timing(1.0, 1.0))])
    assert (result.ratio, result.cpu_ratio) == (2.0, 1.0)


def test_pairs_are_measured_by_turns_after_one_that_warms_up():
    calls = []
    pairs = in_turns(lambda: calls.append("a") or len(calls), lambda: calls.append("b") or -len(calls), pairs=3)
    assert "".join(calls) == "abbaabba"
    assert pairs == [(4, -3), (5, -6), (8, -7)]


def test_a_target_without_a_baseline_bounds_the_value():
    assert repeated("help", "s", [0.9, 0.1, 0.2], target=Target(relation="<=", limit=0.5)).passed is True


def test_a_result_without_a_target_neither_passes_nor_misses():
    result = repeated("sync", "s", [0.25])
    assert result.passed is None
    assert result.spread is None
    assert "pass" not in table([result]) and "MISSED" not in table([result])


def test_the_table_has_one_aligned_line_a_result():
    results = [
        paired("step", "s", clocked((1.1, 1.0)), target=AT_MOST, note="400 tokens"),
        Result(name="demo", value=250.0, unit="s", target=Target(relation="<=", limit=300)),
    ]
    header, step, demo = table(results).splitlines()
    assert " ".join(step.split()) == "step 1.100 s 0.550 1.000 s 1.100 1.100 <= 1.05 MISSED 1 1.100 to 1.100 400 tokens"
    assert " ".join(demo.split()) == "demo 250 s <= 300 pass 1"
    assert header.index("target") == step.index("<=") == demo.index("<=")


def test_a_result_for_machines_says_whether_it_passed():
    result = paired("step", "s", clocked((1.0, 1.0)), target=AT_MOST)
    read = json.loads(json.dumps(result.as_dict()))
    assert read["passed"] is True
    assert read["target"] == "<= 1.05"
    assert read["ratio"] == 1.0


def test_all_but_the_demo_run_unless_it_is_asked_for():
    known = dict.fromkeys(("help", "demo", "step"), list)
    assert run.choose(known, [], demo=False) == ["help", "step"]
    assert run.choose(known, [], demo=True) == ["help", "step", "demo"]
    assert run.choose(known, ["step"], demo=False) == ["step"]
    assert run.choose(known, ["demo"], demo=True) == ["demo"]


def test_an_unknown_benchmark_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match="benchmark 'stepp' does not exist; known: step"):
        run.choose({"step": list}, ["stepp"], demo=False)


def test_every_promised_benchmark_is_found():
    assert {"step", "engine", "sync", "demo", "debug", "help"} <= set(run.find_benchmarks())


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RuntimeError, match=r"polyphony sing failed:(.|\n)*no verb 'sing'"):
        commands.measure(["sing"])


def test_the_cost_of_a_command_is_its_own_time_and_memory():
    cost = commands.measure(["--help"])
    assert 0 < cost.seconds.clock < 60
    assert 0.01 < cost.seconds.cpu < 60
    assert 0 < cost.peak_gib < 1  # sampled: a command this short may be seen only while it starts


def test_one_that_ends_while_it_is_asked_is_no_failure(monkeypatch):
    ended = psutil.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda process, recursive: [ended])
    assert tree_cpu_s() > 0


def test_what_two_processes_measured_on_a_gpu_is_one_table(monkeypatch):
    values = {"step": 1.0, "sync": 0.1, "peak memory": 6.0, "colocate step": 2.0, "colocate sync": 0.4}
    values |= {"colocate peak memory": 8.0, "engine": 900.0, "weight check": 0.0}

    def measure(group, policy, folder, *, effort):
        return [Result(name=name, value=values[name], unit="s", cpu=0.5) for name in GROUPS[group]]

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "_policies", lambda scratch: {"lab": LAB})
    rows = {row.name: row.ratio for row in gpu.bench_gpu()}
    against = {
        "lab step, TRL's colocate": 0.5,
        "lab sync, TRL's colocate": 0.25,
        "lab peak memory, TRL's colocate": 0.75,
    }
    assert rows == {
        **{f"lab {name}": None for name in GROUPS["ours"]},
        **{k: pytest.approx(v) for k, v in against.items()},
    }


def test_a_line_from_another_process_is_the_same_line():
    step = paired("step", "s", clocked((1.1, 1.0)), target=AT_MOST)
    assert read_result(json.loads(json.dumps(asdict(step)))) == step


def broken():
    raise ValueError("no\nengine")


def test_a_benchmark_that_fails_is_a_line_of_the_table_and_the_others_stay(capsys, monkeypatch):
    fine = repeated("fine", "s", [1.0])
    known = {"first": lambda: [fine], "broken": broken, "last": lambda: [fine]}
    monkeypatch.setattr(run, "find_benchmarks", lambda: known)
    assert run.main([]) == 1
    _, first, second, last = capsys.readouterr().out.splitlines()
    assert first == last and first.startswith("fine")
    assert second.split() == ["broken", "FAILED", "ValueError:", "no", "engine"]


def test_an_interrupt_ends_with_the_table_of_what_there_is(capsys):
    def stopped():
        raise KeyboardInterrupt

    fine = repeated("fine", "s", [1.0])
    found = run.measure({"fine": lambda: [fine], "stopped": stopped, "never": broken}, ["fine", "stopped", "never"])
    assert [result.name for result in found] == ["fine", "stopped"]
    assert json.loads(json.dumps(found[1].as_dict(), allow_nan=False))["value"] is None


def test_a_missed_target_is_no_failure(monkeypatch, capsys):
    missed = repeated("slow", "s", [2.0], target=AT_MOST)
    monkeypatch.setattr(run, "find_benchmarks", lambda: {"slow": lambda: [missed]})
    assert run.main([]) == 0
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(run.find_benchmarks().keys() - NOT_HERE))
def test_every_benchmark_runs(name):
    found = run.find_benchmarks()[name](short=True)
    assert found
    for result in found:
        numbers = (result.value, result.baseline, result.ratio)
        assert all(math.isfinite(number) for number in numbers if number is not None), result


@pytest.mark.slow
def test_the_engine_is_found_to_follow_the_weights_and_an_engine_that_does_not_is_found_out(tmp_path, monkeypatch):
    from polyphony.launch.measures.side_by_side import lab_engine
    from polyphony.launch.measures.spine import ours

    engine = lab_engine()
    rows = dict(ours(LAB, tmp_path, effort=Effort(pairs=1, steps=1), engine=engine))
    assert rows.keys() == set(GROUPS["ours"])  # engine, sync and step are measured above
    assert rows["peak memory"]().value > 0
    found = rows["weight check"]()
    assert found.passed
    assert found.note.endswith("every parameter is the policy's")
    monkeypatch.setattr(engine, "sync_weights", lambda: None)
    with pytest.raises(RuntimeError, match="the engine does not follow the policy's weights"):
        rows["weight check"]()
