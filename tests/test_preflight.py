"""What is said before a run begins: of values that were hardly meant so, and by `--dry-run` of all that a run will meet."""

from __future__ import annotations

import json

import pytest
import torch

from polyphony.launch.build import grpo_config, missing_names
from polyphony.launch.cli import main
from polyphony.launch.preflight import preflight
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.remarks import remarks
from polyphony.trainer.checkpoint_mark import begin_mark, write_mark
from polyphony.trainer.run.folder import RunFolder


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_the_policy_takes_float32_and_it_is_said(tmp_path, recipe):
    told = load_recipe(recipe, ["grpo.bf16=null"])
    args = grpo_config(told, tmp_path)
    assert (args.bf16, args.fp16) == (False, False)
    assert remarks(told, args) == ["no GPU here: the policy takes float32"]


RECOVERED = ["guardrails.words={max_drop: 0.1, action: recover}"]
TAUGHT = ["algorithm=distil", "teachers={t: {model: self}}", "domains.sums.teacher=t", "domains.words.teacher=t"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], []),
        (["grpo.num_generations=8"], ["a draw holds 1 prompt (8 completions in groups of 8) for 2 trained domains: "]),
        (["grpo.warmup_steps=1"], []),
        (["grpo.warmup_steps=2"], ["grpo.warmup_steps=2 of grpo.max_steps=2: the learning rate is never reached"]),
        (["grpo.beta=5"], ["grpo.beta=5 is far outside what is used, 0 to 0.1: "]),
        (
            [*RECOVERED, "eval.every=4", "checkpoint.every=6"],
            ["guardrails.words: recovered from a checkpoint that was evaluated, of which there is one every 12 steps"],
        ),
        ([*RECOVERED, "eval.every=4", "checkpoint.every=8"], []),
        ([*RECOVERED, "guardrails.words.by=refresh", "eval.every=4", "checkpoint.every=6"], []),
        (
            [*TAUGHT, "pool={}"],
            [
                "pool: prompts of domains with a teacher are sorted by pass rate as well: ",
                "pool.refill and pool.look do nothing in domains with a teacher",
            ],
        ),
        (
            ["grpo.learning_rate=0.1", "grpo.temperature=9"],
            ["grpo.learning_rate=0.1 is ", "grpo.temperature=9 is far "],
        ),
    ],
)
def test_what_was_hardly_meant_so_is_said(tmp_path, recipe, overrides, said):
    told = load_recipe(recipe, overrides)
    found = remarks(told, grpo_config(told, tmp_path))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True)), found


def test_what_trl_refuses_without_the_name_of_its_field_is_named(tmp_path, recipe):
    with pytest.raises(RecipeError, match=r"^grpo\.optim: adamx is not a valid"):
        grpo_config(load_recipe(recipe, ["grpo.optim=adamx"]), tmp_path)


def raises(prompts, **columns):
    return [1 / len(columns["nothing"])]


def test_one_dry_run_finds_all_mistakes_cheap_ones_first(capsys, tmp_path, recipe):
    (tmp_path / "words-train.jsonl").write_text('{"question": "1"}\n')
    wrong = ["evl.every=3", "grpo.num_generations=3", "grpo.beta=-1", "domains.sums.reward=exactt"]
    assert main(["train", str(recipe), *wrong, "--dry-run"]) == 2
    said = capsys.readouterr()
    starts = [
        "unknown key 'evl'; did you mean 'eval'?",
        "grpo.beta must be at least 0, got -1",
        "domains.sums.reward: reward 'exactt' does not exist; did you mean 'exact'? ",
        "grpo: generation_batch_size (8) must be divisible by num_generations (3).",
        "domains.words.train: row 1 has no `prompt`",
    ]
    found = said.err.splitlines()
    assert (said.out, len(found)) == ("", len(starts)), found
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(f"polyphony train: {start}"), line


