import pytest

from curricula.sampling import PassSampler

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


def test_domains_and_seeds_have_their_own_orders():
    orders = [tuple(PassSampler(IDS, seed=s, name=n).draw(10)) for s, n in ((1, "math"), (1, "code"), (2, "math"))]
    assert len(set(orders)) == 3


def test_a_restored_sampler_goes_on_where_it_was():
    sampler = PassSampler(IDS, seed=1, name="math")
    sampler.draw(13)
    state = sampler.state_dict()
    restored = PassSampler(IDS, seed=1, name="math")
    restored.load_state_dict(state)
    assert restored.draw(12) == sampler.draw(12)


def test_other_rows_than_the_saved_ones_are_refused():
    state = PassSampler(IDS, seed=1, name="math").state_dict()
    with pytest.raises(ValueError, match="domain 'math': the training rows differ"):
        PassSampler(IDS[:-1], seed=1, name="math").load_state_dict(state)


def test_a_domain_without_prompts_is_refused():
    with pytest.raises(ValueError, match="'math'"):
        PassSampler([], seed=1, name="math")
