"""`polyphony init`: from somebody's rows to a recipe that passes the preflight and trains."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from polyphony.launch.cli import main
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.schema import schema
from polyphony.launch.verbs.init import Guess, init
from polyphony.launch.yaml_text import read_yaml
from tests.conftest import POLICY, RECIPES

CHANCE = random.Random(0)
SUMS = [{"question": f"{a} + {b} =", "target": str(a + b)} for a in range(9) for b in range(9)]
CAPITALS = [{"prompt": f"The capital of land {n}?", "answer": f"town {n * 7}"} for n in range(60)]
LETTERS = [{"prompt": f"Which letter, {n}? A: {n} B: {-n}", "answer": CHANCE.choice("AB")} for n in range(60)]
STEPS = [
    {"prompt": f"How many, {n}?", "answer": "Count " + "one more, " * 30 + f"so it is\n#### {n}"} for n in range(60)
]
MMLU = [{"question": f"Which, {n}?", "choices": [f"w{n}", f"x{n}", "y", "z"], "answer": n % 4} for n in range(60)]
ESSAYS = [{"prompt": f"Write, {n}.", "answer": "a long text, " * 20 + str(n)} for n in range(60)]
VERLS = [
    {
        "prompt": [{"role": "user", "content": f"{n} times 3?"}],
        "reward_model": {"ground_truth": str(3 * n), "style": "rule"},
        "data_source": "openai/gsm8k",
    }
    for n in range(60)
]
CODE = [{"prompt": f"Write f that adds {n}.", "tests": f"assert f(1) == {1 + n}"} for n in range(60)]
CALLS = [
    {"prompt": f"Look up {n}.", "answer": json.dumps([{"name": "look", "arguments": {"n": n}}])} for n in range(60)
]


def written(folder: Path, name: str, rows) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("rows", "reward"),
    [
        (SUMS, "math"),
        (STEPS, "math"),
        (CAPITALS, "short_answer"),
        (LETTERS, "multiple_choice"),
        (CALLS, "function_call"),
        (MMLU, "multiple_choice"),
    ],
)
def test_a_reward_is_one_that_takes_references_for_right_and_others_for_wrong(tmp_path, rows, reward):
    guess = Guess.of(written(tmp_path, "rows", rows), None)
    assert guess.reward == reward, guess.why
    prompts = {split: {json.dumps(row["prompt"]) for row in getattr(guess, split)} for split in ("train", "heldout")}
    assert not prompts["train"] & prompts["heldout"] and len(prompts["heldout"]) >= 16 and guess.size == len(rows)


def test_a_recipe_passes_the_preflight_and_trains(tmp_path, capsys, monkeypatch):
    files = [written(tmp_path, "Sums-easy", SUMS), written(tmp_path, "capitals", CAPITALS)]
    out = tmp_path / "new" / "mine.yaml"
    given = ["init", "--from", *map(str, files), "--model", str(POLICY), "--out", str(out)]
    assert main(given) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "Sums-easy.jsonl: reward math (of 48 references 100% are right, of another row's" in said.err
    assert "`prompt` is its `question`, `answer` is its `target`" in said.err
    text = out.read_text()
    assert text.startswith("# yaml-language-server: $schema=mine.schema.json\n")
    assert Draft202012Validator(json.loads((out.parent / "mine.schema.json").read_text())).is_valid(read_yaml(out))
    assert list(load_recipe(out).domains) == ["sums_easy", "capitals"]
    quick = ["rollouts.engine=transformers", "grpo.max_steps=1", "grpo.max_completion_length=8", "eval.samples=1"]
    quick += ["grpo.gradient_accumulation_steps=1", "grpo.bf16=false", "eval.kl_items=0", "grpo.use_cpu=true"]
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(out), "--dry-run"]) == 0
    assert main(["train", str(out), *quick]) == 0
    assert (tmp_path / "runs" / "mine" / "final" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(given) == 2
    assert capsys.readouterr().err == f"polyphony init: {out} exists; choose another --out\n"


def test_choices_are_shown_in_the_prompt_and_an_index_becomes_a_letter(tmp_path):
    guess = Guess.of(written(tmp_path, "rows", MMLU))
    row = next(row for row in (*guess.train, *guess.heldout) if row["prompt"].startswith("Which, 5?"))
    assert (row["prompt"], row["answer"]) == ("Which, 5?\nA. w5\nB. x5\nC. y\nD. z", "B")
    assert "the choices are written into 60 prompts; 60 answers, an index or a choice's text, are written" in str(guess)


def test_a_table_is_read_whatever_the_case_of_its_columns_and_repeats_are_said(tmp_path):
    file = tmp_path / "Sums.CSV"
    lines = [f'"{row["question"]}",{row["target"]}' for row in (*SUMS, *SUMS[:2])]
    file.write_text("\n".join(["Question,Answer", *lines]), encoding="utf-8-sig")
    guess = Guess.of(file)
    assert (guess.name, guess.reward, guess.size, guess.repeated) == ("sums", "math", 81, 2)
    assert "2 rows repeat others and are left out" in str(guess)
    file.write_text("\n".join(["Question,Answer", *lines, "x,1,2"]))
    with pytest.raises(RecipeError, match=r"Sums\.CSV: line 85: more columns than the header's 2"):
        Guess.of(file)


@pytest.mark.parametrize("name", ["2024", "true", "null", "7e1", "a b"])
def test_names_that_yaml_would_read_as_something_else_stay_names(tmp_path, name):
    file = written(tmp_path, name, SUMS)
    recipe = load_recipe(init([file], tmp_path / f"{name}.yaml", model=str(POLICY)))
    assert (recipe.name, len(recipe.domains), recipe.model) == (name, 1, str(POLICY.resolve()))


def test_what_a_reward_is_asked_for_is_looked_for_and_a_judge_is_to_be_filled_in(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, "essays", ESSAYS)
    recipe = load_recipe(init([file], reward="judge"))
    assert recipe.domains["essays"].reward == {
        "name": "judge",
        "endpoint": "http://127.0.0.1:8001/v1",
        "model": "judge",
    }
    assert recipe.domains["essays"].kind == "open_ended" and "fill in `endpoint` and `model`" in capsys.readouterr().err
    exact = load_recipe(init([file], Path("exact.yaml"), reward="exact"))
    assert exact.domains["essays"].kind == "structured"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--reward", "mth"], "--reward: reward 'mth' does not exist; did you mean 'math'?"),
        (["--reward", "verl"], "--reward: reward 'verl': needs function"),
        (["--model", "/nope"], "--model /nope: no such folder, and no name on the hub"),
        (["--out", "mine.json"], "--out mine.json: expected a name that ends in .yaml"),
        (["--out", "new/sub/..yaml"], "name: a run's folder is called so"),
    ],
)
def test_what_makes_no_recipe_leaves_nothing_behind(tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "sums", SUMS)
    assert main(["init", "--from", "sums.jsonl", *given]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sums.jsonl"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (SUMS[:20], "20 different prompts; at least 40 are needed"),
        ([{"prompt": "One.", "answer": str(n)} for n in range(60)], "1 different prompts; at least 40 are needed"),
        ([{"ask": str(n)} for n in range(60)], "no column is a prompt in every row; it has ask, known are prompt, "),
        (
            [{"prompt": str(n)} for n in range(60)],
            "reference: it has prompt; give --answer COLUMN, or call one answer, ",
        ),
        (
            [{"messages": [{"role": who, "content": str(n)} for who in ("user", "assistant")]} for n in range(60)],
            "no column is a reference: its messages end with the answer: move that to a column `answer`",
        ),
        ([], "has no rows"),
        (ESSAYS, "takes its references, 'a long text, a long"),
        (
            [*SUMS[:44], {"question": "1 ="}, *SUMS[44:], {"question": "2 ="}],
            "line 45 (and 1 more) has no `target`, which",
        ),
        ([*SUMS, {"question": " ", "target": "1"}], "line 82 has no `question`, which the others have"),
        ([*MMLU, {**MMLU[0], "answer": 9}], "line 61: answer must be one letter of A to D"),
    ],
)
def test_rows_that_nothing_can_be_made_of_are_told_in_one_line(tmp_path, capsys, rows, message):
    file = written(tmp_path, "rows", rows)
    assert main(["init", "--from", str(file), "--out", str(tmp_path / "mine.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"polyphony init: {file}: ") and message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "question,answer\n", "has no rows"),
        ("a.csv", "question;answer\n1;2\n", "line 1: columns are parted by ';', expected ',' in a .csv"),
        ("a.csv", "question,question,answer\n1,2,3\n", "line 1: 2 columns are called 'question'"),
        ("a.csv", 'question,answer\n1,2\n"3,4\n', "after line 2: unexpected end of data; is a quote not closed?"),
        ("a.csv", "question,answer\n\udcff,2\n", "not UTF-8, in which it must be saved: invalid start byte at byte 16"),
        ("a.xlsx", "PK", "cannot read .xlsx; known: .jsonl, .json, .parquet, .csv, .tsv"),
    ],
)
def test_files_that_are_no_rows_are_told_in_one_line(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    assert main(["init", "--from", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"polyphony init: {tmp_path / name}: {message}\n"


def test_columns_are_found_by_the_names_that_are_given(tmp_path, capsys):
    file = written(tmp_path, "sums", [{"task": row["question"], "result": row["target"]} for row in SUMS])
    recipe = load_recipe(init([file], tmp_path / "mine.yaml", prompt="task", answer="result", model=str(POLICY)))
    assert recipe.domains["sums"].reward == "math" and recipe.grpo["learning_rate"] == 2e-4
    assert "`prompt` is its `task`, `answer` is its `result`" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=rf"--answer resul: no such column; {file} has result, task$"):
        init([file], tmp_path / "other.yaml", prompt="task", answer="resul")
    with pytest.raises(RecipeError, match="--prompt task and --answer task: one column cannot be both"):
        init([file], tmp_path / "other.yaml", prompt="task", answer="task")


def test_a_column_that_is_given_is_that_of_the_files_that_have_it(tmp_path, capsys):
    odd = written(tmp_path, "odd", [{"question": row["question"], "outcome": row["target"]} for row in SUMS])
    files = [odd, written(tmp_path, "sums", SUMS)]
    init(files, tmp_path / "mine.yaml", answer="outcome", model=str(POLICY))
    said = capsys.readouterr().err
    assert "`answer` is its `outcome`" in said and "`answer` is its `target`" in said
    with pytest.raises(RecipeError, match="no column is a reference: it has outcome, question; give --answer COLUMN"):
        init(files, tmp_path / "other.yaml", model=str(POLICY))


def test_a_column_that_is_given_goes_before_one_of_the_usual_name(tmp_path, capsys):
    rows = [{"question": row["question"], "outcome": row["target"], "answer": "see the book"} for row in SUMS]
    recipe = load_recipe(init([written(tmp_path, "sums", rows)], tmp_path / "mine.yaml", answer="outcome"))
    assert recipe.domains["sums"].reward == "math" and "`answer` is its `outcome`" in capsys.readouterr().err
    assert "see the book" not in (tmp_path / "mine-rows" / "sums-train.jsonl").read_text()


def test_what_is_wrong_with_each_file_is_told_at_once(tmp_path, capsys):
    files = [written(tmp_path, name, rows) for name, rows in (("few", SUMS[:20]), ("sums", SUMS), ("none", []))]
    assert main(["init", "--from", *map(str, files), "--out", str(tmp_path / "mine.yaml")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "few.jsonl: 20 different prompts" in first and "none.jsonl: has no rows" in second


def test_a_name_on_the_hub_is_no_file(capsys):
    assert main(["init", "--from", "hf://openai/gsm8k"]) == 2
    assert "files of this machine are read, not hf" in capsys.readouterr().err


def test_the_schema_takes_our_recipes_and_underlines_mistakes():
    check = Draft202012Validator(schema())
    for recipe in RECIPES.glob("*.yaml"):
        assert not list(check.iter_errors(read_yaml(recipe))), recipe
    document = read_yaml(RECIPES / "debug.yaml")
    for change in ({"evall": {}}, {"grpo": {"learning_rte": 1}}, {"eval": {"every": 0}}, {"domains": {}}):
        assert not check.is_valid(document | change), change
    assert "no gradient" in schema()["$defs"]["RowSettings"]["properties"]["drop_dead"]["description"]
