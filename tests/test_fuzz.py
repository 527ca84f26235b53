"""A slice of `python -m tests.experiments.fuzz`: nonsense through the real dry run."""

from __future__ import annotations

import json

import pytest

from tests.experiments.fuzz import ACCEPTED, failures, shared_tokenizer, try_recipes, try_rows


@pytest.mark.parametrize(("tries", "n"), [(try_recipes, 60), (try_rows, 40)], ids=["recipes", "rows"])
def test_nonsense_is_refused_in_words_or_has_a_verdict(tmp_path, tries, n):
    with shared_tokenizer():
        found = list(tries(n, seed=20, folder=tmp_path))
    assert len(found) == n
    assert failures(found, json.loads(ACCEPTED.read_text()), rows=tries is try_rows) == []


def test_every_verdict_gives_its_reason():
    known = json.loads(ACCEPTED.read_text())
    said = [one["verdict"] for one in known["recipes"]] + list(known["rows"].values())
    assert all(said)
