from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.records import Domain
from polyphony.trainer.domains import DomainData
from polyphony.trainer.policy import Policy
from polyphony.trainer.settings import DataSettings
from tests.conftest import HOUSE


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HOUSE / "launch" / "lab" / "policy")


@pytest.fixture
def load(tokenizer, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), max_completion_length=8, bf16=False)

    def load(*domains, **settings):
        return DomainData.load(domains, **{"tokenizer": tokenizer, "args": args} | settings)

    return load


def rows(*prompts):
    return [{"prompt": prompt, "answer": "1", "id": prompt} for prompt in prompts]


HELDOUT = rows("1+1 =", "2+2 =")


def domain(name="math", *, train=("3+3 =", "4+4 ="), heldout=HELDOUT, **changes) -> Domain:
    rows_to_train = rows(*train) if train else None
    return Domain(name=name, kind="structured", reward="exact", train=rows_to_train, heldout=heldout, **changes)


def test_domains_keep_their_order_and_watched_ones_have_no_training_rows(load):
    data = load(domain(), domain("safety", train=None), domain("code", train=["5+5 ="]))
    assert data.names == ("math", "safety", "code")
    assert list(data.train) == ["math", "code"]
    assert list(data.heldout) == ["math", "safety", "code"]
    assert data.n_train == 3


def test_a_domain_without_a_limit_takes_that_of_the_run(load):
    data = load(domain(), domain("code", max_completion_length=3))
    assert data.limits == {"math": 8, "code": 3}


def test_a_limit_above_that_of_the_run_is_an_error(load):
    with pytest.raises(ValueError, match=r"domain 'math': max_completion_length must be in 1\.\.8 .*, got 9"):
        load(domain(max_completion_length=9))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'a' + messages }}", "concatenate"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].name.upper() }}", "has no attribute 'name'"),
    ],
)
def test_a_prompt_that_the_chat_template_refuses_is_named(load, tokenizer, template, why):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    parts = [{"role": "user", "content": [{"type": "text", "text": "3+3 ="}]}]
    odd = Domain(
        name="math",
        kind="structured",
        reward="exact",
        train=[{"prompt": parts, "id": "odd", "answer": "6"}],
        heldout=HELDOUT,
    )
    with pytest.raises(ValueError, match=f"domain 'math': the chat template refuses prompt 'odd': .*{why}"):
        load(odd, tokenizer=other, context=64)


def test_prompts_go_through_the_chat_template_with_the_system_prompt(load, tokenizer):
    data = load(domain(system_prompt="say it"), domain("code"))
    asked = data.tokenized([next(iter(data.train[name])) for name in ("math", "code")])
    assert [tokenizer.decode(prompt.ids) for prompt in asked] == [
        "<|begin|><|system|>say it<|end|><|user|>3+3 =<|end|><|assistant|>",
        "<|begin|><|user|>3+3 =<|end|><|assistant|>",
    ]


def test_each_domain_has_its_own_arguments_for_the_chat_template(load):
    tokenizer = AutoTokenizer.from_pretrained(HOUSE / "launch" / "lab" / "policy")
    tokenizer.chat_template = "{{ 'a' if thinks else 'b' }}"
    data = load(domain(chat_template_kwargs={"thinks": True}), domain("code"), tokenizer=tokenizer)
    asked = data.tokenized([next(iter(data.train[name])) for name in ("math", "code", "math")])
    assert [tokenizer.decode(prompt.ids) for prompt in asked] == ["a", "b", "a"]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLING = [
    {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
]


def test_what_is_null_is_left_out_and_parts_of_content_are_text(load, tokenizer):
    with pytest.warns(UserWarning, match="1 of 1 rows end with what the assistant said"):
        data = load(Domain(**TOOLS | {"train": [{"prompt": CALLING, "answer": "1"}]}))
    (prompt,) = data.tokenized(data.train["tools"])
    assert tokenizer.decode(prompt.ids) == "<|begin|><|user|>1\n2<|end|><|assistant|><|end|><|assistant|>"


def test_functions_go_to_the_chat_template_or_are_missed(load, tokenizer):
    tool = {"type": "function", "function": {"name": "f"}}
    rows_ = [
        {"prompt": "3+3 =", "answer": "6", "tools": given, "id": i}
        for i, given in enumerate(([tool], json.dumps([tool])))
    ]
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ tools[0].function.name if tools }}" + tokenizer.chat_template
    data = load(Domain(**TOOLS, train=rows_), tokenizer=other)
    assert {other.decode(p.ids)[:10] for p in data.tokenized(data.train["tools"])} == {"f<|begin|>"}
    with pytest.warns(UserWarning, match=r"domains\.tools\.train: row 1: `tools` are not shown to the policy"):
        load(Domain(**TOOLS, train=rows_))


TOOLS = {"name": "tools", "kind": "structured", "reward": "exact", "heldout": HELDOUT}


def test_text_may_be_asked_as_it_stands_and_has_one_beginning(load, tokenizer):
    begun = copy.deepcopy(tokenizer)
    begun.bos_token = "<|begin|>"
    texts = ("3+3 =", "<|begin|>4+4 =")
    data = load(domain(train=texts, as_chat=False), tokenizer=begun)
    assert [begun.decode(p.ids) for p in data.tokenized(data.train["math"])] == list(texts)
    assert data.openings == {}


