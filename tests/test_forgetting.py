"""The numbers of one run of three stages a, b, c, worked by hand. R[s, k] is the score of domain k after stage s.

     a   b   c        ACC = (.7 + .5 + .8) / 3 = 2/3
R0  .2  .3  .1        BWT = ((.7 - .8) + (.5 - .9)) / 2 = -.25
R1  .8  .4  .1        FWT = ((.4 - .3) + (.3 - .1)) / 2 = .15
R2  .6  .9  .3        forgetting of a = max(.8, .6) - .7 = .1, of b = max(.4, .9) - .5 = .4,
R3  .7  .5  .8            of c undefined: it was trained last
"""

import math
import random
from dataclasses import replace

import pytest

from polyphony.curricula.intervals import paired
from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.forgetting import curves, drawdown, measure, moment, stages
from polyphony.curricula.transfer.matrix import TransferMatrix

R = [(0.2, 0.3, 0.1), (0.8, 0.4, 0.1), (0.6, 0.9, 0.3), (0.7, 0.5, 0.8)]


def ones(share, n=10):
    return tuple(float(k < round(share * n)) for k in range(n))


def row(trained, step, scores, seed=0, probe=False):
    named = {name: ones(share) for name, share in zip("abcw", scores, strict=False)}
    return Evaluation(trained=tuple(trained), step=step, seed=seed, scores=named, probe=probe)


def run(trained="abc", table=R, seed=0):
    return [row((), 0, table[0], seed)] + [
        row((t,), n + 1, r, seed) for n, (t, r) in enumerate(zip(trained, table[1:], strict=True))
    ]


def matrix(rows, names="abc", **fields):
    return TransferMatrix(domains=tuple(names), kinds=dict.fromkeys(names, "structured"), rows=tuple(rows), **fields)


def test_average_bwt_fwt_and_forgetting_of_the_hand_worked_run():
    measured = measure(matrix(run()))
    assert measured.average == pytest.approx(2 / 3)
    assert measured.bwt == pytest.approx(-0.25)
    assert measured.fwt == pytest.approx(0.15)
    assert measured.forgetting["a"] == pytest.approx(0.1)
    assert measured.forgetting["b"] == pytest.approx(0.4)
    assert math.isnan(measured.forgetting["c"])


def test_evaluations_inside_a_stage_do_not_change_what_its_end_says():
    rows = run()
    inside = Evaluation(trained=("b",), step=1, seed=0, scores={name: ones(0.0) for name in "abc"})
    measured = measure(matrix([*rows[:2], inside, *rows[2:]]))
    assert (measured.bwt, measured.fwt) == pytest.approx((-0.25, 0.15))


def test_rows_of_a_file_are_read_in_order_of_step():
    rows = run()
    assert measure(matrix([rows[3], rows[1], rows[0], rows[2]])).bwt == pytest.approx(-0.25)


def test_several_seeds_are_measured_one_by_one_and_averaged():
    other = [R[0], R[1], R[2], (0.8, 0.9, 0.8)]  # nothing forgotten: BWT 0
    assert measure(matrix(run() + run(table=other, seed=1))).bwt == pytest.approx(-0.125)


def test_a_run_of_one_stage_has_no_backward_and_no_forward_transfer():
    measured = measure(matrix(run("a", R[:2])))
    assert math.isnan(measured.bwt) and math.isnan(measured.fwt) and math.isnan(measured.forgetting["a"])
    assert measured.average == pytest.approx((0.8 + 0.4 + 0.1) / 3)


def test_a_file_of_probes_has_no_measured_stages():
    rows = [row((), 0, R[0]), row(("a",), 1, R[1], probe=True)]
    assert measure(matrix(rows)) is None


def test_a_file_of_one_mixture_has_no_measured_stages():
    assert measure(matrix([row((), 0, R[0]), row("abc", 1, R[1])])) is None


def test_a_second_stage_moves_the_anchor_of_its_domain():
    # a, b, a: a is last, so only b was trained earlier; forgetting of b = max(.4, .9) - .5
    measured = measure(matrix(run("aba")))
    assert measured.bwt == pytest.approx(0.5 - 0.9)
    assert measured.fwt == pytest.approx(0.4 - 0.3)
    assert math.isnan(measured.forgetting["a"])


def test_stages_are_stretches_of_one_domain_and_mixtures_belong_to_none():
    rows = [row((), 0, R[0]), row("a", 1, R[1]), row("a", 2, R[1]), row("abc", 3, R[2]), row("b", 4, R[3])]
    assert [(s.domain, s.before, s.end) for s in stages(rows)] == [("a", 0, 2), ("b", 3, 4)]


def test_online_bwt_begins_when_the_stage_of_a_domain_has_ended():
    first, second, third = curves(run())
    assert math.isnan(first.bwt["a"].mid) and math.isnan(first.bwt["c"].mid)
    assert second.bwt["a"].mid == pytest.approx(0.6 - 0.8)
    assert math.isnan(second.bwt["b"].mid)
    assert third.bwt["a"].mid == pytest.approx(0.7 - 0.8)
    assert third.bwt["b"].mid == pytest.approx(0.5 - 0.9)
    assert third.mean_bwt == pytest.approx(-0.25)
    assert third.bwt["b"] == paired(ones(0.5), ones(0.9))


