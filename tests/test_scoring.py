from __future__ import annotations

import asyncio
import errno
import json
import math
import pickle
import socket
import urllib.error
from contextlib import nullcontext
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch

from polyphony.curricula.monitors.signs import COUNTED
from polyphony.curricula.records import Completion, Domain, Group, Prompt
from polyphony.rewards.registry import HOOKS, GraderGoneError, as_score, find_reward
from polyphony.trainer.extra_columns import Extra
from polyphony.trainer.scoring import Failures, Scorer, is_unreachable


class Recording:
    """Gives every completion its length and remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids, **columns})
        return [float(len(ids)) for ids in completion_ids]


def scorer(**rewards) -> Scorer:
    return Scorer([Domain(name=name, kind="structured", reward=reward) for name, reward in rewards.items()])


def sample(domain="math", text="4", ids=(1,), prompt="2+2=", **columns) -> Completion:
    prompt = Prompt(id=f"{domain}-{prompt}", domain=domain, prompt=prompt, columns=columns)
    return Completion(prompt=prompt, ids=list(ids), text=text, truncated=False)


def test_every_sample_goes_to_its_domains_reward_and_comes_back_in_its_place():
    samples = [sample("math", ids=[1]), sample("code", ids=[1, 2]), sample("math", ids=[1, 2, 3])]
    math_reward, code_reward = Recording(), lambda prompts, **columns: [0.5]
    assert scorer(math=math_reward, code=code_reward)(samples) == [1.0, 0.5, 3.0]
    assert len(math_reward.calls) == 1


def test_a_reward_sees_texts_ids_and_every_column_of_its_rows():
    reward = Recording()
    scorer(math=reward)([sample(answer="4", level=1), sample(text="5", ids=[7, 8], answer="4", hint="add")])
    hooks = {name: reward.calls[0].pop(name) for name in HOOKS}
    assert hooks.pop("trainer_state") is None  # outside a run
    assert all(map(callable, hooks.values()))
    assert reward.calls == [
        {
            "id": ["math-2+2=", "math-2+2="],
            "domain": ["math", "math"],
            "prompts": ["2+2=", "2+2="],
            "completions": ["4", "5"],
            "ids": [[1], [7, 8]],
            "answer": ["4", "4"],
            "hint": [None, "add"],
            "level": [1, None],
        }
    ]


def test_a_conversation_is_answered_by_a_message():
    reward = Recording()
    chat = [{"role": "user", "content": "2+2="}]
    scorer(math=reward)([sample(prompt=chat)])
    assert reward.calls[0]["prompts"] == [chat]
    assert reward.calls[0]["completions"] == [[{"role": "assistant", "content": "4"}]]


async def slow_reward(prompts, completions, completion_ids, answer, **columns):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


class SlowReward:
    async def __call__(self, prompts, **columns):
        return [1] * len(prompts)


@pytest.mark.parametrize("reward", [slow_reward, SlowReward()])
def test_a_reward_may_be_asynchronous(reward):
    assert scorer(math=reward)([sample(answer="4")]) == [1.0]


def test_an_asynchronous_reward_is_awaited_inside_a_running_event_loop():
    async def inside():
        return scorer(math=SlowReward())([sample(), sample()])

    assert asyncio.run(inside()) == [1.0, 1.0]


class Keeps:
    """Has a client of the loop that it was first called in, as HTTP clients have."""

    def __init__(self):
        self.lock, self.loops = asyncio.Lock(), set()

    async def __call__(self, prompts, **columns):
        async with self.lock:
            self.loops.add(asyncio.get_running_loop())
        return [1.0] * len(prompts)


def test_asynchronous_rewards_always_run_in_the_same_loop():
    reward = Keeps()
    grader = scorer(math=find_reward({"name": "weighted", "parts": {"a": {"reward": reward}, "b": {"reward": waits}}}))
    assert [grader([sample(), sample()]) for _ in range(2)] == [[1.5, 1.5]] * 2
    assert len(reward.loops) == 1


def test_an_asynchronous_reward_may_ask_asynchronous_ones():
    async def asks(prompts, **columns):
        return scorer(math=waits)([sample()] * len(prompts))

    assert scorer(math=asks)([sample(), sample()]) == [0.5, 0.5]


RETURNED = {
    "list": [1, None, 0.5],
    "tuple": (1, None, 0.5),
    "numpy": np.array([1, None, 0.5], dtype=object),
    "float32": np.array([1, 0, 0.5], dtype=np.float32),
    "torch": torch.tensor([1, 0, 0.5], dtype=torch.bfloat16, requires_grad=True),
    "column": torch.tensor([[1], [0], [0.5]]),
    "tensors": [torch.tensor(1), None, np.float64(0.5)],
    "not graded": torch.tensor([1, math.nan, 0.5]),  # a tensor knows no None, and TRL reads NaN as one
    "not graded of numpy": [1, np.float32("nan"), 0.5],
}


@pytest.mark.parametrize("values", RETURNED.values(), ids=RETURNED)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_may_return_lists_numpy_and_tensors(values, is_async):
    async def later(prompts, **columns):
        return values

    found = scorer(math=later if is_async else lambda prompts, **columns: values)([sample()] * 3)
    assert found == [1.0, None if values[1] is None or math.isnan(values[1]) else 0.0, 0.5]


def test_a_reward_may_yield_its_values():
    assert scorer(math=lambda prompts, **columns: (0.5 for _ in prompts))([sample()] * 2) == [0.5, 0.5]


@pytest.mark.parametrize("values", [0.5, "11", {"a": 1}, np.array(1.0)], ids=str)
def test_a_reward_that_returns_no_values_is_refused_by_its_domains_name(values):
    with pytest.raises(ValueError, match="domain 'math': the reward returned"):
        scorer(math=lambda prompts, **columns: values)([sample(), sample()])


def test_extra_columns_are_of_the_completions_that_they_were_said_of():
    grader = scorer(math=of_trl, code=fixed)
    grader.extra = extra = Extra()
    rows = [sample("math", "a", ids=[1]), sample("code", answer="4"), sample("math", "abc", ids=[2])]
    grader(rows)
    assert extra.flush(rows) == {"length": [1, None, 3]}
    assert extra.flush(rows) == {"length": [None] * 3}  # a column that was once there stays one
    grader.apart()(rows)
    assert extra.flush(rows[:1]) == {"length": [None]}
    extra.add("math", "length", [rows[0], rows[0]], [1, 2])  # the same sampled twice
    assert extra.flush([rows[0]] * 3) == {"length": [1, 2, 2]}


def test_an_extra_column_has_a_value_for_each_completion():
    def short(prompts, log_extra, **columns):
        log_extra("seen", ["4"])
        return [1.0] * len(prompts)

    grader = scorer(math=short)
    grader.extra = Extra()
    with pytest.raises(ValueError, match="domain 'math': log_extra got 1 values of 'seen' for 2 completions"):
        grader([sample(), sample()])


def test_none_stays_none_and_other_numbers_become_floats():
    class Number:
        def __float__(self):
            return 0.25

    rewards = scorer(math=lambda prompts, **columns: [None, True, 2, Number()])([sample()] * 4)
    assert rewards == [None, 1.0, 2.0, 0.25]
    assert [type(reward) for reward in rewards[1:]] == [float] * 3


def fragile(prompts, completions, **columns):
    if "?" in completions:
        raise KeyError("?")
    return [1.0] * len(prompts)


def test_a_reward_that_raises_costs_its_own_sample_and_says_so(caplog):
    assert scorer(math=fragile)([sample(), sample(text="?"), sample()]) == [1.0, None, 1.0]
    told = (
        f"domain 'math': the reward raised KeyError: '?' ({__file__}:{fragile.__code__.co_firstlineno + 2}); told once"
    )
    assert told in caplog.text


def unreadable(prompts, completions, **columns):
    return [float(json.loads(text)["x"]) for text in completions]


async def of_a_group(prompts, completions, **columns):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(of_a_task())
    return [1.0] * len(prompts)


async def of_a_task():
    raise KeyError("inside")


def test_what_a_reward_raises_is_told_once_with_its_own_line(caplog):
    graded = scorer(math=unreadable)
    assert graded([sample(text="a"), sample(text="b")]) == graded([sample(text="c")]) * 2 == [None, None]
    assert caplog.text.count("the reward raised JSONDecodeError") == 1
    assert f"({__file__}:{unreadable.__code__.co_firstlineno + 1}); told once" in caplog.text
    graded([sample(text="{}")])
    assert "the reward raised KeyError: 'x'" in caplog.text
    scorer(math=of_a_group)([sample()])
    assert f"KeyError: 'inside' ({__file__}:{of_a_task.__code__.co_firstlineno + 1})" in caplog.text


def of_trl(prompts, completions, log_metric, log_extra, **columns):
    """A reward in the form of TRL's documentation."""
    lengths = [len(text) for text in completions]
    log_extra("length", lengths)
    log_metric("mean_length", sum(lengths) / len(lengths))
    return [float(length > 1) for length in lengths]


