"""The published schedulers against numbers worked by hand. Domains a, b(, c); T of `visatb` as in test_effects."""

import copy
import json
import math
import random

import pytest

from polyphony.curricula.records import DomainStats, Evaluation, Evidence
from polyphony.curricula.schedulers import find_scheduler
from polyphony.curricula.schedulers.dump import DUMP
from polyphony.curricula.schedulers.e2h import E2H
from polyphony.curricula.schedulers.mt_grpo import MTGRPO
from polyphony.curricula.schedulers.pac import PAC
from polyphony.curricula.schedulers.sec import SEC
from polyphony.curricula.schedulers.visatb import VisATB
from polyphony.curricula.transfer.halves import halves
from polyphony.curricula.transfer.matrix import TransferMatrix

UNSEEN = DomainStats()
BANDITS = [SEC(), PAC(), MTGRPO(), DUMP()]


def stats(advantage=0.5, reward=0.5, dead=0.0, groups=2):
    return DomainStats(groups=groups, reward=reward, abs_advantage=advantage, frac_dead=dead)


def evidence(draw, last, kinds=None, total_draws=100):
    k = len(last)
    return Evidence(
        draw=draw,
        total_draws=total_draws,
        domains=("a", "b", "c", "d")[:k],
        kinds=kinds or ("structured",) * k,
        weights=(1.0,) * k,
        sizes=(10,) * k,
        drawn=(draw,) * k,
        last=tuple(last),
    )


def run(scheduler, *draws, total_draws=100):
    """Return the decision after the first draw saw nothing and each later one saw what is given."""
    decision = scheduler.decide(evidence(0, [UNSEEN] * len(draws[0]), total_draws=total_draws), {})
    for n, last in enumerate(draws):
        decision = scheduler.decide(evidence(n + 1, last, total_draws=total_draws), decision.state)
    return decision


def close(values):
    return pytest.approx(tuple(values), abs=1e-6)


def matrix(after, *, domains=("a", "b"), report=None):
    """Return probes whose items all score as given; with `report`, items of the `report` half score that instead."""
    ids = tuple(f"item{n}" for n in range(10))

    def items(value):
        return tuple(value if report is None or side == "steer" else report for side in halves(ids))

    rows = tuple(
        Evaluation(
            trained=trained,
            step=1,
            seed=0,
            probe=True,
            scores={name: items(value) for name, value in zip(domains, means, strict=True)},
        )
        for trained, means in after.items()
    )
    return TransferMatrix(
        domains=domains,
        kinds=dict.fromkeys(domains, "structured"),
        rows=rows,
        items=None if report is None else dict.fromkeys(domains, ids),
    )


THREE = {(): (0.2, 0.4, 0.0), ("a",): (0.8, 0.2, 0.0), ("b",): (0.4, 0.8, 0.2), ("c",): (0.1, 0.4, 0.8)}
UNRELATED = {(): (0.0, 0.0), ("a",): (0.8, 0.0), ("b",): (0.0, 0.3)}


# sec


def test_sec_prefers_the_larger_smoothed_advantage():
    decision = run(SEC(), [stats(0.8), stats(0.4)])  # Q = .4, .2; in units of tau 2 and 1
    assert decision.mixture == close([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert "a 0.40, b 0.20" in decision.reason


def test_sec_keeps_the_value_of_a_domain_that_was_not_drawn():
    decision = run(SEC(), [stats(0.8), stats(0.4)], [UNSEEN, stats(0.8)])  # Q = .4, .5 * .2 + .5 * .8 = .5
    assert decision.mixture == close([1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))])


