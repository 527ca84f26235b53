import math
import random

import pytest

from polyphony.curricula.intervals import Interval, average, paired, quantile


def test_paired_difference_of_three_items_that_all_fell_by_one():
    # centre -3/5; spread sqrt(((3 + 1)/5 - 9/25) / 5) = sqrt(.44/5) = .29665; z = 1.95996
    interval = paired([0, 0, 0], [1, 1, 1])
    assert interval.mid == -1
    assert interval.low == pytest.approx(-0.6 - 1.95996 * 0.29665, abs=1e-4)
    assert interval.high == pytest.approx(-0.6 + 1.95996 * 0.29665, abs=1e-4)
    assert interval.is_below_zero and not interval.is_above_zero


def test_items_that_did_not_move_are_not_taken_for_certainty():
    interval = paired([1.0] * 10, [1.0] * 10)
    assert interval.mid == 0
    assert interval.low == pytest.approx(-1.95996 * math.sqrt(1 / 12 / 12), abs=1e-5)


def test_no_items_give_an_undefined_interval_that_is_neither_above_nor_below_zero():
    interval = paired([], [])
    assert all(math.isnan(bound) for bound in interval)
    assert not interval.is_above_zero and not interval.is_below_zero


def test_different_numbers_of_items_are_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired([1, 0], [1])


def test_the_interval_covers_the_true_difference_at_its_level():
    rng, hits, worlds = random.Random(0), 0, 2000
    for _ in range(worlds):
        before = [float(rng.random() < 0.6) for _ in range(40)]
        now = [b if rng.random() < 0.7 else float(rng.random() < 0.3) for b in before]
        interval = paired(now, before)
        hits += interval.low <= 0.3 * (0.3 - 0.6) <= interval.high  # 30 % of the items are drawn anew at .3
    assert 0.93 <= hits / worlds <= 0.98


def test_averaging_two_independent_estimates_adds_half_widths_in_quadrature():
    assert average(Interval(-0.3, 0.0, 0.3), Interval(0.0, 0.4, 0.8)) == pytest.approx((-0.05, 0.2, 0.45))


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_outside_zero_and_one_is_refused(level):
    with pytest.raises(ValueError, match="confidence level"):
        quantile(level)
