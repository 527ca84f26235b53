"""Find a reward, or another exchangeable part, by registry name or by import path, or take an object as it is.

`settled` gets the result of one that may be asynchronous, wherever the caller stands.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import math
import os
import pkgutil
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

Reward = Callable[..., Any]
"""TRL's reward callable: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async.

One that mostly waits, for a judge or for processes, says so by an attribute `is_slow = True`: the trainer then calls it
while the engine still generates, with the completions that are finished, and never twice at a time. One that says by a
method `unreadable(**columns)` why it cannot read a row's reference (None: it can) is asked when rows are loaded, and so is
one that says by `remark(**columns)` with which reservation it grades a row. One that cannot grade on this machine
says so by a ValueError from `check_host()`, before the first row. One whose rules change counts its attribute `version`
up: scores before and after are not comparable.

One whose signature takes `log_metric` gets TRL's hook, and logs by it: `log_metric(name, value)` is averaged by domain over
all calls between two logs. See `tell` for what our own graders say of each completion. `log_extra(column, values)` adds a
column to TRL's table of training completions (`log_completions`), `trainer_state` is Transformers' (None outside a run),
`id` and `domain` name each row.

One that grades an answer it finds in the text may have a method `reads(completion, prompt, /, **columns)` that returns it,
hashable and equal where the reward would not tell two answers apart, None where it finds none: held-out votes are about
that. Without it they are about `answer_signature`.
"""

HOOKS = ("log_metric", "log_extra", "trainer_state")
"""What TRL hands to every reward beside the columns, and we to those whose signature takes it."""
OFFERED = (*HOOKS, "id", "domain", "environments")
"""With what else a signature may take: the names of each row, and where the policy acted the instances it acted in."""


REGISTRY = {
    "code": "polyphony.rewards.code:Code",
    "exact": "polyphony.rewards.short_answer:Exact",
    "format": "polyphony.rewards.shaping:Format",
    "function_call": "polyphony.rewards.function_call:FunctionCall",
    "judge": "polyphony.rewards.judge:Judge",
    "language": "polyphony.rewards.shaping:Language",
    "length": "polyphony.rewards.shaping:Length",
    "math": "polyphony.rewards.math:Math",
    "multiple_choice": "polyphony.rewards.multiple_choice:MultipleChoice",
    "procedural": "polyphony.rewards.procedural:Procedural",
    "repetition": "polyphony.rewards.shaping:Repetition",
    "short_answer": "polyphony.rewards.short_answer:ShortAnswer",
    "verl": "polyphony.rewards.verl:Verl",
    "weighted": "polyphony.rewards.shaping:Weighted",
}
"""Registry name to `module:Class`; a class is built with the recipe's arguments, a function takes none."""


class GraderGoneError(RuntimeError):
    """What a reward asks has been out of reach for too long, or fails for too many: the run ends, to be resumed."""


def find_reward(spec: str | Mapping[str, Any] | Sequence[Any] | Reward) -> Reward:
    """Return the reward of a name, of `pkg.module:name`, of `{name: .., **arguments}`, the callable itself, or the weighted
    sum of a list of them (`composed`).

    Raises ValueError that names the reward and, for an unknown one, lists those that exist.
    """
    one: Any = composed(spec) if isinstance(spec, list | tuple) else spec
    range_of(one)
    if isinstance(one, Mapping):
        one = {name: value for name, value in one.items() if name != "range"}
    reward = find("reward", REGISTRY, one, also=("range",))
    if not callable(reward):
        raise ValueError(f"reward {spec!r} is no function and has no __call__, it is {reward!r:.60}")
    return reward


def composed(rewards: Sequence[Any]) -> dict[str, Any]:
    """Return the `weighted` mapping that a list of rewards stands for, each with a key `weight` beside its own (1 without).

    A part is called as its reward, or as the last part of its import path; a second of that name gets a number. Raises
    ValueError that names the place in the list.

    Example: `composed(["math", {"name": "repetition", "weight": 0.1}])["parts"]["repetition"]["weight"]` is 0.1.
    """
    if not rewards:
        raise ValueError("expected at least one reward in the list")
    if faults := [fault for place, one in enumerate(rewards) for fault in _faults_of_part(place, one)]:
        raise ValueError("; ".join(faults))
    parts: dict[str, dict[str, Any]] = {}
    for one in rewards:
        weight = one.get("weight", 1.0) if isinstance(one, Mapping) else 1.0
        reward = {k: v for k, v in one.items() if k != "weight"} if isinstance(one, Mapping) else one
        stem = called(reward)
        names = (stem, *(f"{stem}-{n}" for n in range(2, len(rewards) + 2)))
        parts[next(name for name in names if name not in parts)] = {"reward": reward, "weight": float(weight)}
    return {"name": "weighted", "parts": parts}


