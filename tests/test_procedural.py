import json
import pickle
import time
from pathlib import Path

import pytest

from polyphony.rewards import find_reward, reasoning_gym
from polyphony.rewards.procedural import rows

SUMS = {"dataset": "chain_sum", "seed": 0, "config": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}}


def grade(row, completions, **settings):
    reward = find_reward({"name": "procedural", **settings})
    n = len(completions)
    columns = {name: [row[name]] * n for name in ("answer", "procedural")}
    return reward(prompts=[row["prompt"]] * n, completions=completions, completion_ids=None, **columns)


def test_rows_are_questions_with_answers_that_score():
    row = rows(split="train", size=3, **SUMS)[0]
    assert json.loads(json.dumps(row)) == row
    wrong = str(int(row["answer"]) + 1)
    completions = [
        row["answer"],
        f"<answer>{row['answer']}</answer>",
        wrong,
        "",
        row["prompt"],
        f"{row['answer']} {wrong}",
    ]
    assert grade(row, completions) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_rows_are_the_same_again_and_all_different():
    first = rows(split="train", size=50, **SUMS)
    assert first == rows(split="train", size=50, **SUMS)
    assert len({row["prompt"] for row in first}) == 50


def test_splits_never_share_a_question_whatever_the_seeds():
    questions = lambda split, seed: {r["prompt"] for r in rows(split=split, size=200, **{**SUMS, "seed": seed})}  # noqa: E731
    train = questions("train", 0) | questions("train", 1)
    heldout = questions("heldout", 0) | questions("heldout", 2)
    assert not train & heldout


def test_compositions_never_share_a_chain_between_splits():
    def chains(split):
        made = rows(split=split, dataset="composition", size=300, seed=0, config={"depth": 2})
        return {row["prompt"].partition('"')[0] for row in made}

    assert chains("train") and chains("heldout") and not chains("train") & chains("heldout")


def test_compositions_are_scored_letter_for_letter():
    row = rows(split="heldout", dataset="composition", size=1, seed=3, config={"depth": 3, "definitions": True})[0]
    answer = row["answer"]
    completions = [answer, f'The answer is "{answer}".', f"<answer>{answer}</answer>", answer.upper(), answer + "x", ""]
    assert grade(row, completions) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


ATTACKS = [
    "__import__('os').system('touch /tmp/polyphony-mark')",
    "open('/tmp/polyphony-mark', 'w')",
    "exec('raise SystemExit')",
    "entry['metadata']['target']",
    "eval(chr(52))",
    "(lambda: 4)()",
    "().__class__",
    "sqrt('open(0)')",
    "5! + __import__('os').getpid()",
    "exit()",
    "oracle_answer",
]


@pytest.mark.parametrize("dataset", ["countdown", "string_insertion", "n_queens", "polynomial_multiplication"])
def test_scorers_that_evaluate_see_no_code(dataset):
    row = rows(split="train", dataset=dataset, size=1, seed=1)[0]
    # 0.01 is what countdown gives any text
    assert all(reward is not None and reward <= 0.01 for reward in grade(row, ATTACKS, partial_credit=True))
    assert not Path("/tmp/polyphony-mark").exists()
    assert grade(row, [row["answer"]]) == [1.0]


def test_an_answer_keeps_the_full_stop_that_its_scorer_wants():
    made = rows(split="train", dataset="sentence_reordering", size=20, seed=11)
    row, other = [row for row in made if row["answer"][-1] == "." and row["answer"][0].isalpha()][:2]
    answer, other = row["answer"], other["answer"]
    right = [
        "{}",
        "<answer>{}</answer>",
        "<answer>\n  {}\n</answer>",
        "<answer>**{}**</answer>",
        "I put it in order.\n<answer>{}</answer>",
        "<think>A verb comes second.</think><answer>{}</answer>",
        r"\boxed{{{}}}",
        r"It reads $\boxed{{{}}}$",
        "Answer: {}",
        "**Answer:** {}",
        "The answer is: {}",
    ]
    assert grade(row, [form.format(answer) for form in right]) == [1.0] * len(right)
    wrong = [f"<answer>{text}</answer>" for text in (answer[:-1], answer[:-1] + "!", other, answer + ".", answer * 2)]
    assert grade(row, [*wrong, f"<answer>{answer[:-1]}</answer>."]) == [0.0] * 6


def test_no_full_stop_is_added_where_the_scorer_wants_none():
    row = rows(split="train", size=1, **SUMS)[0]
    assert grade(row, [f"<answer>{row['answer']}.</answer>", f"The answer is {row['answer']}."]) == [1.0, 1.0]


@pytest.mark.parametrize("place", [None, "", "chain_sum", 4, "{}", "[1]", "null", float("nan"), {}, '{"index": 1}'])
def test_a_row_that_says_no_place_has_no_verdict(place):
    assert grade({"prompt": "2 + 2?", "answer": "4", "procedural": place}, ["4", "5"]) == [None, None]


