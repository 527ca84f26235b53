"""`rollouts: {engine: ray}`: the trainer's engine, over a pool of rollout workers.

Rank 0 holds the pool; the other trainer ranks hand it their requests and get their completions back. Seeds belong to
completions, so who samples what changes nothing but rounding. Groups stay whole, and the longest work is dealt out first.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from polyphony.curricula.records import Completion
from polyphony.launch.cluster.ray_turns import OverWorkers
from polyphony.launch.cluster.ray_workers import Share, Worker, WorkerPool, last_line
from polyphony.launch.cluster.shares import cost, spread, whole_groups
from polyphony.launch.cluster.weights import Announcement, Buckets, NcclSender, copies, pack, put
from polyphony.launch.sections import RolloutsSection
from polyphony.trainer.engine.adapters import AdapterShape
from polyphony.trainer.engine.engine import Engine
from polyphony.trainer.engine.turns import Turns
from polyphony.trainer.engine.vllm import OnFinished, Request
from polyphony.trainer.ranks import broadcast_object, gather_object
from polyphony.trainer.run import say


def _from_anywhere(model: str) -> str:
    """Return the model's folder by its whole path, since workers run in another; a hub's name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


WORKERS_SHARE = 0.9
"""Of each of its GPUs that a worker takes: it has them to itself."""


Weights = Callable[[], Iterator[tuple[str, torch.Tensor]]]
"""Begins a walk over weights, which gathers them: every rank must take it to its end."""


