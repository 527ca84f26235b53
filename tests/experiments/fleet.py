"""A model of rollout workers and their trainer: what a draw takes, by the balancer that deals out the real ones.

A worker takes so long for a share: a call, its prompts once a group, a decoding step after the other, and in each step every
sequence that is not whole yet. The engine makes one draw at a time and gets weights between two of them; draw d begins once
draw d - 1 is whole and the update of draw d - ahead - 1 is done. Lengths are lognormal, cut off at what a request may have.
Imports neither torch nor vLLM: `Sleeping` is a worker that takes its time by the model, in a process of some megabytes.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

from polyphony.launch.cluster.shares import cost, spread, whole_groups


@dataclass(frozen=True, kw_only=True)
class Wanted:
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

    def seconds(self, share: Sequence[Wanted]) -> float:
        """Return what a share takes."""
        return sum(factor * one for factor, one in zip(self.factors, measures(share, self.slots), strict=True))

    @property
    def factors(self) -> tuple[float, float, float, float]:
        return self.call_s, self.step_s, self.token_s, self.prompt_token_s


def measures(share: Sequence[Wanted], slots: int) -> tuple[int, int, int, int]:
    """Return of a share what takes time: itself, its decoding steps, its tokens, and the tokens of its prompts."""
    prompts = sum(len(share[group[0]].prompt_ids) for group in _groups(share))
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
    """Lengths of completions: lognormal, about a mean of its own for each group, cut off at `max_tokens`."""

    log_mean: float
    between: float
    """Deviation of the groups' means, of the logarithm."""
    within: float
    """Deviation in a group."""
    max_tokens: int

    @classmethod
    def of(cls, asked: Sequence[Wanted]) -> Lengths:
        """Return those that were seen, of groups of two or more."""
        logs = [[math.log(max(1, asked[place].length)) for place in group] for group in _groups(asked)]
        logs = [group for group in logs if len(group) > 1]
        within = fmean(variance(group) for group in logs)
        between = variance([fmean(group) for group in logs]) - within / fmean(map(len, logs))
        return cls(
            log_mean=fmean(one for group in logs for one in group),
            between=math.sqrt(max(0.0, between)),
            within=math.sqrt(within),
            max_tokens=asked[0].max_tokens,
        )

    def draw(self, n_groups: int, copies: int, prompt_tokens: int, rng: random.Random) -> list[Wanted]:
        """Return the requests of a draw, group by group."""
        asked = []
        for group in range(n_groups):
            mean = rng.gauss(self.log_mean, self.between)
            lengths = [round(rng.lognormvariate(mean, self.within)) for _ in range(copies)]
            prompt = (group,) * prompt_tokens
            asked += [
                Wanted(prompt_ids=prompt, max_tokens=self.max_tokens, length=max(1, min(self.max_tokens, length)))
                for length in lengths
            ]
        return asked


Deal = Callable[[Sequence[Wanted], int], list[list[int]]]
"""Deals a draw out to so many workers: the places that each gets."""


def dealt(asked: Sequence[Wanted], workers: int) -> list[list[int]]:
    """Return the places that each worker gets from the engine's own balancer."""
    return _spread(asked, workers, lambda group: cost(asked, group))  # type: ignore[arg-type]


def foreseen(asked: Sequence[Wanted], workers: int) -> list[list[int]]:
    """Return the same where lengths are known before: more than any prediction of them can gain."""
    return _spread(asked, workers, lambda group: sum(asked[place].length for place in group))


def _groups(asked: Sequence[Wanted]) -> list[list[int]]:
    return whole_groups(asked)  # type: ignore[arg-type]


