"""Tests on one side, the code under test on the other, and plain data between them.

The candidate's process runs the code that nobody has read and serves requests (`serve`). The tests' process holds the
assertions and sees a `Remote` for everything of the candidate's that is not plain data. So the candidate can not patch
the tests, read what they expect, or end them; and what it returns is compared here, with Python's own `==`.

An object that equals everything equals nothing here: a Remote is never compared with plain data, and what arithmetic
with plain data makes of it stays Remote, or an object that has been told the expected value could turn into it.
Not supported: passing the candidate an instance of a class that the tests define, subclassing the candidate's classes,
capturing what it prints.
"""

from __future__ import annotations

import _ast
import builtins
import collections
import importlib
import json
import operator
import os
import sys

TYPE_CHECKING = False  # typing is not worth its import here
if TYPE_CHECKING:
    from typing import Any

MAX_MESSAGE = 16 << 20


class BridgeError(BaseException):
    """The other side sent something that is no message, or nothing. No `except Exception` of a test hides that."""


def _construct(kind):
    module, _, name = kind.partition(".")
    return getattr(importlib.import_module(module), name)


_SCALARS: dict[str, Any] = {
    "decimal.Decimal": (str, lambda v: _construct("decimal.Decimal")(v)),
    "fractions.Fraction": (str, lambda v: _construct("fractions.Fraction")(v)),
    "datetime.date": (str, lambda v: _construct("datetime.date").fromisoformat(v)),
    "datetime.datetime": (str, lambda v: _construct("datetime.datetime").fromisoformat(v)),
    "datetime.timedelta": (
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: _construct("datetime.timedelta")(*v),
    ),
}
"""Values of the standard library that are plain data: how each is written, how it is read."""


