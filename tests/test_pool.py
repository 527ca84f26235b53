"""The prompt pool on simulated prompts with known pass rates."""

import json
import random
import time

import numpy as np
import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.prompts.estimate import Band, RankedSet, State, Thompson, find_sampling
from polyphony.curricula.prompts.pool import PoolSettings, PromptPool
from polyphony.curricula.prompts.pool_file import PoolFileError, load_pools, move_aside, save_pools
from polyphony.curricula.records import Domain, Group
from polyphony.curricula.schedulers.fixed import Joint

G = 8


def pool(n=20, **settings) -> PromptPool:
    ids = [f"p{k}" for k in range(n)]
    return PromptPool(ids, name="math", seed=1, settings=PoolSettings(**settings))


def visit(p: PromptPool, prompt_id: str, rate: float, generator: random.Random) -> None:
    p.observe(prompt_id, [float(generator.random() < rate) for _ in range(G)])


# --- the posterior --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "visits", "state"),
    [
        ([0.0] * 8, 1, State.DEFERRED),  # mean 1/10
        ([0.0] * 4, 1, State.ACTIVE),  # mean 1/6: four failures say little
        ([1.0] * 8, 1, State.ACTIVE),  # mean 9/10, not above 0.9
        ([1.0] * 8, 2, State.MASTERED),  # about 17/18
        ([1.0] + [0.0] * 7, 1, State.ACTIVE),  # mean 2/10
        ([0.0] * 8, 7, State.DEFERRED),  # 54.3 discounted failures: 0.95^55.3 = 0.059 > 0.05
        ([0.0] * 8, 8, State.IMPOSSIBLE),  # 61.8: 0.95^62.8 = 0.040
        ([0.0] * 100, 1, State.DEFERRED),  # certain enough, but never after one visit
        ([0.4] * 8, 3, State.ACTIVE),  # a graded reward is a share of a success
    ],
)
def test_states_by_hand(rewards, visits, state):
    p = pool()
    for _ in range(visits):
        p.observe("p0", rewards)
    assert p.state_of("p0") is state


def test_a_graders_failure_is_no_evidence():
    p = pool()
    p.observe("p0", [])
    assert p.state_of("p0") is State.UNSEEN
    assert p.posterior("p0") == (1.0, 1.0)


def test_earlier_evidence_is_discounted():
    p = pool(discount=0.5)
    p.observe("p0", [1.0, 0.0])
    p.observe("p0", [1.0, 1.0])
    assert p.posterior("p0") == (1 + 0.5 + 2, 1 + 0.5)


def test_what_was_failed_before_all_was_right_counts_half():
    p = pool(discount=1.0)
    p.observe("p0", [1.0] * 2 + [0.0] * 6)
    means = []
    for _ in range(3):
        p.observe("p0", [1.0] * G)
        a, b = p.posterior("p0")
        means.append((a, b))
    assert means == [(11, 4), (19, 2.5), (27, 1.75)]  # 0.73, 0.88, 0.94
    assert p.state_of("p0") is State.MASTERED


def test_hardly_any_learnable_prompt_is_called_impossible_and_most_impossible_ones_are():
    generator = random.Random(0)
    p = pool(4_000)
    called = {0.1: 0, 0.005: 0}
    for k, prompt_id in enumerate(p.ids):
        rate = 0.1 if k % 2 else 0.005
        for _ in range(8):
            visit(p, prompt_id, rate, generator)
            if p.state_of(prompt_id) is State.IMPOSSIBLE:
                called[rate] += 1
                break
    assert called[0.1] / 2_000 < 0.01  # 0.9^64 = 0.0012 have no success in 64
    assert called[0.005] / 2_000 > 0.65  # 0.995^64 = 0.73 have none


