"""Shared words, worked by hand; `launch/lab/RESULTS.md` says what they were held against."""

from __future__ import annotations

import math

import pytest

from polyphony.rewards.diversity import distinct_n, self_bleu, vendi


def test_distinct_n_by_hand():
    # unigrams a b a b: 2 of 4; bigrams "a b" twice: 1 of 2
    assert distinct_n(["a b", "a b"], 1) == 0.5
    assert distinct_n(["a b", "a b"], 2) == 0.5
    assert math.isnan(distinct_n(["a", ""], 2))


def test_self_bleu_of_copies_is_one_and_of_strangers_zero():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert self_bleu(["42", "42", "42"]) == pytest.approx(1.0)
    assert self_bleu(["a b", "c d", ""]) == 0.0
    assert math.isnan(self_bleu(["a"]))


def test_self_bleu_by_hand():
    # a b c d e with a b c d: words 4/5, pairs 3/4, triples 2/3, fours 1/2: product 1/5; the other way all match, and
    # a text of 4 words is short of 5 by exp(1 - 5/4)
    assert self_bleu(["a b c d e", "a b c d"]) == pytest.approx((0.2**0.25 + math.exp(-0.25)) / 2)


def test_a_word_counts_as_often_as_the_text_that_has_it_most():
    # a a a with a a and a: words 2 of 3, pairs 1 of 2, triples 0.1 of 1; a a with a a a and a: all, lengths 1 and 3 are
    # as near and the shorter one counts; a: all, of length 1 with 2 as the nearest
    first, second, third = (2 / 3 * 1 / 2 * 0.1) ** (1 / 3), 1.0, math.exp(1 - 2)
    assert self_bleu(["a a a", "a a", "a"]) == pytest.approx((first + second + third) / 3)


def test_vendi_counts_copies_once_and_strangers_each():
    assert vendi(["a b", "a b", "c", "d e f"]) == pytest.approx(math.exp(-(0.5 * math.log(0.5) + 0.5 * math.log(0.25))))
    assert vendi(["a", "b", "c"]) == pytest.approx(3.0)
    assert vendi(["x y z"] * 5) == pytest.approx(1.0)
    assert math.isnan(vendi([]))


def test_vendi_by_hand():
    # a b: a, b, ab; a: a: cosine 1 / sqrt(3); eigenvalues (1 + c) / 2 and (1 - c) / 2
    high, low = (1 + math.sqrt(1 / 3)) / 2, (1 - math.sqrt(1 / 3)) / 2
    assert vendi(["a b", "a"]) == pytest.approx(math.exp(-(high * math.log(high) + low * math.log(low))))


def test_an_empty_text_is_like_another_empty_one_only():
    assert vendi(["", " ", "a"]) == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
