"""Numbers of held-out answers, worked by hand and against independent implementations."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from polyphony.rewards.math import Math
from polyphony.rewards.shaping import Format, Weighted
from polyphony.rewards.style import is_valid, style
from polyphony.trainer.data import Prompt
from polyphony.trainer.evaluation.answers import Answer, answer_probability, token_span
from polyphony.trainer.evaluation.statistics import (
    Answers,
    auroc,
    brier,
    compare,
    consistency,
    expected_calibration_error,
    majority_score,
    pass_at_k,
)
from polyphony.trainer.scoring import Sample

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


# --- calibration --------------------------------------------------------------------------------------------------------


def test_calibration_error_worked_by_hand():
    # two bins of two: |0.1 + 0.3 - 0| and |0.7 + 0.9 - 1|, over 4
    assert expected_calibration_error(
        np.array([0.9, 0.1, 0.7, 0.3]), np.array([1.0, 0.0, 0.0, 0.0]), bins=2
    ) == pytest.approx(1.0 / 4)


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


def sample(pieces, logps) -> Sample:
    """Tokens are places in `pieces`, the last one ends the sequence and has no text."""
    ids = list(range(len(pieces) + 1))
    prompt = Prompt(id="1", domain="math", prompt="?", columns={})
    return Sample(prompt=prompt, ids=ids, text="".join(pieces), truncated=False, logps=logps)


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


def test_bootstrap_by_prompt_keeps_the_samples_of_a_prompt_together():
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
    assert compare(a, a)["score"] == (0.0, 0.0, 0.0)


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