def _spread(asked: Sequence[Wanted], workers: int, of: Callable[[list[int]], int]) -> list[list[int]]:
    groups = _groups(asked)
    shares = spread([of(group) for group in groups], workers)
    return [[place for n in share for place in groups[n]] for share in shares]


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

    def draw(self, asked: Sequence[Wanted], rng: random.Random, deal: Deal = dealt) -> Draw:
        """Return what becomes of a draw that is dealt out whole, a share a worker."""
        sent, ends, busy = 0.0, [], []
        for places in filter(None, deal(asked, self.workers)):
            sent += self.send_s * len(places)
            busy.append(self._slowed(rng) * self.speed.seconds([asked[place] for place in places]))
            ends.append((sent + busy[-1], len(places)))
        taken = 0.0
        for end, n in sorted(ends):
            taken = max(taken, end) + self.send_s * n
        longest = max(self.speed.seconds([asked[place] for place in group]) for group in _groups(asked))
        return Draw(seconds=taken, busy=sum(busy), completions=len(asked), longest=longest)

    def steal(self, asked: Sequence[Wanted], rng: random.Random) -> Draw:
        """Return what would become of it if whoever is free took as many of the groups not yet begun as it has slots for."""
        waiting = _groups(asked)
        slow = [self._slowed(rng) for _ in range(self.workers)]
        free = [(0.0, worker) for worker in range(self.workers)]
        busy = 0.0
        while waiting:
            share: list[int] = []
            at_most = max(1, min(self.speed.slots, -(-sum(map(len, waiting)) // self.workers)))
            while waiting and len(share) < at_most:
                share += waiting.pop(0)
            began, worker = heapq.heappop(free)
            spent = slow[worker] * self.speed.seconds([asked[place] for place in share])
            busy += spent
            heapq.heappush(free, (began + spent + 2 * self.send_s * len(share), worker))
        return Draw(seconds=max(end for end, _ in free), busy=busy, completions=len(asked))

    def _slowed(self, rng: random.Random) -> float:
        return self.slow_by if rng.random() < self.slow_share else 1.0


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a draw took."""

    seconds: float
    """From the first request sent to the last completion back."""
    busy: float
    """Seconds that workers were at it, all of them together."""
    completions: int
    longest: float = 0.0
    """Seconds of the group that takes longest, had a worker it alone: no deal is faster."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What the trainer takes, in seconds."""

    sync_s: float
    """Of trainer and workers, between two draws."""
    update_s: float
    """For each completion of a draw."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
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


def course(draws: Sequence[Draw], trainer: Trainer, *, ahead: int) -> Timeline:
    """Return when each draw of a run is whole and when its update is done."""
    run = Timeline()
    for d, draw in enumerate(draws):
        weights = run.updated[d - ahead - 1] if d > ahead else 0.0
        begins = max(weights, run.generated[-1] if run.generated else 0.0)
        run.generated.append(begins + trainer.sync_s + draw.seconds)
        sends = trainer.sync_s if ahead else 0.0  # in turns, the same seconds as the engine's
        before = run.updated[-1] + sends if run.updated else 0.0
        run.updated.append(max(run.generated[-1], before) + trainer.update_s * draw.completions)
        run.stale.append(min(d, ahead))
    return run


def bounds(draws: Sequence[Draw], trainer: Trainer, of: Fleet) -> dict[str, float]:
    """Return what a draw would take, in seconds on average, if one thing alone took time."""
    return {
        "update": fmean(trainer.update_s * draw.completions for draw in draws),
        "tokens": fmean(draw.busy / of.workers for draw in draws),
        "longest group": fmean(draw.longest for draw in draws),
        "dealing": fmean(2 * of.send_s * draw.completions for draw in draws),
    }


class Underway:
    """Turns that a worker is at, none waiting for a slot; their prompts are in its cache.

    Example: `at = Underway(speed); at.add([(0, asked)]); at.go_on(0.05)`
    """

    def __init__(self, speed: Speed) -> None:
        self.speed, self.left, self._begun = speed, dict[int, int](), 0.0

    def add(self, asked: Sequence[tuple[int, Wanted]]) -> None:
        """Take turns in, each with its place."""
        self.left |= {place: request.length for place, request in asked}

    def go_on(self, seconds: float) -> tuple[list[int], float]:
        """Go on until one is whole, or for so many seconds; return the places of what is whole, and what it took."""
        if not self.left:
            return [], 0.0
        step_s = self.speed.step_s + self.speed.token_s * len(self.left)
        fewest = min(self.left.values())
        spent = min(fewest * step_s - self._begun, seconds)
        steps = min(fewest, int((self._begun + spent) / step_s + 1e-9))
        self._begun += spent - steps * step_s
        self.left = {place: left - steps for place, left in self.left.items()}
        whole = [place for place, left in self.left.items() if left == 0]
        for place in whole:
            del self.left[place]
        return whole, spent


class Talk:
    """Episodes of some turns each, whose tools answer at once; stands where `Episodes` does."""

    def __init__(self, episodes: Sequence[Sequence[int]], *, max_tokens: int) -> None:
        self._lengths, self._max_tokens = episodes, max_tokens
        self._of: list[tuple[int, int]] = []
        """By place, which turn of which episode it is."""
        self._waiting: list[tuple[int, Wanted]] = []
        for episode in range(len(episodes)):
            self._ask(episode, 0)

    def waiting(self, wait: str) -> list[tuple[int, Wanted]]:
        asked, self._waiting = self._waiting, []
        return asked

    def take(self, place: int, completion: Any) -> None:
        episode, turn = self._of[place]
        if turn + 1 < len(self._lengths[episode]):
            self._ask(episode, turn + 1)

    def _ask(self, episode: int, turn: int) -> None:
        length = self._lengths[episode][turn]
        request = Wanted(prompt_ids=(episode,), max_tokens=self._max_tokens, length=length, episode=episode)
        self._waiting.append((len(self._of), request))
        self._of.append((episode, turn))


def converse(
    talk: Talk, of: Fleet, *, hear_s: float, way_s: float, moment_s: float, routes: Any
) -> tuple[float, float]:
    """Return the seconds that episodes take, and those that workers are at it, all together.

    `routes` are the engine's own; it hears of one worker after the other, and is at it for `hear_s`; a call and its answer
    are under way for `way_s`, those of all workers at the same time.
    """
    at = [Underway(of.speed) for _ in range(of.workers)]
    calls: list[tuple[float, int, list[int]]] = []
    unsent: dict[int, list[tuple[int, Wanted]]] = {}
    now = busy = 0.0
    while True:
        asked = talk.waiting("none")
        if not asked and not any(routes.turns.values()):
            return now, busy
        for worker, more in routes.deal(asked, range(of.workers)).items() if asked else ():
            unsent.setdefault(worker, []).extend(more)
        called = {worker for _, worker, _ in calls}
        for worker in [worker for worker, turns in routes.turns.items() if turns and worker not in called]:
            at[worker].add(unsent.pop(worker, []))
            whole, spent = at[worker].go_on(moment_s)
            busy += spent
            heapq.heappush(calls, (now + spent + way_s, worker, whole))
        ended, worker, whole = heapq.heappop(calls)
        now = max(now, ended) + hear_s
        for place in whole:
            routes.whole(worker, place)
            talk.take(place, None)


class Sleeping:
    """Stands where a rollout worker does, and sleeps as long as one of its speed would sample; for `WorkerPool`."""

    def __init__(self, speed: Speed) -> None:
        self.speed, self.version, self.at = speed, -1, Underway(speed)

    def process_id(self) -> tuple[str, int]:
        import os

        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def load(self, version: int, is_all: bool, *buckets: Any) -> None:
        self.version = version

    def complete(self, requests: Sequence[Wanted], sampling: Any) -> Slept:
        time.sleep(self.speed.seconds(requests))
        return Slept(version=self.version, completions=[Whole(ids=[0] * one.length) for one in requests])

    def forget(self) -> None:
        self.at = Underway(self.speed)

    def go_on(self, asked: Sequence[tuple[int, Wanted]], sampling: Any, seconds: float) -> Slept:
        self.at.add(asked)
        whole, spent = self.at.go_on(seconds)
        time.sleep(spent)
        return Slept(version=self.version, completions=[Whole(ids=[]) for _ in whole], places=whole)


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
