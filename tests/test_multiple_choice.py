import json
import time

import pytest

from polyphony.rewards import find_reward
from polyphony.rewards.multiple_choice import chosen_letter, right_letter

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


PHRASES = [
    "Let us see: Rome is no candidate.\nThus: {}",
    "I'll go for {}.",
    "I would pick option {}",
    "So the choice is clear.\nHence ({}).",
    "Therefore, {} is the best choice.",
    "{} is the correct option.",
    "Of these options, {} is correct.",
    "My choice is {}.",
    "Option {} is right.",
    "({}) is the right answer.",
    "Choice: {}",
    "The answer should be {}.",
    "The correct answer has to be ({})!",
    "The best option is certainly {}.",
    "The right answer is choice {}: Paris.",
    "The answer is {} (Paris).",
    "The answer is {}, since the others lie elsewhere.",
    "{}, because the others lie elsewhere.",
    "{} \u2013 Paris",
    "Paris ({}).",
    "The answer is not C, but {}.",
    "The answer isn't (A), it\u2019s ({}).",
    r"The answer is $\mathrm{{{}}}$.",
    r"The final answer is \(\textbf{{({})}}\).",
    "The answer is \u201c{}\u201d.",
    "The answer is '{}'",
    "**Answer:** {}",
    "__Final answer__ = __{}__",
    "Answer \u2014 {}",
    '{{"reason": "It lies in France.", "answer": "{}"}}',
    "<answer>The correct option is {}.</answer>",
    "<answer>\n{}) Paris\n</answer>",
    r"\boxed{{\text{{Option {}}}}}",
    "\u7b54\u6848\u662f\uff1a{}",
    "\u6240\u4ee5\u9009{}",
    "\u7b54\u6848\uff1a\u9009\u9879{}\u3002",
    "Answer:\n\n{}",
    "The answer to the question is ({}) Paris.",
    "The right answer, therefore, is {}.",
    "The correct choice is: **{}) Paris**",
    "Ans: {}",
    "Considering the map, {} is the best answer.",
    "We select {}.",
    "I am going with {}.",
    "Rome? No.\n=> {}",
    "Rome? No.\n- {}",
    "The answer is {} rather than C.",
    "The answer is {}, not C.",
    "The answer is ({}) (not C).",
    "The answer is {} \u2013 it lies in France.",
    "Answer: {}\n\nExplanation: Paris lies in France. Option C is wrong.",
]
TEXTS = [
    "Paris.",
    "Paris is the correct answer.",
    "I would say Paris.",
    "The answer is Paris, since it lies in France.",
    "**Answer:** Paris",
    "<answer>Option B</answer>",
    "<answer>The answer is: Paris.</answer>",
    r"\boxed{\text{Paris}}",
    r"\boxed{B: Paris}",
    "Hence Paris (B).",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_choice_by_its_text(text):
    grade = find_reward("multiple_choice")
    texts = [text, text.replace("Paris", "Bern or Basel").replace("B:", "D:").replace("(B)", "(D)")]
    texts[1] = texts[1].replace("Option B", "Option D")
    assert grade(["q"] * 2, texts, answer=["B"] * 2, choices=[CHOICES] * 2) == [1.0, 0.0]


def test_letters_as_texts_and_articles():
    choices = ["a dog", "a cat", "A", "cats"]
    texts = ["A dog", "a cat.", "The answer is A cat.", "A", "C", "A (a cat)", "dog"]
    assert [chosen_letter(text, choices) for text in texts] == ["A", "B", "B", "A", "C", None, "A"]


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_choice_in_usual_words(phrase):
    grade = find_reward("multiple_choice")
    texts = [phrase.format("B"), phrase.format("D")]
    assert grade(["q"] * 2, texts, answer=["B"] * 2, choices=[CHOICES] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "Maybe B.",
        "It could be B.",
        "The answer could be B.",
        "Either A or B.",
        "Both A and B.",
        "B, maybe C",
        "The answer is B, or maybe C.",
        "The answer is B/C.",
        "The answer is B & C",
        "The answer is (B) (C)",
        "I'd go with B. Or C.",
        "I choose B. Perhaps C.",
        "I choose B. But C may be right.",
        "So B. So C.",
        "B is correct. C is also correct.",
        "The answer is B. However, C is possible.",
        "The answer isn't B.",
        "The answer is not B, but it depends.",
        "The answer is not B but C.",
        "B is not the answer.",
        "B is the wrong answer.",
        "The answer is clearly Rome (B).",
        "The answer is B: Rome.",
        "The answer is B (Rome).",
        "Rome, because it lies in France.",
        "B is in Italy.",
        "B) lies in France, C) in the Netherlands",
        "I think so.",
        "Sob.",
        "Answer - none.",
        "<answer>The answer is B or C</answer>",
        '{"answer": ["B", "C"]}',
        "B\nNo, C.",
        "The answer is B. Wait, no, C.",
        "If C then B.",
        "If C is wrong, B is correct.",
        "B is correct? No, C is.",
        "B unless C",
        "B = 2",
        "The answer is B+C",
        "Vitamin B",
        "Rome is in Italy, Paris is not.",
        "Paris is correct, but Rome is too.",
        "The answer is C (Paris).",
        "The answer is A (Paris).",
    ],
)
def test_what_commits_to_no_choice_or_to_another(text):
    assert find_reward("multiple_choice")(["q"], [text], answer=["B"], choices=[CHOICES]) == [0.0]