def _faults_of_part(place: int, one: Any) -> list[str]:
    """Return what is wrong with a reward of a list, by its place; what its arguments are is seen when it is made."""
    found = []
    weight = one.get("weight", 1.0) if isinstance(one, Mapping) else 1.0
    if isinstance(weight, bool | str) or not isinstance(weight, int | float) or not math.isfinite(weight):
        found.append(f"{place}.weight: {weight!r:.200} is no finite number")
    if why := refusal(named, one):
        found.append(f"{place}: {why}, {one!r:.200} is none")
    elif why := _unknown_name("reward", one.get("name") if isinstance(one, Mapping) else one, REGISTRY):
        found.append(f"{place}: {why}")
    return found


def called(reward: Any) -> str:
    """Return what a reward is called in metrics: its name, the last part of its path, or the name of what it is."""
    name = reward.get("name") if isinstance(reward, Mapping) else reward
    if not isinstance(name, str):
        name = getattr(getattr(reward, "func", reward), "__name__", type(reward).__name__)  # of a partial what it calls
    return re.sub(r"\W+", "_", name.rpartition(":")[2]).strip("_") or "reward"


def range_of(spec: str | Mapping[str, Any] | Reward) -> tuple[float, float]:
    """Return the lowest and the highest reward, as declared by a key `range` or an object's attribute; 0 and 1 without.

    Raises ValueError for anything but two rising numbers.
    """
    given = spec.get("range") if isinstance(spec, Mapping) else getattr(spec, "range", None)
    if given is None:
        return 0.0, 1.0
    try:
        low, high = (float(bound) for bound in given)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"range: expected [lowest, highest], two finite numbers, got {given!r}")
    return low, high


def declared_range(spec: Any, reward: Reward) -> tuple[float, float]:
    """Return the range that a domain's key says, or else that of the reward which was found for it."""
    return range_of(spec if isinstance(spec, Mapping) and "range" in spec else reward)


def as_score(spec: str | Mapping[str, Any] | Reward, reward: float | None) -> float | None:
    """Return where in its declared range a reward lies, from 0 at the low end to 1 at the high one."""
    low, high = range_of(spec)
    return reward if reward is None or (low, high) == (0.0, 1.0) else (reward - low) / (high - low)


def ask(reward: Reward, arguments: Mapping[str, Any]) -> Any:
    """Call a reward with these arguments, but for what is only offered and its signature does not take."""
    return reward(**_taken(_signature(reward), arguments))


def misfit(reward: Reward, names: Collection[str]) -> str | None:
    """Return which of these arguments a reward's signature does not take, in words; None where it takes all.

    What it asks for beside them another row may have. Of a sum, each part is asked.
    """
    if isinstance(parts := getattr(reward, "rewards", None), Mapping):
        return next((f"{name}: {why}" for name, part in parts.items() if (why := misfit(part, names))), None)
    signature = _signature(reward)
    try:
        if signature is not None:
            signature.bind_partial(**_taken(signature, dict.fromkeys((*names, *OFFERED))))
    except TypeError as error:
        return str(error)
    return None


def _signature(reward: Reward) -> inspect.Signature | None:
    try:
        return inspect.signature(reward)
    except (TypeError, ValueError):  # a callable without a signature to read: it has rewards' plain form
        return None


