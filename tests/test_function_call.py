import json
import time

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


ROME = [{"name": "weather", "arguments": {"city": "Rome", "days": 3}}]
AS_JSON = '{"city": "Rome", "days": 3}'
FORMATS = {
    "Hermes": f'<tool_call>\n{{"name": "weather", "arguments": {AS_JSON}}}\n</tool_call>',
    "a tag cut off at its end": f'<tool_call>\n{{"name": "weather", "arguments": {AS_JSON}}}',
    "a tag cut off at its beginning": f'{{"name": "weather", "arguments": {AS_JSON}}}\n</tool_call>',
    "prose before a tag": f'I look it up.\n<tool_call>{{"name": "weather", "arguments": {AS_JSON}}}</tool_call>',
    "prose before JSON": f'Let me see:\n\n{{"name": "weather", "arguments": {AS_JSON}}}',
    "prose and a colon": f'I ask the service: {{"name": "weather", "arguments": {AS_JSON}}}',
    "prose before Python": "This takes one call.\nweather(city='Rome', days=3)",
    "prose before a list": "My call:\n[weather(city='Rome', days=3)]",
    "in a line's backticks": "`weather(city='Rome', days=3)`",
    "in an answer": "<think>Rome?</think><answer>weather(city='Rome', days=3)</answer>",
    "Mistral": f'Yes. [TOOL_CALLS] [{{"name": "weather", "arguments": {AS_JSON}, "id": "a1"}}]',
    "Mistral, version 11": f"[TOOL_CALLS]weather[ARGS]{AS_JSON}",
    "Mistral, with an id": f"[TOOL_CALLS]weather[CALL_ID]x81[ARGS]{AS_JSON}",
    "Llama 3": f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {AS_JSON}}}<|eom_id|>',
    "Llama 3, bare": f'{{"name": "weather", "parameters": {AS_JSON}}}<|eot_id|>',
    "Llama 3, function": f"<function=weather>{AS_JSON}</function>",
    "Llama 4": "<|python_tag|>[weather(city='Rome', days=3)]",
    "Qwen3-Coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "Qwen3-Coder, cut off": "So:\n<function=weather><parameter=city>Rome</parameter><parameter=days>3</parameter>",
    "invoke": '<function_calls><invoke name="weather"><parameter name="city">Rome</parameter>'
    '<parameter name="days">3</parameter></invoke></function_calls>',
    "Kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    f"{AS_JSON}<|tool_call_end|><|tool_calls_section_end|>",
    "Kimi, its marks gone": f"functions.weather:0{AS_JSON}",
    "DeepSeek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{AS_JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "Granite": f'<|tool_call|>[{{"name": "weather", "arguments": {AS_JSON}}}]',
    "Anthropic": f'{{"type": "tool_use", "id": "t1", "name": "weather", "input": {AS_JSON}}}',
    "LangChain": f'{{"name": "weather", "args": {AS_JSON}}}',
    "OpenAI": f'{{"tool_calls": [{{"function": {{"name": "weather", "arguments": {json.dumps(AS_JSON)}}}}}]}}',
    "OpenAI, before tools": f'{{"function_call": {{"name": "weather", "arguments": {json.dumps(AS_JSON)}}}}}',
    "ReAct": f"Thought: I ask.\nAction: weather\nAction Input: {AS_JSON}",
    "a fence in a tag": f'<tool_call>\n```json\n{{"name": "weather", "arguments": {AS_JSON}}}\n```\n</tool_call>',
    "a fence between words": "So:\n```\nweather(city='Rome', days=3)\n```\nThat is all.",
    "BFCL": f'[{{"weather": {AS_JSON}}}]',
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_calls_are_read_in_every_format_and_are_never_no_call(text):
    grade = find_reward("function_call")
    others = text.replace("Rome", "Oslo")
    assert grade(["q"] * 3, [text, text, others], answer=[ROME, [], ROME]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call></tool_call>",
        "<tool_call>weather, please</tool_call>",
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "da',
        "[TOOL_CALLS] weather",
        "<|python_tag|>import weather",
        "<function=weather><parameter=city>Rome",
        "<function=weather><parameter=city>Rome</parameter> and <parameter=days>3</parameter></function>",
        "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>Rome<|tool_call_end|>",
        'I call {"name": "weather", "arguments": {}} and wait.',
        "One could try weather(city='Rome') here.",
        "Calling:\nweather(city='Rome', days=3) or weather(city='Oslo', days=3)",
        "Calling:\n[weather(city=Rome)]",
        '{"name": "weather", "city": "Rome"}',
        '```json\n{"temperature": 3}\n```',
        "Action: weather\nAction Input: Rome",
        '{"action": "weather", "action_input": {"city": "Rome", "days": 3}}',
        '{"name": "weather", "arguments": {"city": "Rome"}, "parameters": {"city": "Oslo"}}',
        "<think>No tool helps with",
    ],
)
def test_what_looks_like_a_call_and_can_not_be_read_is_wrong(text):
    assert find_reward("function_call")(["q"] * 2, [text] * 2, answer=[[], ROME]) == [0.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "None of the tools gives the weather (or the time).",
        "weather() needs a city. Which one?",
        "The set {1, 2} has 2 elements; f(x) = 2 * x.",
        "My name: Ada. I need the parameters of your question.",
        "```python\ndef double(x):\n    return 2 * x\n```\nThis does it.",
        "Here is a table:\n```json\n[1, 2]\n```",
        "In TeX:\n\\frac{1}{2} and x{2}",
        "If a == b, then max(a, b) == a.",
        "Action: none is needed.",
        "I would have to call weather() for that.",
        "See the [map](https://example.org/a(b)c).",
        "<think>weather(city='Rome')? No.</think>I can not tell.",
        "<answer>There is nothing to call.</answer>",
    ],
)
def test_words_are_no_call(text):
    assert find_reward("function_call")(["q"] * 2, [text] * 2, answer=[[], ROME]) == [1.0, 0.0]


