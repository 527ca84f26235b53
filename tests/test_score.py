"""`polyphony score` with every reward there is."""

from __future__ import annotations

import json

import pytest

from polyphony.launch.cli import main
from polyphony.launch.verbs.score import score_rows
from polyphony.rewards.registry import REGISTRY
from tests.conftest import write_rows
from tests.test_judge import Server

LOOP = "while True: pass"
WEATHER = [{"name": "weather", "arguments": {"city": "Paris"}}]
VERL = {"name": "verl", "function": "tests.test_attacks:compute_score"}
WEIGHTED = {"name": "weighted", "parts": {"a": {"reward": "exact", "weight": 0.5}, "b": {"reward": "format"}}}

ROWS = {
    "code": (
        "code",
        [("print(4)", {"tests": [{"input": "", "output": "4"}]}, 1.0), ("4", {"test_code": "assert x"}, 0.0)],
    ),
    "exact": ("exact", [("4", {"answer": "4"}, 1.0), ("5", {"answer": "4"}, 0.0)]),
    "format": ("format", [("<think>2</think><answer>4</answer>", {}, 1.0), ("4", {}, 0.0)]),
    "function_call": (
        "function_call",
        [("weather(city='Paris')", {"answer": WEATHER}, 1.0), ("", {"answer": WEATHER}, 0.0)],
    ),
    "language": ("language", [("да", {}, 0.0), ("yes", {}, 1.0)]),
    "length": (
        {"name": "length", "max_tokens": 4, "soft_tokens": 2},
        [("yes", {"completion_ids": [7, 8, 9]}, -0.5), ("yes", {}, None)],  # nobody said how many tokens
    ),
    "math": (
        "math",
        [(r"\boxed{2x}", {"answer": "x + x"}, 1.0), ("5", {"answer": "4"}, 0.0), ("4", {"answer": ""}, None)],
    ),
    "multiple_choice": ("multiple_choice", [("B", {"answer": "B", "choices": ["1", "2"]}, 1.0)]),
    "repetition": ("repetition", [("a b c a b c", {}, -0.25)]),
    "short_answer": ("short_answer", [("the Paris.", {"answer": ["Paris", "Lutetia"]}, 1.0)]),
    "verl": (VERL, [("4", {"answer": "4"}, 1.0), ("[", {"answer": "4"}, None)]),
    "weighted": (WEIGHTED, [("4", {"answer": "4"}, 0.5)]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_file_are_scored_in_order(name, tmp_path):
    spec, rows = ROWS[name]
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": text, **more} for text, more, _ in rows])
    reward = spec if isinstance(spec, str) else json.dumps(spec)
    assert score_rows(file, reward=reward).rewards == [expected for _, _, expected in rows]


def test_what_a_reward_logs_is_printed_beside_the_rewards(tmp_path, capsys):
    rows = [{"prompt": "q", "completion": c, "tests": [{"input": "", "output": "4"}]} for c in ("print(4)", LOOP)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    spec = json.dumps({"name": "code", "limits": {"wall_s": 1, "cpu_s": 1}})
    assert main(["score", str(file), "--reward", spec]) == 0
    assert "exhausted: 1 of 2\nsuspected tricks: 0 of 2\nrefused calls: 0 of 2\n" in capsys.readouterr().out
    assert main(["score", str(file), "--reward", spec, "--json"]) == 0
    logged = {
        "exhausted": {"sum": 1.0, "of": 2},
        "suspected_tricks": {"sum": 0.0, "of": 2},
        "refused_calls": {"sum": 0.0, "of": 2},
    }
    assert json.loads(capsys.readouterr().out) == {"rewards": [1.0, 0.0], "logged": logged}


def test_a_judge_scores_a_file(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Write.", "completion": "text"}])
    with Server('{"score": 10}') as server:
        spec = {"name": "judge", "endpoint": server.url, "model": "j"}
        assert score_rows(file, reward=json.dumps(spec)).rewards == [1.0]


@pytest.mark.slow
def test_a_procedural_domain_scores_its_own_rows(tmp_path):
    from polyphony.rewards.procedural import rows

    (row,) = rows(split="train", dataset="chain_sum", size=1, seed=0)
    file = write_rows(tmp_path / "rows.jsonl", [{**row, "completion": text} for text in (row["answer"], "no")])
    assert score_rows(file, reward="procedural").rewards == [1.0, 0.0]


def test_every_reward_is_among_these():
    assert {*ROWS, "judge", "procedural"} == set(REGISTRY)
