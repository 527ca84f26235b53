import json

import numpy as np
import pytest

from polyphony.rewards.answers import accepted_answers


@pytest.mark.parametrize(
    ("reference", "accepted"),
    [
        ("Oslo", ["Oslo"]),
        (" Oslo ", ["Oslo"]),
        (12, ["12"]),
        (12.0, ["12"]),  # an integer column with gaps, from Parquet
        (12.5, ["12.5"]),
        (0.1 + 0.2, ["0.3"]),
        (np.int64(12), ["12"]),
        (np.array(["Oslo", "Bergen"]), ["Oslo", "Bergen"]),
        (["Oslo"], ["Oslo"]),
        (["Oslo", None], ["Oslo"]),
        (["Oslo", "Oslo", 12.0], ["Oslo", "12"]),
        ([["Oslo"]], ["Oslo"]),
        ({"target": ["Oslo", "Christiania"]}, ["Oslo", "Christiania"]),  # Search-R1
        ({"ground_truth": {"target": "Oslo"}, "style": "rule"}, ["Oslo"]),
        ({"value": "Oslo", "aliases": ["Christiania"], "type": "WikipediaEntity"}, ["Oslo", "Christiania"]),  # TriviaQA
        ({"text": ["Oslo", "Oslo"], "answer_start": [3, 9]}, ["Oslo"]),  # SQuAD
        (json.dumps(["Oslo", "Christiania"]), ["Oslo", "Christiania"]),
        (json.dumps({"target": ["Oslo"]}), ["Oslo"]),
        (str(["Oslo", "Christiania"]), ["Oslo", "Christiania"]),
        ("[1, 2]", ["[1, 2]"]),
        (r"\{1, 2\}", [r"\{1, 2\}"]),
        ("[Oslo]", ["[Oslo]"]),
    ],
)
def test_each_shape_is_read(reference, accepted):
    assert accepted_answers(reference) == accepted


@pytest.mark.parametrize(
    "reference",
    [
        None,
        "",
        "  ",
        float("nan"),
        float("inf"),
        True,
        [],
        [None],
        {},
        {"city": "Oslo"},
        {"text": [], "answer_start": []},
        ["Oslo", {"city": "Oslo"}],
        ["Oslo", float("nan")],
        '{"city": "Oslo"}',
        object(),
        b"Oslo",
    ],
)
def test_another_shape_is_unreadable_and_never_its_text(reference):
    assert accepted_answers(reference) == []
