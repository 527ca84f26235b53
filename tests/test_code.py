import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from polyphony.rewards import find_reward
from polyphony.rewards.code import Code, program_of, same_output
from tests.conftest import below
from tests.test_sandbox import WAITS, inner_process

FAST = {"wall_s": 2.0, "cpu_s": 2, "memory_bytes": 256 << 20}
DOUBLE = [{"input": "2\n", "output": "4"}, {"input": "5\n", "output": "10\n"}]


def grade(completions, **columns):
    code = find_reward({"name": "code", "limits": FAST})
    columns = {name: [value] * len(completions) for name, value in columns.items()}
    return code(prompts=["Double it."] * len(completions), completions=completions, completion_ids=None, **columns)


def test_the_program_is_the_last_fenced_python_block():
    assert program_of("```python\na = 1\n```\nthen\n```py\nb = 2\n```\nprints\n```text\nc\n```") == "b = 2"
    assert program_of("<think>```python\na\n```</think>\n```\nb\n```") == "b"
    assert program_of("```python\ncut off = 1") == "cut off = 1"
    assert program_of("  print(1)  ") == "print(1)"
    assert program_of("") == ""


def test_output_is_compared_by_lines():
    assert same_output("1 \n2\n\n", "1\n2")
    assert not same_output("1 2", "1\n2")
    assert not same_output("", "0")


IO_ROWS = [
    ("print(2 * int(input()))", 1.0),
    ("```python\nprint(2 * int(input()))\n```", 1.0),
    ("n = int(open(0).read())\nprint(n * 2)", 1.0),
    ("import sys\ndef main(): print(int(sys.stdin.readline()) * 2)\nif __name__ == '__main__': main()", 1.0),
    ("```python\nprint(2 * int(input()))\n```\nExample:\n```\n2\n4\n```", 1.0),
    ("1. So:\n   ```python\n   n = int(input())\n   if n:\n       print(2 * n)\n   ```\n2. Done.", 1.0),
    ("<answer>print(2 * int(input()))</answer>", 1.0),
    ("print(2 * int(input()))\nexit()", 1.0),
    ("print(2 * int(input()))\nquit(1)", 0.0),
    ("", 0.0),
    ("print(4)", 0.0),
    ("print(2 * int(input())); 1 / 0", 0.0),
    ("print(2 * int(input())); raise SystemExit(1)", 0.0),
    ("print(2 * int(input())); print(1)", 0.0),
    ("print(3); print(2 * int(input()))", 0.0),
    ("I would double the number.", 0.0),
    ("The answer is print(2 * int(input()))", 0.0),
    ("while True: pass", 0.0),
    ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", 0.0),
    ("x = []\nwhile True: x.append(' ' * 10**7)", 0.0),
    ("while True: print(4)", 0.0),
    ("print(2 * int(input()), flush=True)\nimport os; os.kill(os.getppid() or 2, 9)", 0.0),
    ("import sys; print('４'); print(1)", 0.0),
    ("print = lambda *a: None\nprint(4)", 0.0),
    ("#" * 10**6, 0.0),
    ("x = " + "[" * 10_000 + "]" * 10_000, 0.0),
]


def test_code_table_for_stdin_and_stdout():
    completions, rewards = zip(*IO_ROWS, strict=True)
    assert grade(completions, tests=DOUBLE) == list(rewards)


ASSERTS = "assert double(2) == 4\nassert double(-1) == -2\nassert double([1]) == [1, 1]"
GOOD = "def double(x): return x + x"
FAKES = {
    "nothing": "",
    "wrong": "def double(x): return x",
    "half": "def double(x): return 4",
    "raises": "def double(x): raise ValueError",
    "exits at once": GOOD + "\nimport sys; sys.exit(0)",
    "exits hard at once": GOOD + "\nimport os; os._exit(0)",
    "exits when called": "def double(x): import os; os._exit(0)",
    "exits softly when called": "def double(x): raise SystemExit(0)",
    "equals everything": "class E:\n    def __eq__(s, o): return True\ndef double(x): return E()",
    "is a list that equals everything": "class E(list):\n    def __eq__(s, o): return True\ndef double(x): return E()",
    "is an int that equals everything": "class E(int):\n    __eq__ = lambda s, o: True\ndouble = lambda x: E(0)",
    "patches builtins": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.exec = print\n"
    "def double(x): return x",
    "shadows builtins": "all = any = lambda *a: True\nAssertionError = None\ndouble = all",
    "patches the harness": "import sys\nfor m in list(sys.modules.values()):\n"
    "    for k in dir(m):\n        if 'test' in k or 'hold' in k: setattr(m, k, lambda *a: ('verdict', '3 3'))\n"
    "def double(x): return x",
    "answers for itself": "import os\nfor fd in range(64):\n    try: os.write(fd, b'verdict 3\\n3 3\\n')\n"
    "    except OSError: pass\ndef double(x): return x",
    "reads the tests in memory": "import gc, inspect\ndef double(x):\n"
    "    frames = [f.frame.f_locals for f in inspect.stack()]\n"
    "    found = [o for o in gc.get_objects() if isinstance(o, (str, dict)) and 'double(2)' in str(o)[:500]]\n"
    "    return 4 if any('assert double' in str(f.get('tests', '')) for f in frames) else found and None",
    "traces its caller": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(print)\ndef double(x): return x",
    "defines tests": "def test_double(): pass\ndef double(x): return x",
    "never returns": "import time\ndef double(x): time.sleep(60)",
    "never ends": "def double(x):\n    while True: yield x",
    "sends a flood": "def double(x): return 'x' * (1 << 25)",
    "sends a deep answer": "def double(x):\n    y = []\n    for _ in range(900): y = [y]\n    return y",
    "kills": "import os\ndef double(x): os.kill(-1, 9)",
}


