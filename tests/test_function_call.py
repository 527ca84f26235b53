import json

import pytest

from polyphony.rewards import find_reward
from polyphony.rewards.function_call import calls_of, canonical, compare, reference_calls

WEATHER = [{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]
BOTH = [*WEATHER, {"name": "time", "arguments": {}}]
NESTED = [{"name": "double", "arguments": {"x": {"name": "add", "arguments": {"a": 1, "b": [2, {"c": None}]}}}}]
CHAINED = [
    {"name": "find", "arguments": {"who": "Ada"}, "label": "$var_1"},
    {"name": "mail", "arguments": {"to": "$var_1.address$", "copy": "$var_1.boss.address$"}},
]
CALL = json.dumps(WEATHER[0])

ROWS = [
    (CALL, WEATHER, 1.0),
    (f"[{CALL}]", WEATHER, 1.0),
    (f"<tool_call>\n{CALL}\n</tool_call>", WEATHER, 1.0),
    (f"I look it up.\n```json\n{CALL}\n```", WEATHER, 1.0),
    (f"<think>[time()]</think>{CALL}", WEATHER, 1.0),
    ("weather(city='Paris', days=2)", WEATHER, 1.0),
    ("[weather(days=2.0, city='Paris')]", WEATHER, 1.0),
    ('{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 2}"}}', WEATHER, 1.0),
    ('{"name": "weather", "parameters": {"city": "Paris", "days": 2}}', WEATHER, 1.0),
    ([{"role": "assistant", "tool_calls": [{"type": "function", "function": WEATHER[0]}]}], WEATHER, 1.0),
    ("[time(), weather(city='Paris', days=2)]", BOTH, 1.0),
    (f"<tool_call>{CALL}</tool_call><tool_call>{json.dumps(BOTH[1])}</tool_call>", BOTH, 1.0),
    ("double(x=add(a=1, b=[2, {'c': None}]))", json.dumps(NESTED), 1.0),
    (json.dumps(NESTED), json.dumps(NESTED), 1.0),
    (json.dumps(CHAINED).replace("var_1", "first"), CHAINED, 1.0),
    ("weather(city='Paris', days=2)\ntime()", BOTH, 1.0),
    (f"{CALL}\n{json.dumps(BOTH[1])}", BOTH, 1.0),
    ("f(x) = 2x is a function.", [], 1.0),
    ("[1] says so.", [], 1.0),
    ('{"name": "weather", "arguments": {"city": "Rome", "city": "Paris", "days": 2}}', WEATHER, 0.0),
    ("x = weather(city='Paris', days=2)", WEATHER, 0.0),
    ("I need no tool for that.", [], 1.0),
    ("", WEATHER, 0.0),
    ("", [], 0.0),
    ("I would call weather(city='Paris', days=2).", WEATHER, 0.0),
    ("weather('Paris', 2)", WEATHER, 0.0),
    ("weather(city='Paris', days=2, days_=3)", WEATHER, 0.0),
    ("weather(city='Paris')", WEATHER, 0.0),
    ("weather(city='paris', days=2)", WEATHER, 0.0),
    ("weather(city='Paris', days='2')", WEATHER, 0.0),
    ("weather(city='Paris', days=True)", [{"name": "weather", "arguments": {"city": "Paris", "days": 1}}], 0.0),
    ("weather(city='P\u0430ris', days=2)", WEATHER, 0.0),
    ("[weather(city='Paris', days=2), weather(city='Paris', days=2)]", WEATHER, 0.0),
    ("[weather(city='Paris', days=2), weather(city='Rome', days=2)]", WEATHER, 0.0),
    (f"{CALL} or {json.dumps(BOTH[1])}", WEATHER, 0.0),
    (CALL[:-2], WEATHER, 0.0),
    (f"<think>{CALL}", WEATHER, 0.0),
    (CALL, [], 0.0),
    (json.dumps(CHAINED).replace("$var_1.address$", "$var_2.address$"), CHAINED, 0.0),
    (json.dumps(CHAINED).replace("boss", "friend"), CHAINED, 0.0),
    ("__import__('os').system(command='touch /tmp/polyphony-mark')", WEATHER, 0.0),
    ("weather(city=__import__('os').getcwd(), days=2)", WEATHER, 0.0),
    ("[" * 10_000 + "]" * 10_000, WEATHER, 0.0),
    ('{"name": "weather", "arguments": {"city": ' + "[" * 10_000 + "]" * 10_000 + "}}", WEATHER, 0.0),
    ('{"name": "weather", "arguments": {"city": ' + "[" * 200 + "]" * 200 + "}}", WEATHER, 0.0),
    ("weather(city=" + "-" * 20_000 + "1)", WEATHER, 0.0),
    ("weather(days=" + "f(x=" * 150 + "1" + ")" * 151, WEATHER, 0.0),
    ("weather(city='Paris', days=" + "9" * 50_000 + ")", WEATHER, 0.0),
    ("<tool_call>" * 200_000, WEATHER, 0.0),
    ("```json\n" * 100_000, WEATHER, 0.0),
    ('{"name": "weather", "arguments": {"city": "Paris", "days": NaN}}', WEATHER, 0.0),
    ("null", WEATHER, 0.0),
    ("weather(city='Paris', days=" + "9" * 400 + ")", WEATHER, 0.0),
    ([{"role": "assistant", "content": ""}], [], 0.0),
]


@pytest.mark.parametrize(("completion", "answer", "reward"), ROWS)
def test_function_call_table(completion, answer, reward):
    assert find_reward("function_call")(["q"], [completion], [[1]], answer=[answer]) == [reward]


def scores(text, answer):
    return compare(canonical(calls_of(text)), reference_calls(answer))


def test_f1_by_hand():
    # made: weather, weather; asked: weather, time. Shared names 1 of 2 and 2: F1 = 2 * 1 / 4
    # triples made: city, days, city; asked: city, days. Shared 2: F1 = 2 * 2 / 5
    got = scores("[weather(city='Paris', days=2), weather(city='Rome')]", BOTH)
    assert (got.name_f1, got.argument_f1, got.full_match) == (0.5, pytest.approx(0.8), 0.0)


def test_calls_without_arguments_have_all_arguments_right():
    assert scores("[time()]", [{"name": "time", "arguments": {}}]).argument_f1 == 1.0


def test_the_metric_may_be_partial():
    grade = find_reward({"name": "function_call", "metric": "name_f1"})
    assert grade(["q"], ["weather(city='Rome')"], answer=[WEATHER]) == [1.0]


def test_nulls_that_a_table_filled_in_are_no_arguments():
    filled = [{"name": "weather", "arguments": {"city": "Paris", "days": 2, "zone": None}}]
    assert find_reward("function_call")(["q"], [CALL], answer=[filled]) == [1.0]
    # in JSON text a null was meant
    assert find_reward("function_call")(["q"], [CALL], answer=[json.dumps(filled)]) == [0.0]


@pytest.mark.parametrize("answer", [None, "weather()", [{"name": 3}], [{"name": "f", "arguments": [1]}], 4])
def test_a_row_without_calls_to_compare_with_is_refused(answer):
    with pytest.raises(ValueError, match="answer must be a list of"):
        find_reward("function_call")(["q"], [CALL], answer=[answer])


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric is one of name_f1, argument_f1, full_match, got 'bleu'"):
        find_reward({"name": "function_call", "metric": "bleu"})
