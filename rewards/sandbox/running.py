"""Run the tests' source: beside the code under test, or inside its process where they ask for what needs that.

Beside (`run_tests`), what the code defines stands for objects of another process, and what it returns is plain data that
nothing of its own compares. Subclassing, patching, capturing what is printed, awaiting and identity need one process
(`run_inside`), where that code can do as it likes: such a pass counts only if altered tests fail (`altered`).
"""

from __future__ import annotations

import _ast
import builtins
import importlib
import sys

import calls  # noqa: F401 (what tests of calls import; they can read no file)
from test_side import Remote, StoppedError

_NEEDS_INSIDE = {"patch", "monkeypatch", "redirect_stdout", "redirect_stderr", "stdout", "stdin", "asyncio", "inspect"}
_NEEDS_INSIDE |= {"weakref", "issubclass", "gc", "abc", "get_type_hints", "signature"}
"""What tests do with these works only in the process of the code under test."""
_OFTEN_INSIDE = {"type", "vars", "dir", "id", "__class__", "__doc__", "__dict__", "asdict", "astuple", "is_dataclass"}
"""What they do with these may: where it did not, the run inside is asked."""

CO_COROUTINE = 0x80
"""The flag of an `async def`'s code (`inspect.CO_COROUTINE`)."""


class UnreadableTestsError(Exception):
    """The tests want what is not there, whatever the code under test does."""


def run_tests(source, link):
    """Run the tests' source against the names that `link` offers; return a word and "passed total".

    Each top-level `assert`, expression, and loop, branch or `try` with one in it counts as one, so does each function
    `test*` and each unittest method. `broken` where the source is no Python or tests nothing. Any other statement that
    raises counts as a check that fails, and so does all that follows: it stands on it. `inside` where the run inside
    decides, the count being what holds without it, of nothing where that says nothing.
    """
    try:
        tree = compile(source, "tests.py", "exec", _ast.PyCF_ONLY_AST)
    except (SyntaxError, ValueError):
        return "broken", "0 0"
    needs = _needs(tree, _NEEDS_INSIDE) or _subclasses(tree)
    _meet_stops(tree)
    solution = type(sys)("solution")
    vars(solution).update(link.names())
    sys.modules["solution"] = solution
    try:
        passed, total = _run(tree, vars(solution), {"next": _next, "_Stopped": StoppedError, "_Asked": _Asked})
    except UnreadableTestsError:
        return "broken", "0 0"
    if link.broken or passed < total:
        if link.unsupported or needs:
            return "inside", "0 0"
        if link.is_doubtful or _needs(tree, _OFTEN_INSIDE) or (not link.broken and link.changed_parts()):
            return "inside", f"0 {total}"
    if link.unsupported or not total:
        return "broken", "0 0"
    return "verdict", f"{0 if link.broken else passed} {total}"


def run_inside(source, solution):
    """Run the tests' source in the process of the code under test, the module `solution`; return "passed total"."""
    tree = compile(source, "tests.py", "exec", _ast.PyCF_ONLY_AST)
    passed, total = _run(tree, vars(solution), {})
    return f"{passed} {total}"


def _run(tree, defined, own):
    visible = _visible(defined, tree)
    defined["__all__"] = list(visible)
    namespace = {**visible, **own, "__name__": "tests"}
    passed, total, whole = _statements(tree, namespace)
    named = {k: v for k, v in namespace.items() if k.startswith("test") and v is not visible.get(k)}
    called = {node.func.id for node in _nodes(tree) if isinstance(node, _ast.Call) and isinstance(node.func, _ast.Name)}
    functions = {k: v for k, v in named.items() if type(v) is type(run_tests)}
    helpers = {k for k, v in functions.items() if _wants_arguments(v)}
    if helpers - called:
        raise UnreadableTestsError(f"{sorted(helpers - called)} take what only pytest would give them")
    functions = [_awaited(v) for k, v in functions.items() if k not in helpers]
    cases = [v for v in namespace.values() if isinstance(v, type) and hasattr(v, "countTestCases")]
    for case in cases:
        functions += [test.debug for test in sys.modules["unittest"].defaultTestLoader.loadTestsFromTestCase(case)]
    total += len(functions)
    passed += sum(map(_holds, functions)) if whole else 0
    return passed, total + (bool(total) and not whole)


def _wants_arguments(function):
    return function.__code__.co_argcount > len(function.__defaults__ or ())


def _awaited(function):
    """Return a call of the test that also runs what it awaits: calling it alone would check nothing."""
    if not function.__code__.co_flags & CO_COROUTINE:
        return function
    asyncio = importlib.import_module("asyncio")
    return lambda: asyncio.run(function())


def _needs(tree, names):
    nodes = _nodes(tree)
    used = {getattr(node, field, None) for node in nodes for field in ("id", "attr", "name", "module")}
    return bool(names & used) or any(isinstance(node, (_ast.Await, _ast.AsyncFunctionDef)) for node in nodes)


def _subclasses(tree):
    """Say whether a class of the tests has a base that neither they nor Python's own names define."""
    known = _bound(tree) | set(vars(builtins))
    bases = [base for node in _nodes(tree) if isinstance(node, _ast.ClassDef) for base in node.bases]
    return any(getattr(base, "id", None) not in {None, *known} for base in bases)


_MISSING = object()


