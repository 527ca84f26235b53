import asyncio
import pickle

import pytest

from polyphony.rewards import find_reward
from polyphony.rewards.registry import composed
from polyphony.rewards.shaping import Weighted, within


class Slow:
    async def __call__(self, completions, **columns):
        await asyncio.sleep(0)
        return [None if "?" in completion else 0.5 for completion in completions]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>2 + 2</think><answer>4</answer>", 1.0),
        (" <think>\n2\n</think>\n\n<answer>\n4\n</answer>\n", 1.0),
        ("the template opened the thought</think><answer>4</answer>", 1.0),
        ("", 0.0),
        ("4", 0.0),
        ("<answer>4</answer>", 0.0),
        ("<think>2</think>4", 0.0),
        ("<think></think><answer>4</answer>", 0.0),
        ("<think>2</think><answer> </answer>", 0.0),
        ("<think>2</think><answer>4</answer> bye", 0.0),
        ("hello <think>2</think><answer>4</answer>", 0.0),
        ("<think>2</think><answer>3</answer><answer>4</answer>", 0.0),
        ("<think>2</think></think><answer>4</answer>", 0.0),
        ("<think><think>2</think><answer>4</answer>", 0.0),
        ("<answer>4</answer><think>2</think>", 0.0),
        ("＜think＞2＜/think＞＜answer＞4＜/answer＞", 0.0),
        ("<think>" * 100_000 + "</think><answer>4</answer>", 0.0),
    ],
)
def test_format_table(completion, reward):
    assert find_reward("format")(["q"], [completion]) == [reward]


def test_a_pattern_must_match_the_whole_completion():
    grade = find_reward({"name": "format", "pattern": r"\d+\."})
    assert grade(["q"] * 3, ["42.", "so 42.", "42.\n"]) == [1.0, 0.0, 0.0]


def test_length_by_hand():
    # max 10, soft 4: nothing up to 6 tokens, then a quarter each, -1 from 10 on
    grade = find_reward({"name": "length", "max_tokens": 10, "soft_tokens": 4})
    tokens = [[0] * n for n in (0, 6, 7, 9, 10, 99)]
    assert grade(["q"] * 6, ["", *"xxxxx"], tokens) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]


def test_length_takes_the_limit_of_its_domain_and_a_fifth_of_it():
    both = within([{"name": "exact", "weight": 1}, {"name": "length", "weight": 0.1}], 10)
    grade = find_reward(both).rewards["length"]
    assert grade(["q"] * 4, ["x"] * 4, [[1] * n for n in (8, 9, 10, 12)]) == [0.0, -0.5, -1.0, -1.0]
    parts = composed(["exact", "length", {"name": "length", "max_tokens": 4}])
    assert [part["reward"] for part in within(parts, 10)["parts"].values()] == [
        "exact",
        {"name": "length", "max_tokens": 10},
        {"name": "length", "max_tokens": 4},
    ]
    with pytest.raises(ValueError, match="length: needs max_tokens"):
        find_reward("length")(["q"], ["x"], [[1]])


def test_length_needs_tokens():
    with pytest.raises(ValueError, match="needs completion_ids"):
        find_reward({"name": "length", "max_tokens": 10, "soft_tokens": 4})(["q"], ["x"])


def test_nothing_to_punish_is_no_negative_zero():
    length = find_reward({"name": "length", "max_tokens": 4, "soft_tokens": 2})
    assert str(length(["q"], ["a"], [[1]]) + find_reward("repetition")(["q"], ["a b"])) == "[0.0, 0.0]"


def test_repetition_by_hand():
    # four word trigrams, "a b c" twice among them
    assert find_reward("repetition")(["q"] * 2, ["a b c a b c", ""]) == [-0.25, 0.0]


def test_language_by_hand():
    assert find_reward("language")(["q"] * 4, ["abcд", "42", "", "да"]) == [0.75, 1.0, 0.0, 0.0]
    assert find_reward({"name": "language", "scripts": ["CYRILLIC"]})(["q"], ["да"]) == [1.0]


PARTS = {
    "correct": {"reward": "exact", "weight": 0.75},
    "format": {"reward": {"name": "format", "pattern": "[0-9]+"}, "weight": 0.25},
    "repeats": {"reward": "repetition", "weight": 0},
}


def test_weighted_keeps_each_part_a_number_of_its_own():
    reward = find_reward({"name": "weighted", "parts": PARTS})
    arguments = {"prompts": ["q"] * 3, "completions": ["4", "5", "x x x x"], "answer": ["4"] * 3}
    parts = reward.components(**arguments)
    assert parts == {"correct": [1.0, 0.0, 0.0], "format": [1.0, 1.0, 0.0], "repeats": [0.0, 0.0, -0.5]}
    assert reward(**arguments) == [1.0, 0.25, 0.0]


