"""Reading past mistakes: all that is wrong with a recipe is found at once, each key's value as that which was meant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from polyphony.curricula.declarations import UNKNOWN, closest, keys_at, problem

Model = TypeVar("Model", bound=BaseModel)
Meant = Callable[[Sequence[Any]], str]
UNSAID = "?"
"""The model of a recipe that names none that can be looked for."""
STAND_INS = {"name": "unsaid", "model": UNSAID, "kind": "structured"}
"""What stands for a key that a recipe, or its domain, must have, while the rest is checked."""
SURELY_MEANT = 0.75
"""How near a misspelt key is to the one whose value it is checked as."""


def valid_part(kind: type[Model], document: dict[str, Any], meant: Meant) -> tuple[Model | None, list[str]]:
    """Return the recipe of what is valid, None where too little is, and a line for each key that is not.

    `kind` is the recipe's class, `meant` says which key was meant by one that does not exist.
    """
    found: dict[tuple[Any, ...], str] = {}
    while True:
        try:
            return kind.model_validate(document, by_alias=True, by_name=False), list(found.values())
        except ValidationError as error:
            errors = error.errors()
        misspelt = {each["loc"]: (right, each) for each in errors if (right := _misspelt(kind, document, each))}
        found |= {place: problem(each, meant) for place, (_, each) in misspelt.items()}
        if misspelt:  # without them what they stand for is missing
            for place, (right, _) in misspelt.items():
                document = _renamed(document, place, right)
            continue
        wrong = {_place_of(document, each): each for each in reversed(errors)}
        for place, each in reversed(wrong.items()):
            if each["loc"] not in found:  # else it is missing because it was taken out
                found.setdefault(place, problem(each, meant))
        if () in wrong:
            return None, list(found.values())
        for place in sorted(wrong, key=lambda place: _stand_in(place) is None):  # what stands in first: a domain may go
            stand_in = _stand_in(place)
            document = _without(document, place) if stand_in is None else _with(document, place, stand_in)
        if any(place[0] == "domains" and len(place) == 2 for place in wrong):  # who names it is not at fault
            document = {k: v for k, v in document.items() if k not in ("curriculum", "guardrails", "entropy")}
        if not document.get("domains"):
            return None, list(found.values())


def _stand_in(place: Sequence[Any]) -> str | None:
    is_required = len(place) == 1 or (place[0] == "domains" and len(place) == 3)
    return STAND_INS.get(place[-1]) if is_required else None


def _place_of(document: Any, error: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the place of an error: of a key that something can stand for, else as far as the document has it."""
    return error["loc"] if error["loc"] and _stand_in(error["loc"]) else _within(document, error)


def _misspelt(kind: type[BaseModel], document: Any, error: Mapping[str, Any]) -> str | None:
    """Return the key whose place a misspelt one at the top, or of a domain, surely stands in."""
    *parents, name = error["loc"] or [""]
    if error["type"] not in UNKNOWN or (parents and (parents[0] != "domains" or len(parents) != 2)):
        return None
    section = functools.reduce(lambda found, part: found[part], parents, document)
    known = [key for key in keys_at(kind, parents).values() if key not in section]
    return closest(name, known, at_least=SURELY_MEANT)


def _renamed(document: dict[str, Any], place: Sequence[Any], meant: str) -> dict[str, Any]:
    """Return a document whose key at a place is called as it was meant."""
    *parents, name = place
    section = functools.reduce(lambda found, part: found[part], parents, document)
    return _with(_without(document, place), [*parents, meant], section[name])


def _with(document: dict[str, Any], place: Sequence[Any], value: Any) -> dict[str, Any]:
    """Return a document that has a value at a place."""
    first, *rest = place
    return {**document, first: _with(document[first], rest, value) if rest else value}


def _within(document: Any, error: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the place of an error as far as the document has it."""
    place: list[Any] = []
    for part in error["loc"]:
        if not isinstance(document, Mapping) or part not in document:
            break
        place.append(part)
        document = document[part]
    return tuple(place)


def _without(document: dict[str, Any], place: Sequence[Any]) -> dict[str, Any]:
    """Return a document without what stands at a place."""
    first, *rest = place
    if not rest:
        return {key: value for key, value in document.items() if key != first}
    return {key: _without(value, rest) if key == first else value for key, value in document.items()}
