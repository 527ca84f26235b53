"""Numbers of held-out answers, worked by hand and against independent implementations."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from polyphony.curricula.records import Completion, Prompt
from polyphony.rewards.math import Math, equal_at_sight, reading
from polyphony.rewards.registry import find_reward
from polyphony.rewards.shaping import Format, Weighted
from polyphony.rewards.style import is_valid, style
from polyphony.trainer.evaluation.answers import Answer, answer_probability, read_answer, token_span, vote
from polyphony.trainer.evaluation.statistics import (
    Answers,
    as_lists,
    auroc,
    brier,
    compare,
    consistency,
    expected_calibration_error,
    majority_score,
    pass_at_k,
)

RNG = np.random.default_rng(1)
UNSURE = math.nan
"""No confidence, so that calibration, the slowest of the statistics, is not resampled where another is looked at."""


def answer(score, vote="a", confidence=0.5, valid=True, style="bare") -> Answer:
    return Answer(score=score, vote=vote, confidence=confidence, is_valid=valid, style=style)


# --- pass@k and votes ---------------------------------------------------------------------------------------------------


def test_pass_at_k_worked_by_hand():
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
    assert pass_at_k(4, 0, 4) == 0.0 and pass_at_k(4, 3, 2) == 1.0 and pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert math.isnan(pass_at_k(3, 1, 4))


@pytest.mark.parametrize(("n", "correct", "k"), [(6, 2, 3), (7, 1, 2), (5, 3, 2), (8, 4, 4)])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_correct_one(n, correct, k):
    samples = [True] * correct + [False] * (n - correct)
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize("case", [(4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_an_impossible_count_is_an_error(case):
    with pytest.raises(ValueError, match="0 <= correct <= n and k >= 1"):
        pass_at_k(*case)


def test_the_majority_is_scored_by_its_graded_samples_and_ties_are_shared():
    assert majority_score(["a", "a", "b"], [1.0, None, 0.0]) == 1.0
    assert majority_score(["a", "b"], [1.0, 0.0]) == 0.5
    assert math.isnan(majority_score(["a", "a", "b"], [None, None, 1.0]))
    assert consistency(["a", "a", "b", "c"]) == 0.5


def test_who_reads_nothing_does_not_vote():
    assert majority_score([None, None, "a", None], [0.0, 0.0, 1.0, 0.0]) == 1.0
    assert consistency([None, None, "a", None]) == 0.25
    assert majority_score([None, None], [0.0, None]) == 0.0 and consistency([None, None]) == 0.0


def completion(text, **columns) -> Completion:
    prompt = Prompt(id="1", domain="d", prompt="How many are there in all?", columns=columns)
    return Completion(prompt=prompt, ids=[1], text=text, truncated=False)


CHOICES = {"choices": ["Paris", "Rome", "Bonn"]}
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1, "y": "a"}}</tool_call>'
BOTH = Weighted(parts={"right": {"reward": "math"}, "form": {"reward": "format", "weight": 0.1}})
FORM = Weighted(parts={"form": {"reward": "format"}, "right": {"reward": "math", "weight": 0}})


@pytest.mark.parametrize(
    ("reward", "columns", "first", "second", "is_same"),
    [
        ("math", {}, "3 + 15 = 18 eggs.\nA: 18", "Nine and nine.\nA: 18", True),  # no mark: the grader takes the number
        ("math", {}, "A: 18", "A: 19", False),
        ("math", {}, "\\boxed{1,000}", "so 1000 it is", True),
        ("math", {}, "\\boxed{x = 0.5}", "The answer is \\frac{1}{2}", True),
        ("math", {}, "\\boxed{-\\sqrt{2}}", "\\boxed{\\sqrt{2}}", False),
        ("math", {}, "\\boxed{(0, 1)}", "\\boxed{[0, 1]}", False),
        ("math", {}, "\\boxed{(0,1)}", "\\boxed{\\left(0, 1.0\\right)}", True),
        ("math", {}, "\\boxed{4 million}", "\\boxed{4}", False),
        ("math", {}, "\\boxed{x \\ge 4}", "\\boxed{x >= 4}", False),
        ("math", {}, "\\boxed{\\text{Even}}", "The answer is even.", True),
        ("multiple_choice", CHOICES, "B", "The answer is (b).", True),
        ("multiple_choice", CHOICES, "I think of ships.\nB) Rome", "The answer is Rome", True),
        ("multiple_choice", CHOICES, "The answer is A", "The answer is B", False),
        ("short_answer", {}, "<think>Lyon?</think>The Seine", "<think>So.</think>\nseine.", True),
        ("short_answer", {}, "Seine", "Loire", False),
        ("exact", {}, " a.", "a.\n", True),
        ("exact", {}, "a", "a.", False),
        ("function_call", {}, CALL, 'Here.\n<tool_call>{"name":"f","arguments":{"y":"a","x":1.0}}</tool_call>', True),
        ("function_call", {}, CALL, CALL.replace("1", "2"), False),
        ("code", {}, "Answer: a loop.\n```python\nx = 1  # one\n```", "```py\nx=1\n```", True),
        ("code", {}, "```python\nx = 1\n```\nThe answer is x", "```python\nx = 2\n```\nThe answer is x", False),
        ("procedural", {}, "<answer>blen</answer>", "The answer is blen.", True),
        (BOTH, {}, "A: 18", "So 18.", True),
        (FORM, {}, "A: 18", "So 18.", False),  # nothing that counts reads an answer
        (object(), {}, "\\boxed{4}", "The answer is 4.0", True),
        (object(), {}, "A: 18", "So 18.", False),
    ],
)
def test_votes_are_about_what_the_grader_reads(reward, columns, first, second, is_same):
    grader = find_reward(reward) if isinstance(reward, str) else reward
    votes = [vote(completion(text, **columns), grader) for text in (first, second)]
    assert None not in votes and (votes[0] == votes[1]) == is_same


@pytest.mark.parametrize(
    ("reward", "columns", "text"),
    [
        ("math", {}, "none at all"),
        ("math", {}, "\\boxed{3 = 4}"),
        ("math", {}, "<think>18"),
        ("multiple_choice", CHOICES, "The answer is A or B"),
        ("short_answer", {}, "<think>Paris"),
        ("function_call", {}, '<tool_call>{"name": </tool_call>'),
        ("function_call", {}, " "),
        ("code", {}, "<think>x = 1"),
        ("procedural", {}, "<answer></answer>"),
        (BOTH, {}, "none at all"),
    ],
)
def test_what_the_grader_cannot_read_is_no_vote(reward, columns, text):
    assert vote(completion(text, **columns), find_reward(reward) if isinstance(reward, str) else reward) is None


def test_equal_readings_are_never_told_apart_at_sight():
    spellings = [
        *(
            "18",
            "18.0",
            "$18$",
            "18 eggs",
            "1,000",
            "1000",
            "1/2",
            "0.5",
            "\\frac{1}{2}",
            "-1/2",
            "4 million",
            "4",
            "1010_2",
        ),
        *(
            "(1,2)",
            "(1, 2.0)",
            "[1,2]",
            "Paris",
            "\\text{paris}",
            "x^2",
            "x_2",
            "x-1",
            "x+1",
            "50\\%",
            "10^3",
            "1010_3",
        ),
    ]
    pairs = [(a, b) for a in spellings for b in spellings if reading(a) == reading(b)]
    assert len(pairs) > len(spellings) and all(equal_at_sight(a, b) is not False for a, b in pairs)


def test_the_majority_of_solutions_that_mark_no_answer_is_that_of_their_numbers():
    # two of four end in the reference, 18; as whole texts all four would differ, and the majority be their mean
    texts = ["9 + 9\nA: 18", "3 * 6\nA: 18", "9 + 8\nA: 17", "9 + 7\nA: 16"]
    math = find_reward("math")
    scores = math(prompts=["?"] * 4, completions=texts, answer=["18"] * 4)
    rows = [
        [
            read_answer(replace(completion(text), reward=score), reward=math, has_one_answer=False, decode=str)
            for text, score in zip(texts, scores, strict=True)
        ]
    ]
    assert Answers(sampled=rows).values()["majority"] == 1.0
    assert consistency([a.vote for a in rows[0]]) == 0.5


# --- calibration --------------------------------------------------------------------------------------------------------


def test_calibration_error_worked_by_hand():
    # two bins of two: |0.1 + 0.3 - 0| and |0.7 + 0.9 - 1|, over 4
    assert expected_calibration_error(
        np.array([0.9, 0.1, 0.7, 0.3]), np.array([1.0, 0.0, 0.0, 0.0]), bins=2
    ) == pytest.approx(1.0 / 4)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.5] * 100, [1] * 50 + [0] * 50, 0.0),
        ([0.5] * 100, [1, 0] * 50, 0.0),
        # middle ranks 2 of .2 and 5 of .8 of six: with two bins .2 three times, .8 three times
        ([0.2, 0.8, 0.2, 0.8, 0.2, 0.8], [1, 1, 0, 0, 0, 1], (abs(1 - 0.6) + abs(2 - 2.4)) / 6),
        # four of five tie and straddle the middle: they share a bin, |2 - 2| of it; the other has |0 - .1|
        ([0.1, 0.5, 0.5, 0.5, 0.5], [0, 1, 1, 0, 0], 0.1 / 5),
    ],
)
def test_calibration_error_knows_no_order_of_ties(confidence, correct, expected):
    rows = list(zip(confidence, correct, strict=True))
    for _ in range(5):
        random.Random(1).shuffle(rows)
        given = np.array(rows, dtype=float)
        assert expected_calibration_error(given[:, 0], given[:, 1], bins=2) == pytest.approx(expected)


def test_calibration_error_of_equal_mass_bins_is_that_of_pandas_like_quantile_bins():
    confidence, correct = RNG.random(100), RNG.integers(0, 2, 100).astype(float)
    edges = np.quantile(confidence, np.linspace(0, 1, 11))
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, 9)
    gaps = [abs((correct - confidence)[place == b].mean()) * (place == b).mean() for b in range(10)]
    assert expected_calibration_error(confidence, correct) == pytest.approx(sum(gaps))


def test_a_calibrated_policy_has_little_error_and_a_boastful_one_much():
    confidence = RNG.random(5000)
    right = (RNG.random(5000) < confidence).astype(float)
    assert expected_calibration_error(confidence, right) < 0.03
    assert expected_calibration_error(np.full(5000, 0.99), right) == pytest.approx(0.99 - right.mean())


def test_brier_and_auroc_are_scikit_learns():
    confidence = np.round(RNG.random(300), 1)  # with ties
    right = (RNG.random(300) < confidence).astype(float)
    assert brier(confidence, right) == pytest.approx(brier_score_loss(right, confidence))
    assert auroc(confidence, right) == pytest.approx(roc_auc_score(right, confidence))
    assert math.isnan(auroc(confidence, np.ones(300)))


# --- the answer's tokens --------------------------------------------------------------------------------------------------


def sample(pieces, logps) -> Completion:
    """Tokens are places in `pieces`, the last one ends the sequence and has no text."""
    ids = list(range(len(pieces) + 1))
    prompt = Prompt(id="1", domain="math", prompt="?", columns={})
    return Completion(prompt=prompt, ids=ids, text="".join(pieces), truncated=False, logps=logps)


def decoder(pieces):
    return lambda ids: "".join(pieces[i] for i in ids if i < len(pieces))


@pytest.mark.parametrize(("start", "end", "expected"), [(0, 2, (0, 1)), (3, 4, (1, 2)), (2, 9, (1, 4)), (8, 9, (3, 4))])
def test_tokens_that_hold_some_characters_are_found(start, end, expected):
    pieces = ["it", " is", " 4", "2."]
    assert token_span([0, 1, 2, 3, 4], start, end, decoder(pieces)) == expected


def test_confidence_is_the_probability_of_the_marked_answers_tokens():
    pieces = ["so ", "\\boxed{", "4", "2", "}", "."]
    logps = [-9.0, -9.0, math.log(0.5), math.log(0.8), -9.0, -9.0, -9.0]
    assert answer_probability(sample(pieces, logps), decoder(pieces)) == pytest.approx(0.4)


def test_a_bare_answer_is_all_of_its_tokens_and_its_end():
    pieces = ["4", "2"]
    logps = [math.log(0.5)] * 3
    assert answer_probability(sample(pieces, logps), decoder(pieces)) == pytest.approx(0.125)


def test_without_log_probabilities_or_an_answer_there_is_no_confidence():
    assert math.isnan(answer_probability(sample(["4"], None), decoder(["4"])))
    assert math.isnan(answer_probability(sample(["  "], [0.0, 0.0]), decoder(["  "])))


# --- form ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "bare"),
        (" ", "empty"),
        ("```python\nprint(1)\n```", "code"),
        ("<think>x</think> 4", "think and answer"),
        ("so \\boxed{4}", "boxed"),
        ("The answer is 4.", "marked answer"),
        ('{"name": "f"}', "json"),
        ('<tool_call>{"name": "f"}</tool_call>', "tool call"),
        ("1. first\n2. second\n", "list"),
        ("we know $x^2$ and more", "latex"),
        ("once upon a time there was a fox who lived in the forest", "prose"),
    ],
)
def test_styles(text, expected):
    assert style(text) == expected


def test_a_completion_is_valid_where_it_ends_and_its_grader_can_read_it():
    boxed = Weighted(parts={"right": {"reward": "math"}, "form": {"reward": "format", "weight": 0}})
    assert is_valid("\\boxed{4}", Math(), truncated=False) and not is_valid("four", Math(), truncated=False)
    assert not is_valid("\\boxed{4}", Math(), truncated=True) and is_valid("four", object(), truncated=False)
    assert not is_valid(" ", object(), truncated=False)
    assert not is_valid("\\boxed{4}", boxed, truncated=False)
    assert is_valid("<think>2+2</think><answer>4</answer>", boxed, truncated=False)
    assert is_valid("a!", Format(pattern="a."), truncated=False)


# --- statistics of a domain ------------------------------------------------------------------------------------------------


def test_statistics_of_two_items_worked_by_hand():
    rows = [
        [answer(1.0, "x", 0.9), answer(1.0, "x", 0.7), answer(0.0, "y", 0.2), answer(None, "x", 0.5)],
        [answer(0.0, "p", 0.6), answer(0.0, "q", 0.4, valid=False), answer(0.5, "q", 0.4), answer(0.0, "q", 0.6)],
    ]
    found = Answers(sampled=rows, greedy=[answer(1.0), answer(0.0)], entropy=[(3.0, 4), (1.0, 4)]).values()
    assert found["score"] == pytest.approx((2 / 3 + 0.5 / 4) / 2)
    assert found["pass@1"] == pytest.approx((2 / 3 + 0) / 2) and found["pass@2"] == pytest.approx((1.0 + 0) / 2)
    assert found["pass@4"] == 0.0  # the first item has three graded samples only, so nothing is known of four
    assert found["majority"] == pytest.approx((1.0 + 0.5 / 3) / 2)
    assert found["greedy"] == 0.5 and found["entropy"] == 0.5 and found["format_valid"] == 7 / 8
    assert found["overconfidence"] == pytest.approx((0.9 + 0.7 + 0.2 + 0.6 + 0.4 + 0.4 + 0.6) / 7 - 2 / 7)
    assert found["consistency_overconfidence"] == pytest.approx(0.75 - 0.5)


def test_open_ended_answers_have_no_calibration():
    found = Answers(sampled=[[answer(0.3, confidence=math.nan)]]).values()
    assert found.keys() == {"score", "pass@1", "format_valid", "format_share"}


def test_the_interval_keeps_the_samples_of_a_prompt_together():
    # 40 prompts whose 8 samples agree: as wide as 40 independent answers, not as 320
    rng = random.Random(1)
    rows = [[answer(float(rng.random() < 0.5), confidence=UNSURE)] * 8 for _ in range(40)]
    low, mid, high = Answers(sampled=rows).intervals()["score"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(mid * (1 - mid) / 40), rel=0.15)


def test_a_paired_difference_is_surer_than_two_models_apart():
    rng = random.Random(2)
    first = [[answer(float(rng.random() < p), confidence=UNSURE) for _ in range(4)] for p in [0.05, 0.95] * 50]
    second = [[answer(1.0, confidence=UNSURE), *row[1:]] for row in first]  # every item is a little better
    a, b = Answers(sampled=first), Answers(sampled=second)
    apart = [m.intervals()["score"] for m in (a, b)]
    difference = compare(a, b)["score"]
    assert difference.mid == pytest.approx(apart[1].mid - apart[0].mid)
    assert difference.low > 0 and apart[0].high > apart[1].low
    same = compare(a, a)
    assert same["score"].low < 0 == same["score"].mid < same["score"].high


def test_items_that_all_agree_leave_doubt_in_every_statistic_but_the_ratios():
    sure = Answers(sampled=[[answer(1.0, confidence=0.9)] * 4] * 10, greedy=[answer(1.0)] * 10)
    found = sure.intervals(resamples=200)
    assert {"score", "pass@4", "majority", "greedy", "ece", "brier", "overconfidence"} <= found.keys()
    assert all(interval.high - interval.low > 0.05 for interval in found.values())
    risen = compare(Answers(sampled=[[answer(0.0, confidence=0.9)] * 4] * 10), sure, resamples=200)
    assert risen["score"].mid == 1.0 and risen["score"].low > 0.4 and risen["brier"].is_below_zero


def test_entropy_has_the_interval_of_a_ratio_and_one_item_has_none():
    rows = [[answer(1.0)], [answer(0.0)]]
    low, mid, high = Answers(sampled=rows, entropy=[(1.0, 2), (2.0, 2)]).intervals()["entropy"]
    assert mid == 0.75 and high - mid == mid - low == pytest.approx(12.7062 * 0.25, abs=1e-3)  # residuals -.5 and .5
    alone = Answers(sampled=rows[:1], entropy=[(1.0, 2)]).intervals()
    assert alone["entropy"].high == math.inf and "entropy" not in as_lists(alone)


def test_a_mean_is_compared_over_the_items_that_both_graded():
    first = Answers(sampled=[[answer(0.0)], [answer(None)], [answer(1.0)]])
    second = Answers(sampled=[[answer(1.0)], [answer(0.0)], [answer(1.0)]])
    assert compare(first, second, resamples=10)["score"].mid == 0.5


def test_the_interval_of_a_difference_covers_it_in_about_19_of_20_comparisons():
    rng, covered = random.Random(3), 0
    for seed in range(60):
        draws = [
            [[answer(float(rng.random() < 0.5), confidence=UNSURE) for _ in range(2)] for _ in range(60)] for _ in "ab"
        ]
        low, _, high = compare(Answers(sampled=draws[0]), Answers(sampled=draws[1]), seed=seed, resamples=150)["score"]
        covered += low <= 0 <= high
    assert covered >= 51


def test_only_the_same_items_are_compared():
    with pytest.raises(ValueError, match="got 1 and 2"):
        compare(Answers(sampled=[[answer(1.0)]]), Answers(sampled=[[answer(1.0)]] * 2))