def _taken(signature: inspect.Signature | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = signature.parameters if signature else {}
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {n: v for n, v in arguments.items() if takes_all or n in parameters or not (n in OFFERED or _is_void(n, v))}


def _is_void(name: str, values: Any) -> bool:
    """Whether this is the reference of rows that have none."""
    return name == "answer" and isinstance(values, list) and all(value is None for value in values)


def tell(log_metric: Callable[[str, float], None] | None, **signs: Sequence[bool]) -> None:
    """Log of each completion whether it shows a sign, so that the mean is the share of those that do.

    Example: `tell(log_metric, exhausted=[False, True])`; None logs nothing.
    """
    if log_metric is None:
        return
    for name, values in signs.items():
        for value in values:
            log_metric(name, float(value))


def named(spec: Any, *, method: str = "__call__") -> Any:
    """Return what names an exchangeable part, or is one by having that method; raise ValueError for anything else.

    Nothing is imported: a recipe is read without the modules that its parts are in.
    """
    if not (isinstance(spec.get("name") if isinstance(spec, Mapping) else spec, str) or hasattr(spec, method)):
        raise ValueError("expected a name, pkg.module:name, or a mapping with `name`")
    return spec


def refusal(read: Callable[..., Any], *given: Any) -> str | None:
    """Return why a function refuses what it is to read, by its ValueError; None where it reads it."""
    try:
        read(*given)
    except ValueError as error:
        return str(error)
    return None


def version_of(reward: Reward) -> dict[str, Any]:
    """Return which reward this is, and by which version of its rules it grades (its attribute `version`; 1 without)."""
    kind = reward if inspect.isfunction(reward) else type(reward)
    return {"reward": f"{kind.__module__}:{kind.__qualname__}", "version": getattr(reward, "version", 1)}


def other_versions(graders: Mapping[str, Any]) -> list[str]:
    """Return a line for each domain whose scores were given by another version of its reward than today's.

    `graders` is by domain what `version_of` said then. A reward that cannot be found now is left out.
    """
    found = []
    for domain, grader in graders.items():
        try:
            now = getattr(pkgutil.resolve_name(grader["reward"]), "version", 1)
        except (ImportError, AttributeError, ValueError):
            continue
        if now != grader["version"]:
            found.append(f"{domain}: graded by version {grader['version']} of {grader['reward']}, now it is {now}")
    return found


def find(kind: str, registry: Mapping[str, str], spec: Any, *, also: Sequence[str] = ()) -> Any:
    """Return the part of that kind that `spec` describes, as `find_reward` does for rewards.

    `also` are keys of a mapping that were read before.
    """
    if not isinstance(spec, str | Mapping):
        return spec
    if isinstance(spec, Mapping) and not isinstance(spec.get("name"), str):
        raise ValueError(f"a {kind} needs a name, got {dict(spec)!r}")
    name, arguments = (
        (spec, {}) if isinstance(spec, str) else (spec["name"], {k: v for k, v in spec.items() if k != "name"})
    )
    if why := _unknown_name(kind, name, registry):
        raise ValueError(why)
    path = registry.get(name, name)
    try:
        found: Any = pkgutil.resolve_name(path)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(f"{kind} {name!r} cannot be imported: {error}") from error
    if isinstance(found, type):
        check_arguments(found, arguments, where=f"{kind} {name!r}", types=name in registry, also=also)
        taken = inspect.signature(found).parameters if name in registry else {}
        if needed := [
            n for n, p in taken.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD and n not in arguments
        ]:
            given = ", ".join(map(str, arguments)) or "no arguments"
            raise ValueError(f"{kind} {name!r}: needs {', '.join(needed)}; got {given}")
        try:
            return found(**arguments)
        except ValueError:
            raise
        except Exception as error:  # a user's may raise anything
            raise ValueError(f"{kind} {name!r}: {error}") from error
    if arguments:
        raise ValueError(f"{kind} {name!r} is a function and takes no arguments, got {sorted(arguments)}")
    return found


def _unknown_name(kind: str, name: Any, registry: Mapping[str, str]) -> str | None:
    """Return why nothing has a name, with the nearest that something has; None for a known one, a path and an object."""
    if not isinstance(name, str) or ":" in registry.get(name, name):
        return None
    near = f"{meant} " if (meant := _near(name, registry)) else ""
    return f"{kind} {name!r:.200} does not exist; {near}known: {', '.join(sorted(registry))}, or pkg.module:name"


def check_arguments(
    kind: type, given: Mapping[Any, Any], *, where: str, types: bool = True, also: Sequence[str] = ()
) -> None:
    """Raise ValueError for an argument that a class does not take; for our own (`types`) also for one of another type.

    `also` are names that others take. A number is no text, no truth value, finite and at most `MOST`.
    """
    taken = inspect.signature(kind).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    hints = get_type_hints(kind.__init__) if types else {}
    for name, value in given.items():
        if name not in taken:
            meant = _near(name, [*taken, *also]) or f"known: {', '.join([*taken, *also])}"
            raise ValueError(f"{where}: unknown argument {name!r:.200}; {meant}")
        if types and (why := _unlike(hints[name], value)):
            raise ValueError(f"{where}: {name}: {why}, got {value!r:.200}")


def _unlike(hint: Any, value: Any) -> str | None:
    """Return why a value is not of a type."""
    from pydantic import TypeAdapter, ValidationError  # not in graders' processes

    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MOST):
        return f"expected a number of at most {MOST:,}"
    kinds = {hint, *get_args(hint)}
    if isinstance(value, bool | str) and kinds & {int, float} and type(value) not in kinds:
        return "expected a number"
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        inside = ".".join(str(part) for part in first["loc"])
        return f"{inside}: {first['msg']} ({first['input']!r:.60})" if inside else first["msg"]
    return None


