"""What the tests' process and the candidate's say to each other: plain data, and numbers for all that is not plain."""

from __future__ import annotations

import collections
import importlib
import json
import os
import sys

TYPE_CHECKING = False  # typing is not worth its import here
if TYPE_CHECKING:
    from typing import Any

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift")
ARITHMETIC = (*_BINARY, "divmod", "neg", "pos", "abs", "invert", "round")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
CONVERSIONS = ("str", "repr", "float", "int", "bool", "complex", "format", "index", "hash")
ACCESSES = ("len", "iter", "next", "reversed", "getitem", "setitem", "delitem")

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
    "datetime.time": (str, lambda v: _construct("datetime.time").fromisoformat(v)),
    "datetime.timedelta": (
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: _construct("datetime.timedelta")(*v),
    ),
}
"""Values of the standard library that are plain data: how each is written, how it is read."""


def mutable(values: Any) -> list:
    """Return those of the values that a call can change in place."""
    return [value for value in values if type(value) in (list, dict, set, bytearray)]


def named(value: Any) -> list | None:
    """Return where a class, function or module of the standard library is found by name; None if it is no such thing."""
    if isinstance(value, type(sys)):
        return [value.__name__, ""] if value.__name__.partition(".")[0] in sys.stdlib_module_names else None
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if type(module) is not str or type(name) is not str or module.partition(".")[0] not in sys.stdlib_module_names:
        return None
    return [module, name] if find(module, name) is value else None


def find(module: str, name: str) -> Any:
    """Return what a module holds under a name, None where it does not; the module itself for no name."""
    value = sys.modules.get(module) or importlib.import_module(module)
    return getattr(value, name, None) if name else value


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
    kind: Any = type(value)
    if isinstance(value, tuple) and type(getattr(kind, "_fields", None)) is tuple:
        items = [pack(item, refer) for item in tuple.__iter__(value)]
        return {"record": [kind.__name__, list(kind._fields), items]}
    if type(value) is range:
        return {"range": [value.start, value.stop, value.step]}
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        return _pack_array(value, refer)
    if kind in (collections.Counter, collections.OrderedDict):
        return {kind.__name__: [[pack(k, refer), pack(v, refer)] for k, v in kind.items(value)]}  # type: ignore[arg-type]
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


def _pack_array(value: Any, refer: Any) -> Any:
    plain = pack(value.tolist(), refer)
    if not hasattr(value, "tobytes") or value.dtype.kind not in "biufcU":
        return refer(value)
    return {"array": [value.dtype.str, plain]} if value.ndim else plain


def _array(data: Any, resolve: Any) -> Any:
    """Return the array where numpy is installed, else its rows as lists."""
    values = unpack(data[1], resolve)
    try:
        return _construct("numpy.array")(values, dtype=data[0] if data[0][1] in "biufcU" else None)
    except ImportError:
        return values


_RECORDS: dict[tuple, Any] = {}


def _record(data: Any, resolve: Any) -> Any:
    """Return a named tuple of a class with these fields, the same class each time."""
    name, fields, items = data
    key = (name, *fields)
    if key not in _RECORDS:
        _RECORDS[key] = collections.namedtuple(name, fields, rename=True)  # type: ignore[misc]
    return tuple.__new__(_RECORDS[key], [unpack(item, resolve) for item in items])


_READERS: dict[str, Any] = {
    "array": _array,
    "record": _record,
    "range": lambda v, _: range(*v),
    "Counter": lambda v, resolve: collections.Counter({unpack(k, resolve): unpack(n, resolve) for k, n in v}),
    "OrderedDict": lambda v, resolve: collections.OrderedDict((unpack(k, resolve), unpack(n, resolve)) for k, n in v),
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
