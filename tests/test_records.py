import math
import re

import pytest

from polyphony.curricula.declarations import as_settings
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import Domain, Evaluation, Group


def group(*rewards):
    n = len(rewards)
    return Group(prompt_id="p", domain="d", draw=0, rewards=rewards, lengths=(1,) * n, truncated=(False,) * n)


def test_a_grader_failure_is_left_out_and_never_counts_as_zero():
    g = group(1.0, None, 0.0, 1.0)
    assert g.graded == (1.0, 0.0, 1.0)
    assert g.mean_reward == pytest.approx(2 / 3) and g.pass_rate == pytest.approx(2 / 3)


def test_a_group_that_nobody_graded_is_undefined():
    g = group(None, None)
    assert math.isnan(g.mean_reward) and math.isnan(g.pass_rate) and math.isnan(g.abs_advantage)
    assert not g.has_signal


@pytest.mark.parametrize(
    ("rewards", "cause"),
    [
        ((1.0, 1.0), "all_correct"),
        ((0.0, 0.0), "all_wrong"),
        ((-1.0, -1.0), "all_wrong"),
        ((0.5, 0.5), "all_equal"),
        ((0.5, None), "all_equal"),
        ((0.5, 0.25), "all_wrong"),  # teaches nothing only where nothing but a full reward is accepted
        ((None, None), "ungraded"),
    ],
)
def test_equal_partial_rewards_are_not_called_wrong(rewards, cause):
    assert group(*rewards).cause == cause


@pytest.mark.parametrize("solved", [1, 2, 3, 4, 7])
def test_mean_absolute_advantage_of_binary_rewards_is_twice_root_p_times_one_minus_p(solved):
    p = solved / 8
    assert group(*[1.0] * solved, *[0.0] * (8 - solved)).abs_advantage == pytest.approx(2 * math.sqrt(p * (1 - p)))


def test_a_dead_group_has_no_advantage_even_where_its_mean_is_rounded():
    g = group(0.1, 0.1, 0.1)  # their mean is 0.10000000000000002
    assert not g.has_signal and g.abs_advantage == 0.0


def test_an_evaluation_is_the_same_after_its_row_of_the_transfer_file():
    whole = Evaluation(
        trained=("a",), step=3, seed=1, scores={"a": (0.5, 1.0)}, entropy={"a": 0.2}, exposure={"a": 8}, probe=True
    )
    assert Evaluation.from_row(whole.as_row()) == whole


@pytest.mark.parametrize(("field", "value"), [("kind", "verifiable"), ("weight", -1.0), ("weight", math.nan)])
def test_a_wrong_domain_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"Domain 'math': {field}: "):
        Domain(**({"name": "math", "kind": "structured"} | {field: value}))


@pytest.mark.parametrize("given", [False, 0, "abc", [], ["look"]])
def test_settings_are_an_instance_a_mapping_or_nothing(given):
    with pytest.raises(ValueError, match=re.escape(f"PoolSettings: expected a mapping of its fields, got {given!r}")):
        as_settings(PoolSettings, given)
    assert as_settings(PoolSettings, {"look": 4}).look == 4 and as_settings(PoolSettings, None) == PoolSettings()
    with pytest.raises(ValueError, match="PoolSettings: unknown key '5'; known: "):
        as_settings(PoolSettings, {5: 4})
