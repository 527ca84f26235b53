"""`polyphony sample`: who is asked, what is accepted, an unfinished sample that goes on, what is refused before weights."""

from __future__ import annotations

import json

import pytest

from polyphony.curricula.records import Completion
from polyphony.launch.build import grpo_config, load_data
from polyphony.launch.cli import main
from polyphony.launch.recipe import RecipeError
from polyphony.launch.verbs.sample import SAMPLED, Asking, _counted, _note, experts_of, sample, sample_table
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.origins import origin_of
from tests.conftest import POLICY
from tests.taught import fill, recipe_of

SMALL = ["grpo.per_device_train_batch_size=16", "distil.others=skip", "rft.dedup=exact", "rft.top_k=2"]
SMALL += [f"domains.{name}.train.size=8" for name in ("sums", "words", "free")]


def lines(folder, name) -> list[dict]:
    return RunFolder(folder).read(name)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def recipe(tmp_path):
    domains = {"sums": ("arithmetic", "now"), "words": ("strings", "then"), "free": ("arithmetic", None)}
    return recipe_of(tmp_path, {"now": {"model": "self"}, "then": {"model": "self@start"}}, *SMALL, **domains)


@pytest.mark.slow
def test_what_the_reward_accepts_becomes_rows_and_a_torn_sample_goes_on_to_the_same(recipe, shelf, tmp_path, capsys):
    folder, teachers = tmp_path / "out", [f"words={shelf / 'moved'}"]  # an adapter
    summary = sample(recipe, folder, per_prompt=3, teachers=teachers)
    assert set(summary["domains"]) == {"sums", "words"}
    sums = summary["domains"]["sums"]
    assert (sums["prompts"], sums["sampled"]) == (8, 24) and 0 < sums["accepted"] <= 16
    assert sums["share"] == sums["accepted"] / 24 and "words" in sample_table(summary)
    rows = lines(folder, "rows")
    assert len(rows) == sum(found["accepted"] for found in summary["domains"].values())
    assert all(row["reward"] == 1.0 and row["completion"] and row["prompt"] for row in rows)
    told = [(row["domain"], row["id"], row["completion"]) for row in rows]
    assert len(set(told)) == len(told)  # dedup

    ledger = RunFolder(folder).ledger(SAMPLED)
    whole = ledger.read_bytes()
    of_adapter = [line for line in whole.splitlines(keepends=True) if json.loads(line)["domain"] == "words"]
    ledger.write_bytes(b"".join(whole.splitlines(keepends=True)[:8] + of_adapter[:4]) + of_adapter[4][:30])
    again = sample(recipe, folder, per_prompt=3, teachers=teachers)
    assert len(lines(folder, SAMPLED)) == 16 and again["domains"]["sums"] == sums
    with pytest.raises(RecipeError, match="holds a sample with per_prompt 3, not 4: choose another --out"):
        sample(recipe, folder, per_prompt=4, teachers=teachers)


@pytest.mark.slow
def test_two_adapters_are_asked_one_after_the_other(recipe, shelf, tmp_path):
    folder, teachers = tmp_path / "out", [f"sums={shelf / 'idle'}", f"words={shelf / 'moved'}"]
    summary = sample(recipe, folder, per_prompt=1, teachers=teachers)
    assert [summary["domains"][name]["sampled"] for name in ("sums", "words")] == [8, 8]
    ledger = RunFolder(folder).ledger(SAMPLED)  # the first is asked nothing again, the second two prompts
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-2]))
    assert sample(recipe, folder, per_prompt=1, teachers=teachers)["domains"]["words"]["sampled"] == 8