def test_nothing_fakes_a_pass_of_tests():
    assert grade([GOOD, *FAKES.values()], test_code=ASSERTS) == [1.0] + [0.0] * len(FAKES)


def test_being_told_the_expected_value_does_not_help():
    told = (
        "class E:\n    def __init__(s, v=None): s.v = v\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n"
        "    def __abs__(s): return 0.0\n    def __lt__(s, o): return True\n    def __float__(s): return 0.0\n"
        "    def __round__(s, n=0): return 0.0\n    def __contains__(s, o): return True\n"
        "    def __bool__(s): return True\ndef root(x): return E()"
    )
    for test in (
        "assert abs(root(2) - 1.41421356) < 1e-6",
        "assert abs(1.41421356 - root(2)) < 1e-6",
        "assert round(root(2) - 1.41421356, 5) == 0",
        "assert float(root(2) - 1.41421356) == 0",
        "assert 1 < root(2) < 2",
        "assert 1.4 in root(2)",
        "import math\nassert math.isclose(root(2), 1.41421356)",
        "assert root(2) in [1.41421356]",
    ):
        assert grade([told, "def root(x): return x ** 0.5"], test_code=test)[0] == 0.0, test


HONEST = [
    ("def sort(a): a.sort()", "a = [3, 1]\nsort(a)\nassert a == [1, 3]"),
    (
        "def check(x): return {1: (x, [None, 2.5]), 'k': {3}}",
        "assert check(True) == {1: (True, [None, 2.5]), 'k': {3}}",
    ),
    ("def gen(n):\n    for i in range(n): yield i", "assert list(gen(3)) == [0, 1, 2]\nassert sum(gen(4)) == 6"),
    ("def apply(f, x): return f(x)", "assert apply(lambda x: x * 2, 3) == 6\nassert apply(len, 'abc') == 3"),
    (
        "class Stack:\n    def __init__(s): s.items = []\n    def push(s, x): s.items.append(x); return s\n"
        "    def __len__(s): return len(s.items)\n    def __getitem__(s, i): return s.items[i]",
        "s = Stack()\ns.push(4).push(5)\nassert len(s) == 2 and s[1] == 5 and s.items == [4, 5]\nassert 4 in s\n"
        "assert isinstance(s, Stack) and not isinstance(3, Stack)",
    ),
    (
        "class V:\n    def __init__(s, x): s.x = x\n    def __add__(s, o): return V(s.x + o.x)\n"
        "    def __mul__(s, k): return V(s.x * k)\n    def __eq__(s, o): return s.x == o.x\n"
        "    def __repr__(s): return f'V{s.x}'",
        "assert V(1) + V(2) == V(3)\nassert V(1) != V(2)\nassert (V(2) * 3).x == 6\nassert str(V(1)) == 'V1'",
    ),
    (
        "class Bad(ValueError): pass\ndef f(x):\n    if x < 0: raise Bad('no')\n    raise KeyError(x)",
        "try: f(-1)\nexcept Bad as error: assert str(error) == 'no'\nelse: assert False\n"
        "try: f(-1)\nexcept ValueError: pass\ntry: f(1)\nexcept KeyError: ok = True\nassert ok",
    ),
    ("def add(a, b): return a + b", "def check(candidate):\n    assert candidate(1, b=2) == 3\ncheck(add)"),
    ("def add(a, b): return a + b", "from solution import add\ndef test_add():\n    assert add(1, 2) == 3"),
    (
        "def add(a, b): return a + b",
        "import unittest\nclass T(unittest.TestCase):\n    def test_add(self): self.assertEqual(add(1, 2), 3)",
    ),
    (
        "from datetime import timedelta\nfrom fractions import Fraction\n"
        "def f(d): return d + timedelta(1), Fraction(1, 3)",
        "from datetime import date\nfrom fractions import Fraction\n"
        "assert f(date(2024, 2, 28)) == (date(2024, 2, 29), Fraction(1, 3))",
    ),
    ("import math\ndef f(n): return math.factorial(n)", "assert f(3000) == math.factorial(3000)"),
    ("def f(): return float('nan'), -0.0, 1e308 * 10", "x = f()\nassert x[0] != x[0] and x[2] == float('inf')"),
    (
        "from collections import Counter, deque\ndef f(): return Counter('aab'), deque([1])",
        "assert f()[0] == {'a': 2, 'b': 1}",
    ),
    ("def f(b): return b[::-1], bytearray(b), 1j", "assert f(b'ab') == (b'ba', bytearray(b'ab'), 1j)"),
    ("def double(x):\n    print('noise', flush=True)\n    return x + x\nprint('noise')", ASSERTS),
]


