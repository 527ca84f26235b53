"""The model of workers and trainer, against cases worked by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from polyphony.launch.cluster.ray_turns import Routes, moment_s
from polyphony.launch.cluster.ray_workers import RolloutWorker
from tests.experiments.fleet import (
    Draw,
    Fleet,
    Lengths,
    Sleeping,
    Speed,
    Talk,
    Trainer,
    Underway,
    Wanted,
    bounds,
    converse,
    course,
    dealt,
    foreseen,
    measures,
    steps,
)
from tests.experiments.simulate import asleep, beyond, fit

ONE_A_STEP = Speed(call_s=0.0, step_s=1.0, token_s=0.0, prompt_token_s=0.0)
LENGTHS = Lengths(log_mean=2.0, between=0.5, within=0.3, max_tokens=32)


def asked(*groups: tuple[int, ...], prompt_tokens: int = 2, max_tokens: int = 8) -> list[Wanted]:
    """Groups by the lengths of their completions."""
    return [
        Wanted(prompt_ids=(n,) * prompt_tokens, max_tokens=max_tokens, length=length)
        for n, group in enumerate(groups)
        for length in group
    ]


def test_whoever_waits_for_a_slot_begins_when_one_is_whole():
    assert steps([3, 1, 2], slots=3) == 3
    assert steps([3, 1, 3], slots=2) == 4  # the third begins after 1
    assert steps([3, 1, 2], slots=1) == 6


def test_a_share_takes_its_call_its_steps_its_tokens_and_its_prompts_once_a_group():
    share = asked((3, 1), (2, 2))
    assert measures(share, 4) == (1, 3, 8, 4)
    speed = Speed(call_s=10.0, step_s=1.0, token_s=0.5, prompt_token_s=0.25, slots=4)
    assert speed.seconds(share) == 10 + 3 + 4 + 1


@pytest.mark.parametrize(
    ("workers", "seconds", "busy"),
    [
        (1, 1 + 2 + 3 + 4, 10),  # one sequence at a time
        (2, 3 + 4 - 1, 10),  # costs are alike, so in turns: groups 0 and 2 take 1 + 3, groups 1 and 3 2 + 4
        (4, 4, 10),
    ],
)
def test_a_draw_ends_with_the_worker_that_has_most_to_do(workers, seconds, busy):
    of = Fleet(workers=workers, speed=replace(ONE_A_STEP, slots=1))
    draw = of.draw(asked((1,), (2,), (3,), (4,)), random.Random(0))
    assert (draw.seconds, draw.busy, draw.longest) == (seconds, busy, 4)


def test_where_lengths_are_known_the_longest_goes_first():
    groups = asked((1,), (2,), (3,), (4,))
    assert dealt(groups, 2) == [[0, 2], [1, 3]]
    assert foreseen(groups, 2) == [[0, 3], [1, 2]]  # 4 and 1, 3 and 2


def test_groups_not_yet_begun_are_taken_by_who_is_free():
    of = Fleet(workers=2, speed=replace(ONE_A_STEP, slots=1))
    # 5 to one; the other takes 1, 1 and 1
    assert of.steal(asked((5,), (1,), (1,), (1,)), random.Random(0)).seconds == 5


def test_who_deals_out_is_at_it_before_and_after():
    of = Fleet(workers=2, speed=ONE_A_STEP, send_s=1.0)
    # the first share leaves at 1 and is whole at 3, taken in until 4; the second leaves at 2, whole at 4, taken in until 5
    assert of.draw(asked((2,), (2,)), random.Random(0)).seconds == 5


@pytest.mark.parametrize(
    ("ahead", "generated", "updated", "stale"),
    [
        # sync 1, rollouts 4, update 3, one after the other
        (0, [5, 13, 21], [8, 16, 24], [0, 0, 0]),
        # draw 1 begins at 5 with the weights that there are, draw 2 at 10 with those of 8; updates are done beside
        (1, [5, 10, 15], [8, 13, 18], [0, 1, 1]),
        (2, [5, 10, 15], [8, 13, 18], [0, 1, 2]),
    ],
)
def test_draws_ahead_wait_for_the_engine_or_for_their_weights(ahead, generated, updated, stale):
    run = course([Draw(seconds=4.0, busy=4.0, completions=1)] * 3, Trainer(sync_s=1.0, update_s=3.0), ahead=ahead)
    assert (run.generated, run.updated, run.stale) == (generated, updated, stale)


def test_with_a_slow_trainer_a_draw_ahead_waits_for_its_weights():
    run = course([Draw(seconds=1.0, busy=1.0, completions=1)] * 3, Trainer(sync_s=0.0, update_s=5.0), ahead=1)
    assert run.generated == [1, 2, 7]  # draw 2 has the weights of 6
    assert run.updated == [6, 11, 16]


def test_what_limits_is_what_alone_would_take_longest():
    of = Fleet(workers=2, speed=ONE_A_STEP, send_s=0.5)
    made = [of.draw(asked((2,), (6,)), random.Random(0))]
    least = bounds(made, Trainer(sync_s=1.0, update_s=5.0), of)
    assert least == {"update": 10, "tokens": 4, "longest group": 6, "dealing": 2}


def test_the_fit_finds_the_speed_that_made_the_shares():
    speed = Speed(call_s=0.05, step_s=0.02, token_s=0.001, prompt_token_s=0.0005, slots=16)
    rng = random.Random(1)
    shares = [LENGTHS.draw(groups, copies, prompt, rng) for groups, copies, prompt in product_of_sizes()]
    found, error = fit([([share], speed.seconds(share)) for share in shares], slots=16)
    assert found.factors == pytest.approx(speed.factors)
    assert error < 1e-6


def test_a_worker_goes_on_until_a_turn_is_whole_or_its_moment_is_over():
    at = Underway(replace(ONE_A_STEP, token_s=0.5))  # two sequences: 2 s a step
    at.add([(0, asked((2,))[0]), (1, asked((3,))[0])])
    assert at.go_on(3.0) == ([], 3.0)  # a step and a half
    assert at.go_on(3.0) == ([0], 1.0)
    assert at.go_on(3.0) == ([1], 1.5)  # alone: 1.5 s a step
    assert at.go_on(3.0) == ([], 0.0)


@pytest.mark.parametrize(
    ("hear_s", "way_s", "seconds"),
    [
        (0.0, 0.0, 9),  # 4 and 5 with one worker, 1 and 2 with the other
        # heard of: 1 at 2, whose next, 2, is whole at 4; 4 at 5, whose next, 5, is whole at 10; 2 at 6; 5 at 11
        (1.0, 0.0, 11),
        (0.0, 3.0, 15),  # both of 4 and 5 are under way, as 1 and 2 are meanwhile
        (1.0, 2.0, 15),
    ],
)
def test_episodes_stay_with_their_workers_and_wait_to_be_heard(hear_s, way_s, seconds):
    of = Fleet(workers=2, speed=ONE_A_STEP)
    talk = Talk([[4, 5], [1, 2]], max_tokens=8)
    took, busy = converse(talk, of, hear_s=hear_s, way_s=way_s, moment_s=100.0, routes=Routes())
    assert busy == 12
    assert took == seconds


def test_moments_are_longer_of_many_workers():
    assert [moment_s(workers) for workers in (1, 4, 16, 64)] == pytest.approx([0.05, 0.05, 0.2, 0.8])


def product_of_sizes():
    return [(groups, copies, prompt) for groups in (1, 4, 16) for copies in (1, 8) for prompt in (5, 50)]


def test_lengths_are_found_again():
    found = Lengths.of(replace(LENGTHS, max_tokens=10_000).draw(2000, 8, 1, random.Random(1)))
    assert (found.log_mean, found.between, found.within) == pytest.approx((2.0, 0.5, 0.3), abs=0.05)


def test_the_same_seed_says_the_same(capsys):
    def said():
        beyond(Fleet(workers=1, speed=ONE_A_STEP), LENGTHS, Trainer(sync_s=1.0, update_s=1.0), 8, draws=4)
        return capsys.readouterr().out

    assert said() == said()


def test_a_sleeping_worker_answers_what_a_pool_asks_of_one():
    for name in ("process_id", "load", "complete", "go_on", "forget"):
        assert hasattr(RolloutWorker, name)
        assert hasattr(Sleeping, name)


@pytest.mark.slow
def test_workers_that_sleep_take_what_the_model_says(monkeypatch):
    speed = replace(ONE_A_STEP, step_s=0.05)
    requests = LENGTHS.draw(8, 4, 5, random.Random(1))
    with asleep(2, speed) as engine:
        import time

        began = time.perf_counter()
        found = engine.complete(requests)
        spent = time.perf_counter() - began
    assert [len(completion.ids) for completion in found] == [one.length for one in requests]
    assert {completion.version for completion in found} == {1}
    least = Fleet(workers=2, speed=speed).draw(requests, random.Random(1)).seconds
    assert least <= spent < least + 5  # a busy machine may be late
