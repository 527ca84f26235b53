"""Read how a row of code is tested: assertions, stdin cases or calls, in the shapes that public sets keep them in.

Read are: Python source, or a list of assertions (MBPP's `test_list`); `{"input", "output"}` cases, whose text may be a
list of lines (null: no input), also as `{"test_cases": [..]}`; APPS's and TACO's `{"inputs", "outputs", "fn_name"}`;
LiveCodeBench's functional cases, whose arguments are JSON, one a line. Any of them may be JSON text, a numpy array, as
Parquet gives it, or stand alone in a list. Whatever else is refused: text made of it by `str` would test nothing.

`altered` changes what tests expect: a program that passes those too never computed it, whatever it does to its process.
"""

from __future__ import annotations

import ast
import contextlib
import json
import string
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MAX_OUTPUT_BYTES = 64 << 20
"""The most that a program may print, whatever it is expected to: half of it is the longest output that is read."""


_NAMES = ("fn_name", "func_name", "function_name")


_CALLS = ("functional", "function_call")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run of a program: what it reads and what it has to print."""

    given: str
    expected: str


def read_checks(tests: Any, test_code: Any = None) -> str | list[Case]:
    """Return the source of a row's tests, or its cases. Raises ValueError where it has neither, both, or another shape."""
    given = [value for value in map(_plain, (tests, test_code)) if value]
    if len(given) != 1:
        raise ValueError("a row needs either tests or test_code")
    return _read(given[0])


def _read(value: Any) -> str | list[Case]:
    value = _parsed(value)
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if "test_cases" in value:
            return _read(value["test_cases"])
        return _from_columns(value) if {"inputs", "outputs"} <= set(value) else _from_cases([value])
    if isinstance(value, list) and len(value) == 1 and not isinstance(_parsed(value[0]), str):
        return _read(value[0])
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _from_cases(value)
    raise ValueError('tests must be source, a list of assertions, or a list of {"input", "output"}')


def _from_columns(value: dict) -> str | list[Case]:
    inputs, outputs = ([v] if isinstance(v, str) else v for v in (value["inputs"], value["outputs"]))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError("inputs and outputs must be lists of the same length")
    name = _function(value)
    if name is None:
        return [_case(given, expected) for given, expected in zip(inputs, outputs, strict=True)]
    # that shape keeps what a function returns in a list of its own, but not everywhere
    return "\n".join(_call(name, *pair, wrapped=True) for pair in zip(inputs, outputs, strict=True))


def _from_cases(cases: list[dict]) -> str | list[Case]:
    if not all({"input", "output"} <= set(case) for case in cases):
        raise ValueError('tests must be a list of {"input", "output"}')
    are_calls = {_function(case) is not None or _kind(case) in _CALLS for case in cases}
    if len(are_calls) > 1:
        raise ValueError("tests must be all runs or all calls")
    if True in are_calls:
        return "\n".join(_call(_function(case), case["input"], case["output"]) for case in cases)
    return [_case(case["input"], case["output"]) for case in cases]


def _kind(case: dict) -> Any:
    return case.get("testtype") or case.get("type")


def _function(case: dict) -> str | None:
    about = _parsed(case.get("metadata"))
    places = [case, about] if isinstance(about, dict) else [case]
    return next((place[name] for place in places for name in _NAMES if place.get(name)), None)


def _case(given: Any, expected: Any) -> Case:
    if expected is None:
        raise ValueError("a case has no output")
    case = Case(given="" if given is None else _text(given), expected=_text(expected))
    if 2 * len(case.expected.encode(errors="replace")) > MAX_OUTPUT_BYTES:
        raise ValueError(f"an expected output is larger than {MAX_OUTPUT_BYTES >> 21} MiB")
    return case


def _text(value: Any) -> str:
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str | int | float) for line in lines):
        raise ValueError("what a program reads or prints must be text or a list of lines")
    return "\n".join(str(line).removesuffix("\n") for line in lines) if isinstance(value, list) else str(value)


def _call(name: str | None, given: Any, expected: Any, *, wrapped: bool = False) -> str:
    """Return the assertion that a call gives what is expected (`rewards/sandbox/calls.py`)."""
    if isinstance(given, str):
        try:
            given = [json.loads(line) for line in given.splitlines() if line.strip()]
        except ValueError:
            raise ValueError("the arguments of a call must be JSON, one a line") from None
        with contextlib.suppress(ValueError, TypeError):
            expected = json.loads(expected)
    if not isinstance(given, list | dict):
        raise ValueError("the arguments of a call must be a list or an object")
    texts = ", ".join(repr(json.dumps(value)) for value in (given, expected))
    return f"import calls; assert calls.gives({name!r}, {texts}, wrapped={wrapped})"


