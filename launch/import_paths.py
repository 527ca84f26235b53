"""Import paths in recipes (`pkg.module:Name`): where a user's own modules are found, and what ours were once called."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

MOVED = {
    "curricula.learnability": "polyphony.curricula.prompts.estimate",
    "curricula.schedulers.joint": "polyphony.curricula.schedulers.fixed",
    "curricula.schedulers.proportional": "polyphony.curricula.schedulers.fixed",
    "curricula.schedulers.sequential": "polyphony.curricula.schedulers.fixed",
    "rewards.choices": "polyphony.rewards.multiple_choice",
    "rewards.exact": "polyphony.rewards.short_answer",
}
"""Module of an older version, as its recipes name it, to today's. A module that is not here only gained `polyphony.`."""

PROVENANCE_FILE = "provenance.json"
"""Of a run folder; its `imports_from` lists the folders where the run found modules of the user's."""

_looked_in: list[str] = []
_OLD = re.compile(r"((?:trainer|rewards|curricula|launch)(?:\.\w+)+):(\w+)")
_HOME = Path(__file__).resolve().parent.parent


def look_in(folder: Path) -> None:
    """Let modules of `folder` be imported, after all others: no file of a user's stands in for a module of ours.

    A run's folder holds a copy of a recipe; what is imported still lies where the first one was.
    """
    places = [str(folder)]
    if (folder / PROVENANCE_FILE).is_file():
        places = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8")).get("imports_from", [])
    for place in places:
        if place not in sys.path:
            sys.path.append(place)
        if place not in _looked_in:
            _looked_in.append(place)


def looked_in() -> list[str]:
    """Return the folders that `look_in` added, in order."""
    return list(_looked_in)


def renamed(value: Any) -> Any:
    """Return a recipe, or a part of one, with import paths of older versions replaced, each with a warning.

    A package of the user's that bears the name of one of our folders keeps it.
    """
    if isinstance(value, dict):
        return {key: renamed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [renamed(part) for part in value]
    if not isinstance(value, str) or not (old := _OLD.fullmatch(value)) or _is_a_users(value.partition(".")[0]):
        return value
    new = f"{MOVED.get(old[1], f'polyphony.{old[1]}')}:{old[2]}"
    warnings.warn(f"{value!r} is now called {new!r}", UserWarning, stacklevel=2)
    return new


def _is_a_users(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    places = [spec.origin] if spec and spec.origin else list(spec.submodule_search_locations or ()) if spec else []
    return any(_HOME not in Path(place).resolve().parents for place in places)