def test_a_misspelt_section_is_read_as_what_was_meant(capsys, recipe):
    document = json.loads(recipe.read_text())
    document["domans"] = document.pop("domains")
    document["domans"]["sums"]["rewrd"] = document["domans"]["sums"].pop("reward") + "t"
    del document["name"], document["model"]
    recipe.write_text(json.dumps(document))
    assert main(["train", str(recipe), "--dry-run"]) == 2
    starts = ["unknown key 'domans'", "unknown key 'domains.sums.rewrd'", "name: required", "model: required"]
    starts += ["domains.sums.reward: reward 'exactt' does not exist"]
    said = capsys.readouterr().err.splitlines()
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(f"polyphony train: {start}"), said


def test_every_domain_with_rows_that_cannot_be_read_is_named(tmp_path, recipe):
    for name in ("sums-train", "words-heldout"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1"}\n')
    found = sorted(line.partition(":")[0] for line in preflight(load_recipe(recipe)))
    assert found == ["domains.sums.train", "domains.words.heldout"]


def test_rewards_are_called_on_one_row_each_and_no_judge_when_offline(capsys, recipe):
    judge = "domains.words.reward={name: judge, endpoint: 'http://127.0.0.1:9/v1', model: m}"
    told = load_recipe(recipe, ["domains.sums.reward=tests.test_preflight:raises", judge])
    (line,) = preflight(told, offline=True)
    assert line.startswith(f"domains.sums.reward: on row 'heldout-0' it raised KeyError: 'nothing' ({__file__}:")
    assert "rows, training" not in capsys.readouterr().err


def test_what_the_chat_template_does_not_ask_for_is_said(capsys, recipe):
    told = load_recipe(recipe, ["domains.sums.chat_template_kwargs={enable_thinkng: true}"])
    assert list(preflight(told)) == []
    said = "domains.sums.chat_template_kwargs: the chat template has no 'enable_thinkng'"
    assert said in capsys.readouterr().err.splitlines()


def test_a_folder_that_is_taken_is_said(capsys, tmp_path, recipe):
    assert main(["train", str(recipe), "--dry-run", "--out", str(tmp_path)]) == 0
    assert f"run folder {tmp_path} is not empty; choose another --out" in capsys.readouterr().err.splitlines()[-1]


def test_the_size_of_a_run_is_said(capsys, recipe):
    assert list(preflight(load_recipe(recipe, ["eval.every=1"]))) == []
    # 2 steps of 8 completions of 8 tokens; 3 evaluations of 8 items by 4 samples of 8 tokens: 768 of 896
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "rows, training + held-out: sums 4 + 4, words 4 + 4",
        "training: 2 steps, 2 draws of 2 prompts, 16 completions, at most 128 tokens",
        "evaluation: 96 completions, at most 768 tokens, 86% of all",
        "more is sampled for evaluation than for training: raise eval.every, or limit held-out rows",
    ]


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["grpo.max_steps=9"], 0, "grpo.max_steps: 2 until step 1, 9 from there on"),
        (["grpo.max_steps=0.5"], 2, "grpo.max_steps must be a whole number"),
        (
            ["grpo.seed=5", "eval.samples=9"],
            2,
            "eval.samples=4, now it is 9, grpo.seed=None, now it is 5: go on with what",
        ),
    ],
)
def test_a_dry_run_of_a_resume_says_what_changes_and_what_may_not(capsys, tmp_path, recipe, overrides, code, says):
    run = going_on(tmp_path / "run", recipe, step=1)
    assert main(["train", "--resume", str(run), *overrides, "--dry-run", "--offline"]) == code
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_of_a_resume_refuses_other_rows_and_an_end_that_is_past(capsys, tmp_path, recipe):
    run = going_on(tmp_path / "run", recipe, step=3)
    data = {"domains.sums.train": {"rows": 3, "sha256": "0"}}
    RunFolder(run).provenance.write_text(json.dumps({"data": data}))
    assert main(["train", "--resume", str(run), "--dry-run", "--offline"]) == 2
    rows, length = capsys.readouterr().err.splitlines()
    assert "domains.sums.train: its rows are not those that the run has practised and measured (3 then, 4 now" in rows
    assert "the run has done 3 steps and would be over at 2: max_steps must be at least 3" in length


