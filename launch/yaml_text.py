"""YAML that a stranger wrote: read as data alone, refused where it is broken, endless or huge."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

PAIR = re.compile(r"(?<!\\)\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}", re.IGNORECASE)
"""One character as JSON escapes it, in two halves; YAML would read two."""
DEEPEST, LARGEST = 50, 100_000
"""Levels and values of a recipe: beyond them something is wrong with it."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a file of YAML 1.2. Raises ValueError, which names the file and what is wrong."""
    try:
        text = PAIR.sub(lambda found: json.loads(f'"{found[0]}"'), path.read_text(encoding="utf-8"))
        document = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{path}:{mark.line + 1 if mark else '?'}: {error.problem or error.context}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    check_size(document, str(path))
    if not isinstance(document, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values")
    return document


def check_size(document: Any, where: str) -> None:
    """Refuse what aliases make endless or huge, before anybody walks through it or writes it out."""
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        if depth > DEEPEST:
            raise ValueError(f"{where}: nested more than {DEEPEST} deep, or an alias (*) that holds itself")
        if isinstance(value, str) and not value.isascii():
            _check_whole(value, where)
        held = (
            [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list | set) else ()
        )
        if id(value) not in sizes:
            sizes[id(value)] = 1 + sum(size(part, depth + 1) for part in held)
        return sizes[id(value)]

    if size(document, 0) > LARGEST:
        raise ValueError(f"{where}: more than {LARGEST:,} values, with what its aliases (*) repeat")


def _check_whole(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a character (a lone surrogate) in {text!r:.200}") from error


def read_value(text: str, where: str) -> Any:
    """Return the value of an override; `where` names it in errors. Raises ValueError for what is no YAML, or too much."""
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError) as error:
        raise ValueError(f"{where}: the value is not valid YAML") from error
    check_size(value, where)
    return value
