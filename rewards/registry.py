"""Find a reward by registry name, by import path, or take a callable as it is."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

Reward = Callable[..., Any]
"""TRL's reward callable: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async."""

REGISTRY = {
    "code": "rewards.code:Code",
    "exact": "rewards.exact:Exact",
    "format": "rewards.shaping:Format",
    "function_call": "rewards.function_call:FunctionCall",
    "language": "rewards.shaping:Language",
    "length": "rewards.shaping:Length",
    "math": "rewards.math:Math",
    "multiple_choice": "rewards.choices:MultipleChoice",
    "repetition": "rewards.shaping:Repetition",
    "short_answer": "rewards.short_answer:ShortAnswer",
    "verl": "rewards.verl:Verl",
    "weighted": "rewards.shaping:Weighted",
}
"""Registry name to `module:Class`; a class is built with the recipe's arguments, a function takes none."""


def find_reward(spec: str | Mapping[str, Any] | Reward) -> Reward:
    """Return the reward of a name, of `pkg.module:name`, of `{name: .., **arguments}`, or the callable itself.

    Raises ValueError that names the reward and, for an unknown one, lists those that exist.
    """
    if callable(spec):
        return spec
    name, arguments = (
        (spec, {}) if isinstance(spec, str) else (spec["name"], {k: v for k, v in spec.items() if k != "name"})
    )
    path = REGISTRY.get(name, name)
    if ":" not in path:
        raise ValueError(f"reward {name!r} does not exist; known: {', '.join(sorted(REGISTRY))}, or pkg.module:name")
    try:
        found: Any = pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    if isinstance(found, type):
        try:
            return found(**arguments)
        except TypeError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
    if arguments:
        raise ValueError(f"reward {name!r} is a function and takes no arguments, got {sorted(arguments)}")
    return found
