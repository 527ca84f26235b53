"""The command: its help, dry runs, overrides, `score`, and what it imports."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from polyphony.launch.cli import SHELLS, VERBS, main, parse
from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import claim_folder
from tests.conftest import RECIPES, write_rows


def broken(prompts, **columns):
    raise ZeroDivisionError("nothing to divide by")


# --- help and dry runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_shows_two_examples_that_parse(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    said = capsys.readouterr().out
    shown = re.findall(r"^  polyphony (.*)$", said.partition("\nexamples:\n")[2], re.MULTILINE)
    assert len(shown) == 2 and shown == list(VERBS[verb].examples)
    assert [parse(shlex.split(line)).verb for line in shown] == [verb, verb]


def test_examples_that_cost_nothing_do_what_they_say(capsys, tmp_path, monkeypatch, completions):
    monkeypatch.chdir(tmp_path)
    completions.rename(tmp_path / "rows.jsonl")
    numbers = {"sums": range(40), "facts": range(100, 140)}
    for name, of in numbers.items():
        write_rows(tmp_path / f"{name}.jsonl", [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in of])
    for line in (*VERBS["score"].examples, VERBS["init"].examples[0]):
        assert main(shlex.split(line)) == 0, line
    assert list(load_recipe(tmp_path / "mine.yaml").domains) == ["sums", "facts"]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_told_how_to_complete_every_verb(capsys, shell):
    told = []
    for words in (["--print-completion", shell], [f"--print-completion={shell}"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        told.append(said := capsys.readouterr().out)
    assert told[0] == told[1]
    assert [name for name in VERBS if name not in said] == [] and "dry" in said


def test_completion_that_cannot_be_had_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    for words, why in (
        (["bash"], "needs shtab: pip install"),
        (["fish"], "expected one of bash"),
        ([], "expected one"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["--print-completion", *words])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"polyphony --print-completion: {why}")


def test_the_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"^    {verb}\b", said, re.MULTILINE) for verb in VERBS)


def modules_after(*arguments) -> set[str]:
    """Return the top-level modules that a fresh interpreter has imported after running the command."""
    program = (
        "import sys\nfrom polyphony.launch.cli import main\n"
        f"try:\n    main({[str(a) for a in arguments]!r})\nexcept SystemExit:\n    pass\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_help_imports_nothing_heavy():
    assert not modules_after("--help") & {
        "torch",
        "pydantic",
        "trl",
        "transformers",
        "vllm",
        "numpy",
        "wandb",
        "ruamel",
    }


def test_a_grader_is_run_without_torch(completions):
    assert not modules_after("score", completions, "--reward", "exact") & {"torch", "trl", "transformers", "vllm"}


def test_names_values_and_files_are_checked_without_torch():
    program = (
        "import sys\nfrom polyphony.launch.build import missing_names\nfrom polyphony.launch.recipe import load_recipe\n"
        f"import polyphony.launch.train\nfound = missing_names(load_recipe({str(RECIPES / 'debug.yaml')!r}))\n"
        "assert not any(found.values())\n"
        "assert not {'torch', 'trl', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rows_are_shown_as_the_policy_will_read_them(capsys, recipe):
    assert main(["train", str(recipe), "--show-prompts", "1"]) == 0
    shown = capsys.readouterr().out
    assert "sums-train.jsonl:1), id train-0, " in shown
    assert "<|begin|><|user|>train sums 0 =<|end|><|assistant|>\n--- its answer: '0'" in shown.replace(
        "<|unknown|>", ""
    )
    assert main(["train", str(recipe), "--show-prompts", "0"]) == 2
    assert "--show-prompts must be at least 1, got 0" in capsys.readouterr().err


def test_a_dry_run_prints_a_recipe_that_loads_back_and_makes_no_folder(capsys, tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["train", str(recipe), "eval.every=7", "--dry-run"]) == 0
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "resolved.yaml") == load_recipe(recipe, ["eval.every=7"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("domains.sums.train=gone.jsonl", "domains.sums.train: file "),
        ("domains.words.heldout={path: gone.parquet}", "domains.words.heldout: file "),
        (
            "domains.sums.reward=exactt",
            "domains.sums.reward: reward 'exactt' does not exist; did you mean 'exact'? known",
        ),
        ("domains.sums.reward=math:pi", "domains.sums.reward: reward 'math:pi' is no function"),
        (
            "domains.sums.diversity={partitioner: nowhere, shape: [1, 0]}",
            "domains.sums.diversity: partitioner 'nowhere'",
        ),
        ("curriculum.scheduler=jint", "curriculum: scheduler 'jint' does not exist"),
        ("curriculum.transfer=gone.json", "curriculum.transfer: file "),
        ("pool.from=gone.npz", "pool.from: file "),
        ("probe.from=nowhere", "probe.from: 'nowhere' is neither base, joint:<steps> nor the folder of a checkpoint"),
        ("grpo.max_steps=many", "grpo.max_steps must be a whole number, got 'many'"),
        ("grpo.learning_rate=true", "grpo.learning_rate must be a finite number, got True"),
        ("grpo.learning_rate=.nan", "grpo.learning_rate must be a finite number, got nan"),
        ("grpo.bf16=1", "grpo.bf16 must be true or false or null, got 1"),
        ("grpo.seed=null", "grpo.seed must be a whole number, got None"),
        ("grpo.num_generations=0", "grpo.num_generations must be above 0, got 0"),
        ("grpo.temperature=0", "grpo.temperature must be above 0, got 0"),
    ],
)
def test_a_dry_run_finds_what_is_not_there(capsys, tmp_path, recipe, override, message):
    assert main(["train", str(recipe), override, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n"), message in said.err) == ("", 1, True), said.err


def test_a_dry_run_of_a_resume_trains_nothing(capsys, tmp_path, recipe):
    run = claim_folder(load_recipe(recipe), tmp_path / "run", resume=False)
    assert main(["train", "--resume", str(run), "--dry-run"]) == 0
    assert capsys.readouterr().out == (run / "recipe.yaml").read_text().partition("\n")[2]  # the first line is a digest
    assert [path.name for path in run.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["RECIPE", "eval.every=7", "grpo.max_steps=9", "--dry-run"],
        ["RECIPE", "--dry-run", "eval.every=7", "grpo.max_steps=9"],
        ["--dry-run", "RECIPE", "eval.every=7", "grpo.max_steps=9"],
        ["RECIPE", "eval.every=7", "--dry-run", "--out", "run", "grpo.max_steps=9"],
    ],
)
def test_overrides_may_stand_before_and_after_options(capsys, tmp_path, recipe, arguments):
    assert main(["train", *[str(recipe) if a == "RECIPE" else a for a in arguments]]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    resolved = load_recipe(tmp_path / "resolved.yaml")
    assert (resolved.eval.every, resolved.grpo["max_steps"]) == (7, 9)


@pytest.mark.parametrize(
    "arguments", [["train", "r.yaml", "--ot", "x"], ["train", "r.yaml", "--out", "x", "y"], ["doctor", "a=b"], ["trin"]]
)
def test_an_argument_that_does_not_exist_is_refused_with_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "error: " in capsys.readouterr().err


# --- score ------------------------------------------------------------------------------------------------------------


def test_score_prints_the_reward_of_every_row_in_order(capsys, completions):
    assert main(["score", str(completions), "--reward", "exact", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"] == [1.0, 0.0, 1.0]
    assert main(["score", str(completions), "--reward", '{"name": "exact"}']) == 0
    assert "mean 0.667 of 3 graded, 0 failed (0: 1, 1: 2)" in capsys.readouterr().out


def test_a_reward_is_found_beside_the_user_as_an_installed_command_is_not(capsys, completions, tmp_path, monkeypatch):
    (tmp_path / "graders_of_mine.py").write_text("def f(prompts, **columns):\n    return [0.5] * len(prompts)\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert main(["score", str(completions), "--reward", "graders_of_mine:f", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"] == [0.5, 0.5, 0.5]


def test_a_row_without_an_answer_is_not_graded_by_exact(capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1 =", "completion": "None"}])
    assert main(["score", str(rows), "--reward", "exact", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"] == [None]


def test_a_reward_that_raises_scores_null(capsys, completions):
    assert main(["score", str(completions), "--reward", "tests.test_cli:broken", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"] == [None, None, None]


def test_a_misspelt_verb_names_the_nearest_and_the_version_is_told(capsys):
    for words, code, said in (
        (["tarin", "x.yaml"], 2, "polyphony: error: no verb 'tarin'; did you mean 'train'?"),
        (["xyzzy"], 2, "no verb 'xyzzy'; known: dashboard, demo, "),
        (["--version"], 0, "polyphony 0."),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        told = capsys.readouterr()
        assert ended.value.code == code and said in told.out + told.err
