import math

import pytest
import torch

from polyphony.curricula.records import Group
from polyphony.trainer.advantages import Advantages, accepted, centred_without, mean_only, rare_successes
from polyphony.trainer.settings import Guard, RftSettings, UpdateSettings


def graded(*rewards, domain="math", signs=(), texts=()) -> Group:
    n = len(rewards)
    return Group(
        prompt_id="p",
        domain=domain,
        draw=0,
        rewards=rewards,
        lengths=(5,) * n,
        truncated=(False,) * n,
        signs=tuple(signs if r == 1.0 else () for r in rewards),
        texts=tuple(texts),
    )


def worth(stock, groups, first_row=0, *, kind="group", **settings):
    return advantages(kind, **settings)(stock, groups, first_row)


def advantages(kind="group", **settings) -> Advantages:
    return Advantages(
        settings=UpdateSettings(**settings),
        kinds={"math": kind, "talk": "group"},
        find_suspects=lambda group: [i for i, signs in enumerate(group.signs) if signs],
    )


def test_mean_only_by_hand():
    assert mean_only([1.0, 0.0, None, 0.5]) == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rewards", "places"),
    [
        ([0.0, 1.0, 0.5], [1]),
        ([1.0, 1.0, 0.0], []),
        ([0.0, 0.0], []),
        ([1.0, None], []),  # nothing failed beside it
        ([1.0], []),
        ([0.0, 1.0, 1.0, *[0.0] * 5], [1, 2]),  # a quarter of eight
        ([0.0, 1.0, 1.0, *[0.0] * 4, None], []),  # more than a quarter of the seven that were graded
        ([1.0, 1.0, 1.0, *[0.0] * 5], []),
    ],
)
def test_a_success_is_rare_alone_and_up_to_a_quarter_of_the_graded(rewards, places):
    assert rare_successes(rewards) == places


def test_each_domain_has_its_own_kind_and_the_rest_is_stock():
    stock = torch.tensor([9.0, 9.0, 7.0, 8.0])
    groups = [graded(1.0, 0.0), graded(1.0, 0.0, domain="talk")]
    assert worth(stock, groups, 0, kind="mean_only").tolist() == [0.5, -0.5, 7.0, 8.0]
    assert worth(stock[2:], groups, 2, kind="mean_only").tolist() == [9.0 - 2, 8.0]  # the second of two ranks
    stock = {"drop_dead": "never"}
    assert advantages(**stock).is_stock and not advantages("mean_only", **stock).is_stock
    assert not advantages().is_stock  # dead groups are exactly 0, so that their rows can be left out


def test_rounding_does_not_keep_a_dead_group_alive():
    assert worth(torch.tensor([1e-5, 1e-5]), [graded(0.1, 0.1)], kind="mean_only").tolist() == [0.0, 0.0]


def test_a_lone_success_is_capped_and_the_failures_keep_theirs():
    stock = torch.tensor([2.5, *[-0.35] * 7])
    group = graded(1.0, *[0.0] * 7)
    capped = worth(stock, [group], 0, guard=Guard(cap=2.0))
    torch.testing.assert_close(capped, torch.tensor([2.0, *[-0.35] * 7]))


def test_a_suspect_leaves_its_group_and_the_others_are_centred_without_it():
    guard = Guard(cap=2.0)
    stock = torch.tensor([1.15, -0.58, -0.58])
    alone = graded(1.0, 0.0, 0.0, signs=("bare_answer",))
    assert worth(stock, [alone], 0, guard=guard).tolist() == [0.0, 0.0, 0.0]  # what is left is all alike
    kept = worth(stock, [alone], 0, guard=Guard(cap=3.0, drop_shortcuts=False))
    torch.testing.assert_close(kept, stock)
    honest = graded(1.0, signs=("bare_answer",)).joined(graded(1.0, 0.0, 0.0))
    # (r - 1/2) / s before; of the three that stay the mean is 1/3, and s is what it was
    values = worth(torch.tensor([0.87, 0.87, -0.87, -0.87]), [honest], 0, guard=guard)
    torch.testing.assert_close(values, torch.tensor([0.0, 2 / 3, -1 / 3, -1 / 3]) * 0.87 / 0.5)
    second = worth(torch.tensor([-0.87, -0.87]), [honest], 2, guard=guard)  # the second of two ranks
    torch.testing.assert_close(second, values[2:])