LABELLED = {"label": ["A", "B", "C", "D"], "text": CHOICES}
NUMBERED = {"label": ["1", "2", "3", "4"], "text": CHOICES}


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ("B", CHOICES),
        (" (b) ", CHOICES),
        (1, CHOICES),
        (1.0, CHOICES),
        (["B"], CHOICES),
        ([1], CHOICES),
        ("Paris", CHOICES),
        ("B. Paris", CHOICES),
        ("B) Paris", tuple(CHOICES)),
        ("B", LABELLED),
        ("2", NUMBERED),
        ("Paris", NUMBERED),
        ("B", dict(zip("ABCD", CHOICES, strict=True))),
        ("B", {**dict(zip("ABCD", CHOICES, strict=True)), "E": None}),
        ("B", json.dumps(CHOICES)),
        (1, [{"label": label, "text": text} for label, text in zip("ABCD", CHOICES, strict=True)]),
    ],
)
def test_references_and_choices_of_every_shape_mean_the_same(answer, choices):
    texts = ["B", "The answer is Paris.", "(B) Paris", "A", "Rome", "B) Rome", "A or B"]
    rewards = find_reward("multiple_choice")(["q"] * 7, texts, answer=[answer] * 7, choices=[choices] * 7)
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_labels_that_are_numbers_are_names_of_their_choices():
    texts = ["2", "(2)", "The answer is 2.", "2) Paris", "1", "2) Rome", "2 or 3"]
    rewards = find_reward("multiple_choice")(["q"] * 7, texts, answer=["2"] * 7, choices=[NUMBERED] * 7)
    assert rewards == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    # a label that is also another choice's text names neither
    mixed = {"label": ["1", "2"], "text": ["2", "5"]}
    assert find_reward("multiple_choice")(["q"] * 2, ["2", "B"], answer=["B"] * 2, choices=[mixed] * 2) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ("E", CHOICES),
        ("", CHOICES),
        ("AB", CHOICES),
        (None, CHOICES),
        (4, CHOICES),
        (-1, CHOICES),
        (True, CHOICES),
        (0.5, CHOICES),
        (float("nan"), CHOICES),
        ("1", CHOICES),  # from 0 or from 1?
        (2, [2, 3, 5]),
        (["A", "B"], CHOICES),
        ([], CHOICES),
        ({"B": "Paris"}, CHOICES),
        ("Athens", CHOICES),
        ("B. Rome", CHOICES),
        ("B", "Rome or Paris"),
        ("B", 4),
        ("B", [["Rome"], ["Paris"]]),
        ("B", {"label": ["A"], "text": CHOICES}),
        ("B is right", None),
    ],
)
def test_a_row_that_can_not_be_read_gives_no_verdict(answer, choices):
    assert (
        find_reward("multiple_choice")(["q"] * 2, ["A", "B"], answer=[answer] * 2, choices=[choices] * 2) == [None] * 2
    )
    with pytest.raises(ValueError, match=r"multiple_choice: (answer|choices) must be"):
        right_letter(answer, choices)


@pytest.mark.parametrize(
    "piece", ["so ", "(", "A. ", "A or ", "answer is ", "'", "{", "$\\text{", "not B but ", "_", "A "]
)
def test_reading_takes_linear_time(piece):
    start = time.monotonic()
    assert find_reward("multiple_choice")(["q"], [piece * (99_000 // len(piece))], answer=["B"], choices=[CHOICES]) == [
        0
    ]
    assert time.monotonic() - start < 5
