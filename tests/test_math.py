import multiprocessing
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from polyphony.rewards import find_reward
from polyphony.rewards.math import equal_at_sight, plain_number
from tests.conftest import below

ROWS = [
    (r"\boxed{4}", "4", 1.0),
    (r"so $x = \boxed{4}$.", "4", 1.0),
    ("<answer>4</answer>", "4", 1.0),
    ("<answer>$4$</answer>", r"\boxed{4}", 1.0),
    ("The answer is 4.", "4", 1.0),
    ("The answer is: $\\frac{1}{2}$", "0.5", 1.0),
    ("2 + 2 = 4", "4", 1.0),
    ("It costs 1,234.50 dollars", "1234.5", 1.0),
    (r"\boxed{\frac34}", "0.75", 1.0),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", 1.0),
    (r"\boxed{x=4}", "4", 1.0),
    (r"\boxed{12\text{ cm}}", "12", 1.0),
    ("<answer>12 apples</answer>", "12", 1.0),
    (r"\boxed{50\%}", "0.5", 1.0),
    (r"\boxed{\$12}", "12", 1.0),
    (r"\boxed{-4}", "\u22124", 1.0),
    (r"\boxed{2, 1}", r"\{1, 2\}", 1.0),
    (r"\boxed{1} and \boxed{2}", "1, 2", 1.0),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
    (r"\boxed{\text{No solution}}", "no solution", 1.0),
    ("#### 10", "5 + 5 = 10\n#### 10", 1.0),
    (r"\boxed{7}", 7, 1.0),
    ("The final answer is **42**.", "42", 1.0),
    ("Final Answer: The final answer is $42$. I hope it is correct.", "42", 1.0),
    ("The answer is:\n\n\\[\n42\n\\]", "42", 1.0),
    ("The answer is 42, since 6 * 7 = 42.", "42", 1.0),
    ("The answer is 42 cm^2.", "42", 1.0),
    (r"\boxed{1 \times 10^3}", "1000", 1.0),
    (r"\boxed{1e3}", "1000", 1.0),
    (r"\boxed{3e8}", r"3 \times 10^8", 1.0),
    ("it is 3.0e8 m", "8", 0.0),
    (r"so it is 3.0 \times 10^8", "8", 0.0),
    (r"so it is 3.0 \times 10^8", "300000000", 1.0),
    (r"we get \frac{1}{2}", "0.5", 1.0),
    ("it is .5", "5", 0.0),
    ("it is \u22127", "-7", 1.0),
    ("pages 3-7", "-7", 0.0),
    (r"\boxed{\sin^2 x + \cos^2 x}", "1", 1.0),
    (r"\boxed{2 1/2}", "5/2", 1.0),
    (r"\boxed{2 1/2}", "1", 0.0),
    (r"\boxed{42 percent}", r"42\%", 1.0),
    (r"\boxed{2**10}", "1024", 1.0),
    (r"\boxed{1 \text{ and } 2}", "2, 1", 1.0),
    ("\\boxed{\u221a12}", r"2\sqrt{3}", 1.0),
    (r"\boxed{x<3}", r"(-\infty, 3)", 1.0),
    (r"\boxed{1010_2}", "1010_3", 0.0),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", 1.0),
    (r"\boxed{\begin{pmatrix}1&3\\2&4\end{pmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", 0.0),
    ("", "4", 0.0),
    (r"\boxed{}", "4", 0.0),
    (r"\boxed{5}", "4", 0.0),
    (r"\boxed{4}, no, \boxed{5}", "4", 0.0),
    (r"\boxed{3} or \boxed{4}", "4", 0.0),
    (r"\boxed{3 \text{ or } 4}", "4", 0.0),
    (r"\boxed{3, 4}", "4", 0.0),
    (r"\boxed{\{3, 4\}}", "4", 0.0),
    (r"\boxed{[0, 10]}", "4", 0.0),
    (r"\boxed{x \in \{3, 4\}}", "4", 0.0),
    (r"\boxed{5 = 4}", "4", 0.0),
    (r"\boxed{1 = 2 = 3 = 4}", "4", 0.0),
    (r"\boxed{4 \text{ million}}", "4", 0.0),
    ("<answer>3 or 4</answer>", "4", 0.0),
    ("<answer>four</answer>", "4", 0.0),
    (r"\boxed{x}", "4", 0.0),
    (r"\boxed{4x}", "4", 0.0),
    (r"\boxed{(2, 1)}", "(1, 2)", 0.0),
    (r"\boxed{0.33}", r"\frac{1}{3}", 0.0),
    (r"\boxed{\text{on solution}}", "no solution", 0.0),
    (r"\boxed{tac}", r"\text{cat}", 0.0),
    ("<think>it is \\boxed{4}", "4", 0.0),
    ("What is 2 + 2? Is it 4?", "4", 0.0),  # the prompt said again
    ("\\boxed{\u0664}", "5", 0.0),  # an Arabic 4
    ("\\boxed{\u0410}", "A", 0.0),  # a Cyrillic A
    (r"\boxed{__import__('os').system('touch /tmp/polyphony-mark')}", "4", 0.0),
    (r"\boxed{().__class__.__base__.__subclasses__()}", "4", 0.0),
    (r"\boxed{exec('open(\"/tmp/polyphony-mark\", \"w\")')}", "4", 0.0),
    (r"\boxed{" + "9" * 5000 + "}", "4", 0.0),
    ("4" * 300_000, "4", 0.0),
    (r"\boxed{" * 100_000, "4", 0.0),
]


