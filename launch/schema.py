"""The JSON Schema of a recipe, for editors: keys, ranges, and the meaning that stands under each field in the code."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

from polyphony.launch.grpo_fields import GRPO_KINDS, OURS
from polyphony.launch.recipe import KEY, Recipe

PLAIN = {"a whole number": "integer", "a finite number": "number", "true or false": "boolean", "text": "string"}
"""JSON's name of what a field of TRL's takes; any other kind is left open."""


def schema() -> dict[str, Any]:
    """Return it. It is wider than the check of a recipe, which knows what goes together."""
    found = Recipe.model_json_schema()
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for kind in _kinds(Recipe):
        described = found if kind is Recipe else found["$defs"][kind.__name__]
        said = meanings(kind)
        for name, field in kind.__pydantic_fields__.items():
            told = described["properties"].get(str(field.validation_alias or name), {})
            told.pop("title", None)
            if name in said:
                told["description"] = said[name]
    for path, named in KEY.items():
        own = found["$defs"][found["properties"][path]["additionalProperties"]["$ref"].rpartition("/")[2]]
        own["properties"].pop(named)
        own["required"] = [key for key in own.get("required", ()) if key not in (named, "reward")]
    fields = {name: _of_trl(*kind) for name, kind in sorted(GRPO_KINDS.items()) if name not in OURS}
    found["properties"]["grpo"] |= {"properties": fields, "additionalProperties": False}
    return found


def meanings(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a class and of those that it builds on, each in one line."""
    found: dict[str, str] = {}
    for owner in reversed([k for k in kind.__mro__ if k.__module__.startswith("polyphony")]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value).split())
    return found


def classes_in(annotation: Any) -> list[type]:
    """Return the classes of settings that a field of this type holds, alone, by name or beside null."""
    parts = [annotation, *get_args(annotation)]
    return [part for part in parts if isinstance(part, type) and hasattr(part, "__pydantic_fields__")]


def _kinds(kind: Any) -> Iterator[Any]:
    yield kind
    for field in kind.__pydantic_fields__.values():
        for inner in classes_in(field.annotation):
            yield from _kinds(inner)


def _of_trl(kind: str | None, may_be_null: bool) -> dict[str, Any]:
    plain = PLAIN.get(kind or "")
    return {} if plain is None else {"type": [plain, "null"] if may_be_null else plain}
