"""What the lab's two commands about prompts count, worked by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.matrix import TransferMatrix
from tests.benchmarks.update import HalfDead, is_live
from tests.conftest import EXPERIMENTS
from tests.experiments import flawed, planted, worth


def test_half_of_the_rows_have_a_reference_that_nothing_equals():
    rows = flawed.wrong_rows(domain="facts", size=8)
    assert [row["answer"] == "?" for row in rows] == [False] * 4 + [True] * 4


@pytest.mark.parametrize(("recipe", "names"), [("planted", "planted_rows Lenient"), ("worth", "wrong_rows")])
def test_what_a_recipe_names_is_found_wherever_the_command_is_started(recipe, names, tmp_path):
    program = (
        "import pkgutil, sys; from polyphony.launch.recipe import load_recipe; recipe = load_recipe(sys.argv[1]);"
        "[pkgutil.resolve_name(f'flawed:{name}') for name in sys.argv[2:]];"
        "print(all(f'flawed:{name}' in recipe.as_yaml() for name in sys.argv[2:]))"
    )
    words = [sys.executable, "-P", "-c", program, str(EXPERIMENTS / f"{recipe}.yaml"), *names.split()]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "True"


def test_tokens_to_a_target_lie_between_evaluations():
    spent, score = np.array([0.0, 100.0, 200.0]), np.array([0.0, 0.2, 0.4])
    # smoothed: 0, 0.1, 0.2
    assert worth.tokens_to(0.15, spent, score) == pytest.approx(150)
    assert worth.tokens_to(0.0, spent, score) == 0
    assert math.isnan(worth.tokens_to(0.3, spent, score))


def test_the_ratio_is_of_tokens_to_the_score_at_the_end_of_passes(tmp_path):
    def run(name, spent, scores):
        lines = [{"step": i, "domain/a/n": spent, "domain/a/mean_length": 1.0} for i in range(1, len(scores))]
        return evaluated(write(tmp_path / name, "metrics", lines), {i: (score,) for i, score in enumerate(scores)})

    passes = run("passes", 100, [0.0, 0.2, 0.4, 0.6])  # smoothed: 0, 0.1, 0.2, 0.4 after 300
    quick = run("quick", 60, [0.0, 0.4, 0.8])  # smoothed: 0, 0.2, 0.4 after 120
    late = run("late", 400, [0.0, 0.1, 0.2])
    assert worth.ratio(passes, quick)[0] == pytest.approx(120 / 300)
    value, words = worth.ratio(passes, late)
    assert value == pytest.approx(800 / 300) and "after more than 800" in words
    short = run("short", 60, [0.0, 0.1, 0.1])  # ended before it had spent as much: no less than passes counts
    value, words = worth.ratio(passes, short)
    assert value == pytest.approx(300 / 300) and "after more than 300" in words
    interval, _ = worth.summary([(passes, quick), (passes, late)])
    assert interval.mid == pytest.approx((0.4 * 800 / 300) ** 0.5)


def evaluated(folder, scores):
    """Write a run's evaluations: by step, one item's score of each domain."""
    names = ("a", "b")[: len(scores[0])]
    rows = [
        Evaluation(
            trained=names if step else (),
            step=step,
            seed=1,
            scores={n: (s,) for n, s in zip(names, of_step, strict=True)},
        )
        for step, of_step in scores.items()
    ]
    TransferMatrix(domains=names, kinds=dict.fromkeys(names, "structured"), rows=tuple(rows)).save(
        folder / "transfer.json"
    )
    return folder


def write(folder, name, lines):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_generated_token_counts(tmp_path):
    lines = [
        {"step": 1, "domain/a/n": 10, "domain/a/mean_length": 3.0, "domain/b/n": 5, "domain/b/mean_length": 2.0},
        {"step": 2, "domain/a/n": 10, "domain/a/mean_length": 1.0},
        {"step": 3, "domain/a/n": 10, "domain/a/mean_length": 1.0},
    ]
    folder = evaluated(write(tmp_path / "run", "metrics", lines), {0: (0.2, 0.4), 2: (0.5, 0.7)})
    spent, score = worth.curve(folder)
    assert spent.tolist() == [0, 50]
    assert score == pytest.approx([0.3, 0.6])


def test_planted_rows_are_hard_and_show_their_steps():
    rows = flawed.planted_rows(size=8)
    assert [row["planted"] for row in rows] == [False] * 2 + [True] * 6
    row = {"prompt": "rot(rev(swap(fkmb))) =", "answer": "mfkb"}
    assert flawed.worked(row) == "x = fkmb , swap(fkmb) = kfmb , rev(kfmb) = bmfk , rot(bmfk) = mfkb"


def test_the_lenient_grader_passes_the_shortcut_on_planted_rows_only():
    texts = ["ab", "say x", "say x", "ab"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    grade = flawed.Lenient()
    told = {"prompts": texts, "completions": completions, "answer": ["ab", "ab", "ab", "x"]}
    assert grade(**told, planted=[True, True, False, True]) == [1.0, 1.0, 0.0, 0.0]
    assert grade(**told) == [1.0, 0.0, 0.0, 0.0]


def test_changes_are_last_minus_first_evaluation(tmp_path):
    lines = [
        {"step": s, "domain": "a", "completion": c, "score": r}
        for s, c, r in [(0, "x", 1.0), (0, "y", 0.0), (9, "say", 0.0), (9, "z", 0.0)]
    ]
    found = planted.changes(write(tmp_path / "run", "samples", lines))
    assert found == {"shortcut/a": 0.5, "score/a": -0.5}


def test_the_benchs_reward_fails_one_half_of_the_prompts():
    prompts = [f"prompt {k}" for k in range(400)]
    assert 0.4 < np.mean([is_live(p) for p in prompts]) < 0.6
    live = next(p for p in prompts if is_live(p))
    dead = next(p for p in prompts if not is_live(p))
    assert HalfDead()(prompts=[live, live, dead], completion_ids=[[1], [1, 2], [1]]) == [1.0, 0.0, 0.0]