def test_text_that_went_through_the_template_is_refused(load):
    with pytest.raises(ValueError, match=r"domains\.math\.train: row 2: the text '<\|begin\|>.*math\.as_chat: false"):
        load(domain(train=("3+3 =", "<|begin|><|user|>4+4 =<|end|><|assistant|>")))


@pytest.mark.parametrize(
    "prompt", ["<|im_start|>user\n1+1=<|im_end|>", [{"role": "user", "content": "<|begin|><|user|>1+1=<|end|>"}]]
)
def test_text_of_another_template_is_refused_and_so_is_such_a_message(load, prompt):
    heldout = [*HELDOUT, {"prompt": prompt, "answer": "1"}]
    with pytest.raises(ValueError, match=r"math\.heldout: row 3: the text '<\|.* went through a chat template already"):
        load(domain(heldout=heldout))


def test_tokens_that_frame_a_turn_are_said_where_they_stand_in_a_text(load):
    with pytest.warns(
        UserWarning, match=r"1 of 2 rows have in their text .* the frame of a turn \(row 2: '<\|end\|>'\)"
    ):
        load(domain(train=["3+3 =", "4+4 = <|end|> 8"]))


def test_text_is_tokenised_as_it_is_without_a_chat_template(load):
    tokenizer = AutoTokenizer.from_pretrained(HOUSE / "launch" / "lab" / "policy")
    tokenizer.chat_template = None
    data = load(domain(), tokenizer=tokenizer)
    assert tokenizer.decode(data.tokenized(data.train["math"])[0].ids) == "3+3 ="


REPEATED = ("3+3 =", "1+1 =", "4+4 =")
"""The second repeats a held-out prompt."""


def test_training_rows_that_repeat_held_out_rows_are_dropped_and_counted(load):
    with pytest.warns(UserWarning, match=r"domains\.math\.train: 1 of 3 rows repeat held-out rows \(.*\); left out"):
        data = load(domain(train=REPEATED))
    assert data.train["math"].ids == ["3+3 =", "4+4 ="]
    assert (data.n_train, data.dropped) == (2, {"math": 1})


def test_held_out_rows_of_another_domain_count_too(load):
    with pytest.warns(UserWarning, match=r"domains\.code\.train: 1 of 2 rows repeat held-out rows \(.*\); left out"):
        load(domain(), domain("code", train=("1+1 =", "5+5 ="), heldout=rows("6+6 =", "7+7 =")))


def test_they_are_kept_where_the_user_says_so(load):
    with pytest.warns(UserWarning, match="kept, as asked for"):
        data = load(domain(train=REPEATED), settings=DataSettings(overlap="keep"))
    assert (data.n_train, data.dropped) == (3, {})


def test_they_are_an_error_where_the_user_says_so(load):
    with pytest.raises(ValueError, match=r"1 of 3 rows repeat held-out rows, for example id '1\+1 ='"):
        load(domain(train=REPEATED), settings=DataSettings(overlap="error"))


def test_a_domain_that_only_repeats_held_out_rows_has_nothing_to_train_on(load):
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match=r"domains\.math\.train: 2 of 2 .*: nothing is left to train on"),
    ):
        load(domain(train=("1+1 =", "2+2 =")))


def test_a_name_given_twice_is_an_error(load):
    with pytest.raises(ValueError, match=r"domains named twice: \['math'\]"):
        load(domain(), domain("code"), domain())


def test_a_domain_without_held_out_rows_is_an_error(load):
    with pytest.raises(ValueError, match="domain 'math' has no `heldout` rows"):
        load(domain(heldout=None))


def test_one_held_out_item_cannot_both_steer_and_report(load):
    with pytest.raises(ValueError, match=r"domains\.math\.heldout: 1 item; at least 2 are needed"):
        load(domain(heldout=rows("1+1 =")))


def test_a_run_that_only_watches_is_an_error(load):
    with pytest.raises(ValueError, match="no domain has `train` rows"):
        load(domain(train=None), domain("safety", train=None))


def test_prompt_and_completion_must_fit_the_context(load):
    # <|begin|> <|user|> 3 + 3 space = <|end|> <|assistant|>: 9 tokens, and 8 for the completion
    assert load(domain(), context=17).context == 17
    with pytest.raises(
        ValueError, match=r"domains\.math\.train: 2 of 2 rows .* context of 16 \(row 1: 9 tokens; row 2"
    ):
        load(domain(), context=16)
    assert load(domain(max_completion_length=7), context=16).limits == {"math": 7}


def test_a_held_out_prompt_must_fit_the_context_too(load):
    long = rows("1+1 =", "11+11 =")
    with (
        pytest.warns(UserWarning, match=r"domains\.math\.heldout: 1 of 2 rows with .* \(row 2: 11 tokens\); left out"),
        pytest.raises(ValueError, match=r"domains\.math\.heldout: 1 item; at least 2 are needed"),
    ):
        load(domain(heldout=long), context=17)