def fixed(prompts, completions, completion_ids, answer):
    return [1.0] * len(prompts)


async def waits(prompts, log_metric=None, **columns):
    log_metric("asked", len(prompts))
    log_metric("asked", math.nan)  # says nothing, and takes nothing from what others say
    return [0.5] * len(prompts)


def test_what_a_reward_logs_as_in_trl_is_a_metric_of_its_domain(caplog):
    weighted = find_reward({"name": "weighted", "parts": {"a": {"reward": waits}, "b": {"reward": fixed}}})
    grader = scorer(math=of_trl, code=fixed, chat=waits, both=weighted)
    for _ in range(2):
        rewards = grader([sample("math", "a"), sample("math", "abc"), sample("code", answer="4"), sample("chat")])
        assert rewards == [0.0, 1.0, 1.0, 0.5]
    grader([sample("math", "abcdef"), sample("both", answer="4"), sample("both", answer="5")])
    assert caplog.text.count("log_extra: column 'length' of a reward is kept of training completions") <= 1  # once
    assert grader.logged.flush("domain") == {
        "domain/math/logged/mean_length": pytest.approx((2 + 2 + 6) / 3),
        "domain/chat/logged/asked": 1.0,
        "domain/both/logged/asked": 2.0,
        "domain/both/logged/a": 0.5,
        "domain/both/logged/b": 1.0,
    }
    assert grader.logged.flush("domain") == {}


