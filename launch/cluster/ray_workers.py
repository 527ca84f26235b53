"""Rollout workers: Ray actors that each hold one vLLM, in places reserved together, replaced where they die or hang."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import warnings
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from polyphony.curricula.records import Completion
from polyphony.launch.cluster import ray_cluster as cluster
from polyphony.launch.sections import RolloutsSection

if TYPE_CHECKING:
    from polyphony.launch.cluster.weights import Buckets, PackedWeights
    from polyphony.trainer.engine.adapters import AdapterShape
    from polyphony.trainer.engine.turns import Running
    from polyphony.trainer.engine.vllm import EngineSettings, Request, Sampling

logger = logging.getLogger(__name__)

LAUNCHER = ("MASTER_", "TORCHELASTIC_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE")
"""How the variables begin by which torchrun tells a process its place."""
MOST_DEATHS = 5
"""Workers lost one after the other, with no completion in between, before the run stops: a cause that stays."""
NO_WEIGHTS = -1
"""Version of a worker that holds the weights it was started with, or half a load."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a worker returns for its share of a draw."""

    version: int
    """Number of the weight sync that its weights are of."""
    completions: list[Completion]
    places: list[int] = field(default_factory=list)
    """Of turns: which they are."""


class RolloutWorker:
    """One vLLM engine in a process of its own."""

    def __init__(self, settings: EngineSettings) -> None:
        from polyphony.trainer.engine.vllm import start_llm  # slow to import

        forget_launcher(os.environ)
        # weights are read where Ray keeps them, and Ray keeps them read-only
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        transfer: dict[str, Any] = {} if settings.on_cpu else {"weight_transfer_config": {"backend": "nccl"}}
        backend = "mp" if settings.tensor_parallel > 1 else None
        self.llm = start_llm(settings, distributed_executor_backend=backend, **transfer)
        self.version = NO_WEIGHTS
        self.running: Running | None = None
        """Turns that are being sampled."""
        self.laid_on: Any = None
        """Names the adapter that is laid over the weights."""

    def process_id(self) -> tuple[str, int]:
        """Return node and process id; answers once the engine is up."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def load(self, version: int, is_all: bool, *buckets: PackedWeights) -> None:
        """Take over the weights of sync `version`, all or what changed; half a load counts as none.

        Raises RuntimeError for changes where there is nothing whole that they are of.
        """
        from polyphony.launch.cluster.weights import unpack  # slow to import
        from polyphony.trainer.engine.vllm import load_weights

        if self.version == NO_WEIGHTS and not is_all:
            raise RuntimeError("a worker without whole weights was sent what changed of them")
        self.version, self.laid_on = NO_WEIGHTS, None
        load_weights(self.llm, [named for bucket in buckets for named in unpack(bucket)])
        self.version = version

    def why_not(self, shape: AdapterShape) -> str:
        """Return why the engine does not take such an adapter; empty where it does."""
        from polyphony.trainer.engine.lora import why_not  # slow to import

        return why_not(self.llm, shape)

    def lay_on(self, version: int, adapter: PackedWeights) -> None:
        """Take over the adapter of sync `version`, over the weights that are there. Raises RuntimeError where none are."""
        from polyphony.launch.cluster.weights import unpack  # slow to import
        from polyphony.trainer.engine.lora import adapter_request, load_adapter

        if self.version == NO_WEIGHTS:
            raise RuntimeError("a worker without whole weights was sent an adapter")
        self.version = NO_WEIGHTS
        load_adapter(self.llm, unpack(adapter), version=version)
        self.version, self.laid_on = version, adapter_request(version)

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Share:
        """Sample one completion a request, in order; turns that are still there belong to a batch that is over."""
        from polyphony.trainer.engine.vllm import sample  # slow to import

        self.forget()
        return Share(version=self.version, completions=sample(self.llm, requests, sampling, adapter=self.laid_on))

    def go_on(self, asked: Sequence[tuple[int, Request]], sampling: Sampling, seconds: float) -> Share:
        """Take turns in, and return those that are whole as soon as any is, or after so many seconds."""
        from polyphony.trainer.engine.turns import Running  # slow to import

        running = self.running = self.running or Running(self.llm, sampling, self.laid_on)
        running.add(asked)
        until, whole = time.monotonic() + seconds, []
        while running and not whole and time.monotonic() < until:
            whole = running.step()
        if not running:
            self.running = None
        places, completions = [place for place, _ in whole], [completion for _, completion in whole]
        return Share(version=self.version, completions=completions, places=places)

    def forget(self) -> None:
        """Let go of turns that nobody waits for any more."""
        if self.running:
            self.running.abort()
        self.running = None

    def parameters(self) -> dict[str, Any]:
        """Return the engine's parameters by vLLM's names (query, key and value are one there), as arrays."""
        held = self.llm.apply_model(lambda model: {n: p.detach().cpu().numpy() for n, p in model.named_parameters()})[0]
        return {name.replace(".base_layer.", "."): array for name, array in held.items()}

    def join(self, meeting: dict[str, Any]) -> None:
        """Join the trainer's NCCL group."""
        self.llm.init_weight_transfer_engine({"init_info": meeting})

    def receive(self, update: dict[str, Any], version: int) -> None:
        """Take over the weights of sync `version` while the trainer sends them; half a transfer counts as none."""
        from polyphony.trainer.engine.lora import unwrap, wrap  # slow to import

        self.version, self.laid_on = NO_WEIGHTS, None
        self.llm.apply_model(unwrap)
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": update})
        self.llm.finish_weight_update()
        self.llm.apply_model(wrap)
        self.llm.reset_prefix_cache()
        self.version = version

    def call_it(self, version: int) -> None:
        """Count the weights that are there as those of sync `version`."""
        self.version = version


