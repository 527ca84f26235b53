"""The candidate's side: answers requests about what the untrusted code defines."""

from __future__ import annotations

import builtins
import operator
import sys

from messages import ACCESSES, ARITHMETIC, COMPARISONS, CONVERSIONS, find, mutable, pack, unpack

TYPE_CHECKING = False  # typing is not worth its import here
if TYPE_CHECKING:
    from typing import Any


def _call(function, *args, **kwargs):
    return function(*args, **kwargs)


def _enter(manager):
    return type(manager).__enter__(manager)


def _exit(manager, kind):
    """Leave as after an exception of that kind, whose content is the tests' own; say whether it is held back."""
    return bool(type(manager).__exit__(manager, kind, kind and kind("an exception of the tests"), None))


_FUNCTIONS: dict[str, Any] = {
    "call": _call,
    "instance": isinstance,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "enter": _enter,
    "exit": _exit,
}
for _name in (*ARITHMETIC, *COMPARISONS, *CONVERSIONS, *ACCESSES):
    _FUNCTIONS[_name] = getattr(builtins, _name, None) or getattr(operator, _name)


class Candidate:
    """Serves the namespace of the code under test over a channel."""

    def __init__(self, channel, namespace):
        self.channel = channel
        self.namespace = namespace
        self.objects = []
        self.numbers = {}

    def refer(self, value):
        number = self._number(value)
        if isinstance(value, type(sys)):
            return {"module": [number, value.__name__]}
        if isinstance(value, type) and value.__module__ == "builtins" and vars(builtins).get(value.__name__) is value:
            return {"named": ["builtins", value.__name__]}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [number, [base.__name__ for base in value.__mro__]]}
        return {"ref": number}

    def _number(self, value):
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]

    def resolve(self, data):
        if "callback" in data:
            return lambda *args: self._call_back(data["callback"], args)
        if "named" in data:
            return find(*data["named"])
        return self.objects[data["ref"]]

    def _call_back(self, number, args):
        self.channel.send({"callback": number, "args": pack(args, self.refer)})
        answer = self.channel.receive()
        if "value" not in answer:
            raise (find("builtins", answer["raise"]) or ValueError)("the tests' function raised")
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
                reply["args"] = self._plain_args(error)
            self.channel.send(reply)

    def _plain_args(self, error):
        """Return what an exception was made of where that is small plain data, else nothing."""
        args = error.args if type(error.args) is tuple and len(error.args) < 10 else ()
        is_plain = all(arg is None or type(arg) in (bool, int, float, str) for arg in args)
        return [pack(arg, self.refer) for arg in args] if is_plain and len(str(args)) < 10_000 else []

    def _answer(self, request):
        args, kwargs = unpack(request["args"], self.resolve), unpack(request["kwargs"], self.resolve)
        value = _FUNCTIONS[request["do"]](*args, **kwargs)
        given = mutable([*args, *kwargs.values()])
        changed = [pack(arg, self.refer) for arg in given]
        same = next((number for number, arg in enumerate(given) if arg is value), None)
        if same is not None:
            return {"same": same, "changed": changed}
        return {"value": pack(value, self.refer), "changed": changed}
