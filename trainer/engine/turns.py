"""Sampling for whom one answer is not the end: requests come while others are sampled, and answers bring new ones.

`Turns` says what is to be sampled and takes what was. One vLLM takes a request up between two of its steps, so that none
waits for another; engines that only know batches sample what there is, batch by batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from polyphony.curricula.records import Completion
from polyphony.trainer.engine.vllm import (
    Request,
    Sampling,
    abort_all,
    check_room,
    completion_of,
    is_out_of_memory,
    sampling_params,
)

Wait = Literal["none", "any", "all"]
"""For what is waited where nothing is to be sampled yet: nothing, the next request, all that could come before a sample."""


class Turns(Protocol):
    """What is sampled over several turns."""

    def waiting(self, wait: Wait) -> Sequence[tuple[int, Request]]:
        """Return the requests that are to be sampled now, each with its place; none after waiting says that all is over."""
        ...

    def take(self, place: int, completion: Completion) -> None:
        """Take in what was sampled for the request of a place, which may have another one afterwards."""
        ...


class Running:
    """The requests of one vLLM, by the number that is the head of their name there.

    Out of memory, what was in the engine is sampled again, from then on half as many at a time, once.

    Example: `running = Running(llm, sampling); running.add([(0, request)]); running.step()`
    """

    def __init__(self, llm: Any, sampling: Sampling, adapter: Any = None) -> None:
        self._llm, self._sampling, self._adapter = llm, sampling, adapter
        self._requests: dict[str, tuple[int, Request]] = {}
        self._backlog, self._most = deque[tuple[int, Request]](), 0

    def __len__(self) -> int:
        return len(self._requests) + len(self._backlog)

    def add(self, asked: Sequence[tuple[int, Request]]) -> None:
        """Take requests in, each with its place; they are begun at the next step."""
        self._backlog.extend(asked)

    def step(self) -> list[tuple[int, Completion]]:
        """Let the engine make one step, and return what is whole by it, by its place.

        Raises ValueError for a request that the engine has no room for, RuntimeError where half as many are too much.
        """
        most, backlog = self._most, self._backlog
        room = len(backlog) if not most else max(0, min(len(backlog), most - len(self._requests)))
        if room:
            self._start([backlog.popleft() for _ in range(room)])
        try:
            outputs = [output for output in self._llm.llm_engine.step() if output.finished]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            taken = self._taken_back()
            if most or len(taken) < 2:
                raise RuntimeError(
                    f"the rollout engine ran out of memory on {len(taken)} completions: lower max_completion_length or "
                    "environments.episodes, or change vllm_gpu_memory_utilization"
                ) from error
            self._most = len(taken) // 2
            backlog.extendleft(reversed(taken))
            return []
        return [(self._requests.pop(o.request_id)[0], completion_of(o.outputs[0])) for o in outputs]

    def abort(self) -> None:
        """Take all requests back out of the engine."""
        self._taken_back()
        self._backlog.clear()

    def _start(self, asked: Sequence[tuple[int, Request]]) -> None:
        requests = [request for _, request in asked]
        check_room(self._llm, max(len(r.prompt_ids) + r.max_tokens for r in requests))
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        params = sampling_params(requests, self._sampling)
        names = self._llm.enqueue(prompts, params, use_tqdm=False, lora_request=self._adapter)
        # a request's name is its number, behind which newer engines put a random tail that outputs do not have
        self._requests |= zip((name.partition("-")[0] for name in names), asked, strict=True)

    def _taken_back(self) -> list[tuple[int, Request]]:
        abort_all(self._llm)
        taken, self._requests = list(self._requests.values()), {}
        return taken


def converse(llm: Any, turns: Turns, sampling: Sampling, *, version: int, adapter: Any = None) -> None:
    """Sample all turns with weights of this version; the engine is never idle while there is a request.

    `adapter` as for `sample`. Raises RuntimeError where it is out of memory again and again.
    """
    running = Running(llm, sampling, adapter)
    try:
        while True:
            running.add(turns.waiting("none" if running else "any"))
            if not running:
                return
            for place, completion in running.step():
                turns.take(place, replace(completion, version=version))
    except BaseException:  # the engine is asked again where a run stops to evaluate or save, and would answer these
        running.abort()
        raise