def test_online_forward_transfer_freezes_when_the_stage_of_the_domain_begins():
    first, second, third = curves(run())
    assert math.isnan(first.fwt["a"].mid)
    assert [m.fwt["b"].mid for m in (first, second, third)] == pytest.approx([0.1, 0.1, 0.1])
    assert [m.fwt["c"].mid for m in (first, second, third)] == pytest.approx([0.0, 0.2, 0.2])


def test_a_watch_only_domain_is_compared_with_its_own_baseline_from_the_first_look():
    table = [(*r, w) for r, w in zip(R, (0.9, 0.8, 0.5, 0.6), strict=True)]
    moments = curves(run(table=table), watch_only=("w",))
    assert [m.bwt["w"].mid for m in moments] == pytest.approx([-0.1, -0.4, -0.3])


def test_under_a_mixture_bwt_is_undefined_and_drawdown_is_not():
    rows = [row((), 0, R[0]), row("abc", 1, R[1]), row("abc", 2, R[2])]
    now = moment(rows)
    assert math.isnan(now.bwt["a"].mid) and math.isnan(now.mean_bwt)
    assert now.drawdown["a"].mid == pytest.approx(0.6 - 0.8)
    assert now.worst_drawdown == pytest.approx(0.2)


def test_drawdown_values_on_one_half_the_evaluation_chosen_on_the_other():
    # items 0, 2 choose evaluation 1 (1.0), valued on items 1, 3: .5 - 0 = .5; items 1, 3 choose evaluation 0 (1.0),
    # valued on items 0, 2: .5 - 0 = .5; so now is .5 above where plain best-minus-now would say 0
    history = [(0.0, 1.0, 0.0, 1.0), (1.0, 0.0, 1.0, 0.0), (0.5, 0.5, 0.5, 0.5)]
    assert drawdown(history).mid == pytest.approx(0.5)


def test_drawdown_of_the_first_evaluation_is_zero_and_of_a_single_item_undefined():
    assert drawdown([(1.0, 0.0)]).mid == 0
    assert math.isnan(drawdown([(1.0,), (0.0,)]).mid)


def test_drawdown_does_not_grow_with_the_number_of_looks_under_noise_alone():
    rng, worlds, plain, fitted = random.Random(0), 300, 0.0, 0.0
    for _ in range(worlds):
        history = [[float(rng.random() < 0.5) for _ in range(40)] for _ in range(30)]
        means = [sum(r) / 40 for r in history]
        plain += (max(means) - means[-1]) / worlds
        fitted += drawdown(history).mid / worlds
    assert plain > 0.1
    assert abs(fitted) < 0.02


def test_forward_transfer_ends_where_the_domain_is_first_practised():
    def at(step, trained, scores, **drawn):
        items = {name: ones(s) for name, s in zip("ab", scores, strict=True)}
        return Evaluation(trained=tuple(trained), step=step, seed=0, scores=items, exposure=drawn)

    # b is practised from step 20 on, under a mixture, before it has a stage of its own
    rows = [
        at(0, "", (0.2, 0.2), a=0, b=0),
        at(10, "a", (0.5, 0.3), a=8, b=0),
        at(20, "ab", (0.6, 0.7), a=12, b=4),
        at(30, "b", (0.6, 0.9), a=12, b=12),
    ]
    assert moment(rows).fwt["b"].mid == pytest.approx(0.1)
    assert moment(rows[:3]).fwt["b"].mid == pytest.approx(0.1)
    # practised before anything else was measured: nothing to tell from
    at_once = [rows[0], at(10, "a", (0.5, 0.3), a=8, b=1), rows[3]]
    assert math.isnan(moment(at_once).fwt["b"].mid)


def test_what_was_not_graded_is_compared_on_the_items_graded_on_both_sides():
    gone = (None, *ones(0.6)[1:])
    assert paired(gone, ones(0.2)).mid == pytest.approx((5 - 1) / 9)
    assert math.isnan(paired((None, None), (1.0, 0.0)).mid)
    # chosen on the even places, where the second is best by .5 or .4, and valued on the odd ones; and the other way round
    history = [(1.0, 0.0) * 4, (1.0, 1.0) * 4, (0.0, 0.0) * 4]
    holes = [(None, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0), (1.0, 1.0) * 4, (0.0, None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
    assert drawdown(history).mid == drawdown(holes).mid == -1.0
    assert math.isnan(drawdown([(1.0, 1.0), (None, None)]).mid)
    rows = run()
    without = [replace(r, scores={n: (None, *items[1:]) for n, items in r.scores.items()}) for r in rows]
    assert measure(matrix(without)).average == pytest.approx((6 + 4 + 7) / 27)
    assert moment(without).bwt["a"].mid == pytest.approx((6 - 7) / 9)
