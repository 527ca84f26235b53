"""`rollouts: {engine: ray}`: the trainer's engine seam over a pool of rollout workers.

Rank 0 holds the pool; the other trainer ranks hand it their requests and get their completions back. Seeds belong to
completions, so who samples what changes nothing but rounding.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from accelerate.utils import broadcast_object_list, gather_object
from ray.exceptions import RayError, RayTaskError

from launch.shares import cost, spread, whole_groups
from launch.weights import TrainerWeights, open_nccl, pack
from launch.workers import PoolSettings, Share, Worker, WorkerPool, last_line
from trainer.rollouts import Completion, Engine, Request
from trainer.sampling import OnFinished


class RayEngine(Engine):
    """An engine of several workers; before a draw, the policy's weights are sent to all of them."""

    def __init__(self, *arguments: Any, pool: PoolSettings, max_staleness: int = 0, **named: Any) -> None:
        self.pool_settings = pool
        self.max_staleness = max_staleness
        self.pool: WorkerPool | None = None
        self._nccl: tuple[list[Any], Any] | None = None
        super().__init__(*arguments, **named)

    def _init_vllm(self) -> None:
        if self.accelerator.is_main_process:
            settings = self.settings(tensor_parallel=self.pool_settings.tensor_parallel)
            everyone = settings.max_num_seqs * self.accelerator.num_processes
            settings = replace(settings, max_num_seqs=-(-everyone // self.pool_settings.workers))
            self.pool = WorkerPool.start(settings, self.pool_settings)
            atexit.register(self.close)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """End the workers, and the cluster if this process started it."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    # --- weights ------------------------------------------------------------------------------------------------------

    def sync_weights(self) -> None:
        """Send the policy's present weights to all workers; every rank must call it, gathering is collective."""
        self.version += 1
        if self.accelerator.device.type != "cpu":
            self._send_by_nccl()
        elif self.pool is not None:
            self.pool.load(self.version, pack(self._iter_named_params()))
        else:
            for _ in self._iter_named_params():
                pass

    def _send_by_nccl(self) -> None:
        """Broadcast over NCCL; the group is opened anew where workers have been replaced since the last sync.

        Not measured: written against vLLM's weight-transfer interface, tests/gpu runs it where there is a GPU.
        """
        handles = [worker.handle for worker in self.pool.alive()] if self.pool is not None else []
        changed = [self._nccl is None or self._nccl[0] != handles]
        broadcast_object_list(changed, from_process=0)
        if changed[0]:
            source = TrainerWeights(self._iter_named_params)
            parallel = self.pool_settings.tensor_parallel
            engine = open_nccl(source, handles, tensor_parallel=parallel, is_sender=self.pool is not None)
            self._nccl = (handles, engine)
        assert self._nccl is not None
        self._nccl[1].send_weights()
        ray.get([handle.received.remote(self.version) for handle in handles])

    # --- completions --------------------------------------------------------------------------------------------------

    def complete(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Completion]:
        """Sample one completion a request, in order; every rank must call it.

        On a single rank `on_finished` gets a worker's whole share at a time; several ranks get all at the end.
        """
        if self.accelerator.num_processes == 1:
            return self._complete(requests, on_finished)
        of_ranks = gather_object([list(requests)])
        flat = [request for of_rank in of_ranks for request in of_rank]
        done = [self._complete(flat) if self.pool is not None else []]
        broadcast_object_list(done, from_process=0)
        start = sum(len(of_rank) for of_rank in of_ranks[: self.accelerator.process_index])
        return done[0][start : start + len(requests)]

    def _complete(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Completion]:
        """Deal out whole groups until every one has come back; what a lost worker had is dealt out again."""
        completions: dict[int, Completion] = {}
        waiting = whole_groups(requests)
        while waiting:
            running = self._deal_out(waiting, requests)
            waiting = self._collect(running, completions, on_finished)
        return [completions[place] for place in range(len(requests))]

    def _deal_out(
        self, groups: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> dict[ray.ObjectRef, tuple[Worker, list[Sequence[int]]]]:
        assert self.pool is not None
        workers = self.pool.alive()
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
        deadline = time.monotonic() + self.pool_settings.timeout_s
        while running:
            done, _ = ray.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            call = done[0] if done else next(iter(running))
            worker, share = running.pop(call)
            answer = self._answer(call, worker) if done else self._hung(worker)
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

    def _answer(self, call: ray.ObjectRef, worker: Worker) -> Share | None:
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
        if behind > self.max_staleness or answer.version < 0:
            self._replace(worker, because=f"its weights are of sync {answer.version}, the policy's of {self.version}")
            return None
        return answer

    def _hung(self, worker: Worker) -> None:
        self._replace(worker, because=f"no answer within rollouts.timeout_s={self.pool_settings.timeout_s:g} s")

    def _replace(self, worker: Worker, *, because: str) -> None:
        assert self.pool is not None
        self.faults.workers_restarted += 1
        self.pool.replace(worker, because=because)
