"""The published rules, each against numbers worked by hand."""

import math

import numpy as np
import pytest

from curricula.records import DomainStats, Evaluation, Evidence
from curricula.schedulers import build_scheduler
from curricula.transfer import TransferMatrix

NAMES = ("a", "b")


def evidence(*stats, draw=1, total=10, drawn=None, evaluations=(), names=NAMES):
    size = len(names)
    return Evidence(
        draw=draw,
        total_draws=total,
        domains=names,
        kinds=("structured",) * size,
        weights=(1.0,) * size,
        sizes=(10,) * size,
        drawn=drawn or (0,) * size,
        last=stats or (DomainStats(),) * size,
        evaluations=evaluations,
    )


def seen(advantage=math.nan, *, groups=4, reward=math.nan, dead=math.nan):
    return DomainStats(groups=groups, abs_advantage=advantage, reward=reward, frac_dead=dead)


def softmax(*scores):
    powers = [math.exp(s) for s in scores]
    return [p / sum(powers) for p in powers]


def test_sec_averages_learnability_and_draws_by_its_softmax():
    sec = build_scheduler("sec")
    first = sec.decide(evidence(seen(0.8), seen(0.2)), {})
    assert first.state["value"] == pytest.approx([0.4, 0.1])  # half way from 0
    assert first.mixture == pytest.approx(softmax(0.4 / 0.2, 0.1 / 0.2))


def test_sec_keeps_the_value_of_a_domain_that_was_not_drawn():
    sec = build_scheduler("sec")
    second = sec.decide(evidence(seen(0.8), DomainStats()), {"value": [0.4, 0.1]})
    assert second.state["value"] == pytest.approx([0.6, 0.1])


def test_dump_adds_a_bonus_for_what_was_seldom_drawn():
    # N = 12: bonus of a sqrt(2 ln 13 / 10), of b sqrt(2 ln 13 / 4)
    dump = build_scheduler("dump")
    decision = dump.decide(evidence(seen(0.5), seen(0.3), drawn=(9, 3)), {})
    a = 0.5 + math.sqrt(2 * math.log(13) / 10)
    b = 0.3 + math.sqrt(2 * math.log(13) / 4)
    assert decision.mixture == pytest.approx(softmax(a / 0.1, b / 0.1))


def test_dump_forgets_groups_beyond_its_window():
    dump = build_scheduler("dump", window=10)
    state = {}
    for advantage in (0.9, 0.4, 0.2):
        state = dump.decide(evidence(seen(advantage, groups=5), DomainStats()), state).state
    assert state["history"][0] == [[5, 0.4], [5, 0.2]]


def test_mt_grpo_moves_logits_down_where_reward_is_high_and_rising():
    # J now .6 and .2, before .5 and .2: s = .1 + .6 x .6 = .46 and .12; z = .5 each, mean .29
    # g = .5 x .17 = .085 and -.085; xi = -.025 x .085 = -.002125 and +.002125
    decision = build_scheduler("mt_grpo").decide(
        evidence(seen(reward=0.6, dead=0.0), seen(reward=0.2, dead=0.0)),
        {"logits": [0.0, 0.0], "rewards": [0.5, 0.2], "dead": [0.0, 0.0]},
    )
    assert decision.state["logits"] == pytest.approx([-0.002125, 0.002125])
    assert decision.mixture == pytest.approx(softmax(-0.002125, 0.002125))


def test_mt_grpo_draws_more_of_a_domain_whose_groups_die_so_that_the_update_keeps_its_ratio():
    state = {"logits": [0.0, 0.0], "rewards": [None, None], "dead": [0.5, 0.0]}
    decision = build_scheduler("mt_grpo").decide(evidence(), state)
    assert decision.mixture == pytest.approx((2 / 3, 1 / 3))  # 1 / (1 - .5) : 1
    capped = build_scheduler("mt_grpo", most=1.0).decide(evidence(), state)
    assert capped.mixture == pytest.approx((0.5, 0.5))


def test_mt_grpo_survives_a_domain_that_is_all_dead():
    state = {"logits": [0.0, 0.0], "rewards": [None, None], "dead": [1.0, 0.0]}
    assert build_scheduler("mt_grpo").decide(evidence(), state).mixture == pytest.approx((0.8, 0.2))


def test_pac_is_uniform_while_it_warms_up_and_then_prefers_the_better_arm():
    pac = build_scheduler("pac", warmup=3)
    state = {}
    for draw in range(8):
        decision = pac.decide(evidence(seen(0.9, reward=0.5), seen(0.1, reward=0.5), draw=draw, total=20), state)
        state = decision.state
        if draw < 3:
            assert decision.mixture == (0.5, 0.5)
    assert decision.mixture[0] > 0.8  # posteriors about .9 +- .4 and .1 +- .4: P(a > b) tends to .93


def test_pac_weighs_a_draw_by_its_share_of_the_groups():
    # the first decision has seen nothing: N(0, 1). Then a had 6 of 8 groups: precision 1 + .75 x 2 = 2.5,
    # mean 1.5 x .8 / 2.5 = .48, variance 1 / 2.5 + .02 = .42; b had 2 of 8: precision 1.5, mean .5 x .4 / 1.5
    pac = build_scheduler("pac")
    state = pac.decide(evidence(draw=0), {}).state
    arms = pac.decide(evidence(seen(0.8, groups=6), seen(0.4, groups=2)), state).state["arms"]
    assert arms["mean"] == pytest.approx([0.48, 0.2 / 1.5])
    assert arms["variance"] == pytest.approx([0.42, 1 / 1.5 + 0.02])