@dataclass(kw_only=True, slots=True)
class Worker:
    """A worker as the trainer sees it."""

    place: int
    """Number of its place in the placement group."""
    handle: Any
    ready: ray.ObjectRef
    """Resolves to node and process id once the engine is up."""
    is_up: bool = False
    holds: Buckets | None = None
    """What of the object store was sent to it, empty where NCCL carried it; None until weights of a sync were sent."""

    @property
    def has_weights(self) -> bool:
        """Whether weights of a sync were sent to it."""
        return self.holds is not None

    def load(self, version: int, weights: Buckets) -> ray.ObjectRef:
        """Send what it does not hold; return what ends with its taking over. Calls of an actor run in order."""
        is_all = not self.holds or len(self.holds) != len(weights)
        changed = weights if is_all else [new for new, old in zip(weights, self.holds or (), strict=True) if new != old]
        self.holds = weights
        return self.handle.load.remote(version, is_all, *changed)


@dataclass(kw_only=True)
class WorkerPool:
    """All workers of a run. A lost one is replaced in its place and gets the weights of the last sync.

    Example: `WorkerPool.start(engine_settings, RolloutsSection(engine="ray", workers=2)).alive()`
    """

    engine: EngineSettings
    settings: RolloutsSection
    group: Any
    is_own_cluster: bool
    workers: list[Worker] = field(default_factory=list)
    weights: tuple[int, Buckets] | None = None
    """Version and places in the object store of the last sync; None before the first, and where NCCL carries them. Of an
    adapter, of the sync that sent its base."""
    adapter: tuple[int, ray.ObjectRef] | None = None
    """The same of the adapter alone; None where there is none, or it is merged in the weights."""
    deaths: int = 0
    """Since the last completion came back."""
    worker_class: ClassVar[type] = RolloutWorker
    """What each of them is; another only where workers are simulated."""

    @classmethod
    def start(cls, engine: EngineSettings, settings: RolloutsSection) -> WorkerPool:
        """Join the cluster, start all workers, and wait for their engines. Raises RecipeError; leaves nothing behind."""
        is_own = cluster.join(settings.address, timeout_s=settings.start_timeout_s)
        group = None
        try:
            group = cluster.reserve(
                settings.workers,
                cpus=settings.tensor_parallel,
                gpus=0 if engine.on_cpu else settings.tensor_parallel,
                timeout_s=settings.start_timeout_s,
                is_own=is_own,
            )
            pool = cls(engine=engine, settings=settings, group=group, is_own_cluster=is_own)
            pool.workers = [pool._start_one(place) for place in range(settings.workers)]
            while not all(worker.is_up for worker in pool.workers):
                pool.wait_for_one(of=[worker for worker in pool.workers if not worker.is_up])
        except BaseException:
            cluster.leave(group, is_own=is_own)
            raise
        return pool

    def _start_one(self, place: int) -> Worker:
        gpus = 0 if self.engine.on_cpu else self.settings.tensor_parallel
        remote = ray.remote(self.worker_class).options(  # type: ignore[call-overload]
            num_cpus=self.settings.tensor_parallel,
            num_gpus=gpus,
            max_restarts=0,  # a restarted actor would serve the weights it was started with
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=place
            ),
            runtime_env={"env_vars": worker_environment(on_cpu=self.engine.on_cpu)},
        )
        handle = remote.remote(self.engine)
        worker = Worker(place=place, handle=handle, ready=handle.process_id.remote())
        if self.weights is not None:
            worker.load(*self.weights)  # arrives before any request
            if self.adapter is not None:
                handle.lay_on.remote(*self.adapter)
        return worker

    def alive(self) -> list[Worker]:
        """Return the workers whose engines are up; waits for one if there is none. Raises RuntimeError."""
        for worker in self.workers:
            if not worker.is_up and ray.wait([worker.ready], timeout=0)[0]:
                self._greet(worker)
        while not any(worker.is_up for worker in self.workers):
            self.wait_for_one(of=self.workers)
        return [worker for worker in self.workers if worker.is_up]

    def answering(self) -> list[Worker]:
        """Return the workers that are up and answer; those that do not are replaced first. Raises RuntimeError."""
        while True:
            workers = self.alive()
            self.wait_for({worker.handle.process_id.remote(): worker for worker in workers})
            if all(worker is self.workers[worker.place] for worker in workers):
                return workers

    def wait_for_one(self, *, of: Sequence[Worker]) -> None:
        """Wait until one of the workers is up or has failed to start. Raises RuntimeError after `start_timeout_s`."""
        timeout_s = self.settings.start_timeout_s
        done, _ = ray.wait([worker.ready for worker in of], timeout=timeout_s)
        if not done:
            raise RuntimeError(f"no rollout worker came up within rollouts.start_timeout_s={timeout_s:g} s")
        self._greet(next(worker for worker in of if worker.ready == done[0]))

    def _greet(self, worker: Worker) -> None:
        try:
            ray.get(worker.ready)
        except RayError as error:
            self.replace(worker, because=f"it did not start: {last_line(error)}")
        else:
            worker.is_up = True

    def replace(self, worker: Worker, *, because: str) -> None:
        """End a worker and start another in its place. Raises RuntimeError where workers keep dying."""
        logger.warning("rollout worker %d is replaced: %s", worker.place, because)
        self.deaths += 1
        self._end(worker)
        if self.deaths >= MOST_DEATHS:
            raise RuntimeError(
                f"{self.deaths} rollout workers were lost with no completion in between; last: {because}"
            )
        self.workers[worker.place] = self._start_one(worker.place)

    def _end(self, worker: Worker) -> None:
        ray.kill(worker.handle)
        if not worker.is_up:
            return
        node, process = ray.get(worker.ready)
        if node == ray.get_runtime_context().get_node_id():  # one that hangs may not hear Ray
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def load(self, version: int, weights: Buckets) -> None:
        """Have every worker take over weights of the object store, what it lacks of them; replaces who does not."""
        self.weights, self.adapter = (version, weights), None
        calls = {worker.load(version, weights): worker for worker in self.workers}
        self.wait_for({call: worker for call, worker in calls.items() if worker.is_up})

    def lay_on(self, version: int, adapter: ray.ObjectRef) -> None:
        """The same with an adapter, over the weights that each has; those that wait for weights get it with them."""
        self.adapter = (version, adapter)
        having = [worker for worker in self.workers if worker.has_weights]
        calls = {worker.handle.lay_on.remote(*self.adapter): worker for worker in having}
        self.wait_for({call: worker for call, worker in calls.items() if worker.is_up})

    def why_not(self, shape: AdapterShape) -> str:
        """Return why the workers do not take such an adapter; empty where they do."""
        return ray.get(self.alive()[0].handle.why_not.remote(shape))

    def wait_for(self, calls: dict[ray.ObjectRef, Worker]) -> None:
        """Wait for calls without an answer of interest; a worker that fails or hangs is replaced."""
        deadline = time.monotonic() + self.settings.timeout_s
        for call, worker in calls.items():
            try:
                ray.get(call, timeout=max(0.0, deadline - time.monotonic()))
            except RayError as error:
                self.replace(worker, because=last_line(error))

    def close(self) -> None:
        """End all workers, and the cluster if it was started here."""
        if ray.is_initialized():
            for worker in self.workers:
                ray.kill(worker.handle)
        cluster.leave(self.group, is_own=self.is_own_cluster)


def forget_launcher(environment: MutableMapping[str, str]) -> None:
    """Take out what torchrun told a trainer rank, which started this process's Ray: a worker is a group of its own.

    Told to use the agent's store, PyTorch would wait for one at a port where vLLM expects it to open its own.
    """
    for name in [name for name in environment if name.startswith(LAUNCHER)]:
        del environment[name]


def worker_environment(*, on_cpu: bool) -> dict[str, str]:
    """Return the environment variables of a worker's process."""
    ours = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are replaced in the engine's own process
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tensor-parallel ranks are sent the loading function
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_cpu:
        # one thread a worker: threads that share a core with another process are slower than one
        ours |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    passed = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_HOME", "TRANSFORMERS_VERBOSITY")
    return ours | {name: os.environ[name] for name in passed if name in os.environ}


def last_line(error: BaseException) -> str:
    """Return the line of an error that comes last: Ray's hold the worker's whole stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
