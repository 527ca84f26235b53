from __future__ import annotations

import pytest

from polyphony.curricula.records import Domain
from polyphony.trainer import domains
from polyphony.trainer.data import PromptTable
from polyphony.trainer.domains import NGRAM_WORDS


def table(*prompts):
    domain = Domain(name="d", kind="structured", reward="exact")
    return PromptTable(
        [{"prompt": p, "id": str(i)} for i, p in enumerate(prompts)], domain=domain, where="d", is_chat=True
    )


def find_overlap(train, heldout):
    return set(domains.find_overlap(train, heldout))


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


def test_an_instruction_in_a_small_domain_beside_a_large_one_is_no_leak():
    large, small = table(*(f"{i} + {i} =" for i in range(1000))), table(*(f"{LONG} passage {i}" for i in range(10)))
    assert find_overlap(table(*(f"{LONG} text {i}" for i in range(50))), [large, small]) == set()


def test_an_instruction_in_all_training_rows_is_none_however_few_are_held_out():
    train = table(*(f"{LONG} text {i}" for i in range(50)))
    assert find_overlap(train, [table(f"{LONG} passage 1", f"{LONG} text 7")]) == {"7"}


def chat(task, said="Go."):
    return [{"role": "system", "content": task}, {"role": "user", "content": said}]


def test_a_task_in_the_system_message_is_what_is_compared():
    heldout = table(chat("add 1 and 2"), chat("add 3 and 4"))
    assert find_overlap(table(chat("add 5 and 6"), chat("add 3 and 4"), "Go."), [heldout]) == {"1"}


def test_a_question_is_a_leak_under_another_system_message():
    heldout = table(chat("be brief", "1 + 2 ="), chat("be brief", "3 + 4 ="))
    assert find_overlap(table(chat("be kind", "1 + 2 ="), "3 + 4 =", chat("be brief", "5 + 6 =")), [heldout]) == {
        "0",
        "1",
    }


def test_what_a_row_repeats_is_said():
    heldout = table("what is 2+2?", f"before {LONG}")
    found = domains.find_overlap(table("What is 2+2?", f"{LONG} after"), [heldout])
    assert found == {"0": "the prompt of d: row 1", "1": f"the words '{LONG}'"}
