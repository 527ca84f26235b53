"""`function_call`: the calls a completion makes against those it should make; `tool_calls` reads them.

Single, parallel, nested and chained calls (the sub-skills of Granite-20B-FunctionCalling, arXiv:2407.00121). A chained
call names an earlier one by its label (`"$var_1.result$"`); that name is replaced by the call it stands for, so labels
are free and independent calls may come in any order.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from jsonschema import Draft202012Validator, SchemaError

from polyphony.rewards.answers import answer_region, completion_text
from polyphony.rewards.registry import refusal
from polyphony.rewards.tool_calls import MAX_DEPTH, Untyped, calls_in, calls_of, unwrapped_all

logger = logging.getLogger(__name__)

_REFERENCE = re.compile(r"\$([\w]+)((?:\.\w+)*)\$")
_FOLDED = re.compile(r"[ ,./\-_*^]")
"""What BFCL drops from texts before it compares them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedArgument:
    """What one argument of a reference's call may be."""

    allows: Callable[[tuple], bool]
    """Says whether a canonical value is right."""
    is_optional: bool = False


WantedCall = tuple[str, Mapping[str, WantedArgument]]
"""A function's name and its arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallScores:
    """How near a list of calls is to the one asked for; each in [0, 1]."""

    name_f1: float
    """F1 of the called functions' names, counted with repetition."""
    argument_f1: float
    """F1 of the (function, argument, value) triples; where neither side has any, that of the names."""
    full_match: float
    """1 where the calls are the same, in any order that their references allow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionCall:
    """Score the completion's calls against the row's `answer`: a list of calls, or its JSON (`reference_calls`).

    An empty list asks for a reply without a call. None where the reference can not be read: the grader does not know.
    """

    version: ClassVar[int] = 2
    metric: Literal["full_match", "name_f1", "argument_f1"] = "full_match"

    def __post_init__(self) -> None:
        if self.metric not in CallScores.__slots__:
            raise ValueError(f"function_call: metric is one of {', '.join(CallScores.__slots__)}, got {self.metric!r}")

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, *, answer: list, **columns: Any
    ) -> list[float | None]:
        return [self._score(c, a) for c, a in zip(completions, answer, strict=True)]

    def is_valid(self, text: str) -> bool:
        """Say whether every call of a text can be read."""
        try:
            canonical(calls_of(text))
        except (ValueError, RecursionError):
            return False
        return True

    def unreadable(self, answer: Any = None, **columns: Any) -> str | None:
        """Return why a row's reference can not be read; None where it can."""
        return refusal(reference_calls, answer)

    def reads(self, completion: Any, prompt: Any = None, /, **columns: Any) -> tuple[str, ...] | None:
        """Return the calls of a completion, whatever their order; None where one can not be read, or there is no text."""
        try:
            made = canonical(calls_of(completion))
        except (ValueError, RecursionError):
            return None
        return tuple(sorted(map(repr, made))) if made or completion_text(completion).strip() else None

    def _score(self, completion: Any, answer: Any) -> float | None:
        try:
            expected = reference_calls(answer)
        except ValueError as error:
            logger.warning("%s", error)
            return None
        try:
            made = canonical(calls_of(completion))
        except (ValueError, RecursionError):
            return 0.0
        if not made and not answer_region(completion):
            return 0.0  # nothing was said, or nothing but a thought
        return getattr(compare(made, expected), self.metric)


def compare(made: Sequence[tuple], expected: Sequence[WantedCall]) -> CallScores:
    """Compare canonical calls with those wanted. An optional argument that was left out counts on neither side."""
    names = _f1(
        (Counter(name for name, _ in made) & Counter(name for name, _ in expected)).total(), len(made), len(expected)
    )
    given = [(name, *argument) for name, arguments in made for argument in arguments]
    required, optional = (
        [(name, argument, w) for name, wanted in expected for argument, w in wanted.items() if w.is_optional is kind]
        for kind in (False, True)
    )
    shared = _pairs(given, [*required, *optional], _is_wanted_argument)
    counted = len(required) + shared - _pairs(given, required, _is_wanted_argument)
    return CallScores(
        name_f1=names,
        argument_f1=_f1(shared, len(given), counted) if given or required else names,
        full_match=float(len(made) == len(expected) == _pairs(made, expected, _is_wanted_call)),
    )


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if ours or theirs else 1.0