def test_a_prompt_whose_pass_rate_rises_comes_back():
    generator = random.Random(0)
    p = pool()
    for _ in range(8):
        p.observe("p0", [0.0] * G)
    assert p.state_of("p0") is State.IMPOSSIBLE
    drawn = 0
    for _ in range(400):
        for prompt_id in p.draw(2):
            if prompt_id == "p0":
                drawn += 1
            visit(p, prompt_id, 0.5, generator)
        if p.state_of("p0") is State.ACTIVE:
            break
    assert p.state_of("p0") is State.ACTIVE
    assert drawn <= 5


def test_a_band_out_of_order_is_refused():
    with pytest.raises(ValueError, match="impossible_below <= defer_below"):
        Band(impossible_below=0.2)


# --- drawing --------------------------------------------------------------------------------------------------------


def test_a_draw_has_different_prompts_and_repeats_only_where_there_are_too_few():
    assert len(set(pool().draw(20))) == 20
    assert sorted(pool(2).draw(5)) in (["p0"] * 3 + ["p1"] * 2, ["p0"] * 2 + ["p1"] * 3)


def test_waiting_prompts_are_left_out_until_their_turn_and_then_take_no_more_than_their_share():
    p = pool(40, retry_deferred=3, retry_share=0.25)
    p.draw(0)
    for k in range(20):
        p.observe(f"p{k}", [0.0] * G)  # due at draw 4
    deferred = {f"p{k}" for k in range(20)}
    waited = [len(deferred & set(p.draw(8))) for _ in range(4)]
    assert waited[:2] == [0, 0]
    assert max(waited[2:]) <= 3 and sum(waited[2:]) >= 4


def test_each_further_group_of_failures_makes_a_prompt_wait_longer():
    p = pool(discount=1.0, retry_deferred=10, retry_impossible=60)
    waits = []
    for _ in range(8):
        p.observe("p0", [0.0] * G)
        waits.append(int(p.due[0]) - p.clock)
    # 10 x 0.125 / mean, means 1/10, 1/18, 1/26, 1/34, 1/42, 1/50: 12.5, 22.5, .. 52.5, then no longer than IMPOSSIBLE ones
    assert waits == [12, 22, 32, 42, 52, 60, 60, 60]
    assert p.state_of("p0") is State.IMPOSSIBLE


def test_a_prompt_whose_last_group_was_all_alike_rests_and_comes_back():
    p = pool(4, retry_deferred=3)
    p.draw(0)
    for prompt_id, passed in (("p0", 8), ("p1", 7), ("p2", 0), ("p3", 1)):
        p.observe(prompt_id, [1.0] * 2 + [0.0] * 6)
        p.observe(prompt_id, [1.0] * passed + [0.0] * (8 - passed))
    p.observe("p2", [1.0, 0.0])  # and learned after all
    assert {p.state_of(i) for i in p.ids} == {State.ACTIVE}
    drawn = []
    for _ in range(3):  # p0 is due at draw 4
        drawn.append(set(p.draw(3)))
        for prompt_id in drawn[-1]:
            p.observe(prompt_id, [1.0, 0.0])
    assert drawn == [{"p1", "p2", "p3"}] * 2 + [drawn[2]]
    assert set(p.draw(4)) == set(p.ids)


def test_resting_prompts_are_drawn_before_worse_ones_where_nothing_else_is_open():
    p = pool(3, retry_share=0.0)
    p.draw(0)
    p.observe("p0", [0.0] * G)
    p.observe("p1", [1.0] * 4)  # mean 5/6: ACTIVE, at rest
    assert p.draw(1) == ["p2"]
    p.observe("p2", [1.0] * G)
    p.observe("p2", [1.0] * G)
    assert p.draw(2) == ["p1", "p0"]
    assert p.refill(1) == []


def test_prompts_before_their_turn_are_those_whose_outcome_is_most_in_doubt():
    p = pool(3, retry_share=0.0)
    p.draw(0)
    for _ in range(3):
        p.observe("p0", [0.0] * G)  # Beta(1, 25): deferred, p (1 - p) = 0.037
    for _ in range(2):
        p.observe("p1", [1.0] * G)  # Beta(17, 1): mastered, 0.052
    p.observe("p2", [0.0] * G)  # Beta(1, 9): deferred, 0.09, and due before p0
    assert p.draw(3) == ["p2", "p1", "p0"]


