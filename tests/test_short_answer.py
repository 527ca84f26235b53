import pickle

import pytest

from polyphony.rewards import find_reward
from polyphony.rewards.short_answer import normalise, token_f1

ROWS = [
    ("Paris", "Paris", 1.0),
    ("  the PARIS. ", "Paris", 1.0),
    ("<think>Rome?</think>The answer is Paris.", "Paris", 1.0),
    ("<answer>Big Apple</answer>", ["New York", "The Big Apple"], 1.0),
    ("Ｐａｒｉｓ", "Paris", 1.0),
    ("Par\u200bis", "Paris", 1.0),
    ("42", 42, 1.0),
    ("A", "A", 1.0),
    ("+", "+", 1.0),
    (r"\boxed{\text{Paris}}", "Paris", 1.0),
    ("\u201cO\u2019Brien\u201d", "O'Brien", 1.0),
    ("1914\u20131918", "1914-1918", 1.0),
    ("\u6771\u4eac\u3002", "\u6771\u4eac", 1.0),
    ("The answer is yes, because it snowed.", "yes", 1.0),
    ("1,000", "1000", 1.0),
    ("$5", "5", 1.0),
    ("\u22125", "-5", 1.0),
    ("c++.", "C++", 1.0),
    ("3.14", "314", 0.0),
    ("5", "-5", 0.0),
    ("12", "1/2", 0.0),
    ("1,5", "15", 0.0),
    ("C", "C++", 0.0),
    ("C#", "C++", 0.0),
    ("x1", "x=1", 0.0),
    ("", "Paris", 0.0),
    ("   \n", "A", 0.0),
    ("the", "A", 0.0),
    ("...", "Paris", 0.0),
    ("London", "Paris", 0.0),
    ("Paris or London", "Paris", 0.0),
    ("Paris, London, Rome", "Paris", 0.0),
    ("<answer>London</answer> <answer>Rome</answer> Paris", "Paris", 0.0),
    ("<think>Paris", "Paris", 0.0),
    ("P\u0430ris", "Paris", 0.0),  # a Cyrillic a
    ("Where is the Louvre? Paris, Rome?", "Paris", 0.0),
    ("Paris " * 200_000, "Paris", 0.0),
]


@pytest.mark.parametrize(("completion", "answer", "reward"), ROWS)
def test_short_answer_table(completion, answer, reward):
    grade = find_reward("short_answer")
    assert grade(prompts=["Where is the Louvre?"], completions=[completion], completion_ids=[[1]], answer=[answer]) == [
        reward
    ]


def test_f1_by_hand():
    # 2 shared tokens, 3 given, 2 asked: precision 2/3, recall 1, F1 = 2 * 2 / (3 + 2) = 0.8
    assert token_f1("new york city", "new york") == pytest.approx(0.8)
    assert token_f1("rome", "paris") == 0.0
    grade = find_reward({"name": "short_answer", "match": "f1"})
    assert grade(["q"], ["the New York City"], answer=[["Rome", "New York"]]) == [pytest.approx(0.8)]


def test_repeating_a_word_does_not_raise_f1():
    assert token_f1("paris paris paris", "paris") == pytest.approx(0.5)


def test_normalising_never_empties_a_reference():
    assert normalise("The") == "the"
    assert normalise("+") == "+"
    assert normalise("The  U.S. State") == "us state"


@pytest.mark.parametrize("answer", [None, "", " ", [], [None]])
def test_a_row_without_an_answer_is_refused(answer):
    with pytest.raises(ValueError, match="short_answer: a row's answer"):
        find_reward("short_answer")(["q"], ["Paris"], answer=[answer])


def test_a_wrong_option_names_what_is_allowed():
    with pytest.raises(ValueError, match="match is exact or f1, got 'fuzzy'"):
        find_reward({"name": "short_answer", "match": "fuzzy"})


def test_it_travels_between_processes():
    grade = pickle.loads(pickle.dumps(find_reward("short_answer")))
    assert grade(["q"], ["Paris"], answer=["paris"]) == [1.0]
