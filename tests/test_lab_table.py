"""The lab's domain that acts, and the policy that is committed for it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import get_json_schema

from polyphony.launch.lab import table
from polyphony.launch.lab.table import Table, cells_of
from polyphony.launch.lab.table_start import Teaching, build_table_tokenizer, train_table_policy, turns
from polyphony.trainer.environments.calls import Instance
from polyphony.trainer.environments.wording import Wording

TABLE_POLICY = Path(table.__file__).parent / "table_policy"


def asked(row, **arguments):
    """A table as it stands for a row."""
    one = Table(**arguments)
    one.reset(row["table"], row["late"])
    return one


def by_hand(row, one):
    """Ask a table as its question says, whatever it takes."""
    who, *path = reversed(row["prompt"].removesuffix(" ?").split(" of "))
    for what in path:
        try:
            who = one.look(who, what)
        except RuntimeError:
            who = one.look(who, what)
    return who


def test_questions_are_answered_by_asking_and_by_nothing_else():
    rows = list(Table.rows(400, 3))
    assert all(by_hand(row, asked(row)) == row["answer"] for row in rows)
    # a control's tool is right by chance alone: of ninety numbers
    assert sum(by_hand(row, asked(row, shuffled=True)) == row["answer"] for row in rows) < 20
    kinds = Counter(row["skill"] for row in rows)
    assert kinds["two_calls"] + kinds["two_calls_again"] == 200
    assert 60 < kinds["one_call_again"] + kinds["two_calls_again"] < 140


def test_train_and_held_out_have_tables_of_their_own():
    assert not {row["table"] for row in Table.rows(400, 1)} & {row["table"] for row in Table.rows(480, 2)}
    assert cells_of(1) != cells_of(2)


def test_a_call_that_fails_is_told_and_made_again():
    one = Instance(environment=Table(), functions={})
    one.environment.reset(7, True)
    call = {"function": {"name": "look", "arguments": {"who": "ada", "what": "room"}}}
    (first,), (second,) = one.answers([call]), one.answers([call])
    assert (first["content"], first["failure"]) == ("{'error': 'busy'}", "raised")
    assert (second["content"], second["failure"]) == (cells_of(7)["ada", "room"], "")
    assert one.answers([{"function": {"name": "look", "arguments": {"who": "nobody", "what": "room"}}}])[0] == {
        "name": "look",
        "content": "no",
        "failure": "",
    }


def test_the_committed_policy_reads_calls_as_its_template_writes_them():
    tokenizer = AutoTokenizer.from_pretrained(TABLE_POLICY)
    assert tokenizer.get_vocab() == build_table_tokenizer().get_vocab()
    assert sum(file.stat().st_size for file in TABLE_POLICY.iterdir()) <= 1_000_000
    schemas = [get_json_schema(Table().look)]
    wording = Wording(tokenizer, chat_template_kwargs={}, tools=schemas)
    wording.check(is_spoken_to=True)
    asked = [{"role": "user", "content": "room of ada ?"}]
    before = wording.prompt(asked)
    said = "<|call|>look who=ada what=room<|call|>look who=ben what=age<|end|>"
    parsed, is_malformed = wording.parsed(tokenizer(said)["input_ids"], before)
    assert not is_malformed
    wanted = [{"who": "ada", "what": "room"}, {"who": "ben", "what": "age"}]
    assert [call["function"] for call in parsed["tool_calls"]] == [{"name": "look", "arguments": a} for a in wanted]
    assert tokenizer.apply_chat_template([*asked, parsed], tools=schemas, tokenize=False).endswith(said)
    for odd in ("<|call|>", "<|call|>look who", "47", "<|call|>look  ==<|call|>", "<|call|>look what=<|tool|>"):
        assert wording.parsed(tokenizer(odd + "<|end|>")["input_ids"], before)[0]["role"] == "assistant"


@pytest.mark.parametrize("is_flawed", [False, True])
def test_what_is_taught_is_what_a_rollout_has(is_flawed):
    tokenizer = build_table_tokenizer()
    wording = Wording(tokenizer, chat_template_kwargs={}, tools=[get_json_schema(Table().look)])
    rows, chance, teaching = list(Table.rows(60, 5)), random.Random(0), Teaching(tokenizer)
    right = 0
    for row in rows:
        state = chance.getstate()
        ids, learned = teaching.episode(row, chance, is_flawed=is_flawed)
        chance.setstate(state)
        said = turns(row, chance, is_flawed=is_flawed)
        own = [i for i, one in zip(ids, learned, strict=True) if one]
        assert tokenizer.decode(own) == "".join(f"{text}<|end|>" for text, _ in said)
        told = [[{"role": "tool", "name": "look", "content": answer}] for _, answer in said[:-1]]
        others = [
            *wording.prompt([{"role": "user", "content": row["prompt"]}]),
            *(i for m in told for i in wording.after(m)),
        ]
        assert [i for i, one in zip(ids, learned, strict=True) if not one] == others
        assert tokenizer.unk_token_id not in ids and len(ids) < 160
        right += said[-1][0] == row["answer"]
    assert right == len(rows) if not is_flawed else 5 < right < 35


def test_the_same_seed_teaches_the_same_weights():
    import torch

    threads = torch.get_num_threads()
    first, second = (train_table_policy(seed=1, steps=2)[0].state_dict() for _ in range(2))
    torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)
