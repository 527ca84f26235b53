import pickle

import pytest

from polyphony.rewards.diversity import unique_classes
from polyphony.trainer.settings import Diversity


def fused(texts, qualities, **settings):
    """Return one group's fusion under `exact`."""
    diversity = Diversity(**({"partitioner": "exact"} | settings))
    return diversity.fused(diversity.found.same([texts], ["p"])[0], qualities)


CHAIN = [[True, True, False], [True, True, True], [False, True, True]]
"""1 says what 0 says, 2 says what 1 says, but 2 does not say what 0 says."""


def test_multiplied_by_hand():
    # n = 4, classes a, a, b, c: div = (4 - 2) / 3, the same, (4 - 1) / 3 = 1 twice
    result = fused(["a", "a", "b", "c"], [1.0, 0.5, 0.25, 0.0])
    assert result.classes == (0, 0, 1, 2)
    assert result.diversity == (pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0, 1.0)
    assert result.rewards == (pytest.approx(2 / 3), pytest.approx(1 / 3), 0.25, 0.0)


def test_a_collapsed_group_keeps_a_tenth():
    assert fused(["a"] * 8, [1.0] * 8).rewards == (0.1,) * 8


def test_a_text_alone_keeps_its_quality():
    assert fused(["a"], [0.5]).rewards == (0.5,)


def test_classes_close_chains_and_pairs_do_not():
    assert Diversity().fused(CHAIN, [1.0] * 3).diversity == (0.1,) * 3
    # text 0 differs from one of two others, text 1 from none, text 2 from one
    assert Diversity(distance="pairs").fused(CHAIN, [1.0] * 3).diversity == (0.5, 0.1, 0.5)


def test_added_by_hand():
    # qualities 1 and 0: mean .5, std .5, standardised 1 and -1; div 1 and 1; coefficient .5
    assert fused(["a", "b"], [1.0, 0.0], fuse="add").rewards == (1.5, -0.5)
    assert fused(["a", "a", "b"], [3.0] * 3, fuse="add", coefficient=1.0).rewards == (0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    # div of the pair of wrong answers is .5, of the right one 1
    [((1, 0), (1.0, 0.0, 0.0)), ((1, -1), (1.0, -0.5, -0.5)), ([2, 1], (2.0, 0.5, 0.5))],
)
def test_shapes_for_answers_that_can_be_wrong(shape, expected):
    assert fused(["a", "b", "b"], [1.0, 0.0, 0.0], shape=shape).rewards == expected


def test_a_wrong_answer_gains_nothing_by_being_different():
    rewards = fused(["right"] * 7 + ["wrong"], [1.0] * 7 + [0.0]).rewards
    assert rewards[-1] == 0.0 < min(rewards[:-1])


def test_negative_qualities_need_a_bias():
    with pytest.raises(ValueError, match=r"mul needs qualities >= 0, got -2.0"):
        fused(["a", "b"], [1.0, -2.0])
    assert fused(["a", "b"], [1.0, -2.0], add_bias=True).rewards == (3.0, 0.0)


def test_what_no_grader_could_grade_stays_without_reward():
    assert fused(["a", "a", "b"], [1.0, None, 1.0]).rewards == (0.5, None, 1.0)
    assert fused(["a"], [None]).rewards == (None,)


def test_a_group_that_the_partitioner_could_not_tell_apart_has_no_reward():
    assert Diversity().fused(None, [1.0, 1.0]).rewards == (None, None)


def test_it_travels_between_processes():
    diversity = pickle.loads(pickle.dumps(Diversity(partitioner={"name": "normalised"}, floor=0.2)))
    same = diversity.found.same([["A", "a"]], ["p"])[0]
    assert diversity.fused(same, [1.0, 1.0]).rewards == (0.2, 0.2)


def test_texts_of_one_answer_are_of_one_class():
    assert unique_classes([r"\boxed{4}", "The answer is 4", "<answer>5</answer>"]) == 2
    assert unique_classes([]) == 0
    assert unique_classes(["a", "b"], "exact") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fuse": "max"}, "Input should be 'mul' or 'add'"),
        ({"distance": "cosine"}, "Input should be 'classes' or 'pairs'"),
        ({"floor": 1.5}, r"^Diversity: floor: Input should be less than or equal to 1, got 1\.5$"),
        ({"flor": 1.5}, r"^Diversity: unknown key 'flor'; did you mean 'floor'\?$"),
        ({"shape": [1]}, r"^Diversity: shape\.1: required, but not given$"),
        ({"partitioner": "magic"}, "partitioner 'magic' does not exist"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        assert Diversity(**({"partitioner": "exact"} | settings)).found
