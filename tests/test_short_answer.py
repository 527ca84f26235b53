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


@pytest.mark.parametrize("answer", [None, "", " ", [], [None], float("nan"), {"city": "Paris"}, [{"Paris": 1}]])
def test_a_row_without_a_readable_answer_has_no_verdict(answer):
    assert find_reward("short_answer")(["q"], ["Paris"], answer=[answer]) == [None]
    assert find_reward("exact")(["q"], [str(answer)], answer=[answer]) == [None]


SHAPES = [
    ("Lima", {"target": ["Lima", "Ciudad de los Reyes"]}, 1.0),
    ("Ciudad de los Reyes", {"value": "Lima", "aliases": ["Ciudad de los Reyes"]}, 1.0),
    ("Lima", {"text": ["Lima"], "answer_start": [0]}, 1.0),
    ("Lima", '["Lima", "Callao"]', 1.0),
    ("Callao", "['Lima', 'Callao']", 1.0),
    ("Lima", ["Lima"], 1.0),
    ("7", 7.0, 1.0),
    ("It is long ago. The answer is Lima.", "Lima.", 1.0),
    ("target", {"target": ["Lima"]}, 0.0),
    ("Lima Callao", '["Lima", "Callao"]', 0.0),
    ("70", 7.0, 0.0),
    ("1", "[1, 2]", 0.0),
]


@pytest.mark.parametrize(("completion", "answer", "reward"), SHAPES)
def test_a_reference_is_read_by_its_shape(completion, answer, reward):
    assert find_reward("short_answer")(["q"], [completion], answer=[answer]) == [reward]


JOINED = [
    ("Anne-Marie", "Anne Marie", 1.0),
    ("Anne Marie", "Anne\u2010Marie", 1.0),
    ("Annemarie", "Anne-Marie", 1.0),
    ("N/A", "N A", 1.0),
    ("C. S. Lewis", "C.S. Lewis", 1.0),
    ("CS Lewis", "C.S. Lewis", 1.0),
    ("Apollo-13", "Apollo 13", 1.0),
    ("snake_case", "snake case", 1.0),
    ("The Spitfire (plane)", "Spitfire plane", 1.0),
    ("Saint-Jean-de-Luz", "Saint Jean de Luz", 1.0),
    ("rock'n'roll", "rock n roll", 1.0),
    ("10-15", "10 15", 0.0),
    ("-13", "13", 0.0),
    ("1/3", "1 3", 0.0),
    ("A-side", "side", 0.0),
    ("Vitamin A", "Vitamin", 0.0),
    ("Anne-Marie", "Anne", 0.0),
    ("C++", "C", 0.0),
    ("3.5", "3 5", 0.0),
    ("12:30", "12 30", 0.0),
]


@pytest.mark.parametrize(("completion", "answer", "reward"), JOINED)
def test_what_a_sign_joins_may_be_written_apart(completion, answer, reward):
    assert find_reward("short_answer")(["q"], [completion], answer=[answer]) == [reward]


def test_exact_reads_a_text_letter_for_letter_and_a_list_as_alternatives():
    grade = find_reward("exact")
    assert grade(["q"] * 4, ["a", '["a"]', "b", "7"], answer=['["a"]', '["a"]', ["a", "b"], 7.0]) == [
        0.0,
        1.0,
        1.0,
        1.0,
    ]


def test_a_wrong_option_names_what_is_allowed():
    with pytest.raises(ValueError, match="match: Input should be 'exact' or 'f1', got 'fuzzy'"):
        find_reward({"name": "short_answer", "match": "fuzzy"})


def test_it_travels_between_processes():
    grade = pickle.loads(pickle.dumps(find_reward("short_answer")))
    assert grade(["q"], ["Paris"], answer=["paris"]) == [1.0]
