"""`function_call`: the calls a completion makes against those it should make, in JSON or Python syntax.

Single, parallel, nested and chained calls (the sub-skills of Granite-20B-FunctionCalling, arXiv:2407.00121). A chained
call names an earlier one by its label (`"$var_1.result$"`); that name is replaced by the call it stands for, so labels
are free and independent calls may come in any order.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from polyphony.rewards.answers import answer_region, completion_text, fenced_blocks

MAX_CHARS = 100_000
"""Longer texts hold no call that anybody meant."""
MAX_DEPTH = 50

_JSON_START, _CALL_START = re.compile(r"\{|\[\s*[\[{]"), re.compile(r"\[?\s*[\w.]+\(")
"""How a text begins that is nothing but calls; `f(x) = 2x is a function.` does not end like one."""
_REFERENCE = re.compile(r"\$([\w]+)((?:\.\w+)*)\$")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallScores:
    """How near a list of calls is to the one asked for; each in [0, 1]."""

    name_f1: float
    """F1 of the called functions' names, counted with repetition."""
    argument_f1: float
    """F1 of the (function, argument, value) triples; 1 where neither side has any."""
    full_match: float
    """1 where the calls are the same, in any order that their references allow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionCall:
    """Score the completion's calls against the row's `answer`: a list of `{"name", "arguments"}`, or its JSON.

    An empty list asks for a reply without a call. Where `answer` is no text, an argument that is null is no argument:
    tables fill absent fields with nulls. Values are compared by type and exactly; 1 and 1.0 are the same number.
    """

    metric: Literal["full_match", "name_f1", "argument_f1"] = "full_match"

    def __post_init__(self) -> None:
        if self.metric not in CallScores.__slots__:
            raise ValueError(f"function_call: metric is one of {', '.join(CallScores.__slots__)}, got {self.metric!r}")

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, *, answer: list, **columns: Any
    ) -> list[float | None]:
        return [self._score(c, reference_calls(a)) for c, a in zip(completions, answer, strict=True)]

    def is_valid(self, text: str) -> bool:
        """Say whether every call of a text can be read."""
        try:
            canonical(calls_of(text))
        except (ValueError, RecursionError):
            return False
        return True

    def _score(self, completion: Any, expected: list[tuple]) -> float:
        try:
            made = canonical(calls_of(completion))
        except (ValueError, RecursionError):
            return 0.0
        if not made and not completion_text(completion).strip():
            return 0.0
        return getattr(compare(made, expected), self.metric)


def compare(made: list[tuple], expected: list[tuple]) -> CallScores:
    """Compare two lists of canonical calls."""
    return CallScores(
        name_f1=_f1((name for name, _ in made), (name for name, _ in expected)),
        argument_f1=_f1(_triples(made), _triples(expected)),
        full_match=float(Counter(made) == Counter(expected)),
    )


def calls_of(completion: Any) -> list[dict[str, Any]]:
    """Return the calls of a completion; none where it makes none. Raises ValueError where a call can not be read.

    In this order: the messages' own `tool_calls`, `<tool_call>` blocks, the last fenced block, the whole text.
    """
    if isinstance(completion, list):
        structured = [call for message in completion for call in message.get("tool_calls") or []]
        if structured:
            return [_unwrapped(call) for call in structured]
    text = answer_region(completion)
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    tagged = [part.rpartition("<tool_call>") for part in text.split("</tool_call>")[:-1]]
    blocks = [block for _, opened, block in tagged if opened]
    if blocks := blocks or [block for _, block in fenced_blocks(text)[-1:]]:
        return [call for block in blocks for call in _read(block)]
    return _read(text) if _JSON_START.match(text) or (_CALL_START.match(text) and text[-1] in ")];") else []


def _read(text: str) -> list[dict[str, Any]]:
    """Return the calls of a text that is nothing but calls: a list, or one after the other."""
    try:
        values = _read_json(text)
    except json.JSONDecodeError:
        values = _read_python(text.strip())
    return [_unwrapped(call) for value in values for call in (value if isinstance(value, list) else [value])]


def _read_json(text: str) -> list[Any]:
    values, position = [], 0
    while rest := text[position:].strip():
        value, end = _DECODER.raw_decode(rest)
        values.append(value)
        position = len(text.rstrip()) - len(rest) + end
    return values


def _only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_only_once)


def _read_python(text: str) -> list[Any]:
    try:
        statements = ast.parse(text).body
    except (SyntaxError, MemoryError) as error:
        raise ValueError(f"neither JSON nor a Python call: {error}") from None
    if not all(isinstance(statement, ast.Expr) for statement in statements):
        raise ValueError("neither JSON nor Python calls")
    return [_python_value(statement.value, 0) for statement in statements if isinstance(statement, ast.Expr)]


def _python_value(node: ast.AST, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(node, ast.Call):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("a call's arguments must be named")
        arguments = {str(keyword.arg): _python_value(keyword.value, depth + 1) for keyword in node.keywords}
        return {"name": ast.unparse(node.func), "arguments": arguments}
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(item, depth + 1) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_python_value(key, depth + 1) for key in node.keys if key is not None]
        values = [_python_value(value, depth + 1) for value in node.values]
        return _only_once(list(zip(map(str, keys), values, strict=True)))
    return ast.literal_eval(node)


def _unwrapped(call: Any) -> dict[str, Any]:
    """Return `{"name", "arguments"}` (and `label`) of a call in any of its usual wrappings."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"not a call: {call!r:.100}")
    arguments = call.get("arguments", call.get("parameters", {}))
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments must be an object, got {arguments!r:.100}")
    return {"name": call["name"], "arguments": arguments, "label": call.get("label")}