def test_a_prompt_that_does_not_fit_is_left_out_counted_and_named(load):
    with pytest.warns(UserWarning, match=r"domains\.math\.train: 1 of 3 rows with completions of 8 tokens \(max"):
        data = load(domain(train=["3+3 =", "44444+4 =", "5+5 ="]), context=17)
    assert (data.train["math"].ids, data.train["math"].left_out) == (["3+3 =", "5+5 ="], ["44444+4 ="])
    assert data.longest == 17


class NoSevens:
    """A reward that cannot read a seven."""

    def __call__(self, prompts, completions, answer, **columns):
        return [0.0] * len(prompts)

    def unreadable(self, answer, **columns):
        return "a seven" if "7" in answer else None


def numbered(n: int) -> list[dict]:
    return [{"prompt": f"{i} =", "answer": str(i), "id": f"i{i}"} for i in range(n)]


def test_rows_whose_reference_cannot_be_read_are_left_out_up_to_a_share(load):
    sums = Domain(name="sums", kind="structured", train=numbered(20), heldout=numbered(6), reward=NoSevens())
    message = r"domains.sums.train: 2 of 20 rows .* \(row 8: a seven; row 18: a seven\)"
    with pytest.warns(UserWarning, match=message):
        data = load(sums, settings=DataSettings(overlap="keep", max_unreadable=0.1))
    assert (data.n_train, len(data.heldout["sums"])) == (18, 6)
    with pytest.raises(ValueError, match=message + "; data.max_unreadable allows a share of 0.01"):
        load(sums, settings=DataSettings(overlap="keep"))


def test_a_thought_that_the_template_begins_is_known(load, tokenizer):
    opens = copy.deepcopy(tokenizer)
    assert load(domain(), tokenizer=opens).openings == {}
    opens.chat_template += "{%- if add_generation_prompt %}<think>{%- endif %}"
    assert load(domain(), tokenizer=opens).openings == {"math": "<think>"}
    opens.chat_template += "{%- if add_generation_prompt %}</think>{%- endif %}"
    assert load(domain(), tokenizer=opens).openings == {}


def test_what_frames_a_turn_is_told_from_other_special_tokens(load, tokenizer):
    names = set(tokenizer.convert_ids_to_tokens(sorted(load(domain()).framing)))
    assert names == {"<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"}  # not <|unknown|>, not <|system|>


CALLS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|tool_call_begin|>", "<think>", "</think>"]


@pytest.mark.parametrize(
    ("said", "read"),
    [
        *((f"{token}a", f"{token}a") for token in CALLS),
        ("<tool_call>a</tool_call><|end|>", "<tool_call>a</tool_call>"),
        ("<think>a</think>b<|end|><|pad|><|pad|>", "<think>a</think>b"),
        ("<|assistant|>a<|user|>b", "ab"),
        ("a<|end|>", "a"),
    ],
)
def test_tokens_marked_special_are_read_but_for_those_that_frame_a_turn(said, read, load, tokenizer):
    calls = copy.deepcopy(tokenizer)
    calls.add_special_tokens({"additional_special_tokens": CALLS}, replace_extra_special_tokens=False)
    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(bf16=True),
        num_generations=2,
        model=torch.nn.Module(),
        processing_class=calls,
        _tokenizer=calls,
        eos_token_ids=[calls.eos_token_id],
    )
    policy = Policy(trainer, load(domain(), tokenizer=calls), passes=tuple, turn=tuple)
    ids = calls(said, add_special_tokens=False)["input_ids"]
    assert "".join(policy.decode(ids).split()) == read


def test_rows_that_repeat_are_said(load):
    twice = [{"prompt": f"{i % 2} =", "answer": "1"} for i in range(4)]
    with pytest.warns(UserWarning, match=r"domains\.math\.heldout: 2 of 4 rows repeat one before them .*; left out"):
        load(domain(heldout=twice))


def test_a_reference_under_another_name_is_guessed(load):
    named = [{"prompt": f"{i} =", "solution": "1"} for i in range(4)]
    with pytest.raises(ValueError, match=r"4 of 4 rows .*row 1: None .*no `answer`, did you mean `solution`\?"):
        load(domain(heldout=named))


def test_rows_of_a_data_set_are_asked_as_trl_asks_them_where_text_is_no_chat(load, tokenizer):
    text = [{"prompt": "3+3 =", "answer": "6"}]
    chat = [{"prompt": [{"role": "user", "content": "3+3 ="}], "answer": "6"}]
    for rows_, said in ((text, "3+3 ="), (chat, "<|begin|><|user|>3+3 =<|end|><|assistant|>")):
        asked = Domain(**TOOLS | {"train": Dataset.from_list(rows_), "heldout": rows_ * 2, "as_chat": False})
        asked = replace(asked, heldout=[row | {"id": i} for i, row in enumerate(asked.heldout)])
        data = load(asked, settings=DataSettings(overlap="keep"))
        (prompt,) = data.tokenized(data.train["tools"])
        assert tokenizer.decode(prompt.ids) == said and type(prompt.prompt) is type(rows_[0]["prompt"])