def _walk(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Take part in the gathering of what rank 0 sends."""
    for _ in weights:
        pass


class RayEngine(Engine):
    """An engine of several workers; before a draw, the policy's weights are sent to all of them."""

    def __init__(
        self, *arguments: Any, rollouts: RolloutsSection, gpu_memory_utilization: float = WORKERS_SHARE, **named: Any
    ) -> None:
        self.rollouts, self.draws_ahead = rollouts, rollouts.ahead
        self._latest = 0
        """The version of the weights that were kept last, to be sent at once or later."""
        self.gpu_memory_utilization = gpu_memory_utilization
        self.pool: WorkerPool | None = None
        self._announcement: Announcement | None = None
        self._sender: NcclSender | None = None
        self._kept: Buckets = ()
        """Whole weights that were put into the object store last."""
        super().__init__(*arguments, **named)

    def _init_vllm(self) -> None:
        self._choose()
        if self.accelerator.is_main_process:
            settings = self.settings(tensor_parallel=self.rollouts.tensor_parallel)
            everyone = settings.max_num_seqs * self.accelerator.num_processes
            settings = replace(
                settings,
                model=_from_anywhere(settings.model),
                max_num_seqs=-(-everyone // self.rollouts.workers),
                gpu_memory_utilization=self.gpu_memory_utilization,
            )
            n = self.rollouts.workers
            say(f"the policy is loaded; starting {n} rollout worker{'s' if n > 1 else ''}")
            self.pool = WorkerPool.start(settings, self.rollouts)
            atexit.register(self.close)
        self.accelerator.wait_for_everyone()
        self._choose(self._why_not)

    def close(self) -> None:
        """End the workers, and the cluster if this process started it."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None
        self._kept = ()

    def attach(self, model: Any, accelerator: Any) -> None:
        """Serve another policy; what workers are told of its parameters is asked anew."""
        super().attach(model, accelerator)
        self._announcement = None
        self._choose(self._why_not)

    def _why_not(self, shape: AdapterShape) -> str:
        return self._agreed(lambda pool: pool.why_not(shape))

    def _agreed(self, asked: Callable[[WorkerPool], Any]) -> Any:
        """Return what rank 0 finds, on every rank."""
        return broadcast_object(asked(self.pool) if self.pool is not None else None)

    # --- weights ------------------------------------------------------------------------------------------------------

    def sync_weights(self) -> None:
        """Send the policy's present weights to all workers; every rank must call it, gathering is collective."""
        self._latest = self.version = self._latest + 1
        self._send()

    def snapshot(self) -> Callable[[], None]:
        """Keep the policy's present weights in the object store, on a GPU too; what is returned sends them."""
        self._latest += 1
        version, is_adapter = self._latest, self.adapter is not None
        assert self._holds_base or not is_adapter, "an adapter needs its base, which the first sync sends"
        weights = self._tensors() if is_adapter else self._iter_named_params()
        pool = self.pool
        if pool is None:
            _walk(weights)
            return lambda: setattr(self, "version", version)
        if is_adapter:
            send = partial(pool.lay_on, version, ray.put(pack(weights)))
        else:
            self._kept = put(weights, self._kept)
            send = partial(pool.load, version, self._kept)

        def take_over() -> None:
            self.version = version
            send()

        return take_over

    def _send(self) -> None:
        if self.adapter is None:
            self._send_whole(self._iter_named_params)
            return
        if not (self._holds_base and self._agreed(lambda pool: all(w.has_weights for w in pool.workers))):
            self._send_whole(self._base)
            self._holds_base = True
        if self.pool is not None:
            self.pool.lay_on(self.version, ray.put(pack(self._tensors())))  # small: through the object store on GPU too
        else:
            _walk(self._tensors())

    def _send_whole(self, weights: Weights) -> None:
        if self.accelerator.device.type != "cpu" and not self.draws_ahead:  # those in flight need them kept
            self._send_by_nccl(weights)
        elif self.pool is not None:
            self._kept = put(weights(), self._kept)
            self.pool.load(self.version, self._kept)
        else:
            _walk(weights())

    def _send_by_nccl(self, weights: Weights) -> None:
        dtype = getattr(torch, self.dtype, None)  # None for "auto"
        if self._announcement is None:  # a base and what an adapter is merged in are alike in names and shapes
            self._announcement = Announcement.of(weights(), dtype=dtype)
        if self.pool is None:
            _walk(weights())
            return
        workers, self.pool.weights = self.pool.answering(), None
        handles = [worker.handle for worker in workers]
        if self._sender is None or self._sender.handles != handles:
            parallel, timeout_s = self.rollouts.tensor_parallel, self.rollouts.timeout_s
            self._sender = NcclSender(handles, tensor_parallel=parallel, timeout_s=timeout_s)
        self._sender.send(self._announcement, copies(weights(), dtype=dtype), version=self.version)
        for worker in workers:
            worker.holds = ()

    # --- completions --------------------------------------------------------------------------------------------------

    def complete(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Completion]:
        """Sample one completion a request, in order; every rank must call it.

        On a single rank `on_finished` gets a worker's whole share at a time; several ranks get all at the end.
        """
        of_ranks = gather_object([list(requests)])
        flat = [request for of_rank in of_ranks for request in of_rank]
        if self.accelerator.num_processes > 1:
            on_finished = None
        completions: dict[int, Completion] = {}
        while True:
            done = broadcast_object(self._complete(flat, completions, on_finished) if self.pool is not None else None)
            if done is not None:
                break
            self._send()  # the workers that had weights are lost; gathering them needs every rank
        start = sum(len(of_rank) for of_rank in of_ranks[: self.accelerator.process_index])
        return done[start : start + len(requests)]

    def converse(self, turns: Turns) -> None:
        """Sample all turns, each episode's by one worker; of a single rank, as `Episodes` sees to."""
        OverWorkers(self, turns).converse()

    def workers_with_weights(self) -> list[Worker]:
        """Return the workers that can sample; where all that could are lost, weights are sent to those in their places."""
        assert self.pool is not None
        while not (workers := [worker for worker in self.pool.alive() if worker.has_weights]):
            self._send()
        return workers

    def _complete(
        self, requests: Sequence[Request], completions: dict[int, Completion], on_finished: OnFinished | None
    ) -> list[Completion] | None:
        """Deal out whole groups until every one has come back; what a lost worker had is dealt out again.

        `completions` keeps what came back. Returns None where no worker is left that has weights.
        """
        assert self.pool is not None
        waiting = [group for group in whole_groups(requests) if group[0] not in completions]
        while waiting:
            workers = [worker for worker in self.pool.alive() if worker.has_weights]
            if not workers:
                return None
            running = self._deal_out(waiting, requests, workers)
            waiting = self._collect(running, completions, on_finished)
        return [completions[place] for place in range(len(requests))]

    def _deal_out(
        self, groups: Sequence[Sequence[int]], requests: Sequence[Request], workers: Sequence[Worker]
    ) -> dict[ray.ObjectRef, tuple[Worker, list[Sequence[int]]]]:
        running = {}
        for worker, numbers in zip(
            workers, spread([cost(requests, group) for group in groups], len(workers)), strict=True
        ):
            share = [groups[n] for n in numbers]
            if share:
                asked = [requests[place] for group in share for place in group]
                running[worker.handle.complete.remote(asked, self.sampling)] = (worker, share)
        return running

    def _collect(
        self,
        running: dict[ray.ObjectRef, tuple[Worker, list[Sequence[int]]]],
        completions: dict[int, Completion],
        on_finished: OnFinished | None,
    ) -> list[Sequence[int]]:
        """Take in the shares as they come; return the groups that have to be sampled again."""
        assert self.pool is not None
        again: list[Sequence[int]] = []
        deadline = time.monotonic() + self.rollouts.timeout_s
        while running:
            done, _ = ray.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            call = done[0] if done else next(iter(running))
            worker, share = running.pop(call)
            answer = self.answer(call, worker) if done else self.hung(worker)
            if answer is None:
                again += share
                self.faults.regenerated += sum(map(len, share))
                continue
            self.pool.deaths = 0
            places = [place for group in share for place in group]
            for place, completion in zip(places, answer.completions, strict=True):
                completions[place] = replace(completion, version=answer.version)
                if on_finished is not None:
                    on_finished(place, completions[place])
        return again

    def answer(self, call: ray.ObjectRef, worker: Worker) -> Share | None:
        """Return a worker's share; None if the worker is lost, or its weights are too old."""
        try:
            answer: Share = ray.get(call)
        except RayTaskError as error:
            raise RuntimeError(f"rollout worker {worker.place}: {error.cause}") from error
        except RayError as error:
            self._replace(worker, because=last_line(error))
            return None
        behind = self.version - answer.version
        if behind > 0:
            self.faults.stale += len(answer.completions)
        if behind > self.rollouts.max_staleness or answer.version < 0:
            self._replace(worker, because=f"its weights are of sync {answer.version}, the policy's of {self.version}")
            return None
        return answer

    def hung(self, worker: Worker) -> None:
        self._replace(worker, because=f"no answer within rollouts.timeout_s={self.rollouts.timeout_s:g} s")

    def _replace(self, worker: Worker, *, because: str) -> None:
        assert self.pool is not None
        self.faults.workers_restarted += 1
        self.pool.replace(worker, because=because)
