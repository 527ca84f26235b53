"""The tests' side: assertions about objects that live in another process.

The candidate's process runs the untrusted code and answers requests (`program_side.py`). The tests' process
holds the assertions and sees a `Remote` for everything of the candidate's that is not plain data. So the candidate can
not patch the tests, read what they expect, or end them; and what it returns is compared here, with Python's own `==`.

An object that equals everything equals nothing here: a Remote is never compared with plain data, and what arithmetic
with plain data makes of it stays Remote, or an object that has been told the expected value could turn into it.
What can not be said between two processes is left to a run inside the candidate's (`running`).
"""

from __future__ import annotations

import builtins
import importlib
import sys

from messages import ACCESSES, ARITHMETIC, COMPARISONS, CONVERSIONS, BridgeError, mutable, named, pack, unpack

TYPE_CHECKING = False  # typing is not worth its import here
if TYPE_CHECKING:
    from typing import Any


MAX_PARTS = 1000
"""Attributes whose copies are looked at again when the tests are over."""


class UnsupportedError(TypeError):
    """The tests ask for what can not be said between two processes."""


class StoppedError(RuntimeError):
    """Stands for a StopIteration that the code under test raised where no item was asked for (as PEP 479 has it)."""

    @property
    def value(self):
        return self.args[0] if self.args else None


class Link:
    """Asks the candidate's process and turns its answers into plain data, Remotes and exceptions."""

    def __init__(self, channel):
        self.channel = channel
        self.broken = False
        self.unsupported = False
        self.is_doubtful = False
        self.parts = []
        self.callbacks = []
        self.exceptions = {}
        self.theirs = {}
        self.remotes = {}

    def names(self):
        """Return what the code under test defines."""
        return unpack(self._receive()["names"], self.resolve)

    def refer(self, value):
        if isinstance(value, Remote):
            return {"ref": value._ref}
        if isinstance(value, (type, type(sys))) and value in self.theirs:
            return {"ref": self.theirs[value]}
        place = named(value)
        if place:
            return {"named": place}
        if callable(value):
            self.callbacks.append(value)
            return {"callback": len(self.callbacks) - 1}
        raise UnsupportedError(f"a {type(value).__name__} of the tests can not be passed to the code under test")

    def resolve(self, data):
        if "exception" in data:
            number, names = data["exception"]
            found = self._exception(names)
        elif "module" in data:
            number, name = data["module"]
            known = name.partition(".")[0] in sys.stdlib_module_names
            found = importlib.import_module(name) if known else Remote(self, number, False)
        elif "named" in data:
            return self._builtin_type(*data["named"])
        else:
            return self.remotes.setdefault(data["ref"], Remote(self, data["ref"], False))
        self.theirs[found] = number
        return found

    def _builtin_type(self, module, name):
        """Return one of Python's own types, which is all that is told by name: a forged message could name an
        object that equals everything (`unittest.mock.ANY`)."""
        found = getattr(builtins, name, None)
        if module != "builtins" or not isinstance(found, type):
            self.broken = True
            raise BridgeError(f"{module}.{name} is no type of Python's own")
        return found

    def _exception(self, names) -> Any:
        """Return the built-in exception of that name, or a class of ours for one that the code under test defines."""
        bases = [getattr(builtins, name, None) for name in names]
        builtin = next((b for b in bases if isinstance(b, type) and issubclass(b, Exception)), RuntimeError)
        if builtin.__name__ == names[0]:
            return builtin
        parent = self._exception(names[1:]) if len(names) > 1 else builtin
        return self.exceptions.setdefault(names[0], type(names[0], (parent,), {}))

    def _raised(self, do, reply):
        """Return what the code under test raised. Only asked for the next item may it say that there is none: anywhere
        else that would end an iteration of the tests', which holds for what was never looked at."""
        kind = self._exception(reply["raise"])
        if issubclass(kind, (StopIteration, StopAsyncIteration)) and do != "next":
            kind = StoppedError
        error = kind(*unpack({"tuple": reply["args"]}, self.resolve))
        if str(error) != reply["text"]:  # its class says it in its own way
            error = kind(reply["text"])
        return error

    def ask(self, do, args, kwargs):
        try:
            request = {"do": do, "args": pack(args, self.refer), "kwargs": pack(kwargs, self.refer)}
        except UnsupportedError:
            self.unsupported = True  # no fault of the code under test, which never saw it
            raise
        self.channel.send(request)
        reply = self._receive()
        while "callback" in reply:
            self._call_back(reply)
            reply = self._receive()
        if "raise" in reply:
            raise self._raised(do, reply)
        ours = mutable([*args, *kwargs.values()])
        for value, changed in zip(ours, reply["changed"], strict=True):
            _become(value, unpack(changed, self.resolve))
        if "same" in reply:
            return ours[reply["same"]]
        value = unpack(reply["value"], self.resolve)
        if do == "getattr" and mutable([value]) and len(self.parts) < MAX_PARTS:
            self.parts.append((value, reply["value"]))
        return value

    def changed_parts(self):
        """Say whether the tests changed a copy of what an object holds, which that object never learns."""
        return any(pack(value, self.refer) != packed for value, packed in self.parts)

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

    def __contains__(self, value):
        try:
            items = iter(self)  # type: ignore[call-overload]
        except TypeError:
            self._link.is_doubtful = True  # it may be told what it is asked for: see `running`
            raise
        return any(item is value or item == value for item in items)

    def __reduce_ex__(self, protocol):
        self._link.is_doubtful = True
        raise TypeError("an object of the code under test is copied only there")

    def __enter__(self):
        return self._link.ask("enter", [self], {})

    def __exit__(self, kind, error, trace):
        answer = self._link.ask("exit", [self, kind], {})
        return answer is True and not issubclass(kind, AssertionError)


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


for _name in COMPARISONS:
    setattr(Remote, f"__{_name}__", _comparison(_name))
for _name in ARITHMETIC:
    setattr(Remote, f"__{_name.rstrip('_')}__", _arithmetic(_name))
    setattr(Remote, f"__r{_name.rstrip('_')}__", _arithmetic(_name, swapped=True))
for _name in CONVERSIONS:
    setattr(Remote, f"__{_name}__", _conversion(_name))
for _name in ACCESSES:
    setattr(Remote, f"__{_name}__", _access(_name))
