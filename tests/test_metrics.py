from __future__ import annotations

import pytest

from polyphony.curricula.records import Group
from polyphony.trainer.metrics import METRICS, OF_GRADERS, Logged, Meter
from polyphony.trainer.settings import RftSettings


def group(domain, rewards, lengths, truncated=None) -> Group:
    truncated = truncated or (False,) * len(rewards)
    return Group(prompt_id="p", domain=domain, draw=0, rewards=rewards, lengths=lengths, truncated=truncated)


MIXED = group("math", (1.0, 0.0, None, 0.0), (5, 9, 12, 7), (False, False, True, False))
SOLVED = group("math", (1.0, 1.0, 1.0, 1.0), (2, 2, 2, 2))
STORY = group("stories", (0.5, 0.75), (10, 30), (False, True))
UNGRADED = group("math", (None, None), (3, 4))


def meter(*draws) -> Meter:
    meter = Meter(domains=("math", "stories"))
    for groups, entropy, seconds in draws:
        meter.add(groups, entropy, seconds)
    return meter


def test_metrics_of_a_domain_worked_by_hand():
    metrics = meter(([MIXED, SOLVED], {}, 2.0)).flush()
    assert metrics["domain/math/n"] == 8
    assert metrics["domain/math/grader_failures"] == 1
    assert metrics["domain/math/reward"] == pytest.approx(5 / 7)
    assert metrics["domain/math/reward_std"] == pytest.approx((10 / 42) ** 0.5)  # 5 ones, 2 zeros: 10/7 over 6
    assert metrics["domain/math/pass_rate"] == pytest.approx(5 / 7)
    assert metrics["domain/math/frac_dead"] == 0.5
    assert metrics["domain/math/mean_length"] == 41 / 8
    assert metrics["domain/math/clipped_ratio"] == 1 / 8
    assert metrics["rollout/tokens_per_s"] == 41 / 2
    assert metrics["rollout/useful_token_frac"] == pytest.approx(33 / 41)


def test_draws_are_added_up_before_they_are_divided():
    metrics = meter(([MIXED], {"math": (6.0, 10)}, 1.0), ([SOLVED, SOLVED], {"math": (1.0, 30)}, 1.0)).flush()
    assert metrics["domain/math/entropy"] == 7 / 40  # not the mean of 6/10 and 1/30
    assert metrics["domain/math/reward"] == pytest.approx(9 / 11)  # not the mean of 1/3 and 1
    assert metrics["domain/math/frac_dead"] == pytest.approx(2 / 3)


def test_completions_that_entropy_leaves_out_are_counted_and_none_are_not_named():
    ours = meter(([MIXED], {"math": (6.0, 10)}, 1.0))
    ours.add([MIXED], {"math": (6.0, 10)}, 1.0, discarded=[SOLVED], rounds=1, unmeasured={"math": 4})
    metrics = ours.flush()
    assert metrics["domain/math/entropy_unmeasured"] == 4 and metrics["domain/math/entropy"] == 12 / 20
    assert "domain/math/entropy_unmeasured" not in meter(([MIXED], {}, 1.0)).flush()


def test_domains_of_different_size_do_not_mix():
    metrics = meter(([MIXED, SOLVED, STORY], {"math": (8.0, 16), "stories": (60.0, 40)}, 1.0)).flush()
    assert metrics["domain/math/entropy"] == 0.5
    assert metrics["domain/stories/entropy"] == 1.5
    assert metrics["domain/stories/reward"] == 0.625
    assert metrics["domain/stories/pass_rate"] == 0.0
    assert metrics["domain/stories/clipped_ratio"] == 0.5


def test_what_is_undefined_is_absent():
    metrics = meter(([UNGRADED], {}, 0.0)).flush()
    assert metrics["domain/math/grader_failures"] == 2
    for name in ("reward", "reward_std", "pass_rate", "entropy"):
        assert f"domain/math/{name}" not in metrics
    assert "rollout/tokens_per_s" not in metrics
    assert not any(name.startswith("domain/stories") for name in metrics)


def test_dead_groups_are_told_by_cause_and_a_graders_failure_is_neither():
    wrong = group("math", (0.0, 0.0, None, 0.0), (1,) * 4)
    metrics = meter(([MIXED, SOLVED, wrong, UNGRADED, UNGRADED], {}, 1.0)).flush()
    assert metrics["domain/math/frac_dead"] == 4 / 5
    assert (metrics["domain/math/dead_correct"], metrics["domain/math/dead_wrong"]) == (1 / 5, 1 / 5)


def test_equal_partial_rewards_are_dead_for_a_cause_of_their_own():
    half = group("math", (0.5, 0.5), (1, 1))
    metrics = meter(([MIXED, half], {}, 1.0)).flush()
    told = [metrics[f"domain/math/{name}"] for name in ("frac_dead", "dead_correct", "dead_wrong", "dead_equal")]
    assert told == [1 / 2, 0, 0, 1 / 2] and metrics["rollout/shortfall"] == 1


def test_completions_of_dead_groups_are_counted_as_they_were_sampled():
    left = group("math", (0.0, 0.0), (3, 3))  # after its look
    metrics = meter(([MIXED, left], {}, 1.0)).flush()
    assert metrics["domain/math/frac_dead"] == 1 / 2
    assert metrics["domain/math/dead_completions"] == 2 / 6


def test_where_solved_groups_teach_they_are_not_dead():
    wrong = group("math", (0.0,) * 4, (1,) * 4)
    rft = Meter(domains=("math",), is_useful=RftSettings().is_useful)
    rft.add([MIXED, SOLVED, SOLVED, wrong], {}, 1.0)
    metrics = rft.flush()
    assert metrics["rollout/shortfall"] == 1
    assert metrics["domain/math/frac_dead"] == metrics["domain/math/dead_completions"] == 1 / 4
    assert metrics["rollout/useful_token_frac"] == 49 / 53
    assert (metrics["domain/math/dead_correct"], metrics["domain/math/dead_wrong"]) == (0, 1 / 4)


def test_one_graded_completion_has_a_mean_and_no_spread():
    metrics = meter(([group("math", (0.5, None), (1, 1))], {}, 1.0)).flush()
    assert metrics["domain/math/reward"] == 0.5
    assert "domain/math/reward_std" not in metrics


def test_a_flush_starts_anew():
    meter_ = meter(([MIXED], {"math": (6.0, 10)}, 1.0))
    meter_.flush()
    assert meter_.flush() == {}
    meter_.add([SOLVED], {"math": (2.0, 8)}, 4.0)
    metrics = meter_.flush()
    assert (metrics["domain/math/n"], metrics["domain/math/entropy"]) == (4, 0.25)
    assert metrics["rollout/tokens_per_s"] == 2.0


def test_what_graders_say_is_added_up_over_ranks_before_it_is_divided():
    here, there = Logged(), Logged()
    here.add("code", [("exhausted", 1.0), ("exhausted", 0.0), ("mine", 3.0)])
    there.add("code", [("exhausted", 0.0)] * 2 + [("suspected_tricks", 1.0)])
    there.add("math", [("mine", float("nan"))])
    rows = list(there.sums.items())
    assert here.flush("heldout", gather=lambda own: own + rows) == {
        "heldout/code/exhausted": 1 / 4,
        "heldout/code/suspected_tricks": 1.0,
        "heldout/code/logged/mine": 3.0,
    }
    assert here.flush("heldout") == {}


def test_what_graders_say_has_a_name_in_training_and_held_out():
    assert all(name in METRICS[family] for name in OF_GRADERS for family in ("domain", "heldout"))
