"""What a recipe or a script fills in: classes of settings that check their fields, and errors that name what was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import pkgutil
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from typing import Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass as checked
from pydantic.fields import FieldInfo

T = TypeVar("T")

MOST = 10**9
"""No number of a recipe is larger: what is, was meant otherwise, and overflows where it is multiplied."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, field))
def settings(kind: type[T]) -> type[T]:
    """Make a class of settings: a frozen dataclass that checks its fields, for recipes and scripts alike.

    Raises ValueError, in one line, for a name that it does not have and for a value of another type, out of its range,
    infinite or NaN; a number that has a range is no text, no truth value and at most `MOST`. What holds such a class takes a
    mapping of its fields as well.

    Example: `@settings class Guard: cap: float = Field(default=2.0, gt=0)`
    """
    for name, annotation in inspect.get_annotations(kind).items():
        if annotation in (bool, "bool") and isinstance(default := vars(kind).get(name), bool):
            setattr(kind, name, Field(default=default, strict=True))  # else "1" and 1 are true
    for given in vars(kind).values():
        if isinstance(given, FieldInfo) and given.metadata:
            given.metadata.append(Strict())
            bounds = {name for limit in given.metadata for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)}
            if bounds and not bounds & {"le", "lt"}:
                given.metadata.extend(Field(le=MOST).metadata)
    config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_by_name=True)
    made: Any = checked(frozen=True, kw_only=True, slots=True, config=config)(kind)
    init = made.__init__
    owner = next((name for name in ("name", "domain") if name in made.__pydantic_fields__), "")

    @functools.wraps(init)
    def __init__(self: Any, **given: Any) -> None:  # noqa: N807
        try:
            init(self, **given)
        except ValidationError as error:
            of = given.get(owner)
            what = problem(error.errors()[0], functools.partial(_meant_in, made))
            raise ValueError(f"{made.__name__}{'' if of is None else f' {of!r}'}: {what}") from error

    made.__init__ = __init__
    return made


def as_settings(kind: type[T], given: T | Mapping[str, Any] | None) -> T:
    """Return settings that may be given as a mapping of their fields, or not at all. Raises ValueError for anything else."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping | None):
        raise ValueError(f"{kind.__name__}: expected a mapping of its fields, got {shortened(given)}")
    return kind(**{str(name): value for name, value in (given or {}).items()})


def problem(error: Mapping[str, Any], meant: Callable[[Sequence[Any]], str]) -> str:
    """Return one of the errors of a ValidationError in one line: which field, what is allowed, what was given.

    `meant` returns, in words, which key was meant by one that does not exist, from its place.
    """
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in UNKNOWN:
        return f"unknown key {where!r}; {meant(error['loc'])}"
    if error["type"] == "missing":
        return f"{where}: required, but not given"
    given = getattr(error["input"], "kwargs", error["input"])  # of the class as a whole: what it was called with
    message = f"{error['msg'].removeprefix('Value error, ')}, got {shortened(given)}"
    if error["type"] == "literal_error" and isinstance(given, str):
        message += _after(near(given, re.findall(r"'([^']*)'", error["ctx"]["expected"])))
    return f"{where}: {message}" if where else message


UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""What pydantic calls a key that does not exist."""


def _after(meant: str) -> str:
    return f"; {meant}" if meant else ""


def _meant_in(kind: type, place: Sequence[Any]) -> str:
    return nearest(str(place[-1]), [name for names in keys_at(kind, place[:-1]).items() for name in names])


def shortened(given: Any, most: int = 200) -> str:
    """Return how something is written, in one line of bounded length."""
    text = " ".join(repr(given).split())
    return text if len(text) <= most else f"{text[:most]}.."


def keys_at(kind: Any, place: Sequence[Any]) -> dict[str, str]:
    """Return the fields of the settings at a place within settings, each with the name that a recipe has for it."""
    for part in place:
        annotation = kind.__pydantic_fields__[part].annotation if isinstance(kind, type) else get_args(kind)[1]
        of_dict = getattr(annotation, "__origin__", None) is dict
        kinds = (annotation, *get_args(annotation))
        kind = annotation if of_dict else next(k for k in kinds if hasattr(k, "__pydantic_fields__"))
    return {name: field.validation_alias or name for name, field in kind.__pydantic_fields__.items()}


def nearest(name: str, known: Collection[str]) -> str:
    """Return, in words, which of the names is meant by one that is not among them; all where none is near."""
    if not known:
        return "there are no keys here"
    if len(known) > MANY:
        return near(name, known) or "no key here is like it; launch/REFERENCE.md has them"
    return near(name, known) or f"known: {', '.join(sorted(set(known)))}"


def near(name: Any, known: Collection[str]) -> str:
    """Return, in words, which of the names is near to one that is not among them; nothing where none is."""
    meant = closest(name, known)
    return f"did you mean {meant!r}?" if meant is not None else ""


def closest(name: Any, known: Collection[str], *, at_least: float = 0.5) -> str | None:
    """Return which of the names is nearest to one that is not among them; None where none is as near as `at_least`."""
    text = str(name).lower().replace("-", "_")
    swapped = [one for one in known if sorted(one) == sorted(text)]
    return next(iter(swapped or difflib.get_close_matches(text, known, n=1, cutoff=at_least)), None)


MANY = 40
"""More names than a person reads in one line."""


def unknown(what: str, name: Any, known: Collection[str], path: str) -> ValueError:
    """Return the error for a name that a registry does not have; `path` is the form of an import path, taken as well."""
    near_by = f"{meant} " if (meant := near(name, known)) else ""
    return ValueError(f"{what} {shortened(name)} does not exist; {near_by}known: {', '.join(known)}, or {path}")


def find_class(what: str, registry: Mapping[str, str], name: Any) -> Any:
    """Return the class of a registry name or of an import path `pkg.module:Class`; ValueError lists the known names."""
    path = registry.get(name, name) if isinstance(name, str) else ""
    if ":" not in path:
        raise unknown(what, name, registry, "pkg.module:Class")
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(f"{what} {name!r} cannot be imported: {error}") from error
