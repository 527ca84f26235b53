import random

import pytest

from polyphony.curricula.curriculum import allocate


def test_largest_remainder_by_hand():
    # 8 prompts at .5, .3, .2: claims 4, 2.4, 1.6; whole parts 4, 2, 1; the one left goes to the remainder .6
    counts, residual = allocate(8, (0.5, 0.3, 0.2), (0, 0, 0))
    assert counts == [4, 2, 2]
    assert residual == pytest.approx([0, 0.4, -0.4])


def test_what_is_owed_comes_with_the_next_draw():
    counts, _ = allocate(8, (0.5, 0.3, 0.2), (0, 0.4, -0.4))  # claims 4, 2.8, 1.2
    assert counts == [4, 3, 1]


def test_a_domain_without_a_share_gets_nothing():
    assert allocate(3, (1.0, 0.0), (0, 0))[0] == [3, 0]


@pytest.mark.parametrize("size", [2, 3, 5, 10, 20])
def test_cumulative_counts_stay_near_the_mixture(size):
    rng = random.Random(size)
    for n in (1, 8, 16):
        for _ in range(30):
            raw = [rng.expovariate(1) ** 2 for _ in range(size)]
            mixture, residual = [r / sum(raw) for r in raw], [0.0] * size
            for _ in range(100):
                counts, residual = allocate(n, mixture, residual)
                assert sum(counts) == n and min(counts) >= 0
                assert min(residual) > -1 and max(residual) < (1 if size <= 3 else 1.2)


def test_counts_are_whole_and_complete_under_mixtures_that_change():
    rng, residual = random.Random(0), [0.0] * 6
    for _ in range(300):
        raw = [rng.random() ** 4 for _ in range(6)]
        counts, residual = allocate(5, [r / sum(raw) for r in raw], residual)
        assert sum(counts) == 5 and min(counts) >= 0
        assert sum(residual) == pytest.approx(0, abs=1e-9)
