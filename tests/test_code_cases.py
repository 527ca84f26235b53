import json
from decimal import Context

import numpy as np
import pytest

from polyphony.rewards import code as code_module
from polyphony.rewards.code import Code, program_of, same_output
from polyphony.rewards.code_cases import MAX_OUTPUT_BYTES, Case, read_checks
from polyphony.rewards.sandbox.calls import same

FAST = {"wall_s": 2.0, "cpu_s": 2, "memory_bytes": 256 << 20}


def grade(programs, **columns):
    columns = {name: [value] * len(programs) for name, value in columns.items()}
    return Code(limits=FAST)([""] * len(programs), programs, **columns)


THRICE = ("def thrice(n): return n * 3", "def thrice(n): return n + 3", "")
CHECKS = ["assert thrice(5) == 15", "assert thrice('ab') == 'ababab'"]
ASSERTIONS = {
    "a list": CHECKS,
    "a tuple": tuple(CHECKS),
    "an array": np.array(CHECKS, dtype=object),
    "a list of one": ["\n".join(CHECKS)],
    "JSON": json.dumps(CHECKS),
    "a list of JSON": [json.dumps(CHECKS)],
    "Python's notation": str(CHECKS),
    "a list of a list": [CHECKS],
    "source": "\n".join(CHECKS),
    "source with a setup": ["five = 5", "assert thrice(five) == 15", "assert thrice('a') == 'aaa'"],
}


@pytest.mark.parametrize("column", ["tests", "test_code"])
@pytest.mark.parametrize("shape", ASSERTIONS)
def test_assertions_are_read_in_every_shape(shape, column):
    assert grade(THRICE, **{column: ASSERTIONS[shape]}) == [1.0, 0.0, 0.0]


SUM = ("print(sum(int(input()) for _ in range(2)))", "print(7)", "pass")
RUN = {"input": "3\n4\n", "output": "7\n"}
MORE = {"input": "1\n1", "output": "2"}
RUNS = {
    "text": [RUN, MORE],
    "lines": [{"input": ["3", "4"], "output": ["7"]}, MORE],
    "lines with their ends": [{"input": ["3\n", "4\n"], "output": ["7\n"]}, MORE],
    "numbers": [{"input": [3, 4], "output": 7}, MORE],
    "floats of a table": [{"input": "3\n4", "output": 7.0}, MORE],
    "JSON": json.dumps([RUN, MORE]),
    "a list of JSON": [json.dumps([RUN, MORE])],
    "arrays": np.array([RUN, {**MORE, "input": np.array(["1", "1"], dtype=object), "fn_name": None}], dtype=object),
    "columns": {"inputs": ["3\n4\n", "1\n1\n"], "outputs": ["7\n", "2\n"]},
    "columns of lines": {"inputs": [["3", "4"], ["1", "1"]], "outputs": [["7"], ["2"]]},
    "columns as JSON": json.dumps({"inputs": ["3\n4\n", "1\n1"], "outputs": ["7", "2"]}),
    "columns with a null": {"fn_name": None, "inputs": np.array(["3\n4", "1\n1"]), "outputs": np.array(["7", "2"])},
    "under a key": {"language": "python", "test_cases": [{**RUN, "type": "stdin_stdout"}, {**MORE, "fn_name": None}]},
    "marked": [{**RUN, "testtype": "stdin"}, {**MORE, "testtype": "stdin"}],
}


@pytest.mark.parametrize("shape", RUNS)
def test_runs_are_read_in_every_shape(shape):
    assert grade(SUM, tests=RUNS[shape]) == [1.0, 0.0, 0.0]


def test_no_input_is_an_empty_one():
    assert read_checks([{"input": None, "output": "ok"}]) == [Case(given="", expected="ok")]