def test_tests_see_what_the_program_defines_as_if_they_stood_below_it():
    code = find_reward({"name": "code", "limits": FAST})
    programs, tests = zip(*HONEST, strict=True)
    rewards = code(prompts=[""] * len(programs), completions=list(programs), test_code=list(tests))
    assert [test for test, reward in zip(tests, rewards, strict=True) if reward != 1.0] == []


def test_partial_credit_is_the_share_that_holds():
    code = Code(partial_credit=True, limits=FAST)
    # print(4) gets the first of two cases; `half` gets 1 of 3 assertions
    assert code([""], ["print(4)"], tests=[DOUBLE]) == [0.5]
    assert code([""], [FAKES["half"]], test_code=[ASSERTS]) == [pytest.approx(1 / 3)]


@pytest.mark.parametrize(
    "tests",
    [
        "assert",
        "x = 1",
        "def helper(): assert False",
        "'only words'",
        "['assert double(2) == 4'][0]",
        "double",
        "import not_installed\nassert double(2) == 4",
        "from not_installed import approx\nassert double(2) == approx(4)",
        "def test_it(some_fixture): assert double(some_fixture) == 4",
    ],
)
def test_tests_that_test_nothing_are_the_graders_failure(tests):
    assert grade([GOOD], test_code=tests) == [None]


@pytest.mark.parametrize(
    "tests",
    [
        "assert double(1) == 2\ntry:\n    double(None)\n    assert False\nexcept TypeError: pass",
        "for x, y in [(1, 2), (2, 4)]:\n    assert double(x) == y",
        "import contextlib\nwith contextlib.nullcontext():\n    assert double(1) == 2",
        "if True:\n    assert double(1) == 2",
        "assert double(0) == 0\nresult = double(1) + 0\nassert result == 2",
    ],
)
def test_checks_inside_blocks_count(tests):
    assert grade([GOOD, "def double(x): return 0"], test_code=tests) == [1.0, 0.0]


def test_a_program_named_like_a_builtin_is_what_is_tested():
    right, wrong = "def sum(a, b): return a * b", "def sum(a, b): return a + b"
    assert grade([right, wrong], test_code="assert sum(2, 3) == 6") == [1.0, 0.0]
    # but it does not shadow what the tests of another name are written with
    shadows = "def double(x): return x\ndef all(x): return True"
    assert grade([shadows], test_code="assert all([double(2) == 4])") == [0.0]
    assert grade(["def all(x): return True"], test_code="assert all([double(2) == 4])") == [0.0]
    starred = "from solution import *\nassert all([double(2) == 4])"
    assert grade([shadows, GOOD + "\ndef all(x): return False"], test_code=starred) == [0.0, 1.0]


def test_tests_that_hand_over_their_own_objects_are_asked_inside():
    passes = "class P: pass\nassert f(P()) is None"
    expects = "try:\n    f(object())\n    assert False\nexcept TypeError: pass"
    assert grade(["def f(x): return None"], test_code=passes) == [1.0]
    assert grade(["def f(x): return None"], test_code=expects) == [None]  # there is nothing to alter
    # what the code under test does with a function of the tests is its own affair
    assert grade(["def f(g): return g(list)"], test_code="assert f(lambda kind: object()) == 1") == [0.0]


def test_a_statement_that_raises_is_a_check_that_fails_even_at_the_end():
    assert grade(["def f(): return 1"], test_code="assert f() == 1\nlength = len(f())") == [0.0]


