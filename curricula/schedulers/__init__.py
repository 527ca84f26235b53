"""Schedulers: given evidence, the share of the next draw for each domain. One protocol, one file a method.

A scheduler is a frozen record of its settings with one pure method. Its memory is the `state` it returned last time,
so it can be saved, restored and replayed offline. Add your own without a patch: `scheduler: my_package.module:Mine`.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.records import Decision, Evidence

REGISTRY = {
    "auto": "polyphony.curricula.schedulers.auto:Auto",
    "joint": "polyphony.curricula.schedulers.fixed:Joint",
    "proportional": "polyphony.curricula.schedulers.fixed:Proportional",
    "sequential": "polyphony.curricula.schedulers.fixed:Sequential",
    "bwt": "polyphony.curricula.schedulers.bwt:Bwt",
    "adaptive": "polyphony.curricula.schedulers.adaptive:Adaptive",
    "sec": "polyphony.curricula.schedulers.sec:SEC",
    "pac": "polyphony.curricula.schedulers.pac:PAC",
    "mt_grpo": "polyphony.curricula.schedulers.mt_grpo:MTGRPO",
    "dump": "polyphony.curricula.schedulers.dump:DUMP",
    "e2h": "polyphony.curricula.schedulers.e2h:E2H",
    "visatb": "polyphony.curricula.schedulers.visatb:VisATB",
}


class Scheduler(Protocol):
    """Decide the mixture of the next draw.

    One that plans stages may have `reviews(evidence, state)` too: what it expected of them and what was measured, asked
    for when the run is over.
    """

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        """Return mixture, reason and next state. Pure: same evidence and state, same decision. `state` starts as {}."""
        ...


def find_scheduler(name: str) -> type:
    """Return the scheduler class of a registry name or of an import path `pkg.module:Class`.

    Raises ValueError that lists the known names.
    """
    path = REGISTRY.get(name, name)
    if ":" not in path:
        raise ValueError(f"scheduler {name!r} does not exist; known: {', '.join(REGISTRY)}, or pkg.module:Class")
    try:
        found: Any = pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"scheduler {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and hasattr(found, "decide")):
        raise ValueError(f"scheduler {name!r}: expected a class with a method `decide`, got {found!r:.60}")
    return found


def as_scheduler(
    given: str | Mapping[str, Any] | Scheduler, *, entropy: EntropySettings, domains: Sequence[str]
) -> Scheduler:
    """Return the scheduler that is meant: one as it is, by its name, or a mapping of `scheduler` and its settings.

    One that can move entropy is told which of the `domains` it holds, and in which band.
    """
    if not isinstance(given, str | Mapping):
        return given
    settings: dict[str, Any] = {"scheduler": given} if isinstance(given, str) else dict(given)
    name = settings.pop("scheduler", "auto")
    fields = getattr(find_scheduler(name), "__dataclass_fields__", {})
    told = {"entropy_band": entropy.band, "entropy_control": entropy.held("sampling", domains)}
    if set(told) <= set(fields):
        settings = told | settings
    elif "adaptive" in fields:  # `auto` hands these on
        settings["adaptive"] = told | settings.get("adaptive", {})
    elif entropy.asks_for_sampling:
        raise ValueError(f"scheduler {name!r} does not support `entropy.control: sampling`; adaptive and auto do")
    return build_scheduler(name, **settings)


def build_scheduler(name: str, **settings: Any) -> Scheduler:
    """Return a scheduler with its settings. Raises ValueError for a setting it does not have, and lists its own."""
    kind = find_scheduler(name)
    allowed = list(inspect.signature(kind).parameters)
    if unknown := set(settings) - set(allowed):
        raise ValueError(f"scheduler {name!r} has no setting {sorted(unknown)}; it has {allowed or 'none'}")
    return kind(**settings)
