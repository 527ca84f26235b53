import random

import pytest

from polyphony.rewards import find_reward
from polyphony.rewards.choices import chosen_letter, short_form

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


QUESTIONS = [
    {"prompt": "Capital of France?", "choices": ["Rome", "Paris"], "answer": "B", "source": "geo"},
    {"prompt": "Capital of Italy?", "choices": ["Rome", "Madrid", "paris"], "answer": "A"},
    {"prompt": "2 + 2?", "choices": ["4", "5", "6"], "answer": "A"},
]


def test_short_form_asks_for_the_text_among_lent_candidates():
    rows = short_form(QUESTIONS, random.Random(0), distractors=3)
    question, _, candidates = rows[1]["prompt"].partition("\nCandidates: ")
    # of the other rows' texts Rome and Paris are the row's own already: 4, 5 and 6 remain
    assert (question, set(candidates.split("; "))) == (
        "Capital of Italy?",
        {"Rome", "Madrid", "paris", "4", "5", "6"},
    )
    assert (rows[0]["answer"], rows[0]["source"], "choices" in rows[0]) == ("Paris", "geo", False)


def test_short_form_is_the_same_for_the_same_seed():
    assert short_form(QUESTIONS, random.Random(3), distractors=2) == short_form(
        QUESTIONS, random.Random(3), distractors=2
    )


def test_a_short_form_row_is_graded_by_its_text():
    row = short_form(QUESTIONS, random.Random(0), distractors=1)[0]
    grade = find_reward("short_answer")
    assert grade([row["prompt"]] * 2, ["paris", "B"], answer=[row["answer"]] * 2) == [1.0, 0.0]


def test_too_few_distractors_are_refused():
    with pytest.raises(ValueError, match="9 distractors asked, the other rows lend 4"):
        short_form(QUESTIONS, random.Random(0), distractors=9)