def test_a_setup_line_that_fails_fails_what_follows():
    assert grade(["def f(): return 1"], test_code="x = missing\nassert True") == [0.0]


def test_it_runs_outside_the_main_thread_and_after_a_pickle():
    code, found = pickle.loads(pickle.dumps(find_reward({"name": "code", "limits": FAST, "workers": 2}))), []
    thread = threading.Thread(target=lambda: found.append(code([""] * 2, ["print(4)"] * 2, tests=[DOUBLE[:1]] * 2)))
    thread.start()
    thread.join()
    assert found == [[1.0, 1.0]]


def test_rows_without_a_column_of_tests_are_refused():
    with pytest.raises(ValueError, match="rows need a column tests or test_code"):
        find_reward("code")([""], [GOOD])


def test_a_row_with_both_kinds_of_tests_has_no_verdict():
    assert grade([GOOD], tests=DOUBLE, test_code="assert 1") == [None]


def test_an_unknown_limit_is_refused():
    with pytest.raises(ValueError, match=r"code: limits: unknown argument 'ram'; known: wall_s, cpu_s"):
        find_reward({"name": "code", "limits": {"ram": 1}})


def test_a_killed_process_that_forks_sandboxes_loses_nothing():
    assert grade(["print(4)"], tests=DOUBLE[:1]) == [1.0]
    (server,) = set(below("sandbox/__main__.py")) & set(psutil.Process().children())
    server.kill()
    assert grade(["print(4)"] * 4, tests=DOUBLE[:1]) == [1.0] * 4


def test_sandboxes_end_with_the_process_that_wanted_them():
    source = (
        "from polyphony.rewards.code import Code\n"
        "Code(limits={'wall_s': 2.0})([''] * 2, ['while True: pass'] * 2, tests=[[{'input': '', 'output': '1'}]] * 2)"
    )
    owner = psutil.Popen([sys.executable, "-c", source])
    while len(sandboxes := owner.children(recursive=True)) < 3:  # what forks them, and a program at least
        time.sleep(0.05)
    owner.kill()
    owner.wait()
    assert psutil.wait_procs(sandboxes, timeout=20)[1] == []


def test_cases_may_be_json():
    assert grade(["print(4)"], tests='[{"input": "", "output": "4"}]') == [1.0]


STOPS = {
    "raised": "raise StopIteration",
    "with a value": "raise StopIteration(4)",
    "a class of its own": "raise type('Done', (StopIteration,), {})",
    "of another iteration": "return next(iter(()))",
    "asynchronous": "raise StopAsyncIteration",
    "of a generator": "raise GeneratorExit",
}
ITERATIONS = [
    "assert all(map(double, [1, 2])) and list(map(double, [1, 2])) != [1, 2, 3]",
    "assert all(x == y for x, y in zip(map(double, [1, 2]), [2, 4]))",
    "for got, wanted in zip(map(double, [1, 2]), [2, 4]):\n    assert got == wanted",
    "assert not [x for x in map(double, [1]) if x != 2]",
    "assert not any(x != 2 for x in map(lambda n: double(n), [1]))",
    "assert sum(1 for _ in filter(double, [0, 1])) < 2",
    "for _ in map(double, [1, 2]):\n    assert False",
    "assert list(iter(lambda: double(1), 2)) == []",
    "assert set(map(double, [1, 2])) <= {2, 4}",
    "wrong = [*filter(lambda n: double(n) != 2 * n, range(3))]\nassert not wrong",
    "class Run:\n    def __iter__(self): return self\n    def __next__(self): return double(1)\n"
    "for got in Run():\n    if got == 2: break\n    assert got == 2",
]


@pytest.mark.parametrize("stop", STOPS)
def test_no_exception_of_the_program_ends_an_iteration_of_the_tests(stop):
    program = f"def double(x):\n    {STOPS[stop]}"
    code = find_reward({"name": "code", "limits": FAST})
    rewards = code([""] * len(ITERATIONS), [program] * len(ITERATIONS), test_code=ITERATIONS)
    assert [test for test, reward in zip(ITERATIONS, rewards, strict=True) if reward != 0.0] == []


def test_nor_does_an_iterator_that_is_asked_by_hand():
    program = "def items(): return iter(())"
    assert grade([program], test_code="assert all(map(lambda _: next(items()) == 1, [1, 2]))") == [0.0]
    assert grade([program], test_code="assert all(map(lambda _: items().__next__() == 1, [1, 2]))") == [0.0]


