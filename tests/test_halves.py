from collections import Counter

import pytest

from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.halves import half, halves, on_half


def test_half_is_the_parity_of_the_sha256_of_the_id():
    # sha256("abc") ends in ...15ad (odd), sha256("") in ...b855 (odd), sha256("hello") in ...9824 (even)
    assert [half(i) for i in ("abc", "", "hello")] == ["report", "report", "steer"]


def test_each_half_gets_about_half_of_the_items():
    steer = Counter(half(f"item-{n}") for n in range(10_000))["steer"]
    assert 4_800 < steer < 5_200  # four standard errors of a fair coin


def test_an_item_keeps_its_half_when_the_set_is_cut_or_reordered():
    ids = [f"item-{n}" for n in range(50)]
    whole = dict(zip(ids, halves(ids), strict=True))
    part = ids[40:5:-1]
    assert dict(zip(part, halves(part), strict=True)) == {i: whole[i] for i in part}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_no_half_is_empty_however_few_the_items(n):
    for start in range(200):
        assert set(halves([f"{start}/{k}" for k in range(n)])) == {"steer", "report"}


def test_the_same_id_twice_is_in_the_same_half():
    assert len(set(halves(["abc", "", "abc"])[::2])) == 1


@pytest.mark.parametrize("ids", [[], ["abc"], ["abc", "abc"]])
def test_fewer_than_two_different_items_cannot_be_split(ids):
    with pytest.raises(ValueError, match="at least 2 different items"):
        halves(ids)


def test_on_half_keeps_the_scores_of_that_half_in_order():
    row = Evaluation(trained=(), step=0, seed=0, scores={"math": (0.1, 0.2, 0.3)})
    items = {"math": ("abc", "hello", "")}
    assert on_half(row, items, "steer").scores == {"math": (0.2,)}
    assert on_half(row, items, "report").scores == {"math": (0.1, 0.3)}


def test_on_half_refuses_scores_without_an_id():
    row = Evaluation(trained=(), step=0, seed=0, scores={"math": (0.1, 0.2, 0.3)})
    with pytest.raises(ValueError, match="'math': 3 scores for 2 item ids"):
        on_half(row, {"math": ("abc", "hello")}, "steer")