def test_a_row_whose_answer_is_no_text_has_no_verdict():
    row = rows(split="train", dataset="composition", size=1, seed=3)[0]
    assert grade(row | {"answer": None}, [row["answer"], "None"]) == [None, None]


def test_two_formulas_are_no_answer():
    row = rows(split="train", dataset="simple_integration", size=1, seed=3)[0]
    assert grade(row, [row["answer"], f"{row['answer']} or x", f"x or {row['answer']}"]) == [1.0, 0.0, 0.0]


def test_plain_formulas_and_literals_pass_to_the_scorer():
    row = rows(split="train", dataset="countdown", size=1, seed=1)[0]
    assert grade(row, [f"({row['answer']})", f"{row['answer']} + 1"]) == [1.0, 0.0]
    row = rows(split="train", dataset="string_insertion", size=1, seed=1)[0]
    assert grade(row, [str(list(row["answer"]))], partial_credit=True) == [0.1]


@pytest.mark.slow
def test_an_answer_that_never_computes_ends_at_its_limit():
    row = rows(split="train", dataset="countdown", size=1, seed=1)[0]
    assert grade(row, ["1"], timeout_s=1.0, workers=1) == [0.0]
    start = time.monotonic()
    assert grade(row, ["9**9**9**9", "1"], timeout_s=1.0, workers=1) == [0.0, 0.0]
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_every_dataset_makes_rows_that_its_scorer_can_read(monkeypatch):
    from reasoning_gym.factory import DATASETS

    monkeypatch.setattr(
        "polyphony.rewards.procedural.BLOCK", 2
    )  # one question is asked for, and some take half a second
    odd, refused = set(), set()
    for dataset in sorted(set(DATASETS) - {"composite"}):
        try:
            row = rows(split="train", dataset=dataset, size=1, seed=4)[0]
        except ValueError as error:
            assert "accepts any answer" in str(error)
            refused.add(dataset)
            continue
        right, wrong = grade(row, [row["answer"] or "none", "certainly not"], timeout_s=60)
        assert wrong == 0.0, dataset
        odd |= set() if right == 1.0 else {dataset}
    assert refused == {"game_of_life_halting"}
    # these have no single answer, and the one they give as an example is none
    assert odd <= {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def test_it_travels_between_processes():
    row = rows(split="train", size=1, **SUMS)[0]
    reward = pickle.loads(pickle.dumps(find_reward("procedural")))
    assert reward(["q"], [row["answer"]], answer=[row["answer"]], procedural=[row["procedural"]]) == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split is train or heldout, got 'test'"),
        ({"size": 0}, "size must be at least 1"),
        ({"dataset": "chain_sums"}, "has no dataset 'chain_sums'; it has ab, acre"),
        ({"config": {"terms": 2}}, "unexpected keyword argument 'terms'"),
        ({"config": {"min_terms": 9, "max_terms": 2}}, "max_terms"),
        (
            {"config": {**SUMS["config"], "max_digits": 1, "min_digits": 1}, "size": 300},
            "different train rows, not 300",
        ),
        ({"dataset": "composition", "config": {"deep": 2}}, "unexpected keyword argument 'deep'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rows(**({"split": "train", "size": 1} | SUMS | settings))


# --- a worker's own side, here in this process ----------------------------------------------------------------------------

JOB = {"dataset": "chain_sum", "seed": 1, "size": 4, "config": json.dumps(SUMS["config"])}


def test_a_worker_makes_questions_and_scores_answers_to_them():
    asked = reasoning_gym.work(JOB | {"indices": [0, 2]})
    assert [question["accepts"] for question in asked] == [False, False]
    answer = asked[1]["answer"]
    scored = [
        reasoning_gym.work(JOB | {"index": 2, "answer": given}) for given in (answer, f" {answer}\n", "no number")
    ]
    assert scored[:2] == [1.0, 1.0] and scored[2] < 0.1
    with pytest.raises(ValueError, match=r"reasoning-gym has no dataset 'sums'; it has .*chain_sum"):
        reasoning_gym.questions(JOB | {"dataset": "sums", "indices": [0]})
    with pytest.raises(ValueError, match=r"reasoning-gym's chain_sum: config .*min_terms"):
        reasoning_gym.questions(JOB | {"config": '{"min_terms": 9, "max_terms": 2}', "indices": [0]})


@pytest.mark.parametrize(
    ("answer", "evaluated", "parsed"),
    [
        ("[1, 2]", True, True),  # a literal
        ("2*x + sin(x)", False, True),  # a formula, of names
        ("__import__('os')", False, False),
        ("(lambda: 1)()", False, False),
        ("open(1)", False, False),
        ("x.y", False, False),
        ("it is seven", False, False),  # is Python
        ("seven: apples", True, False),  # is none, and no formula
    ],
)
def test_a_scorer_that_evaluates_or_parses_sees_plain_literals_and_formulas_only(answer, evaluated, parsed):
    harmless = [reasoning_gym._is_harmless(answer, source) for source in ("eval(a)", "parse_expr(a)", "a == b")]
    assert harmless == [evaluated, parsed, True]