def canonical(calls: list[dict[str, Any]]) -> list[tuple]:
    """Return hashable calls, (name, ((argument, value), ..)), in which equal calls are equal.

    Raises ValueError where a reference names no earlier call, or a value is too deep.
    """
    known: dict[str, tuple] = {}
    done = []
    for call in calls:
        done.append(_frozen_call(call, known, 0))
        if call.get("label"):
            known[str(call["label"]).strip("$")] = done[-1]
    return done


def _frozen_call(call: dict[str, Any], known: dict[str, tuple], depth: int) -> tuple:
    arguments = sorted((name, _frozen(value, known, depth + 1)) for name, value in call["arguments"].items())
    return call["name"], tuple(arguments)


def _frozen(value: Any, known: dict[str, tuple], depth: int) -> tuple:
    """Return the value as (type, content) with every reference replaced by the call it names."""
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(value, dict):
        if isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict):
            return "call", repr(_frozen_call(value, known, depth))
        return "object", tuple(sorted((str(k), _frozen(v, known, depth + 1)) for k, v in value.items()))
    if isinstance(value, list):
        return "array", tuple(_frozen(item, known, depth + 1) for item in value)
    if isinstance(value, str) and (reference := _REFERENCE.fullmatch(value)):
        if reference[1] not in known:
            raise ValueError(f"{value!r} names no earlier call")
        return "call", repr(known[reference[1]]) + reference[2]
    if isinstance(value, bool) or value is None:
        return "constant", str(value)
    if isinstance(value, float) and value.is_integer():
        return "number", str(int(value))
    return ("number" if isinstance(value, int | float) else "text"), str(value)


def reference_calls(answer: Any) -> list[tuple]:
    """Return a row's reference calls, canonical. Raises ValueError where they are none."""
    try:
        calls = json.loads(answer) if isinstance(answer, str) else _without_nulls(answer)
        return canonical([_unwrapped(call) for call in calls])
    except (ValueError, TypeError) as error:
        raise ValueError(f'function_call: answer must be a list of {{"name", "arguments"}}: {error}') from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _triples(calls: Iterable[tuple]) -> Iterable[tuple]:
    return ((name, argument, value) for name, arguments in calls for argument, value in arguments)


def _f1(made: Iterable[Any], expected: Iterable[Any]) -> float:
    ours, theirs = Counter(made), Counter(expected)
    if not ours and not theirs:
        return 1.0
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())