def test_what_is_divided_by_stays_whatever_it_was():
    rewards = (1.0, 0.5, 0.0, 0.5)
    found = centred_without([0], rewards, {1: 0.0, 2: -0.5 / 0.1})
    assert found == pytest.approx({1: (0.5 - 1 / 3) / 0.1, 2: (0.0 - 1 / 3) / 0.1})
    assert centred_without([0], rewards, {1: 0.0, 3: 0.0}) == {1: 0.0, 3: 0.0}  # nothing says what s was
    assert centred_without([0, 2], rewards, {1: 0.0, 2: -5.0}) == {1: 0.0, 2: 0.0}
    assert centred_without([0], (1.0, None, 0.0, 1.0), {1: 7.0, 2: -2.0}) == pytest.approx(
        {2: -1.5}
    )  # no reward: as it is


def test_rft_trains_on_accepted_samples_with_a_mean_of_one():
    rft = RftSettings()
    groups = [graded(1.0, 0.0, 1.0, 0.5), graded(0.0, None, 0.0, 1.0)]
    values = worth(torch.zeros(8), groups, 0, rft=rft)
    assert values.tolist() == pytest.approx([8 / 3, 0, 8 / 3, 0, 0, 0, 0, 8 / 3])
    second_rank = worth(torch.zeros(4), groups, 4, rft=rft)
    assert second_rank.tolist() == pytest.approx([0, 0, 0, 8 / 3])
    nothing = worth(torch.zeros(2), [graded(0.0, 0.0)], 0, rft=rft)
    assert nothing.tolist() == [0, 0]


def test_rft_drops_a_suspect():
    group = graded(1.0, 0.0, signs=("bare_answer",))
    assert worth(torch.zeros(2), [group], 0, rft=RftSettings(), guard=Guard()).tolist() == [0, 0]


def test_rft_takes_the_best_k_of_a_prompt():
    group = graded(0.5, 1.0, 0.2, 0.9)
    assert accepted(group, RftSettings(accept_from=0.4, top_k=2)) == [1, 3]
    assert accepted(group, RftSettings(accept_from=0.4)) == [0, 1, 3]


def test_rft_keeps_one_sample_of_each_class():
    from polyphony.rewards.partitions import find_partitioner

    group = graded(1.0, 1.0, 1.0, texts=["a", "b", "a"])
    assert accepted(group, RftSettings(dedup="exact"), find_partitioner("exact")) == [0, 1]


def test_rft_counts_a_solved_group_as_useful():
    solved = Group(prompt_id="p", domain="m", draw=0, rewards=(1.0, 1.0), lengths=(1, 1), truncated=(False,) * 2)
    assert RftSettings().is_useful(solved) and not solved.has_signal


@pytest.mark.parametrize("build", [lambda: Guard(cap=0.0), lambda: RftSettings(top_k=0)])
def test_settings_out_of_range_are_refused(build):
    with pytest.raises(ValueError, match="got 0"):
        build()


def test_the_advantage_that_the_guard_is_for():
    # one success in G with population std: (1 - 1/G) / sqrt((1/G)(1 - 1/G)) = sqrt(G - 1)
    group = Group(
        prompt_id="p", domain="m", draw=0, rewards=(1.0, *[0.0] * 7), lengths=(1,) * 8, truncated=(False,) * 8
    )
    rewards = torch.tensor(group.rewards)
    assert float((rewards[0] - rewards.mean()) / rewards.std(correction=0)) == pytest.approx(math.sqrt(7))