def going_on(path, recipe, *, step):
    path.mkdir()
    folder = RunFolder(path)
    folder.claim(load_recipe(recipe).as_yaml())
    begin_mark(checkpoint := folder.checkpoints / f"checkpoint-{step}")
    write_mark(checkpoint)
    return path


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_a_name_that_no_file_can_have_is_an_error_as_any_other(recipe, name):
    document = json.loads(recipe.read_text())
    document["domains"]["sums"]["train"] = name
    recipe.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=r"is no path|File name too long|half a character"):
        raise RecipeError(*missing_names(load_recipe(recipe))["sums"])


@pytest.mark.parametrize(
    ("wrong", "right", "starts"),
    [
        (
            {"curriculum": {"schedular": "joint"}, "grpo.lr": 1e-5, "domains.sums.reward": "exat"},
            {"curriculum": {"scheduler": "joint"}, "grpo.learning_rate": 1e-5, "domains.sums.reward": "exact"},
            [
                "unknown key 'grpo.lr'",
                "curriculum: Auto: unknown key 'schedular'",
                "domains.sums.reward: reward 'exat'",
            ],
        ),
        (
            {"domains.sums.train": "sums-trian.jsonl", "eval": {"every": 0}, "grpo.num_generations": 3},
            {"domains.sums.train": "sums-train.jsonl", "eval": {"every": 1}, "grpo.num_generations": 4},
            ["eval.every: Input should", "domains.sums.train: file ", "grpo: generation_batch_size (8) must be divis"],
        ),
        (
            {"model": "modle", "grpo.lr_scheduler_type": "cosin", "domains.words.heldout": [{"question": "1"}]},
            {"model": "model", "grpo.lr_scheduler_type": "cosine", "domains.words.heldout": "words-heldout.jsonl"},
            ["grpo.lr_scheduler_type must be", "model 'modle' cannot be loaded", "domains.words.heldout: row 1 has no"],
        ),
        (  # what has to be there and is wrong, or is called wrongly, hides nothing that comes after it
            {"domains.sums.kind": "structurd", "domains.words.train": "words-trian.jsonl", "grpo.lr": 1e-5},
            {"domains.sums.kind": "structured", "domains.words.train": "words-train.jsonl"},
            ["domains.sums.kind: Input", "domains.words.train: file ", "unknown key 'grpo.lr'"],
        ),
        (
            {"model": "./modle", "domains.sums.reward": "exat", "domains.words.train": "words-trian.jsonl"},
            {"model": "model", "domains.sums.reward": "exact", "domains.words.train": "words-train.jsonl"},
            ["model: folder ", "domains.sums.reward: reward 'exat'", "domains.words.train: file "],
        ),
    ],
    ids=lambda value: "",
)
def test_a_first_recipe_with_three_mistakes_is_right_after_one_dry_run(capsys, recipe, wrong, right, starts):
    document = json.loads(recipe.read_text())

    def dry_run(values) -> tuple[int, list[str]]:
        for path, value in values.items():
            *place, last = path.split(".")
            section = document
            for key in place:
                section = section[key]
            section[last] = value
        for gone in [path for path in wrong if path not in right and values is right]:
            document["grpo"].pop(gone.removeprefix("grpo."), None)
        recipe.write_text(json.dumps(document))
        code = main(["train", str(recipe), "--dry-run", "--offline"])
        return code, [line.removeprefix("polyphony train: ") for line in capsys.readouterr().err.splitlines()]

    code, said = dry_run(wrong)
    assert code == 2 and all(any(line.startswith(start) for line in said) for start in starts), said
    assert len(said) == len(starts), said
    assert dry_run(right)[0] == 0
