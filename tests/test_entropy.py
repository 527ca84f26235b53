"""The entropy monitor on sums worked by hand, on noise that must not alarm it, and on drifts that must."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from scipy import stats

from polyphony.curricula.intervals import ratio, student
from polyphony.curricula.monitors.entropy import TREND, WINDOW, EntropyMonitor
from polyphony.curricula.monitors.entropy_control import EntropyControl, EntropySettings
from polyphony.curricula.records import Group
from polyphony.launch.report.numbers import fit_exchange


def monitor(*domains, **settings) -> EntropyMonitor:
    """A monitor whose domains all have 1.0 nats a token in the base model, so that the band is 0.5 to 1.5."""
    made = EntropyMonitor(domains=domains or ("math",), **{"band": (0.5, 1.5)} | settings)
    assert made.measure(0, {name: ([50.0, 50.0], [40, 60]) for name in made.watches}) == []
    for watch in made.watches.values():
        watch.first = 1.0  # in the first draw as well
    return made


def noisy(rng, level, n=8, tokens=100):
    return sum(rng.gauss(level, 0.2 * level) * tokens / n for _ in range(n)), float(tokens)


def feed(watching, name, levels, rng, *, start=1, drawn=None):
    found = []
    for step, level in enumerate(levels, start):
        found += watching.observe(step, {name: noisy(rng, level)}, drawn=drawn or {name: 8})
    return found


def test_ratio_and_its_interval_worked_by_hand():
    # 2 + 6 nats over 2 + 2 tokens: 2 a token; residuals -2 and 2, so spread t * sqrt(2 * 8) / 4 = t
    low, mid, high = ratio([2, 6], [2, 2], level=0.9)
    assert mid == 2 and high - mid == pytest.approx(6.3138, abs=1e-4) and mid - low == pytest.approx(high - mid)


def test_students_quantile_is_that_of_scipys_distribution():
    assert student(0.95, 7) == pytest.approx(stats.t.ppf(0.975, 7))


def test_one_cluster_says_nothing_about_spread():
    assert ratio([3.0], [2.0]) == (-math.inf, 1.5, math.inf)
    assert all(math.isnan(v) for v in ratio([], []))


def test_ratio_covers_the_truth_in_19_of_20_samples():
    rng = random.Random(1)
    covered = 0
    for _ in range(1000):
        counts = [rng.randint(50, 150) for _ in range(10)]
        low, _, high = ratio([rng.gauss(0.7, 0.1) * n for n in counts], counts)
        covered += low <= 0.7 <= high
    assert 930 <= covered <= 970


def test_the_band_is_a_multiple_of_the_base_models_entropy():
    watching = EntropyMonitor(domains=("math",), band=(0.5, 1.5))
    assert math.isnan(watching.band("math")[0])
    watching.measure(0, {"math": ([30.0, 10.0], [20, 80])})
    assert watching.band("math") == pytest.approx((0.2, 0.6))  # 40 nats over 100 tokens


@pytest.mark.parametrize("band", [(0.5, 0.9), (1.1, 2.0), (-0.1, 1.5), (1.0, 1.5)])
def test_a_band_that_leaves_out_the_base_model_is_refused(band):
    with pytest.raises(ValueError, match="multiples low < 1 < high"):
        EntropyMonitor(domains=("math",), band=band)


def test_a_collapse_is_told_with_step_edge_and_what_was_practised():
    watching = monitor("math", "code")
    found = feed(watching, "math", [0.3] * WINDOW, random.Random(1), drawn={"math": 2, "code": 6})
    assert [(a.step, a.domain, a.kind) for a in found] == [(WINDOW, "math", "collapse")]
    assert found[0].drawn == {"math": 0.25, "code": 0.75}
    assert found[0].message.startswith("entropy (rollouts) fell to 0.3") and "below 0.500" in found[0].message
    assert found[0].message.endswith("since step 0 drawn: code 75%, math 25%")


def test_an_entropy_that_is_low_from_the_first_draw_on_is_no_news():
    watching, rng = EntropyMonitor(domains=("math",), band=(0.5, 1.5)), random.Random(1)
    watching.measure(0, {"math": ([50.0, 50.0], [40, 60])})
    assert feed(watching, "math", [0.3] * 4 * WINDOW, rng) == []
    (alarm,) = feed(watching, "math", [0.05] * WINDOW, rng)
    assert alarm.kind == "collapse"


def test_an_explosion_is_told_too():
    found = feed(monitor(), "math", [2.5] * WINDOW, random.Random(1))
    assert [a.kind for a in found] == ["explosion"] and "above 1.500" in found[0].message


def test_one_excursion_is_one_alarm_and_the_next_is_another():
    watching, rng = monitor(), random.Random(1)
    found = feed(watching, "math", [0.2] * 5 * WINDOW + [1.0] * 2 * WINDOW + [0.2] * 5 * WINDOW, rng)
    assert [a.kind for a in found] == ["collapse", "collapse"]
    assert f"since step {7 * WINDOW} drawn" in found[1].message  # the last look inside


def test_a_watched_domain_is_alarmed_by_its_evaluations():
    watching = monitor("math", "safety")
    feed(watching, "math", [1.0] * 20, random.Random(1))
    found = watching.measure(20, {"safety": ([1.0, 1.2, 0.9, 1.1] * 10, [10, 10, 10, 10] * 10)})
    assert [(a.domain, a.kind) for a in found] == [("safety", "collapse")] and "(held out, items that decide)" in found[
        0
    ].message
    assert found[0].drawn == {"math": 1.0}


def test_a_held_out_level_inside_does_not_end_an_excursion_of_the_rollouts():
    watching, rng = monitor(), random.Random(1)
    found = feed(watching, "math", [0.2] * WINDOW, rng)
    for k in range(1, 5):
        assert watching.measure(k * WINDOW, {"math": ([45.0, 55.0] * 20, [50, 50] * 20)}) == []
        found += feed(watching, "math", [0.2] * WINDOW, rng, start=k * WINDOW + 1)
    assert [a.step for a in found] == [WINDOW] and "(rollouts)" in found[0].message


def test_noise_at_the_very_edge_of_the_band_alarms_at_most_one_run_in_twenty():
    alarmed = 0
    for seed in range(200):
        watching = monitor()
        alarmed += bool(feed(watching, "math", [0.5] * 400, random.Random(seed)))
    assert alarmed <= 16  # 10 expected at most; 16 has probability .03 at a true rate of .05


def test_slope_is_the_least_squares_line_over_the_last_draws():
    watching = monitor()
    levels = [5.0] * 10 + [1.0 - 0.01 * k for k in range(TREND)]
    for step, level in enumerate(levels, 1):
        watching.observe(step, {"math": (level * 50, 50.0)}, drawn={"math": 8})
    assert watching.slope("math") == pytest.approx(-0.01)


def test_place_is_0_at_the_low_edge_and_1_at_the_high_one():
    watching = monitor()
    for step in range(WINDOW):
        watching.observe(step, {"math": (75.0, 100.0)}, drawn={"math": 8})
    assert watching.metrics()["math"]["entropy_place"] == pytest.approx(0.25)


def test_a_draw_without_a_domain_is_no_draw_of_it():
    watching = monitor("math", "code")
    feed(watching, "math", [1.0] * 3, random.Random(1))
    assert set(watching.metrics()) == {"math"}


def test_a_restored_monitor_goes_on_as_if_nothing_had_happened():
    levels = [1.0 - 0.02 * k for k in range(40)]
    whole, rng = monitor(), random.Random(3)
    expected = feed(whole, "math", levels, rng)
    first, rng = monitor(), random.Random(3)
    before = feed(first, "math", levels[:21], rng)
    second = EntropyMonitor(domains=("math",), band=(0.5, 1.5))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + feed(second, "math", levels[21:], rng, start=22) == expected != []
    assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())


def test_another_runs_domains_are_refused():
    with pytest.raises(ValueError, match=r"saved entropies are of \['math'\], this run has \['code'\]"):
        EntropyMonitor(domains=("code",), band=(0.5, 1.5)).load_state_dict(monitor().state_dict())


# --- the law R = b - a exp(H) -------------------------------------------------------------------------------------------


def test_the_law_is_recovered_from_points_on_it():
    entropy = [1.0, 0.8, 0.5, 0.3, 0.2]
    found = fit_exchange(entropy, [0.9 - 0.2 * math.exp(h) for h in entropy])
    assert found is not None and found.is_trade
    assert (found.a, found.b) == pytest.approx((0.2, 0.9))
    # at H = 0 the score is .9 - .2 = .7; at .2 it is .9 - .2 e^.2
    assert found.headroom.mid == pytest.approx(0.7 - (0.9 - 0.2 * math.exp(0.2)))


def test_the_interval_of_a_is_that_of_scipys_regression():
    rng = np.random.default_rng(1)
    entropy = np.linspace(1, 0.2, 9)
    score = 0.8 - 0.1 * np.exp(entropy) + rng.normal(0, 0.02, 9)
    reference = stats.linregress(np.exp(entropy), score)
    found = fit_exchange(entropy.tolist(), score.tolist())
    assert found is not None
    assert found.a == pytest.approx(-reference.slope) and found.b == pytest.approx(reference.intercept)
    assert found.a_interval.high - found.a == pytest.approx(stats.t.ppf(0.975, 7) * reference.stderr)


def test_a_score_that_did_not_follow_entropy_is_no_trade():
    found = fit_exchange([1.0, 0.8, 0.6, 0.4, 0.2], [0.5, 0.7, 0.4, 0.6, 0.5])
    assert found is not None and not found.is_trade and found.headroom.low < 0 < found.headroom.high


@pytest.mark.parametrize("entropy", [[1.0, 0.9, 0.8], [0.5] * 6])
def test_too_few_evaluations_or_a_still_entropy_fit_nothing(entropy):
    assert fit_exchange(entropy, [0.5] * len(entropy)) is None


# --- control -----------------------------------------------------------------------------------------------------------


BAND = {"band": (0.5, 1.5), "base": 1.0}
"""Drawn in by .15 of its width: control begins below 0.65 and above 1.35."""


def test_a_coefficient_answers_at_once_and_grows_while_its_domain_stays_out():
    control = EntropyControl(domains=("math",), settings=EntropySettings(push=0.5, rate=0.1, max_coefficient=1.0))
    assert control.move("math", level=0.4, **BAND) == pytest.approx(0.5 * 0.25 + 0.1 * 0.25)
    assert control.move("math", level=0.3, **BAND) == pytest.approx(0.5 * 0.35 + 0.1 * 0.6)


def test_a_coefficient_fades_once_its_domain_is_back():
    control = EntropyControl(domains=("math",), settings=EntropySettings(push=0.5, rate=0.1))
    control.sums["math"] = 1.0
    assert control.move("math", level=1.0, **BAND) == pytest.approx(0.1 * 0.98)
    assert control.move("math", level=1.0, **BAND) == pytest.approx(0.1 * 0.98**2)


def test_too_much_entropy_is_pushed_down():
    control = EntropyControl(domains=("math",), settings=EntropySettings(push=0.1, rate=0.1))
    assert control.move("math", level=1.9, **BAND) == pytest.approx(-0.1 * 0.55 - 0.1 * 0.55)


def test_a_coefficient_has_bounds_and_its_sum_does_not_run_away():
    control = EntropyControl(domains=("math",), settings=EntropySettings(push=1.0, rate=0.1, max_coefficient=0.2))
    for _ in range(1000):
        assert control.move("math", level=0.0, **BAND) == 0.2
    assert control.sums["math"] == pytest.approx(2.0)
    assert control.move("math", level=9.0, **BAND) == -0.2


def test_nothing_moves_while_the_base_is_unknown():
    control = EntropyControl(domains=("math",))
    control.move("math", level=0.2, **BAND)
    before = control.state_dict()
    control.move("math", level=math.nan, **BAND)
    control.move("math", level=0.1, band=(math.nan, math.nan), base=math.nan)
    assert control.state_dict() == before


def test_a_restored_control_goes_on():
    control, other = EntropyControl(domains=("math",)), EntropyControl(domains=("math",))
    control.move("math", level=0.2, **BAND)
    other.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert other.move("math", level=0.3, **BAND) == control.move("math", level=0.3, **BAND)


def test_domains_are_controlled_apart():
    control = EntropyControl(domains=("math", "stories"), settings=EntropySettings(rate=0.1))
    control.move("math", level=0.1, **BAND)
    assert control.coefficients["stories"] == 0.0 < control.coefficients["math"]


def group(*rewards: float | None, domain: str = "math") -> Group:
    n = len(rewards)
    return Group(prompt_id="p", domain=domain, draw=1, rewards=rewards, lengths=(4,) * n, truncated=(False,) * n)


@pytest.mark.parametrize(
    ("rewards", "acts"),
    [
        ((0.0, 0.0), True),
        ((0.9, 0.5), True),
        ((None, 0.0), True),
        ((1.0, 0.0), False),
        ((1.0, 1.0), False),
        ((None,), False),
    ],
)
def test_entropy_is_raised_where_no_completion_got_the_full_reward(rewards, acts):
    for rows, expected in (("unsolved", 0.2 if acts else 0.0), ("all", 0.2)):
        control = EntropyControl(domains=("math",), settings=EntropySettings(rows=rows))
        control.coefficients["math"] = 0.2
        assert control.of_row(group(*rewards)) == expected


def test_entropy_is_lowered_on_all_rows_alike_and_nothing_is_done_to_other_domains():
    control = EntropyControl(domains=("math",))
    control.coefficients["math"] = -0.2
    assert [control.of_row(group(1.0, 1.0)), control.of_row(group(0.0, 0.0))] == [-0.2, -0.2]
    assert control.of_row(group(0.0, domain="stories")) == 0.0


def test_a_draw_with_nothing_to_act_on_is_let_pass_and_does_not_wind_the_sum_up():
    control = EntropyControl(domains=("math",))
    before = control.move("math", level=0.2, **BAND)
    for _ in range(100):
        assert control.move("math", level=0.2, **BAND, can_raise=False) == 0.0
    assert control.sums["math"] == pytest.approx(0.45) and before > 0
    assert control.move("math", level=1.9, **BAND, can_raise=False) < 0
