"""Rollout workers on Ray: tokens a second of two beside one, and how long weights take to reach both."""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from polyphony.launch.config import load_recipe
from polyphony.launch.lab.bench_commands import RECIPES
from polyphony.launch.lab.bench_result import Result, Target, paired, repeated
from polyphony.launch.lab.bench_rollouts import requests_of

if TYPE_CHECKING:
    from polyphony.launch.ray_engine import RayEngine
    from polyphony.trainer.grpo import DomainGRPOTrainer
    from polyphony.trainer.rollouts import Request

PAIRS = 5
SYNCS = 20


def bench_workers() -> list[Result]:
    """Sample 64 prompts x 8 through both workers and through one of them, in turns; one thread each."""
    trainer, engine = _running()
    asked = requests_of(trainer)
    trainer.policy.sync()
    one, two = [], []
    for _ in range(PAIRS + 1):
        two.append(_rate(engine, asked, workers=2))
        one.append(_rate(engine, asked, workers=1))
    target = Target(relation=">=", limit=1.6)
    # the first of each is the warm-up
    return [paired("workers", "tok/s", ours=two[1:], baseline=one[1:], target=target, note="two workers over one")]


def bench_worker_sync() -> list[Result]:
    """Send the lab policy's weights to two workers."""
    trainer, _ = _running()
    trainer.policy.sync()  # warms up
    seconds = []
    for _ in range(SYNCS):
        started = time.perf_counter()
        trainer.policy.sync()
        seconds.append(time.perf_counter() - started)
    return [repeated("worker sync", "s", seconds, target=Target(relation="<=", limit=0.05), note="to two workers")]


def _rate(engine: RayEngine, asked: list[Request], *, workers: int) -> float:
    """Return tokens a second with the pool cut down to its first `workers`."""
    assert engine.pool is not None
    pool = engine.pool.workers
    engine.pool.workers = pool[:workers]
    started = time.perf_counter()
    tokens = sum(len(c.ids) for c in engine.complete(asked))
    seconds = time.perf_counter() - started
    engine.pool.workers = pool
    return tokens / seconds


@cache
def _running() -> tuple[DomainGRPOTrainer, RayEngine]:
    """Return the demo's trainer over two workers, started once a process."""
    from polyphony.launch.build import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPES / "demo.yaml", ["rollouts={engine: ray, workers: 2}"])
        trainer = build_trainer(recipe, Path(folder))
    return trainer, trainer.engine  # type: ignore[return-value]


BENCHMARKS = {"workers": bench_workers, "worker sync": bench_worker_sync}
