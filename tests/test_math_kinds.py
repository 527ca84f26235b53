"""Kinds of right answers that must count, beside near ones that must not: rows of (in the box, reference, verdict)."""

import time
from collections import Counter

import pytest

from polyphony.rewards import find_reward

KINDS = {
    "a last letter is a variable, not a unit": [
        ("7k", "7k", 1),
        ("3m+n", "n+3m", 1),
        ("1+c", "c+1", 1),
        ("5d+1", "1+5d", 1),
        (r"2\pi l", r"2l\pi", 1),
        ("12s", "12 s", 1),
        (r"-4.9 \cdot g", "-4.9g", 1),
        ("8h", "8", 0),
        ("8", "8h", 0),
        ("3g", "3h", 0),
        ("1+c", "1", 0),
        ("a", "ab", 0),
        ("x", "y", 0),
    ],
    "the imaginary unit": [
        ("7i-2", "-2+7i", 1),
        (r"\frac{5i}{3}", r"\frac53 i", 1),
        ("(1+i)^2", "2i", 1),
        ("(2+i)(2-i)", "5", 1),
        ("i^3", "-i", 1),
        (r"\sqrt{-9}", "3i", 1),
        (r"\frac{1}{i}", "-i", 1),
        (r"e^{i\pi/2}", "i", 1),
        ("x+iy", "x+yi", 1),
        (r"\sum_{i=1}^{4} i", "10", 1),
        ("3-2i", "3+2i", 0),
        ("i", "1", 0),
        ("i", "-i", 0),
        ("5i", "5", 0),
    ],
    "tiny and huge numbers": [
        (r"8.5\times 10^{-12}", "8.5e-12", 1),
        ("3^{-80}", r"\frac{1}{3^{80}}", 1),
        (r"6.02 \times 10^{23}", "6.02e23", 1),
        ("1.4142135", r"\sqrt2", 1),
        ("0.666667", r"\frac23", 1),
        ("8.5e-12", "8.9e-12", 0),
        ("3^{-80}", r"\frac{1}{3^{81}}", 0),
        (r"\frac{2^{100}}{3^{100}}", r"\frac{2^{101}}{3^{101}}", 0),
        (r"\frac{10^{40}+1}{10^{40}}", "1", 0),
        (r"\frac{10^{30}}{10^{30}+1}", "1", 0),
        ("e^{-40}", "0", 0),
        ("0.00000003", "0", 0),
        (r"10^{-9}\pi", r"2\cdot 10^{-9}\pi", 0),
        ("10^{-9}x", "10^{-8}x", 0),
        ("10^{20}+1", "10^{20}", 0),
        (r"6.02 \times 10^{23}", "6.03e23", 0),
        ("1.4142", r"\sqrt2", 0),
    ],
    "times of day and ratios": [
        ("9:05", "09:05", 1),
        (r"7:15 \text{ a.m.}", r"7:15\text{ AM}", 1),
        (r"7:15 \text{ a.m.}", "7:15", 1),
        ("3:2", "6:4", 1),
        ("0.5:1", "1:2", 1),
        ("4 : 6", "2:3", 1),
        ("12:30", "1:30", 0),
        ("3:00", "15:00", 0),
        ("10:20", "5:10", 0),
        ("7:15 pm", "7:15 am", 0),
        ("3:2", "2:3", 0),
        ("1:2:3", "1:2", 0),
    ],
    "units": [
        (r"4\text{ m}", "4", 1),
        (r"4 \mathrm{m}", "4", 1),
        (r"6\text{ kg}", "6 kg", 1),
        (r"3 \text{ km}", r"3000\text{ m}", 1),
        (r"90 \text{ minutes}", r"1.5 \text{ hours}", 1),
        (r"6 \text{ sq cm}", r"6\text{ cm}^2", 1),
        (r"6\sqrt{2} \text{ cm}", r"6\sqrt2", 1),
        ("20^\\circ", "20", 1),
        (r"3 \text{ km}", r"3\text{ m}", 0),
        ("6 hours", "6 minutes", 0),
        (r"6 \text{ cm}^2", r"6\text{ cm}^3", 0),
        ("20^\\circ C", "20^\\circ F", 0),
        ("5 apples", "5 oranges", 0),
        (r"10 \text{ dozen}", "10", 0),
        ("5 but maybe six", "5", 0),
    ],
    "a reference with a full stop": [
        (r"\frac{3}{2}", r"\frac{3}{2}.", 1),
        (r"45^\circ", r"$45^\circ$.", 1),
        ("x^2", "$x^2$.", 1),
        ("101_{2}", "$101_2$.", 1),
        (r"7 \text{ apples}", "7 apples.", 1),
        ("[0,2)", "$[0,2)$.", 1),
        ("5", "$5.$", 1),
        ("5.5", "5.5.", 1),
        (r"\{1,2\}", r"\{1,2\}.", 1),
        (r"\text{Monday}", "Monday.", 1),
        ("11_2", "101_2.", 0),
        ("5", "5.5.", 0),
        ("[0,2]", "$[0,2)$.", 0),
    ],
    "typesetting": [
        ("7 250", "7250", 1),
        (r"1\,234\,567", "1234567", 1),
        ("7{,}250", "7250", 1),
        (r"7,\!250", "7250", 1),
        ("3~000", "3000", 1),
        (r"12\;000", "12000", 1),
        (r"\Bigl(\tfrac12,3\Bigr)", r"(\frac12,3)", 1),
        (r"\bigg\{1,2\bigg\}", r"\{1,2\}", 1),
        (r"\displaystyle\frac12", "0.5", 1),
        ("5 100/200", "5.5", 1),
        (r"3\sqrt(5)", r"3\sqrt5", 1),
        ("7 25", "725", 0),
        ("2 500", "500", 0),
        ("2 100", "2", 0),
        ("1, 234", "1234", 0),
    ],
    "references in other spellings": [
        ("2e", r"2\mathrm{e}", 1),
        ("x>5", r"\{x \mid x > 5\}", 1),
        (r"(5,\infty)", r"\{x : x > 5\}", 1),
        (r"(-\infty,2]", r"\{ x \in \mathbb{R} \mid x \le 2 \}", 1),
        ("3.7", r"\approx 3.7", 1),
        ("-3/4", "-3./4", 1),
        ("27", "27\\", 1),
        (r"\langle x, 2\rangle", "(x,2)", 1),
        ("34", r"\text{(B) } 34", 1),
        ("34", r"\mathrm{(B)}\ 34", 1),
        (r"\textbf{(B)}\ 34", "34", 1),
        ("k_{min}", r"k_{\min}", 1),
        (r"[5,\infty)", r"\{x : x > 5\}", 0),
        (r"\langle 1, 2\rangle", r"\langle 2,1\rangle", 0),
        ("35", r"\textbf{(B)}\ 34", 0),
        ("4k_{min}", r"k_{\min}=n^2", 0),
    ],
    "bases, repeating decimals, primes, letters of choices": [
        ("43_{5}", "43_5", 1),
        ("100_2", "4", 1),
        ("43", "43_5", 1),
        (r"0.\overline{6}", r"\frac23", 1),
        (r"0.1\overline{6}", "1/6", 1),
        (r"1.\overline{27}", r"\frac{14}{11}", 1),
        ("f'(2)", "f'(2)", 1),
        (r"y'\cdot 2", "2y'", 1),
        (r"\textbf{(D)}", r"\textbf{(D)}\ 12", 1),
        ("D", r"\textbf{(D)}\ 12", 1),
        ("43_6", "43_5", 0),
        ("43_5", "43", 0),
        (r"0.\overline{3}", "0.3", 0),
        ("f'(2)", "f(2)", 0),
        ("y''", "y'", 0),
        ("B", r"\textbf{(D)}\ 12", 0),
        (r"\textbf{(B)}\ 12", r"\textbf{(D)}\ 12", 0),
        (r"2 \text{ or more}", "2", 0),
    ],
    "a set is no tuple": [
        (r"\{9,3\}", r"\{3,9\}", 1),
        (r"\{(1,2),(3,4)\}", "(1,2),(3,4)", 1),
        ("3,9", r"\{9, 3\}", 1),
        ("3, 9", "(3,9)", 1),
        ("x=3,y=9", "(3,9)", 1),
        (r"\{3,9\}", "(3,9)", 0),
        ("(3,9)", r"\{3,9\}", 0),
        (r"\{a,b\}", "(a,b)", 0),
        ("[3,9]", r"\{3,9\}", 0),
        (r"\{1,2,3\}", "(1,2,3)", 0),
        (r"\{\frac12,1\}", r"(\frac12,1)", 0),
        (r"\left\{3,9\right\}", r"\left(3,9\right)", 0),
        ("9, 3", "(3,9)", 0),
    ],
    "roots of letters": [
        (r"\frac{2}{\sqrt{x}}", r"2\sqrt{\frac1x}", 1),
        (r"\sqrt{\frac{a}{b}}", r"\frac{\sqrt a}{\sqrt b}", 1),
        (r"\sqrt{4x}", r"2\sqrt{x}", 1),
        (r"\sqrt{x^2}", "|x|", 1),
        (r"\sqrt{x^4}", "x^2", 1),
        (r"x\sqrt{x}", "x^{3/2}", 1),
        (r"\sqrt{x^2}", "x", 0),
        (r"\sqrt{x+1}", r"\sqrt{x}+1", 0),
        (r"\sqrt{x}\sqrt{y}", r"\sqrt{x+y}", 0),
        (r"\sqrt{2x}", r"2\sqrt{x}", 0),
        (r"\frac{1}{\sqrt{x}}", r"\sqrt{x}", 0),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_counts_and_its_near_ones_do_not(kind):
    answers, references, _ = zip(*KINDS[kind], strict=True)
    graded = find_reward("math")(["q"] * len(answers), [rf"So \boxed{{{a}}}." for a in answers], answer=references)
    assert [row for row, reward in zip(KINDS[kind], graded, strict=True) if row[2] != reward] == []


BOXES = [
    (r"$\boxed{2}$ \quad or \quad $\boxed{7}$", "2,7", 1),
    (r"\(\boxed{2}\), \(\boxed{7}\)", "7, 2", 1),
    (r"\boxed{2} \lor \boxed{7}", "2, 7", 1),
    (r"\boxed{2}; \boxed{7}", "2,7", 1),
    (r"\[\boxed{2}\]" + "\n\nand\n\n" + r"\[\boxed{7}\]", "2,7", 1),
    (r"$\boxed{a}\ \mathrm{and}\ \boxed{b}$", "a,b", 1),
    (r"$z_1=\boxed{2}$, $z_2=\boxed{7}$", "2, 7", 1),
    (r"We get \boxed{2}. After a check, the answer is \boxed{7}", "7", 1),
    (r"$x=\boxed{2}$ or $x=\boxed{7}$", "7", 0),
    (r"\[\boxed{2}\]\[\boxed{7}\]", "7", 0),
    (r"\boxed{2}\text{ or }\boxed{7}", "7", 0),
    (r"\(\boxed{2}\)\qquad\textbf{or}\qquad\(\boxed{7}\)", "2", 0),
]


@pytest.mark.parametrize(("completion", "answer", "reward"), BOXES)
def test_boxes_beside_each_other_are_one_answer(completion, answer, reward):
    assert find_reward("math")(["q"], [completion], answer=[answer]) == [reward]


SHAPES = [
    ("4", 4.0, 1),
    ("4", ["4"], 1),
    ("4", [[4]], 1),
    ("4", {"target": ["4"]}, 1),
    ("4", {"target": 4.0}, 1),
    ("4", '["4"]', 1),
    ("0.1", 0.1, 1),
    ("5", ["4", "5"], 1),
    ("[1,2]", "[1,2]", 1),
    ("6", ["4", "5"], 0),
    ("1", "[1, 2]", 0),
    ("4", float("nan"), None),
    ("nan", float("nan"), None),
    ("None", None, None),
    ("4", {"number": 4}, None),
    ("4", [], None),
    ("True", True, None),
    ("4", [{"name": "f", "arguments": {}}], None),
]


@pytest.mark.parametrize(("given", "answer", "reward"), SHAPES)
def test_a_reference_is_read_by_its_shape_or_not_at_all(given, answer, reward):
    assert find_reward("math")(["q"], [rf"\boxed{{{given}}}"], answer=[answer]) == [reward]


EXHAUSTING = [
    "10^{10^{10^{10}}}",
    "700000!",
    r"\sum_{k=1}^{30000000} \frac{1}{k^2}",
    r"\prod_{k=1}^{9000000} (k+1)",
    "ab" * 450,
    "(y-1)" * 160,
    "(" * 300 + "5" + ")" * 300,
    r"\binom{10^9}{10^8}",
    "2^{3^{4^{5^{6}}}}",
    r"\sqrt{" * 120 + "2" + "}" * 120,
]


@pytest.mark.slow
def test_an_answer_that_exhausts_the_grader_is_wrong():
    grade = find_reward({"name": "math", "timeout_s": 1.0})
    start = time.monotonic()
    said = Counter()
    told = {"log_metric": lambda name, value: said.update({name: value})}
    scores = grade(["q"] * 11, [*(rf"\boxed{{{a}}}" for a in EXHAUSTING), "7"], answer=["7"] * 11, **told)
    assert scores == [0.0] * 10 + [1.0]
    assert said["exhausted"] >= 5  # the others are told apart before their limit
    assert time.monotonic() - start < 120  # ten limits, and new workers on a busy host


def test_a_reference_that_exhausts_the_grader_gives_no_verdict():
    grade = find_reward({"name": "math", "timeout_s": 1.0})
    assert grade(["q"], [r"\boxed{7}"], answer=["10^{10^{10^{10}}}"]) == [None]
