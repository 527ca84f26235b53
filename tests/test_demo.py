"""The demo's second run, and what it prints; that it learns and harms nothing is measured, in launch/lab/RESULTS.md."""

import json
from itertools import pairwise

import pytest

from polyphony.launch.recipe import load_recipe
from polyphony.launch.report.closing import closing
from polyphony.launch.report.numbers import find
from polyphony.launch.report.run import read_run
from polyphony.launch.verbs import demo
from polyphony.trainer.run.folder import RunFolder
from tests.benchmarks.synthetic_run import write_run


@pytest.fixture
def trained(monkeypatch):
    """Nothing is trained: runs are written that look like it. (Recipe, folder) of each."""
    runs = []

    def train(recipe, out, *, engine):
        runs.append((recipe, write_run(out, steps=20, items=20)))
        return engine

    monkeypatch.setattr(demo, "probe", lambda recipe, out: write_run(out, steps=20, items=20) and "engine")
    monkeypatch.setattr(demo, "train", train)
    return runs


def test_the_second_run_of_a_comparison_differs_in_its_rate_alone(trained, tmp_path):
    out = demo.demo(tmp_path / "demo", compare=True)
    (recipe, first), (faster, second) = trained
    assert float(faster.grpo["learning_rate"]) == float(demo.TOO_HIGH) > 2 * float(recipe.grpo["learning_rate"])
    same = {"learning_rate": recipe.grpo["learning_rate"]}
    assert faster.model_copy(update={"grpo": faster.grpo | same}) == recipe
    assert recipe.curriculum.transfer == str(out / "probe" / "transfer.json")
    said = demo.demo_tables(out)
    assert f"{second.name} minus {first.name}, at the end" in said
    titles = [before for before, line in pairwise(said.splitlines()) if "held-out score" in line]
    assert [title.split(", ")[0] for title in titles] == [first.name, second.name]
    assert said.endswith(f"report: {out / 'compared.html'}") and second.name in (out / "compared.html").read_text()


def test_without_a_comparison_there_is_one_run_and_its_report(trained, tmp_path):
    out = demo.demo(tmp_path / "demo")
    assert [(recipe.grpo, folder.name) for recipe, folder in trained] == [(load_recipe(demo.RECIPE).grpo, "run")]
    assert demo.demo_tables(out).endswith(f"report: {out / 'run' / 'report.html'}")


def test_a_change_is_printed_with_its_interval(tmp_path):
    findings = find(read_run(write_run(tmp_path / "run", steps=20, items=20)))
    (line,) = [line for line in closing(findings).splitlines() if line.startswith("safety")]
    change = findings.change["safety"]
    assert f"{change.mid:+.3f}".replace("-", "−") in line and "[" in line and "only watched" in line


def test_a_run_ends_with_its_best_checkpoint_and_its_alarms(tmp_path):
    run = write_run(tmp_path / "run", steps=20, items=20)
    (run / "alarms.jsonl").unlink(missing_ok=True)
    best = RunFolder(run).best
    best.parent.mkdir(exist_ok=True)
    best.write_text('{"checkpoint": "checkpoint-10", "worst_domain_score": 0.25}')
    said = closing(find(read_run(run))).splitlines()
    assert said[-2:] == ["best checkpoint, by its worst trained domain (0.250): checkpoint-10", "no alarm"]
    rung = [("collapse", "math"), ("collapse", "math"), ("below_start", "code"), ("spread", ""), ("stale", "code")]
    lines = [{"step": n, "kind": kind, "domain": domain, "message": ""} for n, (kind, domain) in enumerate(rung)]
    (run / "alarms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = closing(find(read_run(run))).splitlines()
    assert said[-1] == "5 alarms: collapse of math (2 times), below_start of code, spread and 1 more"
