"""The tests' side: assertions about objects that live in another process.

The candidate's process runs the code that nobody has read and answers requests (`program_side.py`). The tests' process
holds the assertions and sees a `Remote` for everything of the candidate's that is not plain data. So the candidate can
not patch the tests, read what they expect, or end them; and what it returns is compared here, with Python's own `==`.

An object that equals everything equals nothing here: a Remote is never compared with plain data, and what arithmetic
with plain data makes of it stays Remote, or an object that has been told the expected value could turn into it.
Not supported: passing the candidate an instance of a class that the tests define, subclassing the candidate's classes,
awaiting its coroutines, capturing what it prints. What can be recognised of it makes the tests `broken`.
"""

from __future__ import annotations

import _ast
import builtins
import importlib
import sys

from messages import ACCESSES, ARITHMETIC, COMPARISONS, CONVERSIONS, BridgeError, pack, unpack

TYPE_CHECKING = False  # typing is not worth its import here
if TYPE_CHECKING:
    from typing import Any


class UnsupportedError(TypeError):
    """The tests ask for what can not be said between two processes."""


class Link:
    """Asks the candidate's process and turns its answers into plain data, Remotes and exceptions."""

    def __init__(self, channel):
        self.channel = channel
        self.broken = False
        self.unsupported = False
        self.callbacks = []
        self.exceptions = {}
        self.remotes = {}

    def names(self):
        """Return what the code under test defines."""
        return unpack(self._receive()["names"], self.resolve)

    def refer(self, value):
        if isinstance(value, Remote):
            return {"ref": value._ref}
        if isinstance(value, type) and value in self.exceptions.values():
            raise UnsupportedError("the code under test's own exceptions can not be passed to it")
        if callable(value):
            self.callbacks.append(value)
            return {"callback": len(self.callbacks) - 1}
        raise UnsupportedError(f"a {type(value).__name__} of the tests can not be passed to the code under test")

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


for _name in COMPARISONS:
    setattr(Remote, f"__{_name}__", _comparison(_name))
for _name in ARITHMETIC:
    setattr(Remote, f"__{_name.rstrip('_')}__", _arithmetic(_name))
    setattr(Remote, f"__r{_name.rstrip('_')}__", _arithmetic(_name, swapped=True))
for _name in CONVERSIONS:
    setattr(Remote, f"__{_name}__", _conversion(_name))
for _name in ACCESSES:
    setattr(Remote, f"__{_name}__", _access(_name))


def run_tests(source, link):
    """Run the tests' source against the names that `link` offers; return a word and "passed total".

    Each top-level `assert`, expression, and loop, branch or `try` with one in it counts as one, so does each function
    `test*` and each unittest method. `broken` where the source is no Python or tests nothing. Any other statement that
    raises counts as a check that fails, and so does all that follows: it stands on it.
    """
    try:
        tree = compile(source, "tests.py", "exec", _ast.PyCF_ONLY_AST)
    except (SyntaxError, ValueError):
        return "broken", "0 0"
    solution = type(sys)("solution")
    vars(solution).update(link.names())
    visible = _visible(vars(solution), _names_of(compile(source, "tests.py", "exec")))
    vars(solution)["__all__"] = list(visible)
    sys.modules["solution"] = solution
    namespace = dict(visible)
    namespace["__name__"] = "tests"
    passed, total, whole = _statements(tree, namespace)
    functions = [v for k, v in namespace.items() if k.startswith("test") and type(v) is type(run_tests)]
    cases = [v for v in namespace.values() if isinstance(v, type) and hasattr(v, "countTestCases")]
    for case in cases:
        functions += [test.debug for test in sys.modules["unittest"].defaultTestLoader.loadTestsFromTestCase(case)]
    total += len(functions)
    passed += sum(_holds(function) for function in functions) if whole else 0
    total += bool(total) and not whole
    if link.unsupported or not total:
        return "broken", "0 0"
    return "verdict", f"{0 if link.broken else passed} {total}"


def _visible(defined, used):
    """Return what the tests see of what the code defines: not what would shadow the tests' own Python, as `all`.

    Where they use no other name of it, such a name is the very thing that they test.
    """
    public = {name: value for name, value in defined.items() if not name.startswith("__")}
    own = {
        name: value
        for name, value in public.items()
        if not hasattr(builtins, name) and (name not in sys.stdlib_module_names or isinstance(value, type(sys)))
    }
    return own if used & (set(own) | {"solution"}) else public


def _names_of(code):
    inner = [_names_of(part) for part in code.co_consts if isinstance(part, type(code))]
    return set(code.co_names).union(*inner)


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
    if isinstance(statement, _ast.Expr):
        return not isinstance(statement.value, _ast.Constant)
    parts = [statement, *getattr(statement, "handlers", [])]
    inside = [s for part in parts for name in ("body", "orelse", "finalbody") for s in getattr(part, name, [])]
    is_block = isinstance(statement, (_ast.For, _ast.While, _ast.If, _ast.With, _ast.Try))
    return isinstance(statement, _ast.Assert) or (is_block and any(map(_is_check, inside)))


def _holds(check):
    try:
        check()
    except Exception:  # a test may fail in any way the code under test makes it fail
        return False
    return True
