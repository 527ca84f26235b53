"""A model of rollout workers and their trainer: what a draw takes, by the balancer that deals out the real ones.

A worker takes so long for a share: a call, its prompts once a group, a decoding step after the other, and in each step every
sequence that is not whole yet. The engine makes one draw at a time and gets weights between two of them; draw d begins once
draw d - 1 is whole and the update of draw d - ahead - 1 is done. Lengths are lognormal, cut off at what a request may have.
Imports neither torch nor vLLM: `Sleeping` is a worker that takes its time by the model, in a process of some megabytes.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from polyphony.launch.cluster.shares import cost, spread, whole_groups


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as the balancer sees it, and how long its completion will be, which the balancer does not see."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    length: int
    episode: int | None = None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a worker takes, in seconds.

    Example: `Speed(call_s=0, step_s=1, token_s=0, prompt_token_s=0).seconds([asked])` is the length of its completion.
    """

    call_s: float
    """For a share, whatever is in it."""
    step_s: float
    """For a decoding step, however many sequences are in it."""
    token_s: float
    """For each sequence of a step."""
    prompt_token_s: float
    """For each token of a prompt, which is read once a group."""
    slots: int = 1 << 30
    """Sequences at a time; others wait until one is whole."""
    on_cpu: bool = True
    """What a pool asks of an engine's settings."""

    def seconds(self, share: Sequence[Asked]) -> float:
        """Return what a share takes."""
        return sum(factor * one for factor, one in zip(self.factors, measures(share, self.slots), strict=True))

    @property
    def factors(self) -> tuple[float, float, float, float]:
        return self.call_s, self.step_s, self.token_s, self.prompt_token_s


def measures(share: Sequence[Asked], slots: int) -> tuple[int, int, int, int]:
    """Return of a share what takes time: itself, its decoding steps, its tokens, and the tokens of its prompts."""
    prompts = sum(len(share[group[0]].prompt_ids) for group in whole_groups(share))  # type: ignore[arg-type]
    lengths = [one.length for one in share]
    return 1, steps(lengths, slots), sum(lengths), prompts


def steps(lengths: Sequence[int], slots: int) -> int:
    """Return after how many decoding steps the last is whole, so many at a time, in order."""
    running: list[int] = []
    for length in lengths:
        begun = heapq.heappop(running) if len(running) == slots else 0
        heapq.heappush(running, begun + length)
    return max(running, default=0)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of completions: lognormal, cut off at `max_tokens`."""

    log_mean: float
    log_deviation: float
    max_tokens: int

    def draw(self, n_groups: int, copies: int, prompt_tokens: int, rng: random.Random) -> list[Asked]:
        """Return the requests of a draw, group by group."""
        return [
            Asked(prompt_ids=(group,) * prompt_tokens, max_tokens=self.max_tokens, length=self._one(rng))
            for group in range(n_groups)
            for _ in range(copies)
        ]

    def _one(self, rng: random.Random) -> int:
        return max(1, min(self.max_tokens, round(rng.lognormvariate(self.log_mean, self.log_deviation))))


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Workers of one speed, some of which are slow for a draw, and the process that deals out to them."""

    workers: int
    speed: Speed
    send_s: float = 0.0
    """What the dealing process is at for each request, one after the other, before a share is under way; and again for each
    completion that comes back."""
    slow_share: float = 0.0
    """Chance of a worker to be slow in a draw."""
    slow_by: float = 1.0
    """How many times as long a slow one takes."""

    def draw(self, asked: Sequence[Asked], rng: random.Random) -> Draw:
        """Return what becomes of a draw."""
        groups = whole_groups(asked)  # type: ignore[arg-type]
        costs = [cost(asked, group) for group in groups]  # type: ignore[arg-type]
        sent, ends, busy = 0.0, [], []
        for numbers in spread(costs, self.workers):
            share = [asked[place] for n in numbers for place in groups[n]]
            if not share:
                continue
            sent += self.send_s * len(share)
            slow = self.slow_by if rng.random() < self.slow_share else 1.0
            busy.append(slow * self.speed.seconds(share))
            ends.append((sent + busy[-1], len(share)))
        taken = 0.0
        for end, n in sorted(ends):
            taken = max(taken, end) + self.send_s * n
        return Draw(seconds=taken, busy=sum(busy), completions=len(asked))


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a draw took."""

    seconds: float
    """From the first request sent to the last completion back."""
    busy: float
    """Seconds that workers were at it, all of them together."""
    completions: int


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What the trainer takes, in seconds."""

    sync_s: float
    """Of trainer and workers, between two draws."""
    update_s: float
    """For each completion of a draw."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run: when draws were whole and their updates done, seconds since it began."""

    generated: list[float] = field(default_factory=list)
    updated: list[float] = field(default_factory=list)
    stale: list[int] = field(default_factory=list)
    """By draw, how many updates its weights are behind those it is used with."""

    @property
    def period(self) -> float:
        """Seconds a draw, without the first half, in which it gets under way."""
        half = len(self.updated) // 2
        return (self.updated[-1] - self.updated[half]) / (len(self.updated) - 1 - half)


def course(draws: Sequence[Draw], trainer: Trainer, *, ahead: int) -> Course:
    """Return when each draw of a run is whole and when its update is done."""
    run = Course()
    for d, draw in enumerate(draws):
        weights = run.updated[d - ahead - 1] if d > ahead else 0.0
        begins = max(weights, run.generated[-1] if run.generated else 0.0)
        run.generated.append(begins + trainer.sync_s + draw.seconds)
        sends = trainer.sync_s if ahead else 0.0  # in turns, the same seconds as the engine's
        before = run.updated[-1] + sends if run.updated else 0.0
        run.updated.append(max(run.generated[-1], before) + trainer.update_s * draw.completions)
        run.stale.append(min(d, ahead))
    return run


def bounds(draws: Sequence[Draw], trainer: Trainer, workers: int, *, ahead: int) -> dict[str, float]:
    """Return what a draw would take, in seconds on average, if this alone took time."""
    update = fmean(trainer.update_s * draw.completions for draw in draws)
    even = fmean(draw.busy / workers for draw in draws)
    slowest = fmean(draw.seconds for draw in draws)
    if ahead:
        return {"update": update + trainer.sync_s, "rollouts": slowest + trainer.sync_s, "even": even}
    return {"turns": update + slowest + trainer.sync_s, "update": update, "rollouts": slowest, "even": even}


class Sleeping:
    """Stands where a rollout worker does, and sleeps as long as one of its speed would sample; for `WorkerPool`."""

    def __init__(self, speed: Speed) -> None:
        self.speed, self.version = speed, -1

    def process_id(self) -> tuple[str, int]:
        import os

        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def load(self, version: int, weights: Any) -> None:
        self.version = version

    def complete(self, requests: Sequence[Asked], sampling: Any) -> Slept:
        time.sleep(self.speed.seconds(requests))
        return Slept(version=self.version, completions=[Whole(ids=[0] * one.length) for one in requests])


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A completion that was slept."""

    ids: list[int]
    version: int = 0


@dataclass(frozen=True, kw_only=True)
class Slept:
    """A share that was slept."""

    version: int
    completions: list[Whole]
    places: list[int] = field(default_factory=list)