def test_a_refill_gives_other_prompts_of_the_same_draw_and_no_waiting_ones():
    p = pool(12)
    p.observe("p0", [0.0] * G)
    first = p.draw(6)
    more = p.refill(4)
    assert len(more) == 4 and not set(first) & set(more) and "p0" not in more
    assert len(p.refill(9)) == 1
    assert p.refill(1) == []


def test_thompson_prefers_the_prompts_whose_outcome_is_in_doubt():
    p = pool(200, sampling="thompson")
    for k in range(200):
        p.observe(f"p{k}", [1.0] * (4 if k < 100 else 1) + [0.0] * (4 if k < 100 else 7))
    drawn = [prompt_id for _ in range(20) for prompt_id in p.draw(8)]
    assert sum(int(i[1:]) < 100 for i in drawn) > 0.8 * len(drawn)


def test_thompson_chooses_by_hand():
    class Fixed:
        def __init__(self, *rates):
            self.rates = list(rates)

        def betavariate(self, a, b):
            return self.rates.pop(0)

    assert Thompson().choose([(1, 1)] * 3, 2, Fixed(0.9, 0.5, 0.7)) == [1, 2]


def test_an_unknown_sampling_lists_those_that_exist():
    with pytest.raises(ValueError, match="'hardest' does not exist; known: uniform, thompson"):
        find_sampling("hardest")


@pytest.mark.parametrize("sampling", ["uniform", "thompson"])
def test_a_restored_pool_draws_what_the_saved_one_draws(tmp_path, sampling):
    generator = random.Random(3)
    rates = {f"p{k}": [0.0, 0.05, 0.5, 1.0][k % 4] for k in range(40)}
    one = pool(40, sampling=sampling, retry_deferred=2, retry_mastered=3)

    def step(p: PromptPool, generator: random.Random) -> list[str]:
        ids = p.draw(8)
        ids += p.refill(3)
        for prompt_id in ids:
            visit(p, prompt_id, rates[prompt_id], generator)
        return ids

    for _ in range(30):
        step(one, generator)
    state = json.loads(json.dumps(one.state_dict()))
    save_pools(tmp_path / "pool.npz", {"math": one.columns()})
    two = pool(40, sampling=sampling, retry_deferred=2, retry_mastered=3)
    two.load_state_dict(state)
    assert two.adopt(load_pools(tmp_path / "pool.npz")["math"]) == 40
    g1, g2 = random.Random(4), random.Random(4)
    assert [step(one, g1) for _ in range(30)] == [step(two, g2) for _ in range(30)]


def test_rows_may_come_and_go_between_runs():
    old = pool(4)
    for _ in range(2):
        old.observe("p1", [1.0] * G)
    new = PromptPool(["p9", "p1"], name="math", seed=1, settings=PoolSettings())
    assert new.adopt(old.columns()) == 1
    assert (new.state_of("p9"), new.state_of("p1")) == (State.UNSEEN, State.MASTERED)


# --- a domain that has nothing to teach -------------------------------------------------------------------------------


def curriculum(**settings) -> Curriculum:
    return Curriculum(
        domains=[Domain(name="math", kind="structured", train=[0])],
        prompts={"math": ["a", "b"]},
        scheduler=Joint(),
        total_draws=10,
        pool=PoolSettings(**settings),
    )


def learn(c: Curriculum, prompt_id: str, reward: float, visits: int) -> None:
    group = Group(
        prompt_id=prompt_id, domain="math", draw=0, rewards=(reward,) * G, lengths=(1,) * G, truncated=(False,) * G
    )
    c.observe([group] * visits)


