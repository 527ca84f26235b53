"""The benchmarks' record and table; what they measure is for `make bench`."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from polyphony.launch.lab import bench, bench_commands, bench_gpu
from polyphony.launch.lab.bench_result import Result, Target, paired, repeated, table

AT_MOST = Target(relation="<=", limit=1.05)


def test_the_ratio_is_the_median_of_the_pairs_so_that_a_drift_of_the_machine_cancels():
    # the machine gets four times slower on the way; ours takes a tenth more in every pair but one
    result = paired("step", "s", ours=[1.1, 2.2, 4.0], baseline=[1.0, 2.0, 4.0], target=AT_MOST)
    assert (result.value, result.baseline) == (2.2, 2.0)
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


def test_a_target_without_a_baseline_bounds_the_value():
    assert repeated("help", "s", [0.9, 0.1, 0.2], target=Target(relation="<=", limit=0.5)).passed is True


def test_a_result_without_a_target_neither_passes_nor_misses():
    result = repeated("sync", "s", [0.25])
    assert result.passed is None
    assert result.spread is None
    assert "pass" not in table([result]) and "MISSED" not in table([result])


def test_the_table_has_one_aligned_line_a_result():
    results = [
        paired("step", "s", ours=[1.1], baseline=[1.0], target=AT_MOST, note="400 tokens"),
        Result(name="demo", value=250.0, unit="s", target=Target(relation="<=", limit=300)),
    ]
    header, step, demo = table(results).splitlines()
    assert " ".join(step.split()) == "step 1.100 s 1.000 s 1.100 <= 1.05 MISSED 1 1.100 to 1.100 400 tokens"
    assert " ".join(demo.split()) == "demo 250 s <= 300 pass 1"
    assert header.index("target") == step.index("<=") == demo.index("<=")


def test_a_result_for_machines_says_whether_it_passed():
    result = paired("step", "s", ours=[1.0], baseline=[1.0], target=AT_MOST)
    read = json.loads(json.dumps(result.as_dict()))
    assert read["passed"] is True
    assert read["target"] == "<= 1.05"
    assert read["ratio"] == 1.0


def test_all_but_the_demo_run_unless_it_is_asked_for():
    known = dict.fromkeys(("help", "demo", "step"), list)
    assert bench.choose(known, [], demo=False) == ["help", "step"]
    assert bench.choose(known, [], demo=True) == ["help", "step", "demo"]
    assert bench.choose(known, ["step"], demo=False) == ["step"]
    assert bench.choose(known, ["demo"], demo=True) == ["demo"]


def test_an_unknown_benchmark_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match="benchmark 'stepp' does not exist; known: step"):
        bench.choose({"step": list}, ["stepp"], demo=False)


def test_every_promised_benchmark_is_found():
    assert {"step", "engine", "sync", "demo", "debug", "help"} <= set(bench.find_benchmarks())


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RuntimeError, match=r"polyphony sing failed:(.|\n)*invalid choice: 'sing'"):
        bench_commands.measure(["sing"])


def test_the_cost_of_a_command_is_its_own_time_and_memory():
    cost = bench_commands.measure(["--help"])
    assert 0 < cost.seconds < 60
    assert 0.01 < cost.cpu_seconds < 60
    assert 0 < cost.peak_gib < 1  # sampled: a command this short may be seen only while it starts


def test_what_two_processes_measured_on_a_gpu_is_one_table():
    step = paired("step", "s", ours=[1.1], baseline=[1.0], target=AT_MOST)
    fields = json.loads(json.dumps(asdict(step)))
    assert bench_gpu._read(fields, policy="lab").name == "lab step"
    assert bench_gpu._read(fields, policy="lab").target == AT_MOST
    seen = {"results": [], "tokens_a_step": 10.0, "device": "X"}
    ours = bench_gpu.Measured(**seen, step_s=1.0, sync_s=0.1, peak_gib=6.0)
    colocate = bench_gpu.Measured(**seen, step_s=2.0, sync_s=0.4, peak_gib=8.0)
    rows = {row.name: row.ratio for row in bench_gpu._compared("lab", ours, colocate)}
    assert rows == {"lab step, TRL's colocate": 0.5, "lab sync": 0.25, "lab peak memory": 0.75}
