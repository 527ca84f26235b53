"""Grading that begins before the last completion is sampled."""

from __future__ import annotations

import threading
import time

import pytest

from polyphony.curricula.records import Completion, Domain, Prompt
from polyphony.rewards import find_reward
from polyphony.trainer.engine.vllm import Request
from polyphony.trainer.scoring import EarlyGrading, Scorer


class Waiting:
    """A grader that mostly waits; remembers its calls and when they began."""

    is_slow = True

    def __init__(self, wait_s=0.0, raises=None):
        self.wait_s, self.raises, self.calls, self.began = wait_s, raises, [], []
        self.busy = threading.Lock()

    def __call__(self, prompts, completions, completion_ids, **columns):
        assert self.busy.acquire(blocking=False), "two calls at a time"
        self.began.append(time.monotonic())
        self.calls.append(list(completions))
        time.sleep(self.wait_s)
        self.busy.release()
        if self.raises is not None:
            raise self.raises
        return [float(text) for text in completions]


class Quick(Waiting):
    is_slow = False


def prompts(*domains):
    return [Prompt(id=f"p{i}", domain=name, prompt="q", columns={}) for i, name in enumerate(domains)]


def read(prompts, completions):
    return [
        Completion(prompt=p, ids=c.ids, text=str(c.ids[0]), truncated=False)
        for p, c in zip(prompts, completions, strict=True)
    ]


def completions(n):
    return [Completion(ids=[i], logps=None) for i in range(n)]


def scorer(**rewards):
    return Scorer([Domain(name=name, kind="open_ended", reward=reward) for name, reward in rewards.items()])


def ahead(asked, **rewards):
    return EarlyGrading(scorer(**rewards), asked, read)


def test_rewards_are_the_same_and_in_order_however_completions_end():
    asked, sampled = prompts("slow", "quick", "slow", "slow", "quick"), completions(5)
    slow, quick = Waiting(), Quick()
    grading = ahead(asked, slow=slow, quick=quick)
    for place in (3, 1, 0):  # the engine never announces the last two
        grading.take(place, sampled[place])
    grading.take(3, sampled[3])
    assert grading.scores(read(asked, sampled)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sorted(text for call in slow.calls for text in call) == ["0", "2", "3"]
    assert quick.calls == [["1", "4"]]


def test_slow_grading_begins_while_the_engine_is_at_work_and_one_call_at_a_time():
    asked, sampled = prompts(*["slow"] * 12), completions(12)
    slow = Waiting(wait_s=0.2)
    grading = ahead(asked, slow=slow)
    started = time.monotonic()
    for place in range(12):
        time.sleep(0.05)  # the engine's step
        grading.take(place, sampled[place])
    engine_ended = time.monotonic()
    assert grading.scores(read(asked, sampled)) == [float(i) for i in range(12)]
    assert slow.began[0] < engine_ended - 0.2
    assert 1 < len(slow.calls) < 12  # what came meanwhile is graded together
    assert time.monotonic() - started < 12 * 0.05 + 12 * 0.2


def test_what_grading_raises_is_raised_where_the_scores_are_asked_for():
    asked, sampled = prompts("slow"), completions(1)
    grading = ahead(asked, slow=lambda prompts, **columns: [1.0, 2.0])
    grading._scorer.slow = frozenset({"slow"})
    grading.take(0, sampled[0])
    with pytest.raises(ValueError, match="domain 'slow': the reward returned 2 values for 1 completions"):
        grading.scores(read(asked, sampled))


def test_a_grader_that_fails_ahead_costs_its_own_rows():
    asked, sampled = prompts("slow", "quick"), completions(2)
    grading = ahead(asked, slow=Waiting(raises=ConnectionError("gone")), quick=Quick())
    grading.take(0, sampled[0])
    assert grading.scores(read(asked, sampled)) == [None, 1.0]


def test_without_slow_rewards_no_thread_starts():
    before = threading.active_count()
    grading = ahead(prompts("quick"), quick=Quick())
    grading.take(0, completions(1)[0])
    assert threading.active_count() == before


def test_judge_and_code_are_slow_and_so_is_a_sum_that_holds_one():
    judge = {"name": "judge", "endpoint": "http://127.0.0.1:1/v1", "model": "j"}
    slow = {"judge": judge, "code": "code", "sum": {"name": "weighted", "parts": {"judge": {"reward": judge}}}}
    quick = {"math": "math", "plain": {"name": "weighted", "parts": {"exact": {"reward": "exact"}}}}
    found = scorer(**{name: find_reward(spec) for name, spec in (slow | quick).items()})
    assert found.slow == {"judge", "code", "sum"}


@pytest.mark.slow
def test_a_real_engine_tells_of_completions_before_it_is_done_and_samples_the_same(engine):
    requests = [Request(prompt_ids=[5, 6, 7], seed=i, max_tokens=4 if i % 2 else 48) for i in range(16)]
    told = []
    sampled = engine.complete(requests, lambda place, completion: told.append((time.monotonic(), place, completion)))
    assert sorted(place for _, place, _ in told) == list(range(16))
    assert {place: completion.ids for _, place, completion in told} == {i: c.ids for i, c in enumerate(sampled)}
    assert max(place_time for place_time, place, _ in told if place % 2) < told[-1][0]  # the short ones came first
    assert [(c.ids, c.logps) for c in sampled] == [(c.ids, c.logps) for c in engine.complete(requests)]


class Telling(Waiting):
    def __call__(self, prompts, completions, completion_ids, log_metric, **columns):
        for text in completions:
            log_metric("odd", int(text) % 2)
        return super().__call__(prompts, completions, completion_ids)


def test_what_a_reward_logs_in_the_grading_thread_is_counted_with_the_rest():
    asked, sampled = prompts(*["slow", "quick"] * 10), completions(20)
    grader = scorer(slow=Telling(wait_s=0.01), quick=Telling())
    grading = EarlyGrading(grader, asked, read)
    for place in range(0, 14):
        grading.take(place, sampled[place])
    grading.scores(read(asked, sampled))
    assert grader.logged.sums == {("slow", "odd"): (0.0, 10), ("quick", "odd"): (10.0, 10)}