@pytest.mark.parametrize(
    "tests",
    [
        "assert list(items()) == [1, 2]\nassert [x for x in items()] == [1, 2]",
        "it = items()\nassert next(it) == 1 and next(it) == 2 and next(it, None) is None",
        "it = items()\nnext(it), next(it)\ntry:\n    next(it)\n    assert False\nexcept StopIteration: pass",
        "it = items()\nnext(it), next(it)\ntry:\n    next(it)\nexcept StopIteration as end:\n    assert end.value == 3",
        "import contextlib\nwith contextlib.suppress(StopIteration):\n    raised = stop()\n    assert False",
        "try:\n    stop()\n    assert False\nexcept (KeyError, StopIteration) as e:\n    assert e.value == 7",
        "import unittest\nclass T(unittest.TestCase):\n    def test_end(self):\n"
        "        self.assertRaises(StopIteration, stop)\n        with self.assertRaises(StopIteration): next(items.empty())",
    ],
)
def test_tests_that_expect_the_end_of_an_iteration_meet_it(tests):
    program = (
        "def items():\n    yield 1\n    yield 2\n    return 3\ndef stop(): raise StopIteration(7)\n"
        "items.empty = lambda: iter(())"
    )
    assert grade([program, "def items(): return []\ndef stop(): return None"], test_code=tests) == [1.0, 0.0]


HANDED_BACK = [
    ("class Bad(ValueError): pass\ndef f(e): return issubclass(e, Bad)", "assert f(Bad) is True"),
    ("class Bad(Exception): pass\ndef f(e): raise e", "try:\n    f(Bad)\nexcept Bad:\n    ok = 1\nassert ok == 1"),
    ("def f(e): return e is ValueError", "assert f(ValueError) is True"),
    ("import math\ndef f(m): return m is math", "assert f(math) is True"),
    ("import json\ndef f(m): return m.dumps([1])", "import json\nassert f(json) == '[1]'"),
    ("def f(kind): return isinstance(1, kind)", "assert f(int) and not f(str)"),
    ("def f(g, x): return g(x)", "import math\nassert f(math.sqrt, 4) == 2 and f(len, 'abc') == 3"),
    (
        "def f(g):\n    try: g()\n    except KeyError: return 'none'",
        "def g(): raise KeyError('k')\nassert f(g) == 'none'",
    ),
    ("def f(x): return type(x)", "assert f(1) is int and f('') == str"),
    (
        "def f(): raise KeyError('k', 2)",
        "try:\n    f()\nexcept KeyError as e:\n    assert e.args == ('k', 2)\nelse:\n    assert False",
    ),
    (
        "class Bad(Exception):\n    def __init__(s, code): super().__init__(f'code {code}')\ndef f(): raise Bad(3)",
        "try:\n    f()\nexcept Bad as e:\n    assert str(e) == 'code 3'\nelse:\n    assert False",
    ),
    ("import solution\nclass Bad(Exception): pass\ndef f(x): return x is Bad", "assert f(Bad) is True"),
]


@pytest.mark.parametrize(("program", "tests"), HANDED_BACK)
def test_classes_and_modules_can_be_handed_back(program, tests):
    wrong = "class Bad(Exception): pass\nimport math, json\ndef f(*a): return Bad"
    assert grade([program, wrong], test_code=tests) == [1.0, 0.0]


def test_a_program_that_the_host_held_up_is_run_again_alone():
    with ThreadPoolExecutor(1) as pool:
        rewards = pool.submit(grade, [WAITS, "print(1)"], tests=[{"input": "", "output": "1"}])
        inner_process(threads=5).suspend()
        assert rewards.result() == [1.0, 1.0]


@pytest.mark.parametrize(
    "program",
    ["import time; time.sleep(60)", "import threading\nlock = threading.Lock()\nwith lock:\n    lock.acquire()"],
)
def test_a_program_that_waits_for_ever_is_wrong(program):
    code = Code(limits={**FAST, "wall_s": 0.5})
    assert code([""] * 2, [program] * 2, tests=[DOUBLE, None], test_code=[None, "assert f() == 4"]) == [0.0, 0.0]


def test_a_helper_named_like_a_test_is_what_the_tests_call():
    tests = "def test_with(n, wanted):\n    assert double(n) == wanted\ntest_with(2, 4)"
    assert grade([GOOD, "def double(x): return x"], test_code=tests) == [1.0, 0.0]


def test_tests_that_await_are_run_to_their_end():
    tests = "async def test_it():\n    assert await f() == 4"
    programs = ["async def f(): return 4", "async def f(): return 5", "def f(): return 4"]
    assert grade(programs, test_code=tests) == [1.0, 0.0, 0.0]