def test_a_part_without_a_verdict_leaves_no_sum():
    reward = Weighted(parts={"judge": {"reward": Slow(), "weight": 1}, "exact": {"reward": "exact", "weight": 2}})
    assert reward(["q"] * 2, ["4", "?"], answer=["4", "?"]) == [2.5, None]


def test_a_part_that_only_measures_may_fail():
    reward = Weighted(parts={"judge": {"reward": Slow(), "weight": 0}, "exact": {"reward": "exact"}})
    assert reward(["q"], ["?"], answer=["?"]) == [1.0]


def test_weighted_runs_asynchronous_parts_inside_a_running_loop():
    async def inside():
        return Weighted(parts={"judge": {"reward": Slow()}})(["q"], ["4"])

    assert asyncio.run(inside()) == [0.5]


def test_weighted_travels_between_processes():
    reward = pickle.loads(pickle.dumps(Weighted(parts=PARTS)))
    assert reward(["q"], ["4"], answer=["4"]) == [1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "weighted", "parts": {}}, "at least one part"),
        ({"name": "weighted", "parts": {"a": 1.0}}, r"'weighted': parts: a: Input should be .* \(1\.0\), got"),
        ({"name": "length", "soft_tokens": 0}, "0 < soft_tokens <= max_tokens"),
        (["mth", {"name": "length", "weight": "x"}, 3], r"^0: reward 'mth' does not exist; did you mean 'math'\?"),
        (["mth", {"name": "length", "weight": "x"}, 3], r"; 1\.weight: 'x' is no finite number; 2: expected a name"),
        (["math", {"name": "length", "most": 3}, {"name": "format", "n": 1}], r"part 1 \(length\): .*'most'"),
        (["math", {"name": "length", "most": 3}, {"name": "format", "n": 1}], r"; part 2 \(format\): .*'n'"),
        ({"name": "weighted", "parts": {"a": {"weight": 1}}}, "part 'a' needs reward and weight"),
        ({"name": "weighted", "parts": {"a": {"reward": "exact", "wait": 1}}}, "part 'a' needs reward and weight"),
        ({"name": "format", "pattern": "("}, "no regular expression"),
        ({"name": "length", "max_tokens": 4, "soft_tokens": 5}, "0 < soft_tokens <= max_tokens"),
        ({"name": "repetition", "n": 0}, "n must be at least 1"),
        ({"name": "language", "scripts": "LATIN"}, "scripts: 'str' instances are not allowed"),
        ({"name": "language", "scripts": ["Latin"]}, "scripts is a list of names in capitals"),
        ({"name": "language", "scripts": []}, "scripts is a list of names in capitals"),
        ({"name": "weighted", "parts": {"a": {"reward": "exact", "weight": 0}}}, "one of them not 0"),
        ({"name": "weighted", "parts": {"a": {"reward": "exact", "weight": float("nan")}}}, "must be finite"),
        ({"name": "weighted", "parts": {"a": {"reward": "exact", "weight": "inf"}}}, "must be finite"),
    ],
)
def test_wrong_settings_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        find_reward(spec)


SHORT = {"name": "repetition", "weight": 0.5}


def test_a_list_of_rewards_is_their_weighted_sum_and_each_part_is_logged():
    said: dict[str, list[float]] = {}
    reward = find_reward(["exact", SHORT, {**SHORT, "n": 1, "weight": 0}])
    arguments = {"prompts": ["q"] * 2, "completions": ["4", "x x x x"], "answer": ["4"] * 2}
    assert reward(**arguments, log_metric=lambda name, value: said.setdefault(name, []).append(value)) == [1.0, -0.25]
    assert said == {"exact": [1.0, 0.0], "repetition": [0.0, -0.5], "repetition-2": [0.0, -0.75]}
    assert (reward.range, Weighted(parts=PARTS).range) == ((-0.5, 1.0), (0.0, 1.0))


def test_a_part_without_a_verdict_is_left_out_where_that_is_asked_for():
    parts = {"judge": {"reward": Slow(), "weight": 1}, "exact": {"reward": "exact", "weight": 2}}
    assert Weighted(parts=parts, missing="part")(["q"] * 2, ["4", "?"], answer=["4", "?"]) == [2.5, 2.0]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "at least one reward"),
        ([SHORT, {"name": "exact", "weight": "2"}], r"1\.weight: '2' is no finite number"),
        (["exact", {"weight": 1}], r"1: expected a name, .* \{'weight': 1\} is none"),
        (["exact", "maths"], "did you mean 'math'"),
        ([{"name": "exact", "weight": 0}], "one of them not 0"),
    ],
)
def test_a_list_that_is_no_sum_is_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        find_reward(rewards)
