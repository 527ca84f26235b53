from __future__ import annotations

import pytest

from polyphony.curricula.records import Domain
from polyphony.trainer.data import PromptTable
from polyphony.trainer.domains import NGRAM_WORDS, find_overlap


def table(*prompts):
    domain = Domain(name="d", kind="structured", reward="exact")
    return PromptTable(
        [{"prompt": p, "id": str(i)} for i, p in enumerate(prompts)], domain=domain, where="d", is_chat=True
    )


LONG = " ".join(f"word{i}" for i in range(NGRAM_WORDS))


def test_the_same_prompt_is_found_whatever_its_case_and_spaces():
    assert find_overlap(table("What is  2+2?", "what is 2+3?"), [table("what is 2+2?")]) == {"0"}


def test_a_long_run_of_the_same_words_is_found_inside_other_text():
    assert find_overlap(table(f"so {LONG} then", "something else"), [table(f"before {LONG} after")]) == {"0"}


def test_one_word_less_in_common_is_no_overlap():
    shorter = " ".join(LONG.split()[:-1])
    assert find_overlap(table(f"so {shorter} then"), [table(f"before {shorter} after")]) == set()


def test_words_that_many_heldout_prompts_share_are_a_template_not_a_leak():
    heldout = table(*(f"{LONG} question {i}" for i in range(5)))
    assert find_overlap(table(f"{LONG} question 77"), [heldout]) == set()


@pytest.mark.parametrize("where", [0, 1])
def test_every_heldout_set_counts(where):
    sets = [table("one"), table("two")]
    assert find_overlap(table("one", "two"), [sets[where]]) == {str(where)}