def test_a_reward_that_no_row_can_be_handed_to_is_refused_before_the_first():
    fit = [lambda prompts, **columns: [], Recording(), lambda prompts, completions, completion_ids, answer: []]
    for reward in [*fit, of_trl, waits, "exact"]:
        scorer(math=reward).check_fit([sample(answer="4").prompt])
    for reward, why in [
        (lambda completions, **columns: [], None),
        (lambda prompts, completions, completion_ids: [], "got an unexpected keyword argument 'answer'"),
        (lambda prompts, solution, **columns: [], None),  # which other rows may have
    ]:
        grader = scorer(math=reward)
        with pytest.raises(ValueError, match=rf"domains\.math\.reward: {why}") if why else nullcontext():
            grader.check_fit([sample(answer="4").prompt])


def test_what_is_logged_on_held_out_completions_is_counted_apart():
    grader = scorer(math=of_trl)
    heldout = grader.apart()
    assert (grader([sample("math", "a")]), heldout([sample("math", "abc")])) == ([0.0], [1.0])
    assert grader.logged.flush("domain") == {"domain/math/logged/mean_length": 1.0}
    assert heldout.logged.flush("heldout") == {"heldout/math/logged/mean_length": 3.0}


def test_a_call_that_raises_and_is_made_again_logs_once():
    def logs_and_breaks(prompts, completions, log_metric, **columns):
        log_metric("rows", len(prompts))
        return fragile(prompts, completions)

    grader = scorer(math=logs_and_breaks)
    assert grader([sample(), sample(text="?"), sample()]) == [1.0, None, 1.0]
    assert grader.logged.sums == {("math", "rows"): (2.0, 2)}


class Gone:
    """Raises what it is given, and counts."""

    def __init__(self, error):
        self.error, self.asked = error, 0

    def __call__(self, prompts, **columns):
        self.asked += 1
        raise self.error


class LibraryError(Exception):
    """Stands for an error of a library that need not be there."""


def of_library(name):
    module, _, kind = name.rpartition(".")
    return type("Sub", (type(kind, (LibraryError,), {"__module__": module}),), {})("gone")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError("gone"),
        TimeoutError("gone"),
        socket.gaierror("gone"),
        urllib.error.URLError("gone"),
        httpx.ConnectError("gone"),
        httpx.ReadTimeout("gone"),
        of_library("openai.APIConnectionError"),
        of_library("requests.exceptions.ConnectionError"),
        of_library("aiohttp.client_exceptions.ClientConnectionError"),
    ],
)
def test_a_judge_that_is_down_is_asked_once_for_all_rows(error, caplog):
    grader = Gone(error)
    graded = scorer(math=grader)
    assert graded([sample()] * 5) == [None] * 5
    assert grader.asked == 1 and caplog.text.count("domain 'math': the reward raised") == 1
    graded([sample()] * 5)
    assert caplog.text.count("domain 'math': the reward raised") == 2  # whoever is gone for hours is told of


