import math
import random

import pytest

from polyphony.curricula.intervals import (
    Interval,
    average,
    bounded_mean,
    changed,
    changed_ratio,
    paired,
    quantile,
    ratio,
)
from tests.experiments.coverage import of_changes, of_means


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


# --- what is published ----------------------------------------------------------------------------------------------------


def test_a_mean_of_four_items_worked_by_hand():
    # t(4) = 2.77645, t^2 = 7.70865; n = 4, two right: centre .5, half-width t sqrt(.25 / 11.70865) = .40570
    assert bounded_mean([0.0, 0.0, 1.0, 1.0]) == pytest.approx((0.09430, 0.5, 0.90570), abs=1e-5)


def test_ten_items_that_agree_leave_about_the_rule_of_threes_doubt():
    # t(10) = 2.22814, t^2 = 4.96460: centre 2.4823 / 14.9646 = .16588; variance .16588 (1 - .16588) = .13836
    low, mid, high = bounded_mean([0.0] * 10)
    assert low == mid == 0.0 and high == pytest.approx(0.16588 + 2.22814 * math.sqrt(0.13836 / 14.9646), abs=1e-4)
    assert bounded_mean([1.0] * 10) == pytest.approx((1 - high, 1.0, 1.0))


def test_a_difference_that_all_items_share_has_some_width_and_still_excludes_zero():
    # pseudo-items t^2 / 2 = 2.4823 of square .25: centre 2.5 / 12.4823 = .20028
    # variance (.625 + .62058) / 12.4823 - .04011 = .05968; half-width 2.22814 sqrt(.05968 / 12.4823) = .15406
    assert changed([0.75] * 10, [0.5] * 10) == pytest.approx((0.04622, 0.25, 0.35434), abs=1e-4)


def test_twenty_items_that_did_not_move_leave_room_for_one_in_ten_that_might():
    # t(20) = 2.08596, pseudo-items 2.17562 of square 1: half-width 2.08596 sqrt(2.17562) / 22.17562 = .13874
    assert changed([1.0] * 20, [1.0] * 20) == pytest.approx((-0.13874, 0.0, 0.13874), abs=1e-4)


def test_a_change_of_a_ratio_worked_by_hand():
    # before 3/4, now 5/4 over the same counts: residuals now - before are (.5, -.5) / 4; t(1) = 12.706
    found = changed_ratio([(3.0, 2.0), (2.0, 2.0)], [(1.5, 2.0), (1.5, 2.0)])
    assert found.mid == pytest.approx(0.5) and found.high - found.mid == pytest.approx(12.7062 * 0.25, abs=1e-3)


def test_what_two_ratios_share_cancels_and_clusters_without_counts_are_none():
    rows = [(1.0, 2.0), (5.0, 3.0), (0.0, 0.0), (2.0, 9.0)]
    risen = [(total + count, count) for total, count in rows]
    assert changed_ratio(risen, rows) == pytest.approx((1.0, 1.0, 1.0))
    assert changed_ratio(rows, [(0.0, 1.0)] * 4).mid == pytest.approx(ratio(*zip(*rows, strict=True)).mid)
    assert all(math.isnan(bound) for bound in changed_ratio([(0.0, 0.0)], [(1.0, 1.0)]))
    assert changed_ratio([(1.0, 1.0)], [(0.0, 1.0)]).low == -math.inf


@pytest.mark.parametrize("of", [bounded_mean, lambda rows: changed(rows, rows)])
def test_no_items_have_no_published_interval_either(of):
    assert all(math.isnan(bound) for bound in of([]))


def test_a_change_over_other_items_is_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        changed([1, 0], [1])


@pytest.mark.slow
def test_published_intervals_cover_the_truth_and_are_not_much_wider_than_clopper_pearsons():
    means, changes = of_means(), of_changes()
    assert min(row.coverage for row in (*means, *changes)) >= 0.93
    assert max(row.width for row in means if row.samples == 1) <= 1.5


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_outside_zero_and_one_is_refused(level):
    with pytest.raises(ValueError, match="confidence level"):
        quantile(level)
