import pytest

from polyphony.rewards import find_reward
from polyphony.rewards.multiple_choice import chosen_letter

CHOICES = ["Rome", "Paris", "The Hague", "Bern or Basel"]
ROWS = [
    ("B", 1.0),
    ("(B)", 1.0),
    ("b.", 1.0),
    ("**B**", 1.0),
    ("Option B", 1.0),
    (r"\boxed{B}", 1.0),
    (r"\boxed{\text{B}}", 1.0),
    ("B) Paris", 1.0),
    ("Paris", 1.0),
    ("<think>A? C?</think>It is in France.\nThe answer is (B).", 1.0),
    ("`B`", 1.0),
    ("B is correct.", 1.0),
    (r"\boxed{\textbf{(B) } Paris}", 1.0),
    ("The correct choice is B", 1.0),
    ("The answer is Paris (B).", 1.0),
    ("The answer is B, Paris.", 1.0),
    ("The answer is B because A is smaller.", 1.0),
    ("The answer is B. It lies in France.", 1.0),
    ("The answer is A. No: the answer is B.", 1.0),
    ("B\n\nBecause Paris lies in France.", 1.0),
    ("A) Rome\nB) Paris", 0.0),
    ("A\nB", 0.0),
    ("Answer: A) Paris", 0.0),
    ("The answer is A. or B", 0.0),
    ("The answer is not B", 0.0),
    ("B is wrong.", 0.0),
    ("", 0.0),
    ("A", 0.0),
    ("A or B", 0.0),
    ("A, B, C, D", 0.0),
    ("B) Rome", 0.0),
    ("A) Paris", 0.0),
    ("The answer is B or C", 0.0),
    (r"\boxed{A} and \boxed{B}", 0.0),
    ("<think>B", 0.0),
    ("\u0412", 0.0),  # a Cyrillic letter that looks like B
    ("Paris Rome", 0.0),
    ("ABCD" * 100_000, 0.0),
    ("B\n" * 100_000 + "C", 0.0),
]


@pytest.mark.parametrize(("completion", "reward"), ROWS)
def test_multiple_choice_table(completion, reward):
    assert find_reward("multiple_choice")(["q"], [completion], [[1]], answer=["B"], choices=[CHOICES]) == [reward]


def test_an_echo_of_the_question_chooses_nothing():
    prompt = "Capital of France?\nA) Rome\nB) Paris\nAnswer: B) Paris is an example of the form."
    assert chosen_letter(prompt, ["Rome", "Paris"], prompt) is None


def test_texts_that_differ_by_a_sign_are_different_choices():
    assert [chosen_letter(text, ["-1", "1", "0.1"]) for text in ("-1", "1", "0.1")] == ["A", "B", "C"]
    assert [chosen_letter(text, ["A cat", "dog"]) for text in ("A cat", "cat", "A dog")] == ["A", "A", "B"]


def test_without_choices_only_letters_count():
    grade = find_reward("multiple_choice")
    assert grade(["q"] * 3, ["E", "E) something", "something"], answer=["e", "(E)", "E"]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("answer", ["E", "", "AB", None, 1])
def test_an_answer_that_is_no_letter_of_the_choices_is_refused(answer):
    with pytest.raises(ValueError, match="one letter of A to D"):
        find_reward("multiple_choice")(["q"], ["A"], answer=[answer], choices=[CHOICES])