@pytest.mark.parametrize("error", [OSError("disk"), BrokenPipeError(), ValueError(), of_library("mine.Timeout")])
def test_any_other_error_may_be_of_one_row_so_each_is_asked(error):
    grader = Gone(error)
    assert scorer(math=grader)([sample()] * 5) == [None] * 5
    assert grader.asked == 6


def test_a_failure_in_one_domain_does_not_touch_another():
    samples = [sample("math", text="?"), sample("code", text="4")]
    assert scorer(math=fragile, code=fragile)(samples) == [None, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "the reward returned 1 values for 2 completions"),
        ([1.0, 1.0, 1.0], "the reward returned 3 values for 2 completions"),
        (None, "the reward returned None for 2 completions"),
        ([1.0, math.inf], "the reward returned inf; a failed grading is None"),
        ([1.0, "good"], "the reward returned 'good', which is no number"),
        ([1.0, [1.0]], "the reward returned \\[1.0\\], which is no number"),
    ],
)
def test_a_reward_that_breaks_its_contract_stops_everything_with_its_domains_name(returned, message):
    with pytest.raises(ValueError, match=f"domain 'math': {message}"):
        scorer(math=lambda prompts, **columns: returned)([sample(), sample()])


def test_an_unknown_reward_is_named_with_its_place_and_those_that_exist():
    with pytest.raises(
        ValueError, match=r"domains\.math\.reward: reward 'exactt' does not exist; did you mean 'exact'"
    ):
        scorer(math="exactt")


def graded(prompt, reward=1.0, length=3, truncated=False, text="") -> Completion:
    asked = Prompt(domain="math", id=prompt)
    return Completion(prompt=asked, ids=[0] * length, reward=reward, truncated=truncated, text=text)


def test_a_group_keeps_what_other_ranks_need_to_know():
    told = replace(graded("a", 0.5, length=2, text="4"), logps=[-0.5, -0.25])
    group = Group.of([told, replace(graded("a", None, 5, True), signs=("truncation",))], draw=7)
    assert group == Group(
        prompt_id="a",
        domain="math",
        draw=7,
        rewards=(0.5, None),
        lengths=(2, 5),
        truncated=(False, True),
        surprisals=(0.75, None),
        signs=((), ("truncation",)),
        prints=(hash((0,) * 2), hash((0,) * 5)),
    )
    assert not group.is_alike and Group.of([told, told], draw=7).is_alike
    assert Group.of([told], draw=7, compare="answers").texts == ("4",)


def test_what_ranks_tell_each_other_is_light():
    """200 bytes a completion beside compared text, whatever its length, its prompt and its columns."""
    asked = Prompt(domain="math", id="9f" * 8, prompt="q" * 9000, columns={"answer": "a" * 9000}, ids=range(9000))
    long = Completion(prompt=asked, ids=[7] * 9000, logps=[-0.1] * 9000, text="t" * 9000, reward=0.5, signs=COUNTED)
    groups = [(k, Group.of([long] * 8, draw=3)) for k in range(64)]
    assert len(pickle.dumps(groups)) / (64 * 8) < 200
    texts = [(k, Group.of([long] * 8, draw=3, compare="answers")) for k in range(64)]
    assert (len(pickle.dumps(texts)) - 9000) / (64 * 8) < 200  # one text, said 512 times, is sent once


def test_parts_of_a_group_are_joined_and_others_are_not():
    first, second = (Group.of([graded("a", r)], draw=7) for r in (1.0, 0.0))
    assert first.joined(second) == Group.of([graded("a", 1.0), graded("a", 0.0)], draw=7)
    with pytest.raises(ValueError, match=r"a group is of one prompt, got \['a', 'b'\]"):
        first.joined(Group.of([graded("b")], draw=7))
    with pytest.raises(ValueError, match=r"a group is of one prompt, got \['a', 'b'\]"):
        Group.of([graded("b"), graded("a")], draw=7)


