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


RESULTS = [
    ("1.0", 1.0),
    ("True", 1.0),
    ("0", 0.0),
    ("'0.5'", 0.5),
    ("(0.75, {'acc': True})", 0.75),
    ("(False, 'no box')", 0.0),
    ("[1, 'matched']", 1.0),
    ("({'score': 0.5}, 'why')", 0.5),
    ("{'score': -1.0, 'acc': 0, 'pred': '4'}", -1.0),
    ("{'score': True}", 1.0),
    ("{'acc': 1.0}", None),
    ("{'score': None}", None),
    ("{'score': [1.0]}", None),
    ("()", None),
    ("(None, 1.0)", None),
    ("('good', 1.0)", None),
    ("((1.0, 2.0), 3.0)", None),
    ("'good'", None),
    ("float('nan')", None),
    ("(float('nan'), 1.0)", None),
    ("float('inf')", None),
    ("{'score': float('-inf')}", None),
    ("10**400", None),
    ("object()", None),
]


def returns_it(data_source, solution_str, ground_truth, extra_info=None):
    """Return what the solution spells."""
    return eval(solution_str)


@pytest.mark.parametrize(("spelled", "reward"), RESULTS)
def test_results_are_read_as_verl_reads_them(spelled, reward):
    grade = find_reward({"name": "verl", "function": f"{__file__}:returns_it"})
    assert grade(["q"], [spelled], answer=["4"]) == [reward]


def truth_as_text(data_source, solution_str, ground_truth, extra_info=None):
    """Stands for a reward that takes whatever comes for text."""
    return solution_str == str(ground_truth)


@pytest.mark.parametrize(
    ("columns", "reward"),
    [
        ({"reward_model": {"ground_truth": "4"}}, 1.0),
        ({"reward_model": '{"style": "rule", "ground_truth": "4"}'}, 1.0),
        ({"reward_model": {"ground_truth": 4}, "answer": "5"}, 1.0),
        ({"reward_model": None, "answer": "4"}, 1.0),
        ({"ground_truth": None, "reward_model": {"ground_truth": "4"}}, 1.0),
        ({"ground_truth": float("nan"), "answer": 4}, 1.0),
        ({"ground_truth": "5", "answer": "4"}, 0.0),
        ({"ground_truth": ""}, 0.0),
        ({"ground_truth": None}, None),
        ({"answer": float("nan")}, None),
        ({"reward_model": None}, None),
        ({"reward_model": {"style": "model"}}, None),
        ({"reward_model": {"ground_truth": None}}, None),
        ({"reward_model": "rule"}, None),
        ({"reward_model": ["4"]}, None),
    ],
)
def test_a_row_without_a_truth_has_no_verdict(columns, reward):
    grade = find_reward({"name": "verl", "function": f"{__file__}:truth_as_text"})
    rows = {name: [value] * 2 for name, value in columns.items()}
    other = None if reward is None else 0.0
    assert grade(["q"] * 2, ["4", "None"], **rows) == [reward, other]


@pytest.mark.parametrize(
    "function", ["nowhere.py:compute_score", "no.module:f", f"{__file__}:missing", "words", "json"]
)
def test_a_function_that_is_not_there_is_refused(function):
    with pytest.raises(ValueError, match="is no function to be found"):
        find_reward({"name": "verl", "function": function})
