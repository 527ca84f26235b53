"""Stages in real runs: measured where they end, reviewed to the last one, replayed as they ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyphony.launch.cli import main
from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import train
from polyphony.launch.verbs.probe import probe
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import RECIPES

pytestmark = pytest.mark.slow
# evaluations would fall at the start and the end alone
SPARSE = ["tracking.wandb=null", "grpo.max_steps=5", "eval.every=100", "eval.samples=1", "checkpoint.every=100"]


class Needy:
    """A scheduler that cannot do without a setting."""

    def __init__(self, share):
        self.share = share

    def decide(self, evidence, state):
        raise NotImplementedError


@pytest.fixture(scope="module")
def planned(engine, tmp_path_factory):
    """A run by `bwt` on a probe of its own."""
    folder = tmp_path_factory.mktemp("planned")
    probe(load_recipe(RECIPES / "debug.yaml", [*SPARSE, "probe.seeds=1"]), folder / "probe", engine=engine)
    bwt = f"curriculum={{scheduler: bwt, transfer: {folder / 'probe' / 'transfer.json'}, replay: {{fraction: 0.5}}}}"
    train(load_recipe(RECIPES / "debug.yaml", [*SPARSE, bwt]), folder / "run", engine=engine)
    return folder / "run"


def moments(run) -> list[tuple]:
    rows = json.loads((run / "transfer.json").read_text())["rows"]
    return [(row["step"], row["trained"]) for row in rows if not row["probe"]]


def test_a_stage_is_measured_where_it_ends_though_no_evaluation_was_due(tmp_path, engine):
    sequential = "curriculum={scheduler: sequential, order: [stories, arithmetic]}"
    train(load_recipe(RECIPES / "debug.yaml", [*SPARSE, sequential]), tmp_path / "run", engine=engine)
    decisions = RunFolder(tmp_path / "run").decisions()
    last = max(line["step"] for line in decisions if line["stage"] == "stories")
    assert 0 < last < 5
    assert moments(tmp_path / "run") == [(0, []), (last, ["stories"]), (5, ["arithmetic"])]


def test_every_stage_is_reviewed_the_last_one_too(planned):
    reviews = json.loads((planned / "predicted.json").read_text())
    assert sorted(review["stage"] for review in reviews) == ["arithmetic", "stories"]
    assert reviews[-1]["why"] == "the run is over"
    rows = json.loads((planned / "transfer.json").read_text())["rows"]
    assert len(moments(planned)) == 3
    for review, row in zip(reviews, [r for r in rows if r["trained"] and not r["probe"]], strict=True):
        assert row["trained"] == [review["stage"]]
        assert set(review["measured"]) == set(review["predicted"]) == {"arithmetic", "stories", "safety"}


def test_the_scheduler_that_ran_is_replayed_with_its_own_settings_and_with_others(planned, capsys):
    def replayed(*settings) -> list[dict]:
        assert main(["plan", "--replay", str(planned), "--scheduler", "bwt", *settings, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert all(line["ran"] == line["replayed"] for line in replayed())
    assert 0.5 in replayed()[-1]["ran"].values()
    changed = replayed("curriculum.replay.fraction=0")
    assert set(changed[-1]["replayed"].values()) == {0.0, 1.0} != set(changed[-1]["ran"].values())


def test_any_scheduler_is_replayed_and_drawn_or_refused_in_one_line(planned, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = sorted(planned.rglob("*"))
    assert main(["plan", "--replay", str(planned), "--scheduler", "joint"]) == 0
    assert sorted(planned.rglob("*")) == held  # nothing is written into a run folder but the report
    page = Path(f"{planned.name}-replay-joint.html")
    assert str(page) in capsys.readouterr().out and "joint, replayed" in page.read_text()
    assert main(["plan", "--replay", str(planned), "--scheduler", "tests.test_stage_ends:Needy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "scheduler 'tests.test_stage_ends:Needy' refuses {}" in line and "share" in line
