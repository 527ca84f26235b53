"""Schedulers: given evidence, the share of the next draw for each domain. One protocol, one file a method.

A scheduler is a frozen record of its settings with one pure method. Its memory is the `state` it returned last time,
so it can be saved, restored and replayed offline. Add your own without a patch: `scheduler: my_package.module:Mine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from polyphony.curricula.declarations import find_class, keys_at, nearest
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
    "d3": "polyphony.curricula.schedulers.d3:D3",
}


GONE = {
    "alarm": "it is .05 for good",
    "ceiling": "how far a domain may rise comes down with practice that brings no new best",
    "seed": "nothing is sampled any more",
    "window": "it goes by held-out scores, no longer by rewards and their slope, which pac still does",
}
"""What `adaptive` no longer has, and why."""
SECTION = ("scheduler", "transfer")
"""Keys of a recipe's section `curriculum` whatever the scheduler."""


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
    if name == "need":
        raise ValueError(f"scheduler 'need' is called 'adaptive' now; {GONE['ceiling']}")
    found = find_class("scheduler", REGISTRY, name)
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
        if isinstance(given, type) or not hasattr(given, "decide"):
            raise ValueError(f"curriculum: expected a scheduler, its name or a mapping of its settings, got {given!r}")
        return given
    mapping: Mapping[Any, Any] = {"scheduler": given} if isinstance(given, str) else given
    settings = {str(key): value for key, value in mapping.items()}
    name = settings.pop("scheduler", "auto")
    kind = find_scheduler(name)
    of_adaptive = settings if issubclass(kind, find_scheduler("adaptive")) else settings.get("adaptive")
    if isinstance(of_adaptive, Mapping):
        _check_adaptive(of_adaptive, has_transfer=settings.get("transfer") is not None)
    _check_keys(kind, name, settings, is_given="scheduler" in mapping)
    fields = getattr(kind, "__dataclass_fields__", {})
    told = {"entropy_band": entropy.band, "entropy_control": entropy.held("sampling", domains)}
    if set(told) <= set(fields):
        settings = told | settings
    elif "adaptive" in fields:  # `auto` hands these on
        inner = settings.get("adaptive", {})
        settings["adaptive"] = told | dict(inner) if isinstance(inner, Mapping) else inner
    elif entropy.asks_for_sampling:
        raise ValueError(f"scheduler {name!r} does not support `entropy.control: sampling`; adaptive and auto do")
    return build_scheduler(name, **settings)


def build_scheduler(name: str, /, **settings: Any) -> Scheduler:
    """Return a scheduler with its settings. Raises ValueError for a setting it does not have, or of another type."""
    kind = find_scheduler(name)
    try:
        return kind(**settings)
    except TypeError as error:  # of a user's own class
        raise ValueError(f"scheduler {name!r} refuses {settings}: {error}") from error


def _check_adaptive(settings: Mapping[str, Any], *, has_transfer: bool) -> None:
    for key, why in GONE.items():
        if key in settings:
            raise ValueError(f"adaptive has no {key!r} any more: {why}")
    if settings.get("strength") and not has_transfer:
        raise ValueError(
            f"strength: {settings['strength']}: weighs measured transfer: give `transfer`, or leave it out"
        )


def _check_keys(kind: type, name: str, settings: Mapping[str, Any], *, is_given: bool) -> None:
    """Refuse a key that the scheduler does not have: a misspelt one of its own or of the section, or another's."""
    if not hasattr(kind, "__pydantic_fields__"):  # a user's own class knows best
        return
    own = {*keys_at(kind, ()).values(), *SECTION} - {"entropy_band", "entropy_control"}
    for key in settings:
        if key not in own and key not in kind.__pydantic_fields__:
            of = [n for n in REGISTRY if n != name and key in find_scheduler(n).__pydantic_fields__]  # type: ignore[attr-defined]
            meant = f"it belongs to {', '.join(of)}" if of else nearest(key, own)
            assumed = "" if is_given else f" (`scheduler` is not given, so it is {name})"
            raise ValueError(f"{kind.__name__}: unknown key {key!r}; {meant}{assumed}")