def test_sec_names_a_domain_it_has_not_seen():
    decision = run(SEC(), [stats(0.4), UNSEEN])  # Q = .2, 0
    assert decision.mixture == close([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert decision.reason.endswith("not seen yet, counted as 0: b")


# dump


def test_dump_prefers_the_larger_advantage_among_domains_tried_equally_often():
    decision = run(DUMP(), [stats(0.5), stats(0.4)])  # the bonuses are equal, .1 is one temperature
    assert decision.mixture == close([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_dump_gives_a_bonus_to_the_domain_tried_less():
    scheduler = DUMP(group_size=1, temperature=1.0)
    decision = run(scheduler, [stats(0.5, groups=3), stats(0.5, groups=1)])  # N = 4: bonuses sqrt(2 ln 5 / 4 or / 2)
    gap = math.sqrt(math.log(5)) - math.sqrt(math.log(5) / 2)
    assert decision.mixture == close([1 / (1 + math.exp(gap)), 1 / (1 + math.exp(-gap))])


def test_dump_forgets_what_left_the_window():
    scheduler = DUMP(window=3, group_size=1)  # of a, one group at .3 and two at .6 are left: mean .5
    draws = [[stats(0.9), stats(0.5)], [stats(0.3), stats(0.5)], [stats(0.6), stats(0.5)]]
    assert run(scheduler, *draws).mixture == close([0.5, 0.5])


# pac


def test_pac_updates_its_posterior_with_advantage_and_progress():
    scheduler = PAC(cold_start=1)
    first = run(scheduler, [stats(0.8), stats(0.4)])  # rho 1, v 1: mu = u / 2, v = 1 / 2 + .02
    assert first.state["means"] == pytest.approx([0.4, 0.2])
    assert first.state["variances"] == pytest.approx([0.52, 0.52])
    # only a, rising: A = (.8 + .4) / 2, g = 1, u = 1.2, rho = 2, precision 1 / .52 + 2 = 2.04 / .52
    second = run(scheduler, [stats(0.8), stats(0.4)], [stats(0.4, reward=0.7), UNSEEN])
    assert second.state["means"] == pytest.approx([(0.4 + 0.52 * 2 * 1.2) / 2.04, 0.2])
    assert second.state["variances"] == pytest.approx([0.52 / 2.04 + 0.02, 0.54])


def test_pac_counts_a_falling_reward_against_a_domain():
    draws = [[stats(0.8, 0.4), stats(0.8, 0.6)], [stats(0.8, 0.6), stats(0.8, 0.4)]]  # slopes .2, -.2: g = .5, -.5
    decision = run(PAC(cold_start=1), *draws)  # u = 1.2, .4 weighs .52 against mu = .4
    assert decision.state["means"] == pytest.approx([(0.4 + 0.52 * 1.2) / 1.52, 0.4])


def test_pac_mixes_by_how_often_a_domain_is_drawn_best():
    decision = run(PAC(cold_start=1, samples=40_000), [stats(0.8), stats(0.4)])
    # P(theta_a > theta_b) = Phi((.4 - .2) / sqrt(.52 + .52)) = Phi(.19612) = .57774; 4 standard errors are .01
    assert decision.mixture[0] == pytest.approx(0.57774, abs=0.01)


def test_pac_forgets_draws_that_left_the_window():
    falling = [[stats(0.8, reward, groups=1), UNSEEN] for reward in (0.9, 0.5, 0.5)]
    decision = run(PAC(cold_start=1, window=2), *falling)
    assert [old["draw"] for old in decision.state["history"]] == [1, 2]


def test_pac_starts_cold_for_at_most_a_quarter_of_the_run():
    for draw, cold in [(9, True), (10, False)]:
        decision = PAC().decide(evidence(draw, [stats(0.9), stats(0.1)], total_draws=40), {})
        assert decision.reason.startswith("cold start, draw 10 of 10") == cold
        assert (decision.mixture == (0.5, 0.5)) == cold


def test_pac_draws_differently_with_another_seed_and_at_another_draw():
    shares = {
        PAC(cold_start=1, seed=seed).decide(evidence(draw, [UNSEEN] * 3), {}).mixture
        for seed, draw in [(0, 30), (1, 30), (0, 31)]
    }
    assert len(shares) == 3


# mt_grpo


def test_mt_grpo_moves_one_step_towards_the_worse_domain():
    decision = run(MTGRPO(), [stats(reward=0.8), stats(reward=0.2)])  # Adam's first step is beta, whatever the size
    assert decision.mixture == close([1 / (1 + math.exp(0.05)), 1 / (1 + math.exp(-0.05))])


def test_mt_grpo_moves_away_from_the_domain_that_improves():
    draws = [[stats(reward=0.4), stats(reward=0.5)], [stats(reward=0.6), stats(reward=0.5)]]
    decision = run(MTGRPO(balance=0.0), *draws)  # I = .1, 0; g = .025, -.025 after a first step with g = 0
    assert decision.state["reward"] == [0.5, 0.5]
    step = 0.1 / (1 - 0.9**2) / math.sqrt(0.001 / (1 - 0.999**2))
    assert decision.mixture[0] == pytest.approx(1 / (1 + math.exp(2 * 0.025 * step)), abs=1e-6)


def test_mt_grpo_clips_an_improvement_at_a_tenth():
    start = [stats(reward=0.3), stats(reward=0.5)]
    jump = run(MTGRPO(balance=0.0), start, [stats(reward=0.9), stats(reward=0.5)])  # J rises by .3
    assert jump.state["adam"]["first"] == pytest.approx([0.1 * 0.5 * 0.05, -0.1 * 0.5 * 0.05])


def test_mt_grpo_oversamples_for_dead_groups_up_to_the_cap():
    half_dead = run(MTGRPO(), [stats(dead=0.5), stats(dead=0.0)])  # equal rewards: z uniform, m = 2, 1
    assert half_dead.mixture == close([2 / 3, 1 / 3])
    for nearly in (0.9, 1.0):  # m = 5, 1
        assert run(MTGRPO(), [stats(dead=nearly), stats(dead=0.0)]).mixture == close([5 / 6, 1 / 6])
    assert run(MTGRPO(cap=1.0), [stats(dead=1.0), stats(dead=0.0)]).mixture == close([0.5, 0.5])


def test_mt_grpo_discounts_old_dead_groups():
    draws = [[stats(dead=0.5, groups=4), stats()], [stats(dead=0.0, groups=2), stats()]]
    decision = run(MTGRPO(), *draws)  # rho = .9 * 2 / (.9 * 4 + 2) = 1.8 / 5.6, m = 5.6 / 3.8 = 28 / 19
    assert decision.mixture == close([28 / 47, 19 / 47])


def test_mt_grpo_leaves_a_domain_it_has_not_seen_where_it_is():
    decision = run(MTGRPO(), [stats(reward=0.8), stats(reward=0.2), UNSEEN])
    assert decision.state["logits"] == pytest.approx([-0.025, 0.025, 0.0], abs=1e-6)


# e2h


def test_e2h_cosine_turns_the_shares_of_easy_and_hard_around():
    last = [UNSEEN] * 3
    assert E2H(kind="cosine").decide(evidence(0, last), {}).mixture == close([3 / 6, 2 / 6, 1 / 6])
    assert E2H(kind="cosine").decide(evidence(50, last), {}).mixture == close([1 / 3, 1 / 3, 1 / 3])


def test_e2h_gaussian_focuses_on_one_level_above_a_floor():
    middle = E2H().decide(evidence(25, [UNSEEN] * 3), {}).mixture  # mu = sqrt(1 / 4) * 2 = 1, f = 1 / 6
    focus = 1 / 6 + 0.5 / (1 + 2 * math.exp(-2))
    assert middle == close([(1 - focus) / 2, focus, (1 - focus) / 2])
    first = E2H(sigma=0.01).decide(evidence(0, [UNSEEN] * 3), {}).mixture
    assert first == close([2 / 3, 1 / 6, 1 / 6])


def test_e2h_starts_with_structured_domains_unless_an_order_is_given():
    seen = evidence(0, [UNSEEN] * 3, kinds=("open_ended", "structured", "structured"))
    assert E2H(kind="cosine").decide(seen, {}).mixture == close([1 / 6, 3 / 6, 2 / 6])
    given = E2H(kind="cosine", order=["c", "a", "b"])
    assert given.decide(seen, {}).mixture == close([2 / 6, 1 / 6, 3 / 6])
    with pytest.raises(ValueError, match="must name each trainable domain once"):
        E2H(order=("a", "b")).decide(seen, {})


# visatb


def test_visatb_weighs_giving_receiving_and_difficulty():
    scheduler = VisATB(transfer=matrix(THREE, domains=("a", "b", "c")))
    decision = scheduler.decide(evidence(0, [UNSEEN] * 3), {})
    # out = -.1, .2, -.05; in = .05, -.1, .1; own scores are all .8, so the third term is 1 / 3 each
    out = [math.exp(x) for x in (-0.2, 0.4, -0.1)]
    into = [math.exp(x) for x in (-0.1, 0.2, -0.2)]
    expected = [(o / sum(out) + i / sum(into)) / 4 + 1 / 6 for o, i in zip(out, into, strict=True)]
    assert decision.mixture == close(expected)
    assert decision.mixture == pytest.approx((0.307, 0.386, 0.307), abs=5e-4)


def test_visatb_gives_more_to_the_harder_of_two_unrelated_domains():
    decision = VisATB(transfer=matrix(UNRELATED)).decide(evidence(0, [UNSEEN] * 2), {})
    assert decision.mixture[1] == pytest.approx((0.5 + 1 / (1 + math.exp(-1))) / 2)


def test_visatb_takes_only_the_domains_of_the_run():
    decision = VisATB(transfer=matrix(THREE, domains=("a", "b", "c"))).decide(evidence(0, [UNSEEN] * 2), {})
    ahead = 1 / (1 + math.exp(-0.8))  # b gives .2 and a -.2, b gets -.2 and a .2: .4 of tau .5 in both terms
    assert decision.mixture[1] == pytest.approx((ahead + 0.5) / 2)


def test_visatb_refuses_a_domain_without_a_probe():
    scheduler = VisATB(transfer=matrix(UNRELATED))
    with pytest.raises(ValueError, match=r"no training on \['c'\], only on \['a', 'b'\]"):
        scheduler.decide(evidence(0, [UNSEEN] * 3), {})


def test_visatb_decides_on_the_steer_half_only():
    for report in (0.0, 1.0):
        decision = VisATB(transfer=matrix(UNRELATED, report=report)).decide(evidence(0, [UNSEEN] * 2), {})
        assert decision.mixture[1] == pytest.approx((0.5 + 1 / (1 + math.exp(-1))) / 2)


def test_visatb_without_a_matrix_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"expected a TransferMatrix or the path of .* `polyphony probe` writes, got"):
        VisATB()


# all of them


def each():
    """Return every baseline, made for three domains."""
    measured = matrix(THREE, domains=("a", "b", "c"))
    return [*BANDITS, PAC(cold_start=1), E2H(), E2H(kind="cosine"), VisATB(transfer=measured)]


def noisy_draws(n, k=3):
    """Return n draws in which domains go missing, fail to be graded, and learn."""
    rng = random.Random(7)
    ungraded = DomainStats(groups=2, frac_dead=1.0)
    return [
        [rng.choice([UNSEEN, ungraded, *[stats(rng.random(), rng.random(), rng.random(), 3)] * 4]) for _ in range(k)]
        for _ in range(n)
    ]


def name_of(scheduler):
    return f"{type(scheduler).__name__}-{getattr(scheduler, 'kind', '')}{getattr(scheduler, 'cold_start', '')}"


@pytest.mark.parametrize("scheduler", each(), ids=name_of)
def test_a_state_saved_and_restored_as_json_decides_the_same(scheduler):
    kept, restored = {}, {}
    for n, last in enumerate([[UNSEEN] * 3, *noisy_draws(60)]):
        seen = evidence(n, last, total_draws=61)
        decision = scheduler.decide(seen, kept)
        again = scheduler.decide(seen, json.loads(json.dumps(restored, allow_nan=False)))
        assert again == decision
        assert sum(decision.mixture) == pytest.approx(1) and min(decision.mixture) >= 0
        kept, restored = decision.state, again.state


@pytest.mark.parametrize("scheduler", each(), ids=name_of)
def test_deciding_twice_gives_the_same_and_leaves_the_state_alone(scheduler):
    state = {}
    for n, last in enumerate([[UNSEEN] * 3, *noisy_draws(30)]):
        before = copy.deepcopy(state)
        seen = evidence(n, last)
        decision = scheduler.decide(seen, state)
        assert scheduler.decide(seen, state) == decision
        assert state == before
        state = decision.state


@pytest.mark.parametrize("scheduler", each(), ids=name_of)
def test_a_single_domain_gets_everything(scheduler):
    assert run(scheduler, [stats(0.8, 0.3)], [UNSEEN], [stats(0.1, 0.9, 1.0)]).mixture == close([1.0])


@pytest.mark.parametrize("scheduler", BANDITS, ids=name_of)
def test_the_first_draw_is_uniform_and_says_why(scheduler):
    decision = scheduler.decide(evidence(0, [UNSEEN] * 4), {})
    assert decision.mixture == (0.25,) * 4
    assert "uniform" in decision.reason


@pytest.mark.parametrize("scheduler", [SEC(), MTGRPO(), DUMP(), PAC(cold_start=1, samples=40_000)], ids=name_of)
def test_equal_evidence_gives_equal_shares(scheduler):
    mixture = run(scheduler, *[[stats(0.6, reward)] * 4 for reward in (0.2, 0.5, 0.4)]).mixture
    tolerance = 4 * math.sqrt(0.25 * 0.75 / 40_000) if isinstance(scheduler, PAC) else 1e-9
    assert mixture == pytest.approx((0.25,) * 4, abs=tolerance)


def test_equal_probes_give_equal_shares():
    probes = matrix({(): (0.2, 0.2), ("a",): (0.6, 0.3), ("b",): (0.3, 0.6)})
    assert VisATB(transfer=probes).decide(evidence(0, [UNSEEN] * 2), {}).mixture == close([0.5, 0.5])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: SEC(temperature=0), "SEC: temperature: Input should be greater than 0, got 0"),
        (lambda: SEC(step_size=1.5), "SEC: step_size: Input should be less than or equal to 1, got 1.5"),
        (lambda: DUMP(window=0), "DUMP: window: Input should be greater than or equal to 1, got 0"),
        (lambda: DUMP(group_size=8.0), "DUMP: group_size: Input should be a valid integer, got 8.0"),
        (lambda: DUMP(temperature="0.1"), "DUMP: temperature: Input should be a valid number, got '0.1'"),
        (lambda: PAC(window=1), "PAC: window: Input should be greater than or equal to 2, got 1"),
        (lambda: PAC(drift=-0.1), "PAC: drift: Input should be greater than or equal to 0, got -0.1"),
        (lambda: PAC(samples=True), "PAC: samples: Input should be a valid integer, got True"),
        (lambda: MTGRPO(cap=0.5), "MTGRPO: cap: Input should be greater than or equal to 1, got 0.5"),
        (lambda: MTGRPO(smoothing=1), "MTGRPO: smoothing: Input should be less than 1, got 1"),
        (lambda: MTGRPO(step_size=math.nan), "MTGRPO: step_size: Input should be a finite number, got nan"),
        (lambda: E2H(kind="linear"), "E2H: kind: Input should be 'cosine' or 'gaussian', got 'linear'"),
        (lambda: E2H(sigma=-1), "E2H: sigma: Input should be greater than 0, got -1"),
        (lambda: VisATB(transfer=3), "VisATB: transfer: expected a TransferMatrix or the path .*, got 3"),
    ],
)
def test_a_wrong_setting_is_named_with_its_range(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_every_baseline_is_found_by_name():
    names = ("sec", "pac", "mt_grpo", "dump", "e2h", "visatb")
    assert [find_scheduler(name) for name in names] == [SEC, PAC, MTGRPO, DUMP, E2H, VisATB]
