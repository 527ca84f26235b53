"""One instance of an environment with its tools, and what is asked of it: the same in a thread and in a worker process.

The protocol is TRL's `environment_factory`: `reset(**columns) -> str | None`, public methods as tools, optionally
`get_reward() -> float | None`. Ours beside it is `reply(message) -> str | None`. Methods and tools may be asynchronous.
Imports no torch: worker processes start with it.
"""

from __future__ import annotations

import inspect
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from polyphony.rewards.registry import find, settled

T = TypeVar("T")

ENVIRONMENTS = {"textarena": "polyphony.trainer.environments.games:TextArena"}
"""Registry name to `module:Class`."""
TOOLS = {"python": "polyphony.trainer.environments.python_tool:Python"}
"""Registry name to `module:Class`, whose public methods are the tools."""

Ask = Literal["reset", "calls", "reply", "reward"]
"""What an instance is asked for."""
MAKE_S = 120.0
"""What an instance may take to be made, or a process for them to start, on a busy host."""
MOST_CHARACTERS = 1_000_000
"""Of the answers of a turn, or of what an environment says: no policy reads more, and all of it goes through a pipe."""
OWN = ("reset", "get_reward", "reply")
"""Methods that are no tools."""
JSON_TYPES: Mapping[Any, Any] = {str: str, bool: bool, int: int, float: (int, float), list: list, dict: dict}
"""What JSON has for a type hint."""
NAMES_OF_ROW = ("seed", "id", "domain")
"""What `reset` gets beside the columns, where its signature names it; a column of that name goes before."""


def make_environment(spec: Any) -> Any:
    """Return a new instance of an environment: by name, import path or mapping, or of a class or what makes one.

    Raises ValueError for what makes none.
    """
    if isinstance(spec, str | Mapping):
        spec = find("environment", ENVIRONMENTS, spec)
    made = spec() if inspect.isclass(spec) or inspect.isroutine(spec) or hasattr(spec, "func") else spec
    if not callable(getattr(made, "reset", None)):
        raise ValueError(f"environment {spec!r:.60}: expected a method `reset`, {type(made).__name__} has none")
    return made


def functions_of(specs: Sequence[Any]) -> dict[str, Callable[..., Any]]:
    """Return the functions that tools are, by name; an object's are its public methods. Raises ValueError."""
    found: dict[str, Callable[..., Any]] = {}
    for spec in specs:
        tool = find("tool", TOOLS, spec)
        of = {tool.__name__: tool} if inspect.isroutine(tool) else methods_of(tool)
        if not of:
            raise ValueError(f"tool {spec!r:.60}: expected a function, or a class with public methods")
        found |= _apart(found, of)
    return found