def test_pac_prefers_progress_among_equally_learnable_arms():
    pac = build_scheduler("pac", warmup=0)
    state = {}
    for draw in range(12):
        rising = seen(0.5, reward=0.1 + 0.05 * draw)
        state = (decision := pac.decide(evidence(rising, seen(0.5, reward=0.4), draw=draw), state)).state
    assert decision.mixture[0] > 0.7  # utilities 2 x .5 and 1 x .5, each +- .4: P tends to .82


def test_e2h_cosine_begins_with_the_easy_and_ends_with_the_hard():
    # K = 3, S = 6: at t = 0 shares 3/6, 2/6, 1/6; half way w = .5 makes all (K + 1) / 2S = 1/3
    names = ("hard", "easy", "middle")
    e2h = build_scheduler("e2h", order=("easy", "middle", "hard"))
    start = e2h.decide(evidence(draw=0, names=names), {}).mixture
    half = e2h.decide(evidence(draw=5, names=names), {}).mixture
    assert start == pytest.approx((1 / 6, 3 / 6, 2 / 6))
    assert half == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_e2h_gaussian_travels_from_easy_to_hard_over_its_floor():
    # t = .25 and exponent .5: mu = .5 x 2 = 1, the middle; N = 1, e^-2, e^-2 -> .787, .107, .107; floor 1/6
    e2h = build_scheduler("e2h", kind="gaussian", order=("easy", "middle", "hard"))
    mixture = e2h.decide(evidence(draw=5, total=20, names=("easy", "middle", "hard")), {}).mixture
    peak = 1 / (1 + 2 * math.exp(-2))
    total = peak + 2 / 6
    assert mixture == pytest.approx((1 / 6 / total, peak / total, 1 / 6 / total))


def test_e2h_takes_the_first_evaluation_for_ease_and_refuses_to_guess_without():
    rows = (Evaluation(trained=(), step=0, seed=0, scores={"a": (0.0, 1.0), "b": (1.0, 1.0)}),)
    assert build_scheduler("e2h").decide(evidence(draw=0, evaluations=rows), {}).mixture == pytest.approx(
        (1 / 3, 2 / 3)
    )
    with pytest.raises(ValueError, match="an evaluation must come first"):
        build_scheduler("e2h").decide(evidence(draw=0), {})


def test_visatb_prefers_givers_poor_receivers_and_hard_domains():
    # T[a -> b] = .2, T[b -> a] = -.4; scores .4 before, own .8 and .5: out = .2, -.4; in = -.4, .2; d = .5, .8
    def row(trained, a, b):
        scores = {"a": tuple(float(k < 10 * a) for k in range(10)), "b": tuple(float(k < 10 * b) for k in range(10))}
        return Evaluation(trained=trained, step=1, seed=0, scores=scores, probe=True)

    rows = (row((), 0.4, 0.4), row(("a",), 0.8, 0.6), row(("b",), 0.0, 0.5))
    kinds = dict.fromkeys(NAMES, "structured")
    visatb = build_scheduler("visatb", transfer=TransferMatrix(domains=NAMES, kinds=kinds, rows=rows))
    out, into, hard = softmax(0.4, -0.8), softmax(0.8, -0.4), softmax(1.0, 0.4)
    expected = [((o + i) / 2 + h) / 2 for o, i, h in zip(out, into, hard, strict=True)]
    assert visatb.decide(evidence(), {}).mixture == pytest.approx(expected)
    assert np.sum(expected) == pytest.approx(1)


def test_joint_follows_weights_and_proportional_follows_sizes():
    assert build_scheduler("joint").decide(evidence(), {}).mixture == (0.5, 0.5)
    assert build_scheduler("proportional").decide(evidence(), {}).mixture == (0.5, 0.5)


def test_sequential_gives_each_domain_an_equal_part_of_the_run():
    sequential = build_scheduler("sequential", order=("b", "a"))
    stages = [sequential.decide(evidence(draw=draw, total=7), {}).stage for draw in range(7)]
    assert stages == ["b", "b", "b", "b", "a", "a", "a"]


def test_sequential_without_an_order_puts_structured_before_open_ended():
    given = Evidence(
        draw=0,
        total_draws=4,
        domains=("talk", "math"),
        kinds=("open_ended", "structured"),
        weights=(1.0, 1.0),
        sizes=(1, 1),
        drawn=(0, 0),
        last=(DomainStats(), DomainStats()),
    )
    assert build_scheduler("sequential").decide(given, {}).stage == "math"


@pytest.mark.parametrize("order", [("a",), ("a", "a"), ("a", "c")])
def test_an_order_that_is_not_the_domains_is_refused(order):
    with pytest.raises(ValueError, match="order"):
        build_scheduler("sequential", order=order).decide(evidence(), {})
    with pytest.raises(ValueError, match="order"):
        build_scheduler("e2h", order=order).decide(evidence(), {})