def _pairs(made: Sequence[tuple], wanted: Sequence[tuple], fits: Callable[[tuple, tuple], bool]) -> int:
    """Return to how many of `wanted` one of `made` of its own can be given (augmenting paths)."""
    taken: dict[int, int] = {}

    def place(w: int, seen: set[int]) -> bool:
        for m in range(len(made)):
            if m not in seen and fits(made[m], wanted[w]):
                seen.add(m)
                if m not in taken or place(taken[m], seen):
                    taken[m] = w
                    return True
        return False

    return sum(place(w, set()) for w in range(len(wanted)))


def _is_wanted_argument(made: tuple, wanted: tuple) -> bool:
    return made[:2] == wanted[:2] and wanted[2].allows(made[2])


def _is_wanted_call(made: tuple, wanted: tuple) -> bool:
    return made[0] == wanted[0] and _are_wanted(dict(made[1]), wanted[1])


def _are_wanted(made: Mapping[str, tuple], wanted: Mapping[str, WantedArgument]) -> bool:
    return made.keys() <= wanted.keys() and all(
        w.allows(made[name]) if name in made else w.is_optional for name, w in wanted.items()
    )


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
    if isinstance(value, Untyped):
        return "untyped", str(value)
    if isinstance(value, str) and (reference := _REFERENCE.fullmatch(value)):
        if reference[1] not in known:
            raise ValueError(f"{value!r} names no earlier call")
        return "call", repr(known[reference[1]]) + reference[2]
    if isinstance(value, bool) or value is None:
        return "constant", str(value)
    if isinstance(value, float) and value.is_integer():
        return "number", str(int(value))
    return ("number" if isinstance(value, int | float) else "text"), str(value)


def reference_calls(answer: Any) -> list[WantedCall]:
    """Return what a row's reference wants. Raises ValueError where it can not be read.

    Calls as `tool_calls` reads them (xLAM's JSON text, ToolRL's `<tool_call>` lines, any key for the arguments) are
    compared by type and exactly; 1 and 1.0 are the same number. BFCL's possible answers, `{"f": {"city": ["Paris",
    "Paris, France"], "unit": ["", "C"]}}`, list what is right for each argument; an empty text among it allows to leave
    the argument out, and texts are compared without case and most punctuation. `{"name": "f", "schema": {..}}` takes
    the arguments that satisfy a JSON Schema. What is null or NaN is no argument, but in JSON text: tables fill absent
    fields with it.
    """
    try:
        items = _items(answer)
        if all(_is_possible_answer(item) for item in items):
            return [(name, _possible(wanted)) for item in items for name, wanted in item.items()]
        if all(isinstance(item.get("name"), str) and "schema" in item for item in items):
            return [(item["name"], _by_schema(item["schema"])) for item in items]
        calls = canonical([call for item in items for call in unwrapped_all(item)])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SchemaError) as error:
        raise ValueError(
            f'function_call: answer must be a list of {{"name", "arguments"}}, got {answer!r:.200}: {error}'
        ) from None
    return [
        (name, {argument: WantedArgument(allows=partial(_is_same, value)) for argument, value in arguments})
        for name, arguments in calls
    ]


def _items(answer: Any) -> list[dict[str, Any]]:
    """Return the reference's calls one by one: of a text, of one call, or of a list of these."""
    if isinstance(answer, str):
        return _items_of_text(answer)
    if not isinstance(answer, dict | list | tuple):
        raise ValueError("neither calls nor text")
    parts = [answer] if isinstance(answer, dict) else answer
    items = [call for part in parts for call in (_items(part) if isinstance(part, str) else [_without_nulls(part)])]
    if not all(isinstance(item, dict) and item for item in items):
        raise ValueError("one of the calls is none")
    return items


