import copy
import json
from collections import Counter

import pytest

from polyphony.curricula.prompts.passes import PassSampler

IDS = [f"p{k}" for k in range(10)]


def test_every_prompt_comes_once_a_pass_and_each_pass_in_another_order():
    sampler = PassSampler(IDS, seed=1, name="math")
    first, second = sampler.draw(10), sampler.draw(10)
    assert sorted(first) == sorted(second) == sorted(IDS)
    assert first != second


def test_a_draw_may_cross_passes():
    sampler = PassSampler(IDS, seed=1, name="math")
    drawn = sampler.draw(25)
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == sorted(IDS)


@pytest.mark.parametrize(("size", "n"), [(10, 4), (10, 7), (10, 9), (11, 8), (7, 7), (3, 2)])
def test_no_prompt_comes_twice_in_a_draw_and_each_once_a_pass(size, n):
    sampler = PassSampler(IDS[:size] + ["p10"] * (size > 10), seed=1, name="math")
    draws = [sampler.draw(n) for _ in range(60)]
    assert all(len(set(drawn)) == n for drawn in draws)
    stream = [i for drawn in draws for i in drawn]
    passes = [stream[start : start + size] for start in range(0, len(stream) - size, size)]
    assert all(sorted(one) == sorted(sampler.ids) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_a_draw_of_more_than_all_prompts_takes_none_twice_more_than_another():
    sampler = PassSampler(IDS, seed=1, name="math")
    sampler.draw(3)
    counts = Counter(sampler.draw(25))
    assert sorted(counts.values()) == [2] * 5 + [3] * 5


def test_domains_and_seeds_have_their_own_orders():
    orders = [tuple(PassSampler(IDS, seed=s, name=n).draw(10)) for s, n in ((1, "math"), (1, "code"), (2, "math"))]
    assert len(set(orders)) == 3


def test_a_restored_sampler_goes_on_where_it_was():
    sampler = PassSampler(IDS, seed=1, name="math")
    for _ in range(12):  # at the end of a pass, inside one, and after a draw that crossed into one
        sampler.draw(7)
        restored = PassSampler(IDS, seed=1, name="math")
        restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        again = copy.deepcopy(sampler)
        assert [restored.draw(7) for _ in range(9)] == [again.draw(7) for _ in range(9)]


def test_other_rows_than_the_saved_ones_are_refused():
    state = PassSampler(IDS, seed=1, name="math").state_dict()
    with pytest.raises(ValueError, match="domain 'math': the training rows differ"):
        PassSampler(IDS[:-1], seed=1, name="math").load_state_dict(state)


def test_a_domain_without_prompts_is_refused():
    with pytest.raises(ValueError, match="'math'"):
        PassSampler([], seed=1, name="math")
