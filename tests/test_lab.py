"""The lab's world, its rubric, and the policy that is committed with it."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from polyphony.launch.lab import world
from polyphony.launch.lab.rewards import StoryRubric, story_score
from polyphony.launch.lab.warm_start import build_tokenizer, is_taught, known_target, train_policy, warm_target
from polyphony.launch.lab.world import DOMAINS, knowledge, rows, transform
from polyphony.rewards.registry import find_reward

POLICY = Path(world.__file__).parent / "policy"


def plain(prompt: str) -> str:
    """The prompt with `a+b` written with the smaller operand first."""
    left, plus, right = prompt.removesuffix(" =").partition("+")
    return "+".join(sorted((left, right))) if plus else prompt


@pytest.mark.parametrize("domain", DOMAINS)
def test_train_and_held_out_share_no_prompt_and_no_key(domain):
    spaces = {held: set() for held in (True, False)}
    for key, _ in DOMAINS[domain](0):
        spaces[world.is_held_out(domain, key)].add(key)
    assert spaces[True] and spaces[False] and not spaces[True] & spaces[False]
    prompts = {
        split: {plain(row["prompt"]) for row in rows(domain=domain, split=split)} for split in ("train", "heldout")
    }
    assert not prompts["train"] & prompts["heldout"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompts_of_a_split_are_all_different_and_a_third_is_held_out(domain):
    train, held_out = rows(domain=domain, split="train"), rows(domain=domain, split="heldout")
    assert len({row["prompt"] for row in train}) == len(train)
    assert 0.25 < len(held_out) / (len(train) + len(held_out)) < 0.4


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_depend_on_the_seed_and_on_nothing_else(domain):
    first = rows(domain=domain, split="train", size=50, seed=1)
    assert first == rows(domain=domain, split="train", size=50, seed=1)
    assert first != rows(domain=domain, split="train", size=50, seed=2)


def test_rows_do_not_depend_on_pythons_hash_seed():
    program = (
        "import hashlib; from polyphony.launch.lab.world import DOMAINS, rows;"
        "print(hashlib.sha256(repr([rows(domain=d, split='train', seed=3) for d in DOMAINS]).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    here = [rows(domain=domain, split="train", seed=3) for domain in DOMAINS]
    assert said.stdout.strip() == hashlib.sha256(repr(here).encode()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "poems", "split": "train", "size": 1}, "known: arithmetic, strings"),
        ({"domain": "facts", "split": "test", "size": 1}, "'train' or 'heldout', got 'test'"),
        (
            {"domain": "facts", "split": "heldout", "size": 9999},
            "heldout has 1296 rows, size must be 1 to that, got 9999",
        ),
        ({"domain": "facts", "split": "train", "size": 0}, "got 0"),
    ],
)
def test_impossible_requests_name_the_offender(arguments, message):
    with pytest.raises(ValueError, match=message):
        rows(**arguments)


def test_arithmetic_answers_are_what_python_computes():
    for row in rows(domain="arithmetic", split="heldout", size=200):
        assert int(row["answer"]) == eval(row["prompt"].removesuffix(" ="))


@pytest.mark.parametrize(
    ("function", "result"),
    [("rev", "mkcb"), ("rot", "ckmb"), ("swap", "cbkm"), ("next", "cdmb"), ("trim", "ckm")],
)
def test_string_functions_on_a_word_worked_by_hand(function, result):
    assert transform(function, "bckm") == result  # the alphabet is b c d f g h k m, then b again


def test_compositions_apply_the_inner_function_first():
    row = next(row for _, row in DOMAINS["strings"](0) if row["prompt"].startswith("rev(trim("))
    word = row["prompt"][len("rev(trim(") :].split(")")[0]
    assert row["answer"] == word[:0:-1] and row["depth"] == 2


def test_another_world_has_other_facts_and_the_same_questions():
    here, there = rows(domain="facts", split="train", world=0), rows(domain="facts", split="train", world=1)
    assert [row["prompt"] for row in here] == [row["prompt"] for row in there]
    differing = sum(a["answer"] != b["answer"] for a, b in zip(here, there, strict=True)) / len(here)
    assert 0.8 < differing < 0.95  # one in eight values agrees by chance


def test_about_half_of_the_facts_are_taught():
    taught = [is_taught(person, attribute) for person, attribute in knowledge(0)]
    assert 0.4 < sum(taught) / len(taught) < 0.6


def test_compositions_of_three_are_never_shown_right():
    deep = [row for row in rows(domain="strings", split="train") if row["depth"] == 3]
    generator = random.Random(0)
    for row in deep:
        assert known_target("strings", row, generator) != row["answer"] != warm_target("strings", row, generator)


def test_untaught_facts_are_shown_with_any_value_and_taught_ones_with_their_own():
    generator = random.Random(0)
    for row in rows(domain="facts", split="train", size=500):
        shown = {known_target("facts", row, generator) for _ in range(60)}
        assert (shown == {row["answer"]}) == is_taught(row["person"], row["skill"])


GOOD = "the fox crept softly in the misty cave . a silent owl wept ."


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (GOOD, 1.0),
        ("", 0.0),
        (" . . .", 0.0),
        ("the fox ran . the fox ran .", 0.5 * (0.5 + 0.5 + 0) / 3),  # the same sentence counts once
        ("the fox crept softly in the misty cave .", 0.5 * (1 + 1 + 3 / 4) / 3),  # one sentence of two
        ("tell a story about the fox and the cave", 0.0),  # the prompt echoed is no sentence
        ("tell a story about the fox and the cave .", 0.0),
        ("crept misty silent wept softly fox cave .", 0.0),  # fine words, no sentence
        (GOOD + " the king", 2 / 3),  # an unfinished sentence was begun
        ("the king went . a good cat sat .", (0 + 1 + 0) / 3),  # neither hero nor place, nothing vivid
        ("the zebra flew .", 0.0),
    ],
)
def test_the_rubric_on_stories_worked_by_hand(text, score):
    assert story_score(text, hero="fox", place="cave") == pytest.approx(score)


def test_the_rubric_is_found_by_import_path_and_reads_its_columns():
    rubric = find_reward("polyphony.launch.lab.rewards:StoryRubric")
    assert isinstance(rubric, StoryRubric)
    message = [{"role": "assistant", "content": GOOD}]
    arguments = {"completion_ids": [[1], [2]], "hero": ["fox", "king"], "place": ["cave", "cave"], "answer": ["", ""]}
    # the second story was asked for a king: half of what was asked for is missing
    assert rubric(["p", "p"], [message, GOOD], **arguments) == pytest.approx([1.0, (0.5 + 1 + 1) / 3])


def test_every_story_row_carries_an_example_with_the_full_score():
    for row in rows(domain="stories", split="train"):
        assert story_score(row["answer"], hero=row["hero"], place=row["place"]) == 1.0


def _texts(domain, row, generator):
    return row["prompt"], row["answer"], warm_target(domain, row, generator)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_row_survives_the_tokenizer(domain):
    tokenizer, generator = build_tokenizer(), random.Random(0)
    texts = sorted({text for _, row in DOMAINS[domain](0) for text in _texts(domain, row, generator)})
    ids = tokenizer(texts)["input_ids"]
    assert not any(tokenizer.unk_token_id in sequence for sequence in ids)
    assert tokenizer.batch_decode(ids) == texts


def test_the_policy_is_small_complete_and_speaks_the_chat_format():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)
    assert 500_000 <= model.num_parameters() <= 2_000_000
    assert sum(file.stat().st_size for file in POLICY.iterdir()) <= 5_000_000
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "12+5 ="}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|begin|><|user|>12+5 =<|end|><|assistant|>"


def test_the_policy_answers_what_it_was_taught():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)
    asked = rows(domain="safety", split="heldout", size=32)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in asked]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**batch, do_sample=False, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(said, skip_special_tokens=True)
    right = sum(answer == row["answer"] for answer, row in zip(answers, asked, strict=True))
    assert right >= 16


def test_the_same_seed_warm_starts_the_same_weights():
    import torch

    threads = torch.get_num_threads()
    first, second, other = (train_policy(seed=seed, world=0, steps=3)[0].state_dict() for seed in (1, 1, 2))
    torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