def _near(name: Any, known: Collection[str]) -> str:
    """The name that one is near to, in words; as `polyphony.curricula.declarations.near`, which this wing does not know."""
    text = str(name).lower().replace("-", "_")
    swapped = [one for one in known if sorted(one) == sorted(text)]
    close = swapped or difflib.get_close_matches(text, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


MOST = 10**12
"""No number that a recipe gives to a part is larger; most are bytes."""


def settled(results: Sequence[Any], *, of: str = "rewards") -> list[Any]:
    """Return the results, with those that are awaitable awaited together.

    On a thread of its own, as the caller's may already run an event loop; always the same `of` those who call, as TRL's: a
    client that a reward keeps from call to call belongs to the loop it was first used in.
    """
    if not any(inspect.isawaitable(result) for result in results):
        return list(results)
    own = _loop_of(of)
    if asyncio._get_running_loop() is own.loop:  # an asynchronous reward that asks others
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, _gather(results)).result()
    asked = asyncio.run_coroutine_threadsafe(_gather(results), own.loop)
    own.asked.add(asked)
    try:
        return asked.result()
    finally:
        own.asked.discard(asked)


@dataclass(kw_only=True, slots=True)
class _Loop:
    """An event loop in a thread of its own."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    asked: set[Future] = field(default_factory=set)
    """What is waited for."""


_LOOPS: dict[tuple[int, str], _Loop] = {}
"""By process and by who they are of; a forked process has its own, as threads stay behind."""
_LOOKUP = threading.Lock()
"""Held while one is looked up: two that ask first, at once, must not get one each."""


def _loop_of(of: str) -> _Loop:
    with _LOOKUP:
        if (found := _LOOPS.get((os.getpid(), of))) is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name=f"{of}-{os.getpid()}", daemon=True)
            found = _LOOPS[os.getpid(), of] = _Loop(loop=loop, thread=thread)
            thread.start()
        return found


def blocked(of: str, *, within_s: float = 0.5) -> threading.Thread | None:
    """Return the thread of a loop that does not answer, and let go of it: who waits there gets CancelledError, who comes
    next another loop. None where it answers, or there is none."""
    with _LOOKUP:
        own = _LOOPS.get((os.getpid(), of))
    if own is None or not own.asked:
        return None
    answered = threading.Event()
    own.loop.call_soon_threadsafe(answered.set)
    if answered.wait(within_s):
        return None
    with _LOOKUP:
        _LOOPS.pop((os.getpid(), of), None)
    for asked in list(own.asked):
        asked.cancel()
    return own.thread


def end_loop(of: str) -> None:
    """Let a loop end that nobody will ask again."""
    with _LOOKUP:
        own = _LOOPS.pop((os.getpid(), of), None)
    if own is not None:
        own.loop.call_soon_threadsafe(own.loop.stop)


async def _gather(results: Sequence[Any]) -> list[Any]:
    return list(await asyncio.gather(*(_finish(result) for result in results)))


async def _finish(result: Any) -> Any:
    try:
        return await result if inspect.isawaitable(result) else result
    except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop, and leave whoever waits for it waiting
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
