"""What the chaos run compares: a run's books against each other, and against those of another run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from polyphony.curricula.prompts.pool_file import Columns, save_pools
from polyphony.trainer.run.folder import POOL_FILE
from tests.experiments.accounts import compare, errors


def append(run, ledger: str, **line) -> None:
    with (run / f"{ledger}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture
def run(tmp_path):
    """Two steps of two prompts, four completions each; in the second, `c` was dead and `d` drawn for it."""
    return written(tmp_path / "run")


def written(run, *, entropy: float = 0.5):
    (run / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-2" / "polyphony.json").write_text(json.dumps({"curriculum": {"last": entropy}}))
    (run / "final").mkdir()
    (run / "final" / "model.safetensors").write_bytes(b"weights")
    for step, prompts in ((1, ["a", "b"]), (2, ["a", "c"])):
        evidence = {"entropy": entropy}
        append(run, "decisions", step=step, draw=step - 1, mixture={"x": 1.0}, prompts=prompts, evidence=evidence)
    append(run, "refills", step=2, round=1, prompts=["d"])
    append(run, "metrics", **{"step": 0, "heldout/x/score": 0.5})
    append(run, "metrics", **{"step": 1, "loss": 0.1, "domain/x/n": 8, "step_time": 1.0})
    append(run, "metrics", **{"step": 2, "loss": entropy, "domain/x/n": 12, "faults/regenerated": 4})
    save_pools(run / POOL_FILE, {"x": pool(a=2, b=1, c=1, d=1, e=0)})
    return run


def pool(**visits: int) -> Columns:
    seen = np.array(list(visits.values()))
    return Columns(ids=list(visits), successes=seen * 1.0, failures=seen * 0.0, visits=seen, due=seen * 0, clock=2)


def test_a_sound_run_has_no_errors(run):
    assert errors(run, group_size=4) == []


def test_a_draw_that_is_there_twice_is_named(run):
    append(run, "decisions", step=2, draw=1, mixture={"x": 1.0}, prompts=["a", "c"])
    assert errors(run, group_size=4)[0] == "draws are not 0 to 2, each once and in order"


def test_completions_that_were_lost_are_named(run):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"domain/x/n": 12', '"domain/x/n": 8'))
    assert errors(run, group_size=4) == ["step 2: 4 x 3 completions were asked for, 8 counted"]


def test_a_step_without_metrics_is_named(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]))
    assert errors(run, group_size=4) == ["steps [2] were drawn and have no metrics"]


def test_a_prompt_that_the_pool_has_seen_too_often_is_named(run):
    save_pools(run / POOL_FILE, {"x": pool(a=3, b=1, c=1, d=1, e=0)})
    assert errors(run, group_size=4) == ["x a: asked for 2 times, seen 3 times"]


def test_rounding_in_the_evidence_leaves_the_stream_equal_and_the_metrics_not(run, tmp_path):
    other = written(tmp_path / "other", entropy=0.5000001)
    found = compare(run, other, group_size=4)
    assert (found.accounted, found.prompts, found.metrics, found.weights) == (True, True, False, True)


def test_time_and_counts_of_faults_are_not_compared(run, tmp_path):
    other = written(tmp_path / "other")
    text = (other / "metrics.jsonl").read_text()
    text = text.replace('"step_time": 1.0', '"step_time": 9.0').replace('regenerated": 4', 'regenerated": 0')
    (other / "metrics.jsonl").write_text(text)
    assert compare(run, other, group_size=4).metrics


def test_another_prompt_is_a_difference(run, tmp_path):
    other = written(tmp_path / "other")
    text = (other / "refills.jsonl").read_text()
    (other / "refills.jsonl").write_text(text.replace('"d"', '"e"'))
    assert not compare(run, other, group_size=4).prompts
