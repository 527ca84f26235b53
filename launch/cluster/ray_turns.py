"""Turns of episodes over a pool of rollout workers: an episode stays with the worker whose cache holds what was said in it.

A worker goes on for a moment at a time, and returns what is whole by then; so it hears of new turns while it samples others.
What a lost worker had is sampled again by the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import ray

from polyphony.launch.cluster.ray_workers import Share, Worker, WorkerPool
from polyphony.launch.cluster.shares import cost, whole_groups
from polyphony.launch.sections import RolloutsSection
from polyphony.trainer.engine.engine import EngineFaults
from polyphony.trainer.engine.turns import Turns
from polyphony.trainer.engine.vllm import Request, Sampling

MOMENT_S = 0.05
"""Longest that a worker goes on before it hears of new turns: a twentieth of what a turn takes, or less."""
MOMENT_OF_EACH_S = 0.0125
"""The same for each worker, of more than four: this process is at every call for milliseconds, and workers wait for it."""


def moment_s(workers: int) -> float:
    """Return for how many seconds one of so many workers goes on before it hears of new turns."""
    return max(MOMENT_S, MOMENT_OF_EACH_S * workers)


class Pooled(Protocol):
    """What is asked of the engine whose workers they are."""

    pool: WorkerPool | None
    rollouts: RolloutsSection
    sampling: Sampling
    faults: EngineFaults

    def workers_with_weights(self) -> list[Worker]:
        """Return the workers that can sample."""
        ...

    def answer(self, call: ray.ObjectRef, worker: Worker) -> Share | None:
        """Return what came of a call; None where the worker is lost, which is replaced."""
        ...

    def hung(self, worker: Worker) -> None:
        """Replace a worker that does not answer."""
        ...


@dataclass(kw_only=True, slots=True)
class Routes:
    """Which worker, by the number of its place, samples which turns.

    Example: `Routes().deal([(0, request)], [0, 1]) == {0: [(0, request)]}`
    """

    turns: dict[int, dict[int, Request]] = field(default_factory=dict)
    """By worker what it has and is not whole, by place."""
    homes: dict[int, int] = field(default_factory=dict)
    """By episode the worker that had its last turn."""

    def deal(
        self, asked: Sequence[tuple[int, Request]], workers: Sequence[int]
    ) -> dict[int, list[tuple[int, Request]]]:
        """Return who samples what: an episode's next turn where its last one was, groups together where least is to do."""
        dealt: dict[int, list[tuple[int, Request]]] = {}
        new = []
        for place, request in asked:
            home = self.homes.get(request.episode) if request.episode is not None else None
            if home is not None and home in workers:
                self._give(home, (place, request), dealt)
            else:
                new.append((place, request))
        requests = [request for _, request in new]
        for group in sorted(whole_groups(requests), key=lambda group: -cost(requests, group)):
            worker = min(workers, key=lambda w: (self._load(w), w))
            for n in group:
                self._give(worker, new[n], dealt)
        return dealt

    def whole(self, worker: int, place: int) -> None:
        """Take out a turn that is whole."""
        del self.turns[worker][place]

    def lost(self, worker: int) -> list[tuple[int, Request]]:
        """Return what a worker had that is lost, and forget whose home it was: another has nothing cached."""
        self.homes = {episode: home for episode, home in self.homes.items() if home != worker}
        return list(self.turns.pop(worker, {}).items())

    def _give(self, worker: int, turn: tuple[int, Request], dealt: dict[int, list[tuple[int, Request]]]) -> None:
        place, request = turn
        self.turns.setdefault(worker, {})[place] = request
        if request.episode is not None:
            self.homes[request.episode] = worker
        dealt.setdefault(worker, []).append(turn)

    def _load(self, worker: int) -> int:
        return sum(request.max_tokens for request in self.turns.get(worker, {}).values())


class OverWorkers:
    """The turns of one batch, led over the workers of an engine.

    Example: `OverWorkers(engine, turns).converse()`
    """

    def __init__(self, engine: Pooled, turns: Turns) -> None:
        self._engine, self._turns, self.routes = engine, turns, Routes()
        self._unsent: dict[int, list[tuple[int, Request]]] = {}
        self._calls: dict[ray.ObjectRef, tuple[Worker, float]] = {}
        """What workers are at, and until when they have to have answered."""

    @property
    def _is_sampling(self) -> bool:
        return any(self.routes.turns.values())

    def converse(self) -> None:
        """Sample all turns. Raises RuntimeError where workers keep dying."""
        try:
            while True:
                asked = self._turns.waiting("none" if self._is_sampling else "any")
                if not (asked or self._is_sampling):
                    return
                self._deal(asked)
                self._send()
                self._hear()
        except BaseException:  # workers are asked again where a run stops to evaluate or save, and would answer these
            for worker in self._engine.pool.alive() if self._engine.pool is not None else ():
                worker.handle.forget.remote()
            raise

    def _deal(self, asked: Sequence[tuple[int, Request]]) -> None:
        if not asked:
            return
        for worker, more in self.routes.deal(asked, [w.place for w in self._engine.workers_with_weights()]).items():
            self._unsent.setdefault(worker, []).extend(more)

    def _send(self) -> None:
        """Have every worker go on that has something to do and is not at it."""
        pool, busy = self._engine.pool, {worker.place for worker, _ in self._calls.values()}
        assert pool is not None
        for place, turns in self.routes.turns.items():
            if turns and place not in busy:
                worker = pool.workers[place]
                seconds = moment_s(len(pool.workers))
                call = worker.handle.go_on.remote(self._unsent.pop(place, []), self._engine.sampling, seconds)
                self._calls[call] = worker, time.monotonic() + self._engine.rollouts.timeout_s

    def _hear(self) -> None:
        """Take in what came within a moment."""
        done, _ = ray.wait(list(self._calls), timeout=MOMENT_S)
        late = [call for call, (_, until) in self._calls.items() if call not in done and until < time.monotonic()]
        for call in [*done, *late]:
            worker, _ = self._calls.pop(call)
            answer = self._engine.answer(call, worker) if call in done else self._engine.hung(worker)
            if answer is None:
                self._again(worker)
            else:
                self._take(worker, answer)

    def _take(self, worker: Worker, answer: Share) -> None:
        assert self._engine.pool is not None
        self._engine.pool.deaths = 0
        for place, completion in zip(answer.places, answer.completions, strict=True):
            self.routes.whole(worker.place, place)
            self._turns.take(place, replace(completion, version=answer.version))

    def _again(self, worker: Worker) -> None:
        """Deal out anew what a lost worker had."""
        self._unsent.pop(worker.place, None)
        lost = self.routes.lost(worker.place)
        self._engine.faults.regenerated += len(lost)
        self._deal(lost)