def _items_of_text(text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        calls = calls_in(answer_region(text))
        if not calls and "<response>" not in text:  # ToolRL's way to ask for words
            raise ValueError("a text without calls") from None
        return calls
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) and item for item in items):
        raise ValueError("one of the calls is none")
    return items


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None and item == item}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _is_possible_answer(item: Any) -> bool:
    (wanted, *more) = item.values()
    return not more and isinstance(wanted, dict) and all(isinstance(v, list) and v for v in wanted.values())


def _possible(wanted: Mapping[str, list]) -> dict[str, WantedArgument]:
    return {
        name: WantedArgument(allows=partial(_is_possible, values), is_optional="" in values)
        for name, values in wanted.items()
    }


def _is_possible(values: list, value: tuple) -> bool:
    return any(_is_alternative(alternative, read) for alternative in values for read in _readings(value))


def _is_alternative(alternative: Any, value: tuple) -> bool:
    """Say whether a value is one of BFCL's alternatives; in an object these list what is right for each key."""
    kind, content = value
    if kind == "object" and isinstance(alternative, dict):
        return _are_wanted(
            dict(content), _possible({k: v if isinstance(v, list) else [v] for k, v in alternative.items()})
        )
    if kind == "array" and isinstance(alternative, list):
        return len(content) == len(alternative) and all(map(_is_alternative, alternative, content))
    return _folded(value) == _folded(_frozen(alternative, {}, 0))


def _folded(value: tuple) -> tuple:
    return (value[0], _FOLDED.sub("", value[1]).lower().replace("'", '"')) if value[0] == "text" else value


def _is_same(reference: tuple, value: tuple) -> bool:
    return not set(_readings(reference)).isdisjoint(_readings(value))


def _readings(value: tuple) -> list[tuple]:
    """Return a value, or what an untyped one may be: text, or the JSON that it spells."""
    if value[0] != "untyped":
        return [value]
    readings = [("text", value[1])]
    for text in (value[1], value[1].lower()):  # True is Python's
        try:
            return [*readings, _frozen(json.loads(text), {}, 0)]
        except (ValueError, RecursionError):
            continue
    return readings


_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "int": "integer", "str": "string"}
"""BFCL's and Python's names for JSON Schema's types."""


def _by_schema(schema: Any) -> dict[str, WantedArgument]:
    """Return the arguments of a JSON Schema's properties; one that it does not name is wrong."""
    schema = _standard(schema)
    Draft202012Validator.check_schema(schema)
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return {
        name: WantedArgument(
            allows=partial(_satisfies, Draft202012Validator({**shared, **wanted})),
            is_optional=name not in schema.get("required", ()),
        )
        for name, wanted in schema["properties"].items()
    }


def _standard(schema: Any) -> Any:
    if isinstance(schema, dict):
        if not str(schema.get("$ref", "#")).startswith("#"):
            raise ValueError(f"a schema that stands elsewhere: {schema['$ref']!r}")
        named = {k: _TYPES.get(v, v) if k == "type" and isinstance(v, str) else v for k, v in schema.items()}
        return {k: _standard(v) for k, v in named.items() if (k, v) != ("type", "any")}
    return [_standard(item) for item in schema] if isinstance(schema, list) else schema


def _satisfies(validator: Draft202012Validator, value: tuple) -> bool:
    return any(validator.is_valid(_thawed(read)) for read in _readings(value))


def _thawed(value: tuple) -> Any:
    """Return what `_frozen` froze."""
    kind, content = value
    if kind == "object":
        return {key: _thawed(item) for key, item in content}
    if kind == "array":
        return [_thawed(item) for item in content]
    if kind == "constant":
        return {"True": True, "False": False}.get(content)
    return (
        float(content)
        if kind == "number" and not content.lstrip("-").isdigit()
        else (int(content) if kind == "number" else content)
    )
