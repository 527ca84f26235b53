"""Import paths in recipes (`pkg.module:Name`): where a user's own modules are found, and what ours were once called."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
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

_looked_in: list[str] = []
_last: list[str] = []
"""The working directory, once it is looked in."""
_OLD = re.compile(r"((?:trainer|rewards|curricula|launch)(?:\.\w+)+):(\w+)")


def look_in(folder: Path) -> None:
    """Let modules of `folder` be imported, after all others: no file of a user's stands in for a module of ours.

    Only the working directory comes later (`look_in_working_directory`): a recipe's own modules are the nearer ones. A run's
    folder holds a copy of a recipe; what is imported still lies where the first one was.
    """
    for place in _origins(folder) or [str(folder)]:
        if place not in sys.path:
            sys.path.insert(sys.path.index(_last[0]) if _last and _last[0] in sys.path else len(sys.path), place)
        if place not in _looked_in:
            _looked_in.append(place)


def look_in_working_directory() -> None:
    """Let modules of the working directory be imported, last of all: an installed command does not look there."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    _last[:] = [here]


def _origins(folder: Path) -> list[str]:
    """Return where a run imported from, by its folder; empty for any other folder."""
    from polyphony.trainer.run.folder import RunFolder  # slow to import

    path = RunFolder(folder).provenance
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        found = None
    return [str(place) for place in found.get("imports_from", [])] if isinstance(found, dict) else []


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
    if not isinstance(value, str) or not (old := _OLD.fullmatch(value)) or _is_a_users(old[1]):
        return value
    new = f"{MOVED.get(old[1], f'polyphony.{old[1]}')}:{old[2]}"
    try:
        pkgutil.resolve_name(new)
    except (ImportError, AttributeError):
        return value  # whoever looks for it says what is missing
    warnings.warn(f"{value!r} is now called {new!r}", UserWarning, stacklevel=2)
    return new


def _is_a_users(module: str) -> bool:
    """Whether a package of the user's has this module; nothing of theirs is imported to find out."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    for place in map(Path, (spec and spec.submodule_search_locations) or ()):
        is_a_clone = (place.parent / "curricula" / "records.py").is_file()  # of ours, whatever its version
        inside = place / rest.replace(".", "/")
        if not is_a_clone and (inside.is_dir() or inside.with_suffix(".py").is_file()):
            return True
    return False