def test_math_table():
    completions, answers, _ = zip(*ROWS, strict=True)
    prompts = ["What is 2 + 2? Is it 4?"] * len(ROWS)
    graded = find_reward("math")(prompts=prompts, completions=completions, completion_ids=None, answer=answers)
    wrong = [(c[:80], a, r, g) for (c, a, r), g in zip(ROWS, graded, strict=True) if r != g]
    assert wrong == []
    assert not Path("/tmp/polyphony-mark").exists()


ENDLESS = [
    r"\boxed{" + "(" * 400 + "4" + ")" * 300 + "}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{\sum_{n=1}^{10^{9}} \frac{1}{n^3+n+1}}",
    r"\boxed{" + "+".join(rf"\sqrt[{n}]{{{n}+\sqrt{{{n + 1}}}}}" for n in range(2, 30)) + "}",
    r"\boxed{((10^{10})!)!}",
]


@pytest.mark.slow
def test_what_never_simplifies_ends_at_its_limit_and_is_wrong():
    grade = find_reward({"name": "math", "timeout_s": 1.0, "workers": 2})
    grade([""], [r"\boxed{x+x}"], answer=["2x"])  # the workers are up
    start = time.monotonic()
    rewards = grade([""] * len(ENDLESS), ENDLESS, answer=["4"] * len(ENDLESS))
    assert set(rewards) == {0.0}
    assert time.monotonic() - start < 60  # four limits, and new workers on a busy host
    assert grade([""], [r"\boxed{x+x}"], answer=["2x"]) == [1.0]


def test_a_reference_that_can_not_be_read_is_the_graders_failure():
    assert find_reward("math")([""], [r"\boxed{4}"], answer=[r"\frac{"]) == [None]


def test_only_marked_answers_count_where_asked():
    grade = find_reward({"name": "math", "sources": ["boxed"]})
    assert grade([""] * 3, [r"\boxed{4}", "4", "The answer is 4"], answer=["4"] * 3) == [1.0, 0.0, 0.0]


def test_it_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(find_reward("math")([""], [r"\boxed{y+y}"], answer=["2y"])))
    thread.start()
    thread.join()
    assert found == [[1.0]]


def grade_in_a_process(results):
    results.put(find_reward("math")([""], [r"\boxed{z+z}"], answer=["2z"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_it_works_in_worker_processes(method):
    find_reward("math")([""], [r"\boxed{z+z}"], answer=["3z"])  # a forked child must not talk to these workers
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=grade_in_a_process, args=(results,))
    process.start()
    assert results.get(timeout=120) == [1.0]
    process.join()


def test_a_worker_that_is_killed_while_it_waits_loses_nothing():
    grade = find_reward({"name": "math", "workers": 1, "timeout_s": 30.0})
    assert grade([""], [r"\boxed{u+u}"], answer=["2u"]) == [1.0]
    for process in below("polyphony.rewards.worker_main"):
        with suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait()
    assert grade([""] * 2, [r"\boxed{v+v}", r"\boxed{w+w}"], answer=["2v", "2w"]) == [1.0, 1.0]


def test_numbers_and_words_are_compared_at_sight():
    assert equal_at_sight("1,000", "1000") is True
    assert equal_at_sight("12 apples", "13") is False
    assert equal_at_sight(r"\frac{2}{4}", "1/2") is True
    assert equal_at_sight(r"-\dfrac{1}{2}", "0.5") is None
    assert equal_at_sight("0.1234567", "0.1234568") is False
    assert equal_at_sight("0.333", "1/3") is None
    assert equal_at_sight("(1, 2)", "(1,3)") is False
    assert equal_at_sight("(1, 2)", "[1,2]") is False
    assert equal_at_sight("x+1", "1+x") is None
    assert plain_number("1/0") is None
    assert plain_number("2 pi") is None
    assert plain_number("4x") is None
    assert plain_number(r"3\text{ m}") == 3


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_row_without_a_reference_has_no_verdict(answer):
    assert find_reward("math")([""], ["4"], answer=[answer]) == [None]


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="sources: 0: Input should be 'tag', 'boxed', 'marker' or 'number'"):
        find_reward({"name": "math", "sources": ["guess"]})