MERGE = (
    "class Solution:\n    def _k(self): pass\n"
    "    def merge(self, a: List[int], b: List[int]) -> List[int]:\n        return sorted(a + b)",
    "class Solution:\n    def merge(self, a, b): return a + b",
    "class Solution:\n    def merge(self, a, b):\n        raise StopIteration",
    "class Solution:\n    def other(self, a): return [1, 2, 3]",
    "print([1, 2, 3])",
)
CALL = {"input": "[3, 1]\n[2]", "output": "[1, 2, 3]", "testtype": "functional"}
CALLS = {
    "without a name": [CALL],
    "with a name": [{**CALL, "fn_name": "merge"}],
    "with a name beside it": [{**CALL, "metadata": {"func_name": "merge"}}],
    "with a name in JSON": [{**CALL, "metadata": '{"func_name": "merge"}'}],
    "two": [CALL, {"input": "[]\n[0]", "output": "[0]", "testtype": "functional"}],
    "JSON": json.dumps([CALL]),
    "columns": {"fn_name": "merge", "inputs": [[[3, 1], [2]]], "outputs": [[1, 2, 3]]},
    "columns with results in lists": {"fn_name": "merge", "inputs": [[[3, 1], [2]]], "outputs": [[[1, 2, 3]]]},
    "columns of text": {"fn_name": "merge", "inputs": ["[3, 1]\n[2]"], "outputs": ["[1, 2, 3]"]},
    "under a key": {
        "test_cases": [{"type": "function_call", "fn_name": "merge", "input": [[3, 1], [2]], "output": [1, 2, 3]}]
    },
    "by name": [{"fn_name": "merge", "input": {"a": [3, 1], "b": [2]}, "output": [1, 2, 3]}],
}


@pytest.mark.parametrize("shape", CALLS)
def test_calls_are_read_in_every_shape(shape):
    assert grade(MERGE, tests=CALLS[shape]) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_calls_of_functions_are_compared_as_json():
    tests = [{"fn_name": "f", "input": "4", "output": '[0.25, true, null, {"1": "a"}]'}]
    programs = ["def f(n): return (1 / n, True, None, {1: 'a'})", "def f(n): return [0.2501, True, None, {1: 'a'}]"]
    assert grade(programs, tests=tests) == [1.0, 0.0]
    liar = "class E:\n    def __eq__(s, o): return True\n    def __len__(s): return 4\ndef f(n): return E()"
    assert grade([liar], tests=tests) == [0.0]


@pytest.mark.parametrize(
    ("value", "expected", "holds"),
    [
        (3, 3, True),
        (3.0, 3, True),
        (2.9999999999, 3, False),
        (0.1 + 0.2, 0.3, True),
        ("3", 3, False),
        ((1, 2), [1, 2], True),
        ([1, 2], [1, 2, 3], False),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        (None, None, True),
        (float("inf"), float("inf"), True),
        ({1, 2}, [1, 2], False),
    ],
)
def test_results_of_calls_are_met(value, expected, holds):
    assert same(value, expected) is holds