def _next(iterator, default=_MISSING):
    """Do what `next` does; where the code under test has no further item, that ends no iteration of the tests'."""
    try:
        return next(iterator)
    except StopIteration as error:
        if default is not _MISSING:
            return default
        if isinstance(iterator, Remote):
            raise StoppedError(*error.args) from None
        raise


class _Asked:
    """Stands before `.__next__`, which a test may hand to what iterates."""

    def __init__(self, iterator):
        self._iterator = iterator

    def step(self):
        return _next(self._iterator)


_EXPECTING = ("assertRaises", "assertRaisesRegex", "raises", "suppress")


def _meet_stops(tree):
    """Let the tests' handlers of StopIteration, and what expects one, also meet what stands for it."""
    for node in _nodes(tree):
        if isinstance(node, _ast.ExceptHandler) and node.type is not None:
            node.type = _with_stopped(node.type)
        elif isinstance(node, _ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in _EXPECTING:
                node.args = [_with_stopped(arg) for arg in node.args]
        elif isinstance(node, _ast.Attribute) and node.attr == "__next__" and isinstance(node.ctx, _ast.Load):
            asked = _ast.Name(id="_Asked", ctx=_ast.Load(), **_place(node))
            node.value, node.attr = _ast.Call(func=asked, args=[node.value], keywords=[], **_place(node)), "step"


def _with_stopped(kind):
    names = kind.elts if isinstance(kind, _ast.Tuple) else [kind]
    if not any(getattr(name, "id", "") == "StopIteration" for name in names):
        return kind
    stopped = _ast.Name(id="_Stopped", ctx=_ast.Load(), **_place(kind))
    return _ast.Tuple(elts=[*names, stopped], ctx=_ast.Load(), **_place(kind))


def _place(node):
    return {"lineno": node.lineno, "col_offset": node.col_offset}


_COMPARERS = {"isclose": "math", "fabs": "math", "Counter": "collections", "deque": "collections"}
_COMPARERS |= {
    "OrderedDict": "collections",
    "defaultdict": "collections",
    "Decimal": "decimal",
    "Fraction": "fractions",
}
"""What tests compare with and may have from the code under test only, which has other names to be tested by."""


def _visible(defined, tree):
    """Return what the tests see of what the code defines: not what would shadow the tests' own Python, as `all`.

    Where they use no name but Python's own, such a name is the very thing that they test.
    """
    public = {name: value for name, value in defined.items() if not name.startswith("__")}
    free = {node.id for node in _nodes(tree) if isinstance(node, _ast.Name)} - _bound(tree)
    free = {name for name in free if not hasattr(builtins, name)} - set(_COMPARERS)
    if not free and "solution" not in {node.module for node in _nodes(tree) if isinstance(node, _ast.ImportFrom)}:
        return public
    own = {
        name: value
        for name, value in public.items()
        if not hasattr(builtins, name) and (name not in sys.stdlib_module_names or isinstance(value, type(sys)))
    }
    for name in set(own) & set(_COMPARERS):
        own[name] = getattr(importlib.import_module(_COMPARERS[name]), name)
    return own


def _bound(tree):
    """Return the names that the tests define themselves."""
    names = set()
    for node in _nodes(tree):
        if isinstance(node, _ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, _ast.arg):
            names.add(node.arg)
        elif isinstance(node, (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef, _ast.ExceptHandler)):
            names.add(node.name)
        elif isinstance(node, _ast.Name) and isinstance(node.ctx, _ast.Store):
            names.add(node.id)
    return names


def _statements(tree, namespace):
    """Return how many of the top-level checks hold, how many there are, and whether the source ran to its end."""
    passed, whole = 0, True
    for statement in tree.body:
        code = compile(_ast.Module(body=[statement], type_ignores=[]), "tests.py", "exec")
        if whole and isinstance(statement, (_ast.Import, _ast.ImportFrom)):
            _import_first(statement)
        holds = whole and _holds(lambda code=code: exec(code, namespace))
        passed += holds and _is_check(statement)
        whole = whole and (holds or _is_check(statement))
    return passed, sum(map(_is_check, tree.body)), whole


def _import_first(statement):
    """Raise UnreadableTestsError where a module that the tests import is not installed, which is no program's fault."""
    names = [statement.module] if isinstance(statement, _ast.ImportFrom) else [alias.name for alias in statement.names]
    for name in names:
        try:
            importlib.import_module(name or "")
        except ModuleNotFoundError:
            raise UnreadableTestsError(f"the tests import {name}, which is not installed") from None
        except Exception:  # a module that fails while it is imported is no missing one
            return  # the tests' own statement meets it again


def _is_check(statement):
    if isinstance(statement, _ast.Expr):  # one that calls nothing holds for every program
        return any(isinstance(node, (_ast.Call, _ast.Await)) for node in _nodes(statement))
    parts = [statement, *getattr(statement, "handlers", [])]
    inside = [s for part in parts for name in ("body", "orelse", "finalbody") for s in getattr(part, name, [])]
    is_block = isinstance(statement, (_ast.For, _ast.While, _ast.If, _ast.With, _ast.Try))
    return isinstance(statement, _ast.Assert) or (is_block and any(map(_is_check, inside)))


def _nodes(tree):
    """Return a syntax tree's nodes, the outer first (`ast.walk` is not worth its module's import)."""
    nodes = [tree]
    for node in nodes:
        for field in node._fields:
            value = getattr(node, field, None)
            nodes += [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, _ast.AST)]
    return nodes


def _holds(check):
    try:
        check()
    except Exception:  # a test may fail in any way the code under test makes it fail
        return False
    return True
