"""Styles of assertion: what a correct program passes in one process it passes here, and a trick never does."""

from collections import Counter

import pytest

from polyphony.curricula.records import Domain
from polyphony.rewards.code import Code
from polyphony.rewards.code_cases import altered
from polyphony.trainer.data import PromptTable

FAST = {"wall_s": 3.0, "cpu_s": 3, "memory_bytes": 256 << 20}
POINT = "from collections import namedtuple\nPoint = namedtuple('Point', 'x y')\n"
BOX = "class Box:\n    def __init__(self, n=0): self.n = n; self.items = []\n    def get(self): return self.n\n"

STYLES = {
    "range": ("def f(n): return range(n)", "def f(n): return range(n + 1)", "assert f(4) == range(4)"),
    "range in a list": ("def f(): return [range(2)]", "def f(): return [0]", "assert f() == [range(0, 2)]"),
    "range's length": ("def f(n): return range(n)", "def f(n): return range(0)", "assert len(f(4)) == 4 and 3 in f(4)"),
    "named tuple": (
        POINT + "def f(): return Point(1, 2)",
        POINT + "def f(): return Point(2, 1)",
        "p = f()\nassert p.x == 1 and p == (1, 2)",
    ),
    "named tuple handed back": (
        POINT + "def f(p): return p.x",
        POINT + "def f(p): return p.y",
        "assert f(Point(1, 2)) == 1",
    ),
    "named tuple's methods": (
        POINT + "def f(): return Point(1, 2)",
        POINT + "def f(): return Point(1, 3)",
        "assert f()._asdict() == {'x': 1, 'y': 2}",
    ),
    "counter": (
        "from collections import Counter\ndef f(s): return Counter(s)",
        "def f(s): return {}",
        "assert f('aab').most_common(1) == [('a', 2)]",
    ),
    "ordered dict": (
        ("from collections import OrderedDict\ndef f(): return OrderedDict(a=1, b=2)"),
        "def f(): return {}",
        "assert f().popitem(last=False) == ('a', 1)",
    ),
    "order of a dict": (
        "from collections import OrderedDict\ndef f():\n    d = OrderedDict(a=1, b=2)\n    d.move_to_end('a')\n    return d",
        "from collections import OrderedDict\ndef f(): return OrderedDict(a=1, b=2)",
        "assert list(f()) == ['b', 'a']",
    ),
    "time of day": (
        "from datetime import time\ndef f(): return time(9, 30)",
        "def f(): return None",
        "from datetime import time\nassert f() == time(9, 30)",
    ),
    "context manager": (
        ("class f:\n    def __enter__(s): return 5\n    def __exit__(s, *a): pass"),
        ("class f:\n    def __enter__(s): return 6\n    def __exit__(s, *a): return True"),
        "with f() as n:\n    assert n == 5",
    ),
    "manager of a generator": (
        "import contextlib\n@contextlib.contextmanager\ndef f(): yield 5",
        "import contextlib\n@contextlib.contextmanager\ndef f(): yield 6",
        "with f() as n:\n    assert n == 5",
    ),
    "manager that holds back": (
        ("class f:\n    def __enter__(s): return s\n    def __exit__(s, kind, *a): return kind is KeyError"),
        ("class f:\n    def __enter__(s): return s\n    def __exit__(s, *a): pass"),
        "with f():\n    raise KeyError('k')\nassert True",
    ),
    "set of objects": (
        (
            "class f:\n    def __init__(s, x): s.x = x\n    def __hash__(s): return hash(s.x)\n"
            "    def __eq__(s, o): return s.x == o.x"
        ),
        "class f:\n    def __init__(s, x): pass",
        "assert len({f(1), f(1), f(2)}) == 2",
    ),
    "key of a dict": (
        (
            "class f:\n    def __init__(s, x): s.x = x\n    def __hash__(s): return s.x\n"
            "    def __eq__(s, o): return s.x == o.x"
        ),
        "class f:\n    def __init__(s, x): pass",
        "d = {f(1): 'a'}\nassert d.get(f(1)) == 'a'",
    ),
    "hash": ("class f:\n    def __hash__(s): return 9", "class f: pass", "assert hash(f()) == 9"),
    "membership": (
        BOX + "    def __contains__(self, x): return x == self.n",
        BOX + "    def __contains__(self, x): return False",
        "assert 3 in Box(3)\nassert 4 not in Box(3)",
    ),
    "printed": (
        "def f(): print('hi')",
        "def f(): print('ho')",
        (
            "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n"
            "    f()\nassert out.getvalue() == 'hi\\n'"
        ),
    ),
    "printed to a stream": (
        "def f(): print('hi')",
        "def f(): return 'hi'",
        (
            "import io, sys\nold, sys.stdout = sys.stdout, io.StringIO()\nf()\n"
            "text, sys.stdout = sys.stdout.getvalue(), old\nassert text.strip() == 'hi'"
        ),
    ),
    "patched input": (
        "def f(): return int(input()) + 1",
        "def f(): return 0",
        ("from unittest import mock\nwith mock.patch('builtins.input', side_effect=['3']):\n    assert f() == 4"),
    ),
    "patched by a decorator": (
        "import random\ndef f(): return random.random()",
        "def f(): return 0",
        (
            "from unittest.mock import patch\n@patch('random.random', return_value=.25)\n"
            "def test_f(_):\n    assert f() == .25"
        ),
    ),
    "awaited": (
        "async def f(n): return n * 2",
        "async def f(n): return n",
        "import asyncio\nassert asyncio.run(f(4)) == 8",
    ),
    "gathered": (
        ("import asyncio\nasync def f(n):\n    await asyncio.sleep(0)\n    return n * 2"),
        "async def f(n): return n",
        (
            "import asyncio\nasync def main(): return await asyncio.gather(f(1), f(2))\n"
            "assert asyncio.run(main()) == [2, 4]"
        ),
    ),
    "subclass": (
        BOX,
        BOX.replace("return self.n", "return 0"),
        ("class Big(Box):\n    def twice(self): return 2 * self.get()\nassert Big(4).twice() == 8"),
    ),
    "subclass of an abstract class": (
        (
            "import abc\nclass f(abc.ABC):\n    @abc.abstractmethod\n    def area(self): ...\n"
            "    def double(self): return 2 * self.area()"
        ),
        "class f:\n    def double(self): return 3",
        ("class Square(f):\n    def area(self): return 9\nassert Square().double() == 18"),
    ),
    "identity of an argument": (
        "def f(x): x.append(1); return x",
        "def f(x): return x + [1]",
        "v = []\nassert f(v) is v and v == [1]",
    ),
    "identity of an object": (
        (
            "class f:\n    one = None\n    def __new__(c):\n"
            "        c.one = c.one or super().__new__(c)\n        return c.one"
        ),
        "class f: pass",
        "assert f() is f()",
    ),
    "a part that is changed": (
        BOX + "    def size(self): return len(self.items)",
        BOX + "    def size(self): return 0",
        "b = Box()\nb.items.append(7)\nassert b.size() == 1",
    ),
    "a part that is changed by name": (
        BOX,
        BOX.replace("self.items = []", "self.items = ()"),
        "b = Box()\nb.items += [7]\nassert b.items == [7]",
    ),
    "keyword changed in place": ("def f(*, a): a.append(1)", "def f(*, a): pass", "v = []\nf(a=v)\nassert v == [1]"),
    "type": (BOX, "class Other: pass\ndef Box(): return Other()", "assert type(Box()) is Box and Box(3).get() == 3"),
    "name and text": (
        "def f():\n    'Say hi.'",
        "def f():\n    'Say ho.'",
        "assert f.__name__ == 'f' and f.__doc__ == 'Say hi.'",
    ),
    "signature": (
        "def f(a, b=2): pass",
        "def f(a): pass",
        ("import inspect\nassert [*inspect.signature(f).parameters] == ['a', 'b']"),
    ),
    "copies": (
        BOX,
        BOX.replace("return self.n", "return 0"),
        "import copy\nb = copy.deepcopy(Box(5))\nassert b.get() == 5",
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int",
        "class P:\n    def __init__(s, x): s.y = x",
        "from dataclasses import asdict\nassert asdict(P(3)) == {'x': 3}",
    ),
    "own class handed over": (
        "def f(o): return o.value + 1",
        "def f(o): return 0",
        "class Item:\n    value = 4\nassert f(Item()) == 5",
    ),
    "own sequence handed over": (
        "def f(s): return sum(s)",
        "def f(s): return 0",
        ("class S:\n    def __iter__(self): return iter([1, 2])\nassert f(S()) == 3"),
    ),
    "error's content": (
        "def f(): raise KeyError('k', 1)",
        "def f(): raise KeyError('k')",
        ("try:\n    f()\n    assert False\nexcept KeyError as e:\n    assert e.args == ('k', 1)"),
    ),
    "unittest": (
        "def f(): print('hi')",
        "def f(): pass",
        (
            "import io, unittest\nfrom unittest.mock import patch\nclass T(unittest.TestCase):\n"
            "    @patch('sys.stdout', new_callable=io.StringIO)\n    def test_it(self, out):\n"
            "        f()\n        self.assertEqual(out.getvalue(), 'hi\\n')"
        ),
    ),
    "enumeration": (
        "import enum\nclass C(enum.Enum):\n    A = 1",
        "class C:\n    A = 1",
        "assert C.A.value == 1 and C(1) is C.A and C['A'] == C.A",
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_correct_program_passes_in_every_style_and_a_wrong_one_in_none(style):
    right, wrong, tests = STYLES[style]
    assert Code(limits=FAST)([""] * 3, [right, wrong, ""], test_code=[tests] * 3) == [1.0, 0.0, 0.0]


LEARNS = "class Any:\n    def __getattr__(s, n): return s\n    __call__ = lambda s, *a, **k: s\n" + "".join(
    f"    __{name}__ = lambda s, *a: True\n" for name in ("eq", "contains", "lt", "gt", "le", "ge", "bool", "exit")
)
LEARNS += "    __enter__ = __sub__ = __rsub__ = __abs__ = __call__\n    __hash__ = lambda s: 1\n"
TRICKS = {
    "shadows range": ("range = lambda *a: []", "for i in range(3):\n    assert f(i) == i"),
    "shadows range beside it": (
        "range = lambda *a: []\ndef f(n): return 0",
        "for i in range(1, 3):\n    assert f(i) == i",
    ),
    "shadows all": ("all = lambda *a: True\ndef f(n): return 0", "assert all(f(i) == i for i in [1, 2])"),
    "shadows isclose": ("isclose = lambda *a, **k: True\ndef f(n): return 0", "assert isclose(f(2), 1.5)"),
    "patches isclose": (
        ("import math\nmath.isclose = lambda *a, **k: True\nfrom math import isclose\ndef f(n): return 0"),
        "assert isclose(f(2), 1.5)",
    ),
    "shadows sorted": ("def sorted(x): return [1]\ndef f(): return [2]", "assert sorted(f()) == [1]"),
    "shadows Counter": ("Counter = lambda *a: 1\ndef f(): return 'x'", "assert Counter(f()) == Counter('y')"),
    "shadows abs": ("abs = lambda x: 0\ndef f(n): return n", "assert abs(f(2) - 1.5) < 1e-6"),
    "contains everything": (LEARNS + "def f(*a): return Any()", "assert 3 in f(1)"),
    "is its own manager": (LEARNS + "f = Any()", "with f:\n    assert f(2) == 3"),
    "holds back a failure": (
        ("class f:\n    def __enter__(s): return 2\n    def __exit__(s, *a): return True"),
        "with f() as n:\n    assert n == 3",
    ),
    "is equal inside": (LEARNS + "def f(o): return Any()", "class P: pass\nassert f(P()) == 3"),
    "is equal once in two": (LEARNS + "def f(o): return 4", "class P: pass\nassert f(P()) == 3"),
    "reads what is expected": (
        "import sys\ndef f(o): return sys._getframe(1).f_code.co_consts[-2]",
        "class P: pass\nassert f(P()) == 35",
    ),
    "patches assertions": (
        (
            "import builtins\nclass E(Exception):\n    def __init__(s): raise SystemExit\n"
            "builtins.AssertionError = E\ndef f(o): return 0"
        ),
        "class P: pass\nassert f(P()) == 3",
    ),
    "answers for the tests": (
        ("import os\nfor n in range(3, 64):\n    try: os.write(n, b'1 1')\n    except OSError: pass\nos._exit(0)"),
        "class P: pass\nassert f(P()) == 3",
    ),
    "patches the harness": (
        (
            "import sys\nfor m in [*sys.modules.values()]:\n"
            "    if hasattr(m, '_holds'): m._holds = lambda check: True\ndef f(o): return 0"
        ),
        "class P: pass\nassert f(P()) == 3",
    ),
    "prints for itself": (
        "import io\nio.StringIO.getvalue = lambda s: 'hi'\ndef f(): pass",
        (
            "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n"
            "    f()\nassert out.getvalue() == 'hi\\n'"
        ),
    ),
    "a field that is code": (
        ("class R(tuple): _fields = ('x): import os; os._exit(0) #',)\ndef f(): return R([3])"),
        "assert f() == (4,)",
    ),
    "a message of its own, of what equals everything": (
        "import sys\ndef f(n):\n    frame = sys._getframe()\n"
        "    while not hasattr(frame.f_locals.get('self'), 'channel'): frame = frame.f_back\n"
        "    channel = frame.f_locals['self'].channel\n"
        "    while True:\n        channel.send({'value': {'named': ['unittest.mock', 'ANY']}, 'changed': []})\n"
        "        channel.receive()",
        "assert f(2) == 4\nassert f(5) == 10",
    ),
    "an array of objects": (
        ("class A: dtype = 1\nA.__module__ = 'numpy'\nA.tolist = lambda s: 3\ndef f(): return A()"),
        "assert f() == 4",
    ),
}


READS_ITS_TESTS = """
import ast, os, sys
def f(n): return 0
frame, text = sys._getframe(), ""
while frame:
    for value in list(frame.f_locals.values()):
        if isinstance(value, bytes) and b"type(f(2))" in value and b"READS" not in value: text = value.decode()
    frame = frame.f_back
if text:
    is_altered = {}
    for fd in range(3, 64):
        try: os.write(fd, b"0 3" if is_altered else b"3 3")
        except OSError: pass
    os._exit(0)
READS = 1
"""
WAYS_TO_TELL = ("ast.unparse(ast.parse(text)) == text", "text.count('_')", "\"'four_'\" in text")


@pytest.mark.parametrize("way", WAYS_TO_TELL)
def test_a_program_that_reads_its_tests_can_not_tell_which_are_altered(way):
    tests = "assert  type(f(2)) is int\nassert f(2) == 'four' # by hand\nassert f(5) == 'ten'"
    assert Code(limits=FAST)([""], [READS_ITS_TESTS.format(way)], test_code=[tests]) == [0.0]


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_passes_in_any_style(trick):
    program, tests = TRICKS[trick]
    assert Code(limits=FAST)([""], [program], test_code=[tests]) == [0.0]


@pytest.mark.parametrize(
    ("tests", "changed", "failures"),
    [
        ("assert f(2) == 4", "assert f(2) == 5", 1),
        ("assert 4 == f(2)", "assert 5 == f(2)", 1),
        ("assert f() == -1", "assert f() == 0", 1),
        ("assert f() == [1, 'a'] and g(2) is None", "assert f() == [2, 'b'] and g(2) is False", 1),
        ("assert f() == []\nassert g() == {}", "assert f() == [0]\nassert g() == {'a': 0}", 2),
        ("assert 3 in f(3)", "assert 4 in f(3)", 1),
        ("assert abs(f(2) - 0.5) < 1e-06", "assert abs(f(2) - 1.5) < 1e-06", 1),
        ("assert math.isclose(f(2), 0.5)", "assert math.isclose(f(2), 1.5)", 1),
        ("x = 1\nfor i in [1, 2]:\n    assert f(i) == True", "x = 1\nfor i in [1, 2]:\n    assert f(i) == False", 1),
        ("def check(f):\n    assert f(2) == b'a'\ncheck(f)", "def check(f):\n    assert f(2) == b'b'\ncheck(f)", 1),
        ("def test_f():\n    assert f(2) == 'a'", "def test_f():\n    assert f(2) == 'b'", 1),
        ("assert f() == 'Z9.'\nassert f() == '..'", "assert f() == 'Z0.'\nassert f() == '...'", 2),
        (
            "import calls; assert calls.gives('f', '[2]', '[4, null]', wrapped=True)",
            "import calls\nassert calls.gives('f', '[2]', '[5, false]', wrapped=True)",
            1,
        ),
    ],
)
def test_what_is_expected_is_altered(tests, changed, failures):
    other = altered(tests)
    assert (other.source, other.failures) == (changed, failures)


@pytest.mark.parametrize("tests", ["assert f(2)", "assert f(2) is v", "assert f(2) != 3", "x = 4", "assert ("])
def test_tests_without_a_constant_have_nothing_to_alter(tests):
    assert altered(tests) is None
    assert "no expected constant to alter" in Code().remark(tests=tests)


@pytest.mark.parametrize(
    "tests", ["assert f(2) == 4", [{"input": "2", "output": "4"}], {"inputs": ["2"], "outputs": ["4"]}]
)
def test_tests_with_a_constant_and_runs_have_no_remark(tests):
    assert Code().remark(tests=tests) is None


def test_rows_whose_tests_have_no_constant_are_named_when_they_are_loaded():
    rows = [{"prompt": f"row {n}", "tests": f"assert f({n}) == {n}" if n % 2 else f"assert f({n})"} for n in range(20)]
    table = PromptTable(rows, domain=Domain(name="code", kind="structured"), where="domains.code.train", is_chat=False)
    with pytest.warns(
        UserWarning, match=r"10 of 20 rows are kept with a reservation \(row 1: its tests have no .*row 5"
    ):
        table.leave_out_unreadable(Code(), most=0.01)
    assert len(table) == 20


def test_what_happens_without_a_constant_is_what_is_said():
    captured = (
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n    f()\nassert out.getvalue()"
    )
    assert altered(captured) is None
    assert Code(limits=FAST)([""], ["def f(): print(1)"], test_code=[captured]) == [None]


def test_exhausted_programs_and_suspected_tricks_are_counted():
    said = Counter()
    loop, sleeps = "while True: pass", "import time; time.sleep(60)"
    trick = (
        "class E:\n    def __eq__(s, o): return True\n    def __hash__(s): return 1\n"
        "def f(n): return E()\nclass Base: pass"
    )
    inside = "class Mine(Base): pass\nassert f(2) == 4"
    code = Code(limits={**FAST, "cpu_s": 1})
    programs = [loop, sleeps, trick, "def f(n): return 4\nclass Base: pass", "def f(n): 1 / 0"]
    scores = code([""] * 5, programs, test_code=[inside] * 5, log_metric=lambda name, value: said.update({name: value}))
    assert scores == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert said == {"exhausted": 2.0, "suspected_tricks": 1.0, "refused_calls": 0.0}
    said.clear()
    runs = [{"input": "", "output": "1"}]
    code([""] * 3, [loop, sleeps, "print(1)"], tests=[runs] * 3, log_metric=lambda n, value: said.update({n: value}))
    assert said == {"exhausted": 2.0, "suspected_tricks": 0.0, "refused_calls": 0.0}


def test_values_of_numpy_are_plain_where_it_is_installed():
    programs = ["import numpy as np\ndef f(n): return np.arange(n) * 2, np.float32(.5), np.int64(3), np.bool_(True)"]
    tests = "import numpy\na, b, c, d = f(3)\nassert (a == [0, 2, 4]).all() and b == .5 and c == 3 and d is True"
    assert Code(limits={**FAST, "memory_bytes": 2 << 30}, site_packages=True)([""], programs, test_code=[tests]) == [
        1.0
    ]