def methods_of(instance: Any) -> dict[str, Callable[..., Any]]:
    """Return the methods of an instance that are tools, by name; as in TRL those of its class, no property is read."""
    names = [name for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    return {name: getattr(instance, name) for name in names if not name.startswith("_") and name not in OWN}


def _apart(known: Mapping[str, Any], more: Mapping[str, Any]) -> Mapping[str, Any]:
    if twice := sorted(known.keys() & more.keys()):
        raise ValueError(f"two tools are called {twice[0]!r}")
    return more


def made_in_time(make: Callable[..., T], *given: Any) -> T:
    """Return what a user's code makes. Raises ValueError in words for what that raises, and where it does not come back."""
    came: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            came.put((make(*given), None))
        except BaseException as error:  # a user's may raise anything
            came.put((None, error))

    threading.Thread(target=work, name="environment", daemon=True).start()
    try:
        made, error = came.get(timeout=MAKE_S)
    except queue.Empty:
        raise ValueError(f"it was not made within {MAKE_S:g} s") from None
    if isinstance(error, ValueError | TypeError):
        raise error
    if error is not None:
        raise ValueError(in_words(error)) from error
    return made  # type: ignore[return-value]


class Instance:
    """One environment, or none, with the tools that may be called in it.

    Example: `Instance(environment=Counter(), functions={}).answers([{"function": {"name": "add", "arguments": {"n": 1}}}])`
    """

    loop = "tools"
    """Where what is asynchronous runs: with that of other instances, as clients that they share belong to one loop."""

    def __init__(self, *, environment: Any, functions: Mapping[str, Callable[..., Any]]) -> None:
        self.environment = environment
        self.is_waiting = False
        """For what is asynchronous."""
        own = {} if environment is None else methods_of(environment)
        self.functions = {**functions, **_apart(functions, own)}

    @classmethod
    def made(cls, environment: Any, tools: Sequence[Any]) -> Instance:
        """Return one of what a domain says. Raises ValueError."""
        return cls(
            environment=None if environment is None else make_environment(environment), functions=functions_of(tools)
        )

    def ask(self, what: Ask, given: Any) -> Any:
        """Return what an instance is asked for; what its environment raises is raised."""
        if what == "calls":
            return self.answers(given)
        if self.environment is None:
            return None
        if what == "reset":
            return _text("reset", self._settled(self.environment.reset(**self._taken(given))))
        if what == "reply":
            return _text("reply", self._settled(self.environment.reply(given)))
        return _number(self._settled(self.environment.get_reward()))

    def _settled(self, value: Any) -> Any:
        return self._all_settled([value])[0]

    def _all_settled(self, values: Sequence[Any]) -> list[Any]:
        self.is_waiting = any(map(inspect.isawaitable, values))
        try:
            return settled(values, of=self.loop)
        finally:
            self.is_waiting = False

    def _taken(self, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return what of a row's `columns` and `names` the method `reset` takes."""
        parameters = inspect.signature(self.environment.reset).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = {n: v for n, v in given["names"].items() if n in parameters}
        return named | {n: v for n, v in given["columns"].items() if n in parameters or takes_all}

    def answers(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Return for each call who answered, what, and how it failed (`records.FAILURES`; empty: not).

        Errors are told as TRL tells them. Those that are asynchronous run together.
        """
        begun = [self._begun(call) for call in calls]
        waiting = [_caught(value) for _, value, _ in begun if inspect.isawaitable(value)]
        came = iter(self._all_settled(waiting))
        found, left = [], MOST_CHARACTERS
        for name, value, failure in begun:
            value = next(came) if inspect.isawaitable(value) else value
            if isinstance(value, BaseException):
                value, failure = {"error": said_by(value)}, failure or "raised"
            content, odd = content_of(value, most=left)
            left -= min(left, len(content))
            found.append({"name": name, "content": content, "failure": failure or odd})
        return found

    def _begun(self, call: Mapping[str, Any]) -> tuple[str, Any, str]:
        """Return a call's name, its result or what is to be awaited for it, and how it failed."""
        function = call.get("function", call)
        name = whole(str(function.get("name", "unknown")))
        if (kind := call.get("type", "function")) != "function":
            return name, {"error": f"Unsupported tool call type: {kind}"}, "unknown_tools"
        if name not in self.functions:
            return name, {"error": f"Tool {name} not found."}, "unknown_tools"
        tool, arguments = self.functions[name], function.get("arguments")
        try:
            return name, tool(**arguments), ""
        except BaseException as error:  # a user's, or a program that it runs, may raise anything; the policy is told
            return name, {"error": said_by(error)}, "raised" if _fits(tool, arguments) else "bad_arguments"


def _fits(tool: Callable[..., Any], arguments: Any) -> bool:
    """Whether a tool takes the arguments, by their names and, where its hints are JSON's, by their types."""
    try:
        inspect.signature(tool).bind(**arguments)
    except TypeError:
        return False
    try:
        hints = get_type_hints(tool)
    except Exception:  # a user's are whatever they evaluate to
        return True
    kinds = {name: JSON_TYPES.get(get_origin(hint) or hint) for name, hint in hints.items()}
    return all(isinstance(value, kinds.get(name) or object) for name, value in arguments.items())


def content_of(value: Any, *, most: int = MOST_CHARACTERS) -> tuple[str, str]:
    """Return an answer as the policy reads it, as TRL writes it, and a failure where it is no text and holds none.

    Of more characters than `most` it is said how many there were.
    """
    if isinstance(value, bytes | bytearray):
        return cut(bytes(value[: 4 * most + 4]).decode(errors="replace"), most, of=len(value)), ""
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        return str({"error": f"the tool returned a {type(value).__name__}, which is no answer"}), "bad_results"
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        if any(part["type"] != "text" for part in value):
            return str({"error": "the tool returned more than text, which this policy does not read"}), "bad_results"
        return whole(cut("\n".join(str(part.get("text", "")) for part in value), most)), ""
    try:
        return whole(cut(str(value), most)), ""
    except Exception as error:  # a user's class may raise anything
        return str({"error": f"the tool's answer cannot be written: {said_by(error)}"}), "bad_results"


def cut(text: str, most: int = MOST_CHARACTERS, *, of: int = 0) -> str:
    """Return the beginning of a text that is too long to be sent on, and what was left out: more than any policy reads."""
    if len(text) <= most:
        return text
    return f"{text[:most]}\n[the first {most:,} of {max(of, len(text)):,} characters]"


def whole(text: str) -> str:
    """Return a text without halves of characters (lone surrogates), which no tokenizer takes."""
    return text.encode(errors="replace").decode()


def said_by(error: BaseException) -> str:
    """Return what an error says; its class where that cannot be had."""
    try:
        return str(error)
    except Exception:  # a user's class may raise anything
        return type(error).__name__


def in_words(error: BaseException) -> str:
    """Return an error's class and what it says."""
    return whole(f"{type(error).__name__}: {said_by(error)}"[:500])


async def _caught(awaitable: Any) -> Any:
    try:
        return await awaitable
    except BaseException as error:  # as above; one that leaves would end the loop for all
        return error


def _text(method: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value and whole(cut(value))
    content, odd = content_of(value) if isinstance(value, list) else ("", "odd")
    if odd:
        raise TypeError(f"{method} returned {value!r:.60}, expected text or None")
    return content


def _number(value: Any) -> float | None:
    number = math.nan if value is None else float(value)
    if math.isinf(number):
        raise ValueError(f"get_reward returned {number}; what cannot be told is None")
    return None if math.isnan(number) else number