def pack(value: Any, refer: Any) -> Any:
    """Return `value` in JSON's terms; `refer(object)` names what is not plain data."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    for kind in (tuple, list, set, frozenset, collections.deque):
        if isinstance(value, kind):
            items: Any = kind.__iter__  # a subclass may lie about its items; its base does not
            return {kind.__name__: [pack(item, refer) for item in items(value)]}
    if isinstance(value, dict):
        return {"dict": [[pack(k, refer), pack(v, refer)] for k, v in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    name = f"{type(value).__module__}.{type(value).__name__}"
    return {name: _SCALARS[name][0](value)} if name in _SCALARS else refer(value)


_READERS: dict[str, Any] = {
    "float": lambda v, _: float(v),
    "complex": lambda v, _: complex(float(v[0]), float(v[1])),
    "bytes": lambda v, _: bytes.fromhex(v),
    "bytearray": lambda v, _: bytearray.fromhex(v),
    "tuple": lambda v, resolve: tuple(unpack(item, resolve) for item in v),
    "list": lambda v, resolve: [unpack(item, resolve) for item in v],
    "set": lambda v, resolve: {unpack(item, resolve) for item in v},
    "frozenset": lambda v, resolve: frozenset(unpack(item, resolve) for item in v),
    "deque": lambda v, resolve: collections.deque(unpack(item, resolve) for item in v),
    "dict": lambda v, resolve: {unpack(k, resolve): unpack(item, resolve) for k, item in v},
}


def unpack(data: Any, resolve: Any) -> Any:
    """Return the value that `pack` wrote; `resolve(data)` finds what it named."""
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind in _SCALARS:
        return _SCALARS[kind][1](value)
    return _READERS[kind](value, resolve) if kind in _READERS else resolve(data)


class Channel:
    """Messages, one a line, over two pipes."""

    def __init__(self, reads, writes):
        self._reads = os.fdopen(reads, "rb")
        self._writes = os.fdopen(writes, "wb")

    def send(self, message):
        self._writes.write(json.dumps(message).encode() + b"\n")
        self._writes.flush()

    def receive(self) -> Any:
        """Return the next message. Raises BridgeError where there is none."""
        line = self._reads.readline(MAX_MESSAGE)
        if not line.endswith(b"\n"):
            raise BridgeError("the other process ended or sent too much")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BridgeError(f"not a message: {error}") from None


# ---- the candidate's side


def _call(function, *args, **kwargs):
    return function(*args, **kwargs)


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift")
_ARITHMETIC = (*_BINARY, "divmod", "neg", "pos", "abs", "invert", "round")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_CONVERSIONS = ("str", "repr", "float", "int", "bool", "complex", "format", "index")
_ACCESSES = ("len", "iter", "next", "reversed", "getitem", "setitem", "delitem")
_FUNCTIONS: dict[str, Any] = {
    "call": _call,
    "instance": isinstance,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
}
for _name in (*_ARITHMETIC, *_COMPARISONS, *_CONVERSIONS, *_ACCESSES):
    _FUNCTIONS[_name] = getattr(builtins, _name, None) or getattr(operator, _name)


class Candidate:
    """Serves the namespace of the code under test over a channel."""

    def __init__(self, channel, namespace):
        self.channel = channel
        self.namespace = namespace
        self.objects = []
        self.numbers = {}

    def refer(self, value):
        if isinstance(value, type) and issubclass(value, Exception):
            return {"exception": [base.__name__ for base in value.__mro__]}
        if isinstance(value, type(sys)):
            return {"module": value.__name__}
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return {"ref": self.numbers[id(value)]}

    def resolve(self, data):
        if "callback" in data:
            return lambda *args: self._call_back(data["callback"], args)
        return self.objects[data["ref"]]

    def _call_back(self, number, args):
        self.channel.send({"callback": number, "args": pack(args, self.refer)})
        answer = self.channel.receive()
        if "value" not in answer:
            raise ValueError("the tests' function raised")
        return unpack(answer["value"], self.resolve)

    def serve(self):
        """Tell the names that the code defines, then answer requests until the tests hang up."""
        names = {name: value for name, value in self.namespace.items() if not name.startswith("__")}
        self.channel.send({"names": pack(names, self.refer)})
        while True:
            request = self.channel.receive()
            try:
                reply = self._answer(request)
            except BaseException as error:  # whatever the code under test raises is its answer
                reply = {"raise": [base.__name__ for base in type(error).__mro__], "text": str(error)[:10_000]}
            self.channel.send(reply)

    def _answer(self, request):
        args, kwargs = unpack(request["args"], self.resolve), unpack(request["kwargs"], self.resolve)
        value = _FUNCTIONS[request["do"]](*args, **kwargs)
        changed = [pack(arg, self.refer) for arg in args if type(arg) in (list, dict, set, bytearray)]
        return {"value": pack(value, self.refer), "changed": changed}


# ---- the tests' side


class Link:
    """Asks the candidate's process and turns its answers into plain data, Remotes and exceptions."""

    def __init__(self, channel):
        self.channel = channel
        self.broken = False
        self.callbacks = []
        self.exceptions = {}
        self.remotes = {}

    def names(self):
        """Return what the code under test defines, without what the tests' own Python defines already."""
        found = unpack(self._receive()["names"], self.resolve)
        return {
            name: value
            for name, value in found.items()
            if not hasattr(builtins, name) and (name not in sys.stdlib_module_names or isinstance(value, type(sys)))
        }

    def refer(self, value):
        if isinstance(value, Remote):
            return {"ref": value._ref}
        if isinstance(value, type) and value in self.exceptions.values():
            raise TypeError("the code under test's own exceptions can not be passed to it")
        if callable(value):
            self.callbacks.append(value)
            return {"callback": len(self.callbacks) - 1}
        raise TypeError(f"a {type(value).__name__} of the tests can not be passed to the code under test")

    def resolve(self, data):
        if "exception" in data:
            return self._exception(data["exception"])
        if "module" in data:
            known = data["module"] in sys.stdlib_module_names
            return importlib.import_module(data["module"]) if known else None
        return self.remotes.setdefault(data["ref"], Remote(self, data["ref"], False))

    def _exception(self, names) -> Any:
        """Return the built-in exception of that name, or a class of ours for one that the code under test defines."""
        bases = [getattr(builtins, name, None) for name in names]
        builtin = next((b for b in bases if isinstance(b, type) and issubclass(b, Exception)), RuntimeError)
        if builtin.__name__ == names[0]:
            return builtin
        parent = self._exception(names[1:]) if len(names) > 1 else builtin
        return self.exceptions.setdefault(names[0], type(names[0], (parent,), {}))

    def ask(self, do, args, kwargs):
        self.channel.send({"do": do, "args": pack(args, self.refer), "kwargs": pack(kwargs, self.refer)})
        reply = self._receive()
        while "callback" in reply:
            self._call_back(reply)
            reply = self._receive()
        if "raise" in reply:
            raise self._exception(reply["raise"])(reply["text"])
        mutable = [arg for arg in args if type(arg) in (list, dict, set, bytearray)]
        for ours, theirs in zip(mutable, reply["changed"], strict=True):
            _become(ours, unpack(theirs, self.resolve))
        return unpack(reply["value"], self.resolve)

    def _receive(self) -> Any:
        try:
            return self.channel.receive()
        except BridgeError:
            self.broken = True  # a bare `except:` in a test must not make a pass of it
            raise

    def _call_back(self, request):
        try:
            args = unpack(request["args"], self.resolve)
            answer = {"value": pack(self.callbacks[request["callback"]](*args), self.refer)}
        except Exception as error:  # the code under test learns of it and may handle it
            answer = {"raise": type(error).__name__}
        self.channel.send(answer)


