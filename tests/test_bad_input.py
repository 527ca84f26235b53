"""Bad input: one line and exit code 2, says what was wrong, loads no weights and leaves nothing behind."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest

from polyphony.curricula.records import Domain
from polyphony.launch.cli import main
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.train import claim_folder
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import POLICY, write_rows


def fails(capsys, *arguments, code=2) -> str:
    """Run the command on what cannot work; return the one line it says."""
    returned = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert (returned, said.out, said.err.count("\n"), "Traceback" in said.err) == (code, "", 1, False), said.err
    return said.err


def one_too_few(prompts, **columns):
    return [1.0] * (len(prompts) - 1)


def no_list(prompts, **columns):
    return None


def without_end(prompts, **columns):
    return [math.inf] * len(prompts)


def words(prompts, **columns):
    return ["good"] * len(prompts)


def broken(prompts, **columns):
    raise ZeroDivisionError("nothing to divide by")


# --- bad recipes and bad rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grpo.learning_rat=1"], "unknown key 'grpo.learning_rat'; did you mean 'learning_rate'?"),
        (["grpo.activation_offloading=true"], "unknown key 'grpo.activation_offloading'; TRL has it for SFT, DPO, KTO"),
        (
            ["grpo.use_kernels=true"],
            "unknown key 'grpo.use_kernels'; did you mean 'grpo.model_init_kwargs.use_kernels'?",
        ),
        (["domains.sums.rewrd=exact"], "unknown key 'domains.sums.rewrd'; did you mean 'reward'?"),
        (
            ["domains.sums.reward=exactt"],
            "domains.sums.reward: reward 'exactt' does not exist; did you mean 'exact'?",
        ),
        (["domains.sums.reward={nme: exact}"], "domains.sums.reward: expected a name"),
        (["pool.impossible_below=0.2"], "pool: expected impossible_below <= defer_below < mastered_above"),
        (["pool.sampling=hardest"], "pool.sampling 'hardest' does not exist; known: uniform, thompson"),
        (["pool.from=gone.npz"], "pool.from: file "),
        (["pool.refill.max_round=1"], "unknown key 'pool.refill.max_round'; did you mean 'max_rounds'?"),
        (["guard.cap=0"], "guard.cap: Input should be greater than 0, got 0"),
        (["algorithm=rft", "rft.dedup=nowhere"], "partitioner 'nowhere' does not exist"),
        (["rft.top_k=0"], "rft.top_k: Input should be greater than or equal to 1, got 0"),
        (["domains.sums.advantages=std"], "domains.sums.advantages: Input should be 'group' or 'mean_only'"),
        (["domains.sums.reward=5"], "domains.sums.reward: expected a name"),
        (["domains.sums.reward=nowhere:f"], "domains.sums.reward: reward 'nowhere:f' cannot be imported"),
        (["domains.sums.heldout=null"], "domains.sums.heldout: expected rows to be scored on, got None"),
        (["domains.sums.heldout={path: sums-heldout.jsonl, limit: 1}"], "domains.sums.heldout: 1 item; at least 2"),
        (["domains.sums.train=gone.jsonl"], "domains.sums.train: file "),
        (["domains.sums.train={path: sums-train.jsonl, limit: -1}"], "domains.sums.train: limit must be a whole"),
        (["domains.sums.train=null", "domains.words.train=null"], "no domain has `train` rows"),
        (["domains.sums.max_completion_length=9"], "max_completion_length must be in 1..8"),
        (
            ["grpo.max_completion_length=250"],
            "4 of 4 rows with completions of 250 tokens (max_completion_length) exceed the context of 256",
        ),
        (["grpo.max_completion_length=null"], "max_completion_length must be a number"),
        (["grpo.num_generations=3"], "grpo: "),
        (["grpo.loss_type=gpro"], "grpo.loss_type must be one of grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo, vespo"),
        (["grpo.steps_per_generation=4", "eval.every=3"], "eval.every=3 falls inside a draw; a draw spans 4 optimizer"),
        (
            ["curriculum.scheduler=jint"],
            "curriculum: scheduler 'jint' does not exist; did you mean 'joint'? known: auto",
        ),
        (["curriculum.ordr=[sums]"], "curriculum: Auto: unknown key 'ordr'; known: adaptive, "),
        (["curriculum.transfer=gone.json"], "curriculum.transfer: file "),
        (
            ["curriculum.replay=3"],
            "curriculum: Auto: replay: Input should be a dictionary or an instance of Replay, got 3",
        ),
        (
            ["curriculum.replay={fractoin: 0.1}"],
            "curriculum: Auto: unknown key 'replay.fractoin'; did you mean 'fraction'?",
        ),
        (
            ["curriculum.replay={fraction: much}"],
            "Auto: replay.fraction: Input should be a valid number, got 'much'",
        ),
        (
            ["curriculum.adaptive={floor: x}"],
            "curriculum: Auto: adaptive.floor: Input should be a valid number, got 'x'",
        ),
        (
            ["curriculum.scheduler=sequential", "curriculum.order=5"],
            "Sequential: order: Input should be a valid tuple",
        ),
        (
            ["curriculum.scheduler=joint", "domains.sums.weight=0", "domains.words.weight=0"],
            "joint: the weight of every domain is 0: ['sums', 'words']",
        ),
        (["algorithm=rft", "rft.dedup=5"], "rft.dedup: expected a name"),
        (["rollouts.engine=vlm"], "rollouts.engine: expected vllm, ray, transformers or an import path pkg.module"),
        (
            ["rollouts.engine=no.such:Engine"],
            "rollouts.engine 'no.such:Engine' cannot be imported: No module named 'no'",
        ),
        (["rollouts.engine=json:JSONDecoder"], "expected a subclass of polyphony.trainer.engine.engine:Engine, or a "),
        (["rollouts.engine=json:__name__"], "or a function that returns an Engine, got 'json'"),
        (["model=./gone"], "model: folder "),
        (["model=no-such/model"], "model 'no-such/model' cannot be loaded"),
        (["name=["], "override 'name=[': the value is not valid YAML"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_value_is_named_before_weights_are_loaded_and_leaves_no_folder(
    capsys, tmp_path, recipe, overrides, message
):
    assert message in fails(capsys, "train", recipe, *overrides, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_weights_is_what_is_left_to_complain_about(capsys, tmp_path, recipe):
    """The counterpart of the test above: with nothing else wrong, this recipe does come to load weights."""
    said = fails(capsys, "train", recipe, "rollouts.engine=transformers", "--out", tmp_path / "run")
    assert "model.safetensors" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "1"}\n{"prompt": "2"\n', "sums-train.jsonl:2: not valid JSON"),
        ('{"prompt": "1"}\n\n["2"]\n', "sums-train.jsonl:3: expected an object, got list"),
        (b'{"prompt": "1"}\n{"prompt": "\xff"}\n', "sums-train.jsonl:2: not UTF-8: byte 13 of the line"),
        ('{"prompt": "1", "id": 7}\n{"prompt": "2", "id": 7}\n', "id '7' stands in row 1 and again in row 2"),
        ("", "domains.sums.train: no rows"),
        ('{"question": "1"}\n', "domains.sums.train: row 1 has no `prompt`"),
        (
            '{"prompt": 1}\n',
            "domains.sums.train: row 1: a prompt is text or a list of messages with role and content, got 1",
        ),
        (
            '{"prompt": ["hello"]}\n',
            "domains.sums.train: row 1: a prompt is text or a list of messages with role and content, got ['hello']",
        ),
    ],
)
def test_bad_rows_are_named_with_their_place(capsys, tmp_path, recipe, lines, message):
    (tmp_path / "sums-train.jsonl").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    assert message in fails(capsys, "train", recipe, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_broken_parquet_file_is_named(capsys, tmp_path, recipe):
    (tmp_path / "rows.parquet").write_text("no parquet")
    said = fails(capsys, "train", recipe, "domains.sums.train=rows.parquet", "--out", tmp_path / "run")
    assert "rows.parquet: not a readable Parquet file" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "recipe.yaml:1: "),
        ("- a list", "recipe.yaml: a recipe is a mapping"),
        ("name: \x00", "recipe.yaml: not readable as YAML"),
        (b"name: \xff", "recipe.yaml: not readable as YAML"),
        ("name: x\nmodel: y", "domains: required, but not given"),
        ("", "recipe.yaml: a recipe is a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(capsys, recipe, text, message):
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in fails(capsys, "train", recipe)


def test_a_missing_recipe_is_named(capsys, tmp_path):
    assert "gone.yaml does not exist" in fails(capsys, "train", tmp_path / "gone.yaml")
    assert "give a recipe, or --resume RUN" in fails(capsys, "train")


# --- run folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "probe"])
def test_a_folder_that_cannot_be_made_is_an_error(capsys, tmp_path, recipe, verb):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "cannot be written" in fails(capsys, verb, recipe, "--out", out)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("verb", ["train", "probe"])
def test_a_folder_that_holds_something_else_is_left_alone(capsys, tmp_path, recipe, verb):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "is not empty" in fails(capsys, verb, recipe, "--out", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_demo_wants_a_folder_of_its_own(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "is not empty; remove it, or choose another --out" in fails(capsys, "demo", "--out", tmp_path)


@pytest.mark.parametrize("name", ["a/b", "", "a b", "..", "a..b", ".", "a\\b", "gsm8k[v2]", "<b>", "a&b"])
def test_a_domain_name_must_be_fit_for_a_metric_key(name):
    with pytest.raises(ValueError, match=re.escape(f"Domain {name!r}: name: a name is part of metric keys")):
        Domain(name=name, kind="structured")


def test_an_order_of_other_domains_is_refused_before_any_weight_is_loaded(capsys, recipe):
    order = ("curriculum.scheduler=sequential", "curriculum.order=[sums, poems]")
    said = fails(capsys, "train", recipe, *order)
    assert "order ['sums', 'poems'] must name each trainable domain once: ['sums', 'words']" in said


def test_a_resumed_run_must_be_of_the_same_recipe(tmp_path, recipe):
    run = claim_folder(load_recipe(recipe), tmp_path / "run", resume=False)
    assert claim_folder(load_recipe(recipe), run, resume=True) == run
    with pytest.raises(RecipeError, match=r"holds a run with grpo.seed=None, now it is 3: go on with"):
        claim_folder(load_recipe(recipe, ["grpo.seed=3"]), run, resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "gone"], "--resume gone: no run there (recipe.yaml is missing)"),
        (["recipe.yaml", "--resume", "gone"], "--resume gone: no run there (recipe.yaml is missing)"),
        (["--resume", "gone", "--out", "new"], "--resume goes on in its own folder; leave --out away"),
    ],
)
def test_what_does_not_go_with_resume_is_refused(capsys, arguments, message):
    assert message in fails(capsys, "train", *arguments)


def test_a_recipe_beside_resume_must_be_the_runs_own(capsys, tmp_path, recipe):
    run = claim_folder(load_recipe(recipe), tmp_path / "run", resume=False)
    assert main(["train", str(recipe), "--resume", str(run), "--dry-run"]) == 0
    capsys.readouterr()
    said = fails(capsys, "train", recipe, "grpo.max_steps=3", "grpo.num_generations=8", "--resume", run)
    assert "holds a run with grpo.num_generations=4, now it is 8" in said


def test_a_failed_resume_keeps_its_folder(capsys, tmp_path, recipe):
    run = claim_folder(load_recipe(recipe), tmp_path / "run", resume=False)
    (tmp_path / "sums-train.jsonl").unlink()
    assert "domains.sums.train: file " in fails(capsys, "train", "--resume", run)
    assert load_recipe(run / "recipe.yaml") == load_recipe(recipe)


# --- other verbs ------------------------------------------------------------------------------------------------------


def test_a_probe_needs_two_domains_to_compare(capsys, tmp_path, recipe):
    said = fails(capsys, "probe", recipe, "domains.words.train=null", "--out", tmp_path / "probe")
    assert "at least 2 need `train` rows, got ['sums']" in said


@pytest.mark.parametrize("start", ["joint:", "joint:few", "joint:0", "bse", "no/such/folder"])
def test_a_probe_from_nowhere_is_refused(capsys, tmp_path, recipe, start):
    said = fails(capsys, "probe", recipe, f"probe.from={start!r}", "--out", tmp_path / "probe")
    assert f"probe.from: expected joint:<steps> with a whole number of steps, got {start!r}" in said or (
        f"probe.from: {start!r} is neither base, joint:<steps> nor the folder of a checkpoint" in said
    )
    assert not (tmp_path / "probe").exists()


def test_a_probe_that_cannot_begin_leaves_no_folder(capsys, tmp_path, recipe):
    (tmp_path / "sums-train.jsonl").unlink()
    assert main(["probe", str(recipe), "--out", str(tmp_path / "probe")]) == 2
    assert "domains.sums.train: file " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "gone"], "gone: no such run folder"),
        (["report", "gone", "--json"], "gone: no such run folder"),
        (["plan"], "give a transfer.json, or --replay RUN --scheduler NAME"),
        (["plan", "gone.json", "--scheduler", "bwt"], "--scheduler goes with --replay RUN"),
        (["plan", "gone.json"], "transfer file gone.json does not exist"),
        (["plan", "--replay", "gone"], "--replay needs --scheduler NAME"),
        (["plan", "--replay", "gone", "--scheduler", "joint"], "gone holds no decisions.jsonl"),
        (["score", "gone.jsonl", "--reward", "exact"], "file gone.jsonl does not exist"),
        (["eval", "no-such/model", "RECIPE"], "model 'no-such/model' cannot be loaded"),
        (["eval", "model", "gone.yaml"], "recipe gone.yaml does not exist"),
        (["eval", "model"], "give a recipe: model is not inside a run folder"),
        (["eval", "a", "b", "c", "RECIPE"], "expected one or two models and one recipe, got a, b, c, "),
        (["eval", "a", "RECIPE", "eval.smples=2"], "unknown key 'eval.smples'; did you mean 'samples'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_another_verb_cannot_find_is_named(capsys, recipe, arguments, message):
    assert message in fails(capsys, *[recipe if a == "RECIPE" else a for a in arguments])


def test_a_replay_without_draws_or_without_the_probes_it_needs_is_an_error(capsys, tmp_path):
    from tests.benchmarks.synthetic_run import write_run

    run = write_run(tmp_path / "run", steps=20, items=4)
    asked = ("plan", "--replay", run, "--scheduler")
    file = json.loads((run / "transfer.json").read_text())
    (run / "transfer.json").write_text(json.dumps(file | {"rows": [r for r in file["rows"] if not r["probe"]]}))
    assert "name their file: polyphony plan TRANSFER.json --replay" in fails(capsys, *asked, "bwt")
    assert "scheduler 'math:pi': expected a class with a method `decide`, got 3.14" in fails(capsys, *asked, "math:pi")
    (run / "decisions.jsonl").write_text('{"draw": 0, "cut in the mid')
    assert "holds no decisions.jsonl with a draw in it" in fails(capsys, *asked, "joint")


def test_a_report_that_cannot_be_written_is_an_error(capsys, tmp_path):
    from tests.benchmarks.synthetic_run import write_run

    run = write_run(tmp_path / "run", steps=20, items=4)
    assert "cannot be written" in fails(capsys, "report", run, "--out", run / "recipe.yaml" / "report.html")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("exactt", "reward 'exactt' does not exist; did you mean 'exact'? known: code, exact"),
        ('{"nme": "exact"}', "expected a `name`"),
        ('{"name": ', "not valid JSON"),
        ("tests.test_bad_input:one_too_few", "the reward returned 2 values for 3 completions"),
        ("tests.test_bad_input:no_list", "the reward returned None for 3 completions"),
        ("tests.test_bad_input:without_end", "the reward returned inf; a failed grading is None"),
        ("tests.test_bad_input:words", "the reward returned 'good', which is no number"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(capsys, completions, reward, message):
    assert message in fails(capsys, "score", completions, "--reward", reward)


def test_a_row_without_a_completion_is_named(capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "2+2 =", "answer": "4"}])
    assert "row 1 has no `completion`; its columns are ['answer', 'prompt']" in fails(
        capsys, "score", rows, "--reward", "exact"
    )


# --- what stops a running run -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "code", "message"),
    [
        ("one_too_few", 2, "domain 'sums': the reward returned 3 values for 4 completions"),
        ("without_end", 2, "domain 'sums': the reward returned inf; a failed grading is None"),
    ],
)
def test_a_reward_that_breaks_its_contract_ends_the_run_in_one_line(capsys, tmp_path, recipe, reward, code, message):
    overrides = [
        f"model={POLICY}",
        "rollouts.engine=transformers",
        f"domains.sums.reward=tests.test_bad_input:{reward}",
    ]
    assert main(["train", str(recipe), *overrides, "--out", str(tmp_path / "run")]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
def test_what_transformers_refuses_when_training_begins_leaves_no_folder(capsys, tmp_path, recipe):
    overrides = [f"model={POLICY}", "rollouts.engine=transformers", "grpo.lr_scheduler_type=cosine_with_min_lr"]
    assert main(["train", str(recipe), *overrides, "--out", str(tmp_path / "run")]) == 2
    assert "One of min_lr or min_lr_rate should be set" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rows_that_changed_since_the_checkpoint_are_refused_on_resume(capsys, tmp_path, recipe):
    overrides = [f"model={POLICY}", "rollouts.engine=transformers", "checkpoint.every=1", "eval.every=1"]
    run = str(tmp_path / "run")
    assert main(["train", str(recipe), *overrides, "--out", run]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    write_rows(tmp_path / "words-train.jsonl", [{"prompt": "other words", "answer": "1"}])
    assert main(["train", "--resume", run]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        "domains.words.train: its rows are not those that the run has practised and measured (4 then, 1 now, " in last
    )


@pytest.mark.slow
def test_a_run_that_is_over_goes_on_with_more_steps_and_from_the_checkpoint_before_a_damaged_one(
    capsys, tmp_path, recipe
):
    overrides = [f"model={POLICY}", "rollouts.engine=transformers", "checkpoint.every=1", "eval.every=1"]
    folder = RunFolder(tmp_path / "run")
    run = ["train", "--resume", str(folder.path)]
    assert main(["train", str(recipe), *overrides, "--out", str(folder.path)]) == 0
    capsys.readouterr()
    (folder.checkpoints / "best.json").unlink()  # as where a kill came before it was written
    (folder.checkpoints / "mine").mkdir()
    assert "holds a run with grpo.seed=None, now it is 2" in fails(capsys, *run, "grpo.seed=2")
    assert main([*run, "grpo.max_steps=3", "rollouts.max_grader_failures=0.9"]) == 0
    told = "grpo.max_steps: 2 until step 2, 3 from there on; so are the learning-rate curve"
    assert told in capsys.readouterr().err and load_recipe(folder.recipe).grpo["max_steps"] == 3
    assert f"Changed on the way: {told}" in folder.report.read_text()
    assert {path.name for path in folder.checkpoints.iterdir()} >= {"best.json", "checkpoint-3", "mine"}
    before = [folder.read("metrics"), (folder.final / "model.safetensors").read_bytes()]
    assert [line["step"] for line in before[0]] == [0, 1, 2, 3, 3]  # the last is the summary, and the only one
    state = folder.checkpoints / "checkpoint-3" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-1])
    with folder.ledger("samples").open("ab") as file:
        file.write(b'{"step": 3, "cut')
    assert main(run) == 0
    said = capsys.readouterr().err
    assert "checkpoint-3: optimizer.pt is damaged; moved to checkpoint-3.aside-1" in said and "was cut off" in said
    after = [folder.read("metrics"), (folder.final / "model.safetensors").read_bytes()]
    assert after[1] == before[1] and [line.get("loss") for line in after[0]] == [line.get("loss") for line in before[0]]


def test_whatever_ends_a_run_before_it_began_leaves_no_folder(monkeypatch, tmp_path, recipe):
    def fail(*_, **__):
        raise RuntimeError("TensorBoard is not here")

    monkeypatch.setattr("polyphony.launch.train.start", fail)
    for _ in range(2):
        assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 1
        assert not (tmp_path / "run").exists()
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with run.locked(say=print):
        run.claim("name: killed while it loaded")
    assert main(["train", str(recipe), "--out", str(run.path)]) == 1 and not run.path.exists()
