import time

import pytest

from polyphony.rewards.answers import answer_region, final_answer

PROMPT = "Which is larger, 12 or 30?"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer> 4 </answer>", "4"),
        ("<answer>3</answer> no: <answer>4</answer>", "4"),
        (r"so <answer>\boxed{4}</answer>", "4"),
        (r"first \boxed{3}, then we see that it is \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} or \boxed{4}", "3, 4"),
        (r"$x=\boxed{3}$", "3"),
        (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3"),
        (r"\(\boxed{1}\) and \(\boxed{2}\)", "1, 2"),
        (r"$\boxed{1}$ \quad \text{or} \quad $\boxed{2}$", "1, 2"),
        (r"\[\boxed{1}\] or \[\boxed{2}\]", "1, 2"),
        (r"\boxed{1} \lor \boxed{2}", "1, 2"),
        (r"$x_1=\boxed{1}$; $x_2=\boxed{2}$", "1, 2"),
        (r"\boxed{1} order \boxed{2}", "2"),
        (r"\boxed{1}, so n=\boxed{2}", "2"),
        (r"It is \boxed{5}. \boxed{5}", "5"),
        (r"it is \boxed{4}, or \boxed{4", "4"),
        (r"\boxed{4", None),
        (r"\boxed{a \} b}", r"a \} b"),
        ("The answer is 4.", "4"),
        ("**Answer:** 4", "4"),
        ("**Answer**: 4", "4"),
        ("The answer is **4**.", "4"),
        ("The answer is:\n\n\\[\n4\n\\]", "4"),
        ("The correct option is B.", "B"),
        ("The answer is 3. No, the answer is 4, because 2 + 2 = 4.", "4"),
        ("The answer is Because of Winn-Dixie.", "Because of Winn-Dixie"),
        ("The answer is St. Louis.", "St. Louis"),
        ("The answer is 4.\nThe answer is:", "4"),
        ("5 + 5 = 10\n#### 10", "10"),
        ("The answer is 4.\n#### Remarks", "4"),
        ("answer: 3\nanswer: 4", "4"),
        ("I would say 4", None),
        ("", None),
        ("<think>it is <answer>4</answer>", None),
        (r"<think>maybe \boxed{3}</think> I do not know", None),
        (r"maybe \boxed{3}</think> \boxed{4}", "4"),
        ([{"role": "assistant", "content": r"\boxed{4}"}], "4"),
    ],
)
def test_the_answer_a_completion_commits_to(completion, expected):
    assert final_answer(completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("it is 30", "30"),
        ("1,234.5 apples", "1,234.5"),
        ("from 7 to -3", "-3"),
        ("3/4", "3/4"),
        ("2.5e2", "2.5e2"),
        ("5 \\times 10^{-3} m", "5 \\times 10^{-3}"),
        ("pages 3-7", "7"),
        ("half of it, .5", ".5"),
        ("42\\%", "42\\%"),
        ("no number", None),
        (PROMPT, None),
        ("Which is larger, 12 or 30? 12", "12"),
    ],
)
def test_the_last_number_counts_unless_it_is_the_prompt_said_again(completion, expected):
    assert final_answer(completion, PROMPT, sources=["number"]) == expected


def test_an_echoed_prompt_is_no_answer():
    prompt = [{"role": "user", "content": r"Put your answer in \boxed{...}, like \boxed{42}."}]
    assert final_answer(prompt[0]["content"] + " I do not know.", prompt) is None


def test_an_answer_that_the_prompt_offers_is_still_an_answer():
    assert answer_region("Paris", "Choose.\nParis\nRome") == "Paris"


@pytest.mark.parametrize("unit", ["<answer>", "\\boxed{", "answer is ", "answer:\n", "1,", "{", "####", " "])
def test_a_huge_completion_takes_no_time(unit):
    start = time.perf_counter()
    final_answer(unit * 500_000, sources=["tag", "boxed", "marker", "number"])
    assert time.perf_counter() - start < 1.0