def _become(ours, theirs):
    """Give the tests' argument the content that the code under test left in its copy."""
    if isinstance(ours, (list, bytearray)):
        ours[:] = theirs
    else:
        ours.clear()
        ours.update(theirs)


class Remote:
    """Stands for an object in the candidate's process. `_told`: it may have learned a value that the tests hold."""

    __slots__ = ("_link", "_ref", "_told")

    def __init__(self, link, ref, told):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_ref", ref)
        object.__setattr__(self, "_told", told)

    def __call__(self, *args, **kwargs):
        return self._link.ask("call", [self, *args], kwargs)

    def __getattr__(self, name):
        return self._link.ask("getattr", [self, name], {})

    def __setattr__(self, name, value):
        self._link.ask("setattr", [self, name, value], {})

    def __delattr__(self, name):
        self._link.ask("delattr", [self, name], {})

    def __instancecheck__(self, value):
        return isinstance(value, Remote) and self._link.ask("instance", [value, self], {}) is True

    def __hash__(self):
        return hash(self._ref)


def _conversion(name):
    def convert(self, *args):
        if self._told:
            raise TypeError(f"{name} of an object that the tests told a value")
        return self._link.ask(name, [self, *args], {})

    return convert


def _access(name):
    return lambda self, *args: self._link.ask(name, [self, *args], {})


def _comparison(name):
    def compare(self, other):
        return self._link.ask(name, [self, other], {}) is True if isinstance(other, Remote) else NotImplemented

    return compare


def _arithmetic(name, swapped=False):
    def compute(self, *others):
        operands = [self, *others] if not swapped else [*others, self]
        told = any(not isinstance(operand, Remote) or operand._told for operand in operands)
        value = self._link.ask(name, operands, {})
        if not told:
            return value
        if not isinstance(value, Remote):
            raise TypeError(f"{name} turned an object into plain data that the tests may have told it")
        return Remote(value._link, value._ref, True)

    return compute


for _name in _COMPARISONS:
    setattr(Remote, f"__{_name}__", _comparison(_name))
for _name in _ARITHMETIC:
    setattr(Remote, f"__{_name.rstrip('_')}__", _arithmetic(_name))
    setattr(Remote, f"__r{_name.rstrip('_')}__", _arithmetic(_name, swapped=True))
for _name in _CONVERSIONS:
    setattr(Remote, f"__{_name}__", _conversion(_name))
for _name in _ACCESSES:
    setattr(Remote, f"__{_name}__", _access(_name))


def run_tests(source, link):
    """Run the tests' source against the names that `link` offers; return a word and "passed total".

    Each top-level `assert` and expression, each function `test*` and each unittest method counts as one. `broken`
    where the source is no Python or tests nothing. A statement in between that raises ends the count: what follows
    stands on it.
    """
    try:
        tree = compile(source, "tests.py", "exec", _ast.PyCF_ONLY_AST)
    except (SyntaxError, ValueError):
        return "broken", "0 0"
    solution = type(sys)("solution")
    vars(solution).update(link.names())
    sys.modules["solution"] = solution
    namespace = {name: value for name, value in vars(solution).items() if not name.startswith("__")}
    namespace["__name__"] = "tests"
    passed, total, whole = _statements(tree, namespace)
    functions = [v for k, v in namespace.items() if k.startswith("test") and type(v) is type(run_tests)]
    cases = [v for v in namespace.values() if isinstance(v, type) and hasattr(v, "countTestCases")]
    for case in cases:
        functions += [test.debug for test in sys.modules["unittest"].defaultTestLoader.loadTestsFromTestCase(case)]
    total += len(functions)
    passed += sum(_holds(function) for function in functions) if whole else 0
    return ("verdict" if total else "broken"), f"{0 if link.broken else passed} {total}"


def _statements(tree, namespace):
    """Return how many of the top-level checks hold, how many there are, and whether the source ran to its end."""
    passed, whole = 0, True
    for statement in tree.body:
        code = compile(_ast.Module(body=[statement], type_ignores=[]), "tests.py", "exec")
        holds = whole and _holds(lambda code=code: exec(code, namespace))
        passed += holds and _is_check(statement)
        whole = whole and (holds or _is_check(statement))
    return passed, sum(map(_is_check, tree.body)), whole


def _is_check(statement):
    return isinstance(statement, _ast.Assert) or (
        isinstance(statement, _ast.Expr) and not isinstance(statement.value, _ast.Constant)
    )


def _holds(check):
    try:
        check()
    except Exception:  # a test may fail in any way the code under test makes it fail
        return False
    return True