def test_with_nothing_left_to_learn_the_least_bad_prompts_go_on_with_a_warning(caplog):
    c = curriculum()
    learn(c, "a", 1.0, 2)
    learn(c, "b", 0.0, 8)
    assert [ref.id for ref in c.draw(1)] == ["a"]  # mastered before impossible
    assert [ref.id for ref in c.draw(1)] == ["a"]
    assert [r.getMessage() for r in caplog.records] == [
        "domain 'math': of 2 prompts 0 are unseen or active, 0 deferred, 1 impossible, 1 mastered; "
        "those nearest to the band are drawn"
    ]
    assert c.metrics() == {
        "math/mixture": 1.0,
        "math/active": 0.0,
        "math/deferred": 0.0,
        "math/impossible": 1.0,
        "math/mastered": 1.0,
    }


def test_prompts_that_are_all_too_hard_for_now_warn_but_end_nothing(caplog):
    c = curriculum(when_exhausted="stop")
    learn(c, "a", 0.0, 1)
    learn(c, "b", 0.0, 3)
    assert [ref.id for ref in c.draw(1)] == ["a"]  # due first
    c.draw(2)
    assert [r.getMessage() for r in caplog.records] == [
        "domain 'math': of 2 prompts 0 are unseen or active, 2 deferred, 0 impossible, 0 mastered; "
        "those nearest to the band are drawn"
    ]
    learn(c, "a", 0.5, 1)
    c.draw(1)
    learn(c, "a", 0.0, 3)
    c.draw(1)
    assert len(caplog.records) == 2  # it was better in between


def test_or_the_run_stops_with_a_message():
    c = curriculum(when_exhausted="stop")
    learn(c, "a", 0.0, 8)
    c.draw(1)
    learn(c, "b", 0.0, 8)
    with pytest.raises(
        RuntimeError,
        match=r"every training prompt is mastered or impossible: domain .math.: of 2 prompts .* 2 impossible",
    ):
        c.draw(1)


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"no pool", lambda b: b[:400] + b"x" + b[401:]])
def test_a_damaged_file_is_named_and_can_be_moved_aside(tmp_path, damage):
    path = tmp_path / "pool.npz"
    save_pools(path, {"math": pool().columns()})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PoolFileError, match=r"pool\.npz"):
        load_pools(path)
    aside = move_aside(path)
    assert aside.name == "pool.npz.aside-1" and not path.exists()


def test_a_million_prompts_are_saved_and_loaded_in_two_seconds_each(tmp_path):
    ids = [f"{k:016x}" for k in range(1_000_000)]
    big = PromptPool(ids, name="math", seed=1, settings=PoolSettings())
    rng = np.random.default_rng(0)
    big.failures[:], big.successes[:] = rng.integers(0, 60, 1_000_000), rng.integers(0, 20, 1_000_000)
    big.visits[:] = 3
    began = time.process_time()
    save_pools(tmp_path / "pool.npz", {"math": big.columns()})
    saved = time.process_time()
    fresh = PromptPool(ids, name="math", seed=1, settings=PoolSettings())
    loading = time.process_time()
    assert fresh.adopt(load_pools(tmp_path / "pool.npz")["math"]) == 1_000_000
    assert saved - began < 2 and time.process_time() - loading < 2


def test_a_ranked_set_gives_the_kth_member_away():
    def members(s):
        return [RankedSet(s.member).pop(k) for k in range(len(s))]

    s = RankedSet(np.array([True, False, True, True, False]))
    assert members(s) == [0, 2, 3]
    s.remove(2)
    s.add(4)
    s.add(4)
    assert members(s) == [0, 3, 4]
    assert [s.pop(1), s.pop(1), len(s), s.pop(0)] == [3, 4, 1, 0]
    with pytest.raises(IndexError):
        s.pop(0)


def test_what_is_given_away_by_rank_leaves_a_set_as_if_it_had_been_removed():
    rng = random.Random(1)
    ours, plain = RankedSet(np.ones(37, dtype=bool)), list(range(37))
    while plain:
        rank = rng.randrange(len(plain))
        assert ours.pop(rank) == plain.pop(rank)
        assert ours._tree == RankedSet(ours.member)._tree