POSSIBLE = [
    {
        "hotel.book": {
            "city": ["New York", "New York, NY"],
            "nights": [2],
            "pets": ["", False],
            "extras": [["bath", "view"], ["view", "bath"], ""],
            "price": [{"low": [50, 60], "high": ["", 90]}, ""],
        }
    }
]
BASE = "hotel.book(city='New York', nights=2"
POSSIBLE_ROWS = [
    (BASE + ")", 1.0),
    ("hotel.book(city='New York, NY', nights=2.0)", 1.0),
    ("hotel.book(city='new-york. ny', nights=2)", 1.0),
    (BASE + ", pets=False)", 1.0),
    (BASE + ", extras=['View', 'bath'])", 1.0),
    (BASE + ", price={'low': 60})", 1.0),
    (BASE + ", price={'high': 90, 'low': 50}, pets=False)", 1.0),
    (BASE + ", pets='')", 1.0),
    (
        "<tool_call><function=hotel.book><parameter=city>NEW YORK</parameter><parameter=nights>2</parameter>"
        "<parameter=pets>False</parameter></function></tool_call>",
        1.0,
    ),
    (json.dumps({"name": "hotel.book", "arguments": {"city": "New York", "nights": 2}}), 1.0),
    ("hotel.book(city='Newark', nights=2)", 0.0),
    ("hotel.book(city='New York', nights=3)", 0.0),
    ("hotel.book(city='New York', nights='2')", 0.0),
    ("hotel.book(city='New York')", 0.0),
    ("hotel.book(nights=2)", 0.0),
    ("hotel.book(city=['New York', 'New York, NY'], nights=2)", 0.0),
    (BASE + ", pets=True)", 0.0),
    (BASE + ", pets=0)", 0.0),
    (BASE + ", extras=['bath'])", 0.0),
    (BASE + ", price={'high': 90})", 0.0),
    (BASE + ", price={'low': 70})", 0.0),
    (BASE + ", price={'low': 50, 'mean': 60})", 0.0),
    (BASE + ", stars=4)", 0.0),
    (f"[{BASE}), {BASE})]", 0.0),
    ("hotel_book(city='New York', nights=2)", 0.0),
    ("I would book it.", 0.0),
]


@pytest.mark.parametrize(("completion", "reward"), POSSIBLE_ROWS)
@pytest.mark.parametrize("as_text", [False, True])
def test_possible_answers_allow_what_they_list(completion, reward, as_text):
    answer = json.dumps(POSSIBLE) if as_text else POSSIBLE
    assert find_reward("function_call")(["q"], [completion], answer=[answer]) == [reward]


def test_possible_answers_are_met_by_calls_in_any_order_each_by_its_own():
    # `f(a=1)` may be the first or the second; only if it is the second, all are met
    answer = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}]
    texts = ["[f(a=1), f(a=2)]", "[f(a=2), f(a=1)]", "[f(a=2), f(a=2)]", "[f(a=1), f(a=1)]"]
    assert find_reward("function_call")(["q"] * 4, texts, answer=[answer] * 4) == [1.0, 1.0, 0.0, 1.0]


def test_f1_with_optional_arguments_by_hand():
    # made: city, nights, pets of which pets is wrong; counted: city, nights. F1 = 2 * 2 / (3 + 2)
    assert scores(BASE + ", pets=True)", POSSIBLE).argument_f1 == pytest.approx(0.8)
    # a right optional argument counts on both sides: 2 * 3 / (3 + 3)
    assert scores(BASE + ", pets=False)", POSSIBLE).argument_f1 == 1.0


def test_no_arguments_are_no_merit_of_another_call():
    answer = [{"name": "time", "arguments": {}}]
    assert [scores(text, answer).argument_f1 for text in ("[time()]", "[date()]", "No.")] == [1.0, 0.0, 0.0]


