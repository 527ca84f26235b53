import itertools

import numpy as np
import pytest

from polyphony.curricula.transfer.orders import EntropyTerm, Objective, best_orders, search_orders


def entropy_term(rng, size):
    return EntropyTerm(
        own=rng.uniform(0.2, 1, size),
        change=rng.normal(0, 0.3, (size, size)),
        floor=rng.uniform(0.3, 0.6, size),
        penalty=3.0,
    )


def test_three_domains_by_hand():
    # after[i, j] is what i gains when j comes after it. c takes .3 from a and .2 from b; a takes .1 from b.
    # c, a, b keeps c's 0, a's gain from b 0, b nothing after: 0. Every other order loses: a, b, c loses .5, ...
    after = np.array([[0, 0, -0.3], [-0.1, 0, -0.2], [0, 0, 0]])
    objective = Objective(after=after[None])
    assert best_orders(objective).tolist() == [[2, 0, 1]]
    assert objective.value(np.array([[2, 0, 1]]))[0] == 0
    assert objective.value(np.array([[0, 1, 2]]))[0] == pytest.approx(-0.5)
    assert objective.value(np.array([[1, 0, 2]]))[0] == pytest.approx(-0.6)


def test_entropy_below_its_floor_changes_the_order():
    # by score a before b gains .05; but b after a takes .4 nats from a: .6 - .4 is .1 below the floor, at 2 a nat: -.2
    after = np.array([[[0.0, 0.05], [0.0, 0.0]]])
    change = np.array([[0.0, 0.0], [-0.4, 0.0]])  # change[j, i]: training on b changes a
    term = EntropyTerm(own=np.array([0.6, 0.6]), change=change, floor=np.array([0.3, 0.3]), penalty=2.0)
    assert best_orders(Objective(after=after)).tolist() == [[0, 1]]
    guarded = Objective(after=after, entropy=term)
    assert best_orders(guarded).tolist() == [[1, 0]]
    assert guarded.value(np.array([[0, 1]]))[0] == pytest.approx(0.05 - 2 * 0.1)


def test_a_domain_whose_entropy_was_not_measured_has_no_entropy_term():
    nan = np.array([np.nan, np.nan])
    term = EntropyTerm(own=nan, change=np.zeros((2, 2)), floor=nan, penalty=9.0)
    objective = Objective(after=np.array([[[0.0, 0.1], [0.0, 0.0]]]), entropy=term)
    assert objective.value(best_orders(objective))[0] == pytest.approx(0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("has_entropy", [False, True])
def test_the_subset_programme_finds_the_best_of_all_orders(size, has_entropy):
    rng = np.random.default_rng(size)
    every = np.array(list(itertools.permutations(range(size))))
    for _ in range(5):
        term = entropy_term(rng, size) if has_entropy else None
        objective = Objective(after=rng.normal(size=(1, size, size)), entropy=term)
        best = max(objective.value(order[None])[0] for order in every)
        assert objective.value(best_orders(objective))[0] == pytest.approx(best)


def test_many_problems_are_solved_as_one_by_one():
    rng = np.random.default_rng(0)
    after = rng.normal(size=(20, 7, 7))
    together = best_orders(Objective(after=after))
    alone = [best_orders(Objective(after=each[None]))[0] for each in after]
    assert together.tolist() == np.array(alone).tolist()


def test_ties_go_to_the_order_of_the_domains():
    assert best_orders(Objective(after=np.zeros((1, 5, 5)))).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("size", range(2, 13))
def test_local_search_finds_the_exact_optimum(size):
    rng = np.random.default_rng(size)
    for attempt in range(6):
        term = entropy_term(rng, size) if attempt % 2 else None
        objective = Objective(after=rng.normal(size=(1, size, size)), entropy=term)
        exact = objective.value(best_orders(objective))[0]
        assert objective.value(search_orders(objective))[0] == pytest.approx(exact)


def test_more_domains_than_the_programme_can_hold_are_searched():
    # every pair prefers the later index first: the reversed order keeps all of it
    after = np.tril(np.ones((20, 20)), -1)
    assert best_orders(Objective(after=after[None]))[0].tolist() == list(range(19, -1, -1))


def test_a_tie_of_more_domains_than_the_programme_can_hold_goes_to_their_order():
    assert best_orders(Objective(after=np.zeros((1, 20, 20))))[0].tolist() == list(range(20))


@pytest.mark.parametrize("has_entropy", [False, True])
def test_many_problems_searched_at_once_come_within_a_hundredth_of_the_best_gain(has_entropy):
    rng = np.random.default_rng(3)
    after = rng.normal(size=(200, 9, 9))
    objective = Objective(after=after - after.transpose(0, 2, 1), entropy=entropy_term(rng, 9) if has_entropy else None)
    exact, searched = (objective.value(orders) for orders in (best_orders(objective), search_orders(objective)))
    assert (searched <= exact + 1e-9).all()
    assert (exact - searched).sum() <= 0.01 * exact.sum()


def test_a_searched_order_is_no_worse_than_the_one_that_the_search_began_at():
    rng = np.random.default_rng(4)
    objective = Objective(after=rng.normal(size=(30, 14, 14)), entropy=entropy_term(rng, 14))
    start = rng.permutation(14)
    assert (objective.value(best_orders(objective, start=start)) >= objective.value(start[None])).all()


def test_a_searched_order_cannot_be_bettered_by_moving_one_domain():
    rng = np.random.default_rng(5)
    term = entropy_term(rng, 18)
    term.change[2, 5] = np.nan  # domain 5 has no entropy term
    objective = Objective(after=rng.normal(size=(1, 18, 18)), entropy=term)
    found = best_orders(objective)[0].tolist()
    rests = [(domain, [other for other in found if other != domain]) for domain in found]
    moved = np.array([[*rest[:to], domain, *rest[to:]] for domain, rest in rests for to in range(18)])
    assert objective.value(moved).max() <= objective.value(np.array([found]))[0] + 1e-9


def test_sixteen_domains_are_solved_exactly():
    rng = np.random.default_rng(0)
    objective = Objective(after=rng.normal(size=(1, 16, 16)))
    exact, searched = best_orders(objective), search_orders(objective)
    assert objective.value(exact)[0] >= objective.value(searched)[0] - 1e-9