def test_a_group_is_filled_with_its_own_completions_once_more():
    group = Group.of([graded("a", 1.0, 3), graded("a", 0.0, 4)], draw=7).filled(5)
    assert (group.rewards, group.lengths, group.texts) == ((1.0, 0.0, 1.0, 0.0, 1.0), (3, 4, 3, 4, 3), ())


def test_failures_are_counted_against_the_last_completions_of_their_own_domain_and_one_bad_row_is_none(caplog):
    half = [Group.of([graded("a", None), graded("a", 1.0)], draw=0)]
    Failures(most=0.5).see(half * 200)
    strict = Failures(most=0.49)
    strict.see(half * 31)  # 62 completions
    with pytest.raises(GraderGoneError, match="domain 'math': the reward failed on 32 of the last 64 completions"):
        strict.see(half)
    good, bad = ([Group.of([graded("b", r), graded("b", r)], draw=0)] for r in (1.0, None))
    forgets = Failures(most=0.49)
    forgets.see(bad * 30 + good * 98)
    forgets.see(good * 30 + bad * 62)  # of the last 256 none of the first 30
    assert caplog.text.count("domain 'math': prompt 'b' could not be graded: its group is left out") == 1
    with pytest.raises(GraderGoneError, match="failed on 126 of the last 256"):
        forgets.see(bad)


def test_a_range_maps_held_out_scores_to_0_to_1():
    declared = {"name": "exact", "range": [-1, 1]}
    assert [as_score(declared, r) for r in (-1.0, 0.5, 1.0, None)] == [0.0, 0.75, 1.0, None]
    assert [as_score("exact", r) for r in (-1.0, 0.5)] == [-1.0, 0.5]
    for wrong in ([1, -1], [0], "high", [0, float("nan")], 3):
        with pytest.raises(ValueError, match=r"domains\.sums\.reward: range: expected \[lowest, highest\]"):
            Scorer([Domain(name="sums", kind="structured", reward={"name": "exact", "range": wrong})])


def test_a_thought_that_the_template_began_and_the_policy_never_ended_earns_nothing():
    domain = Domain(name="math", kind="structured", reward="short_answer")
    cut = sample(text=r"6 times 7 is \boxed{42}, but wait", answer="42")
    whole = sample(text=r"six sevens</think>\boxed{42}", answer="42")
    assert Scorer([domain])([cut, whole]) == [1.0, 1.0]
    assert Scorer([domain], openings={"math": "<think>"})([cut, whole]) == [0.0, 1.0]


OPENED = [  # what the policy said after a template that ends with <think>, and what that is worth
    (r"\boxed{42}", 0.0),
    (r"\boxed{42} </thin", 0.0),
    ("<answer>42</answer>", 0.0),
    ("The answer is 42.", 0.0),
    ("", 0.0),
    (r"maybe \boxed{42}</think>", 0.0),
    (r"maybe \boxed{42}</think> I can not tell.", 0.0),
    (r"maybe \boxed{41}</think> \boxed{42}", 1.0),
    ("</think>42", 1.0),
    ("6 * 7</think>\n\n<answer>42</answer>", 1.0),
    ("first</think> The answer is 42.", 1.0),
    (r"first</think> \boxed{41}", 0.0),
    (r"first</think>\boxed{42}<think>or is it", 1.0),
    (r"first</think><think>second \boxed{42}", 0.0),
]


@pytest.mark.parametrize(("said", "reward"), OPENED)
def test_what_follows_a_begun_thought_is_graded_from_its_end(said, reward):
    domain = Domain(name="math", kind="structured", reward="short_answer")
    assert Scorer([domain], openings={"math": "<think>\n"})([sample(text=said, answer="42")]) == [reward]


def caused_by(cause: Exception) -> Exception:
    error = RuntimeError("the judge did not answer")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (caused_by(ConnectionResetError()), True),
        (ExceptionGroup("two tasks", [ValueError(), TimeoutError()]), True),
        (OSError(errno.EHOSTUNREACH, "no route to host"), True),
        (caused_by(ValueError()), False),
        (ExceptionGroup("two tasks", [ValueError(), KeyError()]), False),
        (OSError(errno.ENOENT, "no such file"), False),
    ],
    ids=repr,
)
def test_a_judge_that_is_down_is_known_by_what_the_error_came_from(error, expected):
    assert is_unreachable(error) is expected