def test_an_answer_with_a_mark_of_a_chat_template_is_counted_and_not_accepted(recipe, tmp_path):
    data = load_data(recipe, grpo_config(recipe, tmp_path))
    prompt = next(iter(data.train["sums"]))
    texts, rewards = ("1[/INST]", "<|endoftext|>", "1", "[/INST]", "2"), (1.0, 1.0, 1.0, 0.0, None)
    answers = [
        Completion(ids=(1,), prompt=prompt, text=text, reward=reward)
        for text, reward in zip(texts, rewards, strict=True)
    ]
    experts, folder = experts_of(recipe, ["sums=self"]), RunFolder(tmp_path)
    sums = {"sums": experts["sums"]}
    weights = experts["sums"].weights
    lesson = Asking(recipe=recipe, folder=folder, experts=sums, per_prompt=5, weights=weights, data=data)
    line = lesson._line(data, prompt, answers, data.marks)
    assert line["marked"] == 2 and [answer["completion"] for answer in line["accepted"]] == ["1"]
    assert lesson._line(data, prompt, answers[:2], data.marks)["accepted"] == []
    folder.append(SAMPLED, line)
    domains = _counted(folder, sums)
    assert domains["sums"]["marked"] == 2
    assert "; 2 hold a mark of a chat template" in sample_table({"domains": domains})


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        (["sum=self"], "--teachers sum=self: unknown domain 'sum'; did you mean 'sums'?"),
        (["sums"], "--teachers sums: expected <domain>=<teacher>"),
        (["sums=/no/where"], "teacher '/no/where' of domain 'sums': folder /no/where does not exist"),
        (["sums={tmp}/empty"], "/empty was cut off while being saved"),
        (["watched=self"], "teacher 'self' of domain 'watched': a watched domain has no training prompts to answer"),
    ],
)
def test_teachers_that_are_not_there_are_named(recipe, tmp_path, teachers, said):
    (tmp_path / "empty").mkdir()
    domains = {**recipe.domains, "watched": recipe.domains["sums"].__class__(**WATCHED)}
    with pytest.raises(RecipeError) as refused:
        experts_of(recipe.model_copy(update={"domains": domains}), [t.format(tmp=tmp_path) for t in teachers])
    assert said in str(refused.value)


@pytest.mark.parametrize("field", ["attempt", "reward", "feedback"])
def test_an_expert_that_reads_an_attempt_is_refused(tmp_path, field):
    tutor = {"model": "self", "context": f"{{prompt}} {{{field}}}"}
    with pytest.raises(RecipeError) as refused:
        experts_of(recipe_of(tmp_path, {"tutor": tutor}, sums=("arithmetic", "tutor")), [])
    assert str(refused.value) == (
        f"teacher 'tutor' of domain 'sums': its context reads {{{field}}}, and before its answer there is no attempt: "
        "leave it out"
    )


@pytest.mark.parametrize(
    ("context", "said"),
    [
        ("{prompt} {hint}", "has no field 'hint', which the context names"),
        ("{prompt}" + " 1" * 600, "tokens with its teacher's context and answer, the teacher holds"),
    ],
)
def test_no_folder_is_claimed_where_the_last_expert_cannot_be_asked(tmp_path, context, said):
    experts = {"now": {"model": "self"}, "last": {"model": "self", "context": context}}
    told = recipe_of(tmp_path, experts, *SMALL[:1], sums=("arithmetic", "now"), words=("strings", "last"))
    with pytest.raises(RecipeError) as refused:
        sample(told, tmp_path / "out", per_prompt=1)
    assert said in str(refused.value) and not (tmp_path / "out").exists()


def test_a_sample_does_not_go_on_with_other_weights_at_the_same_place(tmp_path):
    expert, folder, asked = tmp_path / "expert", RunFolder(tmp_path), {"per_prompt": 1}
    expert.mkdir()
    (expert / "model.safetensors").write_bytes(b"then")
    _note(folder, asked, {"sums": origin_of(str(expert))})
    _note(folder, asked, {"sums": origin_of(str(expert))})
    (expert / "model.safetensors").write_bytes(b"trained on")
    with pytest.raises(RecipeError, match="the teacher of domain 'sums': its weights are not those that the run began"):
        _note(folder, asked, {"sums": origin_of(str(expert))})


WATCHED = {"name": "watched", "kind": "structured", "heldout": "x.jsonl", "reward": "exact"}


def test_without_any_teacher_the_command_says_so_in_one_line(recipe, tmp_path, capsys):
    plain = ["algorithm=grpo", "teachers={}", "grpo.num_generations=2", "domains.sums.teacher=null"]
    plain += ["domains.words.teacher=null", f"model={POLICY}"]
    assert main(["sample", str(tmp_path / "recipe.yaml"), *plain, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