def _parsed(value: Any) -> Any:
    """Return what a text of JSON, or of Python's own notation, says where it is a list or an object."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(value.strip())
    return value


def _plain(value: Any) -> Any:
    """Return arrays as lists, and columns of a Parquet struct that a row does not use as nothing."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and value != value else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Altered:
    """Tests whose expected constants are others, and how many of their checks have to fail for it."""

    source: str
    failures: int
    unaltered: str
    """The tests as they are, laid out alike: a program that reads both can not tell which is which."""


def altered(source: str) -> Altered | None:
    """Return the tests with every expected constant changed; None where they hold none, or are no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    unaltered = ast.unparse(tree)
    checks = [part for statement in tree.body for part in _checks(statement)]
    counts = [sum(map(_alter, ast.walk(check))) for check in checks]
    rest = sum(_alter(node) for node in ast.walk(tree)) if not any(counts) else 0
    if not any(counts) and not rest:
        return None
    return Altered(source=ast.unparse(tree), failures=max(1, sum(map(bool, counts))), unaltered=unaltered)


def _checks(statement: ast.stmt) -> list[ast.stmt]:
    """Return what counts as checks of its own (`running.run_tests`), but for helpers that a check calls."""
    if isinstance(statement, ast.ClassDef):
        return [part for part in statement.body if getattr(part, "name", "").startswith("test")]
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement] if statement.name.startswith("test") else []
    return [statement]


_EQUALS = ("assertEqual", "assertIs", "assertIn", "assertListEqual", "assertTupleEqual", "assertSetEqual")


_EQUALS += ("assertDictEqual", "assertCountEqual", "assertAlmostEqual", "assertSequenceEqual", "assertMultiLineEqual")


def _alter(node: ast.AST) -> bool:
    """Change the constant that a comparison expects; say whether there is one."""
    if isinstance(node, ast.Assert):
        parts = node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else []
        return sum(map(_alter_comparison, parts or [node.test])) > 0
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "calls.gives":
        node.args[-1] = ast.Constant(json.dumps(_other(json.loads(ast.literal_eval(node.args[-1])))))
        return True
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _EQUALS:
        return _alter_one(node.args)
    return False


def _alter_comparison(test: ast.expr) -> bool:
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        sides = [test.left, *test.comparators]
        if isinstance(test.ops[0], ast.Eq | ast.Is):
            changed = _alter_one(sides)
        elif isinstance(test.ops[0], ast.In):
            first = sides[:1]
            changed = _alter_one(first) or _alter_one(sides)
            sides = [*first, *sides[1:]]
        elif isinstance(test.left, ast.Call) and getattr(test.left.func, "id", "") == "abs":
            inner = test.left.args[0] if test.left.args else None
            return isinstance(inner, ast.BinOp) and _alter_field(inner, "right", "left")
        else:
            return False
        test.left, test.comparators = sides[0], sides[1:]
        return changed
    if isinstance(test, ast.Call) and getattr(test.func, "attr", getattr(test.func, "id", "")) == "isclose":
        return _alter_one(test.args)
    return False


def _alter_field(node: Any, *fields: str) -> bool:
    for field in fields:
        values = [getattr(node, field)]
        if _alter_one(values):
            setattr(node, field, values[0])
            return True
    return False


def _alter_one(sides: list[ast.expr]) -> bool:
    """Exchange the last of the expressions that is nothing but constants for another of its kind."""
    for number in reversed(range(len(sides))):
        try:
            value = ast.literal_eval(sides[number])
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        sides[number] = ast.copy_location(ast.parse(repr(_other(value)), mode="eval").body, sides[number])
        return True
    return False


def _other(value: Any) -> Any:
    """Return another value of the same kind, with nothing about it that says so."""
    if isinstance(value, bool) or value is None:
        return not value if isinstance(value, bool) else False
    if isinstance(value, str):
        return _other_text(value)
    if isinstance(value, bytes):
        return _other_text(value.decode("latin-1")).encode("latin-1")
    if isinstance(value, int | float | complex):
        return value + 1 if abs(value) < 1e9 else value * 2
    if isinstance(value, dict):
        return {key: _other(item) for key, item in value.items()} or {"a": 0}
    return type(value)([*map(_other, value)] or [0])


_NEXT = {
    a: b for row in (string.digits, string.ascii_lowercase, string.ascii_uppercase) for a, b in pairwise(row + row[0])
}


def _other_text(text: str) -> str:
    """Return the text with its last letter or digit exchanged for the next; with its end said twice where it has none."""
    place = next((n for n in reversed(range(len(text))) if text[n] in _NEXT), None)
    if place is None:
        return text + text[-1] if text else "a"
    return text[:place] + _NEXT[text[place]] + text[place + 1 :]
