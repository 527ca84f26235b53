import pickle

import pytest

from polyphony.rewards import find_reward

ROWS = {
    "data_source": ["gsm8k", "gsm8k", "poems", "gsm8k", "gsm8k"],
    "reward_model": [{"style": "rule", "ground_truth": "4"}] * 5,
    "extra_info": [{"index": i} for i in range(5)],
}
COMPLETIONS = ["4", "5", "4", "raise", "nothing"]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Stands for somebody's verl reward: a number, a dict, a bool, an error or nothing."""
    assert isinstance(extra_info["index"], int)
    if solution_str == "raise":
        raise RuntimeError("no such luck")
    if solution_str == "nothing":
        return None
    if data_source == "poems":
        return {"score": 0.25, "acc": 1.0}
    return solution_str == ground_truth


async def compute_score_later(data_source, solution_str, ground_truth, extra_info=None):
    return compute_score(data_source, solution_str, ground_truth, extra_info)


@pytest.mark.parametrize("function", ["compute_score", "compute_score_later"])
def test_verl_functions_are_used_as_they_are(function):
    grade = find_reward({"name": "verl", "function": f"{__file__}:{function}"})
    expected = [1.0, 0.0, 0.25, None, None]
    assert grade(["q"] * 5, COMPLETIONS, [[1]] * 5, **ROWS) == expected
    assert pickle.loads(pickle.dumps(grade))(["q"] * 5, COMPLETIONS, **ROWS) == expected


def test_the_ground_truth_has_three_homes():
    grade = find_reward({"name": "verl", "function": f"{__file__}:compute_score"})
    extra = {"extra_info": [{"index": 0}], "data_source": ["gsm8k"]}
    assert grade(["q"], ["4"], ground_truth=["4"], **extra) == [1.0]
    assert grade(["q"], ["4"], answer=["4"], **extra) == [1.0]
    with pytest.raises(
        ValueError, match="need ground_truth, reward_model or answer; they have data_source, extra_info"
    ):
        grade(["q"], ["4"], **extra)


@pytest.mark.parametrize("function", ["nowhere.py:compute_score", "no.module:f", f"{__file__}:missing", "words"])
def test_a_function_that_is_not_there_is_refused(function):
    with pytest.raises(ValueError, match="is no function to be found"):
        find_reward({"name": "verl", "function": function})
