import math

import pytest

from polyphony.rewards.style import (
    count_steps,
    degeneration,
    is_bare_answer,
    mixes_languages,
    repeated_ngram_share,
    repeats_answer,
    script_shares,
    skips_computation,
)

STEPS = " ".join(f"step{i}" for i in range(40))
WORKED = rf"We add the tens: 20 + 30 = 50. We add the ones: 4 + 5 = 9. {STEPS} Hence \boxed{{59}}."


def test_repeated_ngrams_by_hand():
    # six bigrams: a b, b a, a b, b a, a b, b c: three of them new, so 3 of 6 are repeats
    assert repeated_ngram_share("a b a b a b c", 2) == 0.5
    assert repeated_ngram_share("a b", 3) == 0.0
    assert repeated_ngram_share("", 1) == 0.0
    assert repeated_ngram_share("\u554a\u554a\u554a\u554a", 3) == 0.5  # two trigrams of characters, one of them new


def test_an_answer_said_three_times_is_repeated():
    assert repeats_answer(r"\boxed{59} \boxed{59} I say 59 it is 59")
    assert not repeats_answer(r"59 and 59 are 59 but the answer is \boxed{59}")
    assert not repeats_answer(r"\boxed{5} and 55 and 555")
    assert not repeats_answer("59 59 59 59")


def test_a_loop_is_repetition_even_without_an_answer():
    # 40 words, 33 8-grams of which 4 differ
    assert degeneration("one two three four " * 10).answer_repetition


def test_a_response_far_below_the_median_of_correct_ones_skips_computation():
    # 0.35 of 100 is 35
    assert skips_computation("x", 34, 100.0)
    assert not skips_computation("x", 35, 100.0)
    assert not skips_computation("x", 0, math.nan)


def test_a_response_without_the_steps_of_its_reference_skips_computation():
    reference = "2 + 3 = 5, 5 * 4 = 20, 20 - 1 = 19"
    assert count_steps(reference) == 6
    assert skips_computation(r"It is clear. \boxed{19}", 50, math.nan, reference)
    assert not skips_computation(r"2 + 3 = 5. \boxed{19}", 50, math.nan, reference)
    assert not skips_computation(r"\boxed{19}", 50, math.nan, "it is 19")


def test_a_marked_answer_with_little_before_it_is_bare():
    assert is_bare_answer(r"\boxed{59}", 4)
    assert is_bare_answer("The answer is 59", 4)
    assert not is_bare_answer("59", 1)
    # 40 of 50 characters stand before the marker: about 80 of 100 tokens
    assert not is_bare_answer("w" * 40 + r"\boxed{59}", 100)


def test_a_worked_answer_shows_no_sign():
    signs = degeneration(WORKED, median_correct_tokens=50.0)
    assert not (signs.answer_repetition or signs.computation_skipping or signs.bare_answer)


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        (r"\boxed{59}", "bare_answer"),
        (WORKED + " 59 59 59", "answer_repetition"),
        ("So it is.", "computation_skipping"),
    ],
)
def test_each_sign_is_seen(text, sign):
    assert getattr(degeneration(text, median_correct_tokens=50.0), sign)


def test_writing_systems_by_hand():
    assert script_shares("ab дa 12") == {"LATIN": 0.75, "CYRILLIC": 0.25}
    assert script_shares("12 + 3") == {}
    assert mixes_languages("abc 数学")
    assert not mixes_languages("α + b = c")
    assert not mixes_languages("Привет", scripts=["CYRILLIC"])
    assert not mixes_languages("42")
    assert not mixes_languages("𝑥 + y")