UNREAD = {
    "a case without an output": [{"input": "1"}],
    "an output that is null": [{"input": "1", "output": None}],
    "an object as input": [{"input": {"n": 1}, "output": "1"}],
    "lists of unequal length": {"inputs": ["1", "2"], "outputs": ["1"]},
    "runs beside calls": [RUN, CALL],
    "arguments that are no JSON": [{**CALL, "input": "[3, 1"}],
    "a number": 4,
    "a list of numbers": [1, 2],
    "nothing": [],
    "words": "It should add the two numbers.",
    "a list of words": ["adds two", "numbers"],
    "an expression that calls nothing": "thrice",
    "an output beyond what may be printed": [{"input": "", "output": "x" * (MAX_OUTPUT_BYTES // 2 + 1)}],
    "NaN": float("nan"),
}


@pytest.mark.parametrize("shape", UNREAD)
def test_what_can_not_be_read_has_no_verdict(shape):
    assert grade(THRICE[:1], tests=UNREAD[shape]) == [None]


def test_the_reason_is_told_once_and_other_rows_are_graded(caplog, monkeypatch):
    monkeypatch.setattr(code_module, "_told", set())
    tests = [UNREAD["a number"], [RUN], UNREAD["a list of numbers"], None]
    assert Code(limits=FAST)([""] * 4, [SUM[0]] * 4, tests=tests) == [None, 1.0, None, None]
    reasons = [record.getMessage() for record in caplog.records]
    assert [reason.partition("tests")[0] for reason in reasons] == ["code: ", "code: a row needs either "]


@pytest.mark.parametrize(
    ("printed", "expected", "holds"),
    [
        ("0.6666666666666666", "0.666666667", True),
        ("0.6667", "0.666666667", False),
        ("2.50", "2.5", True),
        ("2", "2.0", True),
        ("3.0", "3", True),
        ("2.9999999999", "3", False),
        ("1000001.0", "1000000", False),
        ("1e-3", "0.001", True),
        ("-0.0", "0.0", True),
        ("007", "7", False),
        ("0110", "110", False),
        ("nan", "0.5", False),
        ("inf", "1e400", False),
        ("1e9999", "1.5", False),
        ("x 0.1", "x 0.10", True),
        ("1  2\t3", "1 2 3", True),
        ("1 2", "1\n2", False),
        ("12", "1 2", False),
        ("\u0663.5", "3.5", False),
        ("1_0.0", "10.0", False),
    ],
)
def test_numbers_are_compared_as_numbers(printed, expected, holds):
    assert same_output(printed, expected) is holds


def test_long_integers_are_printed():
    digits = f"{Context(prec=8000).power(7, 9000):f}"  # more than the interpreter itself turns into text
    assert grade(["print(7 ** 9000)", "print(7 ** 9001)"], tests=[{"input": "", "output": digits}]) == [1.0, 0.0]


def test_a_program_may_print_as_much_as_is_expected():
    lines = "\n".join(str(n) for n in range(0, 2_000_000, 9))
    flood = "while True: print('0')"
    programs = ["for n in range(0, 2_000_000, 9): print(n)", flood]
    assert grade(programs, tests=[{"input": "", "output": lines}]) == [1.0, 0.0]


FENCED = [
    "Here:\n```python\nprint(1)\n```",
    "```python\nprint(1)\n      ```",
    "    ```python\n    print(1)\n    ```",
    "- first\n      ```py\n      if 1:\n          print(1)\n      ```\n- then",
    "~~~python\nprint(1)\n~~~",
    "~~~~py\nprint(1)\n~~~~\nand\n~~~text\n2\n~~~",
    "````python\nprint(1)\n````",
    "````markdown\n# Title\n```python\nprint(1)\n```\n````",
    "```markdown\n```python\nprint(1)\n```\n```",
    "~~~\n```python\nprint(1)\n```\n~~~",
    '```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\nprint(1)\n```',
    '```python\ndef f():\n    """\n    ~~~\n    """\nprint(1)\n```\nThat is all.',
    "```python\nprint(2)\n    ```\nBetter:\n```python\nprint(1)\n```",
    "```Python3\nprint(1)\n```\nOutput:\n```\n1\n```",
    "```python\nprint(1)\n``` as asked",
    "```python\nprint(2)\n```python\nprint(1)\n```",
    "```python\nprint(1)",
]


@pytest.mark.parametrize("completion", FENCED)
def test_programs_stand_in_every_kind_of_fence(completion):
    assert grade([completion], tests=[{"input": "", "output": "1"}]) == [1.0]


def test_a_fence_inside_a_docstring_is_the_programs():
    assert program_of('```python\ndef f():\n    """\n    ```\n    """\n    return 1\n```\nx').endswith("return 1")


@pytest.mark.parametrize(
    "program",
    [
        "class Solution:\n    def run(self, a: List[int]) -> Optional[int]: return max(a)",
        "class Solution:\n    def run(self, a: 'list[int]') -> Dict[str, Any]: return heapq.nlargest(1, a)[0]",
        "class Solution:\n    def run(self, a): heapify(a); return [heappop(a) for _ in range(len(a))][-1]",
        "class Solution:\n    def run(self, a): return reduce(lambda x, y: x if x > y else y, a)",
        "class Solution:\n    def run(self, a): return sorted(Counter(a))[-1]",
        "class Solution:\n    def run(self, a):\n        q = deque(sorted(a))\n        return q.pop()",
        "class Solution:\n    @cache\n    def at(self, n): return n\n    def run(self, a): return self.at(max(a))",
        "class Solution:\n    def run(self, a):\n        best = -math.inf\n        return max([best, *a])",
        "class Solution:\n    def run(self, a): return [*accumulate(a, max)][-1]",
        "class Solution:\n    def run(self, a): return sorted(a)[bisect_left(sorted(a), max(a))]",
        "from typing import List\nclass Solution:\n    def run(self, a: List[int]): return max(a)",
    ],
)
def test_classes_find_the_usual_names(program):
    assert grade([program], test_code="assert Solution().run([2, 5, 1]) == 5") == [1.0]


def test_own_definitions_come_before_the_usual_names():
    assert grade(["def gcd(a, b): return 7\ndef f(): return gcd(4, 6)"], test_code="assert f() == 7") == [1.0]
    assert grade(["def f(): return 1"], test_code="assert gcd(4, 6) == 2") == [0.0]  # the tests import for themselves
