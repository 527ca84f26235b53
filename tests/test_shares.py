"""How a draw is dealt out to rollout workers."""

from __future__ import annotations

import pytest

from polyphony.launch.cluster.ray_engine import cost, spread, whole_groups
from polyphony.trainer.engine.vllm import Request


def asked(*prompts: str, max_tokens: int = 4) -> list[Request]:
    return [Request(prompt_ids=list(p.encode()), seed=n, max_tokens=max_tokens) for n, p in enumerate(prompts)]


def test_neighbouring_requests_of_one_prompt_are_one_group():
    assert whole_groups(asked("a", "a", "b", "b", "a")) == [[0, 1], [2, 3], [4]]
    assert whole_groups([]) == []


def test_a_group_costs_its_prompt_once_and_each_completion_at_most():
    # a prompt of 3 tokens, twice 4 tokens to come
    assert cost(asked("abc", "abc"), [0, 1]) == 3 + 2 * 4


@pytest.mark.parametrize(
    ("costs", "n_workers", "shares"),
    [
        # 7 first, then 5 to the other, 4 to the lighter (5), 3 to the lighter (7): loads 10 and 9
        ([4, 7, 5, 3], 2, [[1, 3], [0, 2]]),
        ([1, 1, 1], 2, [[0, 2], [1]]),
        ([5], 3, [[0], [], []]),
        ([], 2, [[], []]),
    ],
)
def test_the_costliest_goes_first_to_the_worker_with_least_to_do(costs, n_workers, shares):
    assert spread(costs, n_workers) == shares


def test_every_group_is_dealt_out_once():
    shares = spread([n % 13 for n in range(100)], 7)
    assert sorted(group for share in shares for group in share) == list(range(100))