SCHEMA = [
    {
        "name": "search",
        "schema": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "pattern": "rain"},
                "limit": {"type": "integer", "minimum": 1, "maximum": 10},
                "sort": {"enum": ["date", "rank"]},
                "where": {"type": "dict", "properties": {"year": {"type": "integer"}}, "required": ["year"]},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
            },
            "required": ["query"],
            "$defs": {"tag": {"type": "string", "maxLength": 3}},
        },
    }
]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("search(query='rain in May')", 1.0),
        ("search(query='rain', limit=10, sort='date')", 1.0),
        ("search(query='rain', limit=3.0)", 1.0),
        ("search(query='rain', where={'year': 2001, 'month': None})", 1.0),
        ("search(query='rain', tags=['a', 'abc'])", 1.0),
        ("<function=search><parameter=query>rain</parameter><parameter=limit>4</parameter></function>", 1.0),
        ("search(query='snow')", 0.0),
        ("search(limit=3)", 0.0),
        ("search(query='rain', limit=11)", 0.0),
        ("search(query='rain', limit='3')", 0.0),
        ("search(query='rain', limit=True)", 0.0),
        ("search(query='rain', sort='name')", 0.0),
        ("search(query='rain', where={'month': 5})", 0.0),
        ("search(query='rain', tags=['abcd'])", 0.0),
        ("search(query='rain', page=2)", 0.0),
        ("find(query='rain')", 0.0),
    ],
)
def test_a_schema_takes_what_satisfies_it(completion, reward):
    assert find_reward("function_call")(["q"], [completion], answer=[SCHEMA]) == [reward]


@pytest.mark.parametrize(
    "answer",
    [
        ROME[0],
        json.dumps(ROME[0]),
        [json.dumps(ROME)],
        [{"name": "weather", "args": {"city": "Rome", "days": 3.0}}],
        [{"name": "weather", "input": {"city": "Rome", "days": 3}}],
        [{"name": "weather", "parameters": {"city": "Rome", "days": 3, "zone": float("nan")}}],
        [{"name": "weather", "arguments": AS_JSON, "id": None}],
        [{"type": "function", "function": {"name": "weather", "arguments": AS_JSON}}],
        {"tool_calls": ROME},
        [{"weather": {"city": "Rome", "days": 3}}],
        ["weather(city='Rome', days=3)"],
        "[weather(city='Rome', days=3)]",
        f'<think>Rome.</think>\n<tool_call>\n{{"name": "weather", "parameters": {AS_JSON}}}\n</tool_call>',
        ({"name": "weather", "arguments": {"city": "Rome", "days": 3}},),
        "<function=weather><parameter=city>Rome</parameter><parameter=days>3</parameter></function>",
    ],
)
def test_references_of_every_shape_mean_the_same_and_stay_exact(answer):
    texts = ["weather(city='Rome', days=3)", "weather(city='rome', days=3)", "weather(city='Rome')", "It rains."]
    assert find_reward("function_call")(["q"] * 4, texts, answer=[answer] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("answer", [[], "[]", {"tool_calls": []}, "<think>No.</think><response>It rains.</response>"])
def test_references_that_ask_for_words(answer):
    texts = ["It rains.", "weather(city='Rome', days=3)"]
    assert find_reward("function_call")(["q"] * 2, texts, answer=[answer] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        4,
        float("nan"),
        "",
        "It rains.",
        "weather('Rome')",
        "<tool_call>weather</tool_call>",
        "null",
        "{}",
        {},
        [{}],
        [None],
        [[]],
        [{"name": 3}],
        [{"name": "f", "arguments": [1]}],
        [{"name": "f", "kwargs": {"a": 1}}],
        [{"name": "f", "schema": {"properties": {"a": {"type": 3}}}}],
        [{"name": "f", "schema": {"properties": {"a": {"$ref": "http://example.org/a.json"}}}}],
        [{"name": "f", "arguments": {"a": "$missing$"}}],
    ],
)
def test_a_reference_that_can_not_be_read_gives_no_verdict(answer):
    assert find_reward("function_call")(["q"] * 3, ["f()", "No.", CALL], answer=[answer] * 3) == [None] * 3
    with pytest.raises(ValueError, match="answer must be a list of"):
        reference_calls(answer)


@pytest.mark.parametrize(
    "piece",
    ["[", "{", "f(", "[f([", "a", "<function=f>", "<parameter=a>", "<function=f><parameter=a>", "[TOOL_CALLS]", "<a:",
     '{"name":', "functions.f:0{", "a.", "`", "</tool_call>", " "],
)  # fmt: skip
def test_reading_takes_linear_time(piece):
    start = time.monotonic()
    grade = find_reward("function_call")
    assert grade(["q"] * 2, [piece * (99_000 // len(piece)), "x\n" + piece * (99_000 // len(piece))], answer=[ROME] * 2)
    assert time.monotonic() - start < 5


def test_an_unknown_metric_is_refused():
    with pytest.raises(
        ValueError, match="metric: Input should be 'full_match', 'name_f1' or 'argument_f1', got 'bleu'"
    ):
        find_reward({"name": "function_call", "metric": "bleu"})
