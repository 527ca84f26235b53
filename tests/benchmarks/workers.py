"""Rollout workers on Ray: tokens a second of two beside one, and how long weights take to reach both."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from polyphony.launch.measures.result import Result, Target, Timing, in_turns, paired, repeated, tree_cpu_s
from polyphony.launch.recipe import load_recipe
from tests.benchmarks.commands import RECIPES

if TYPE_CHECKING:
    from polyphony.launch.cluster.ray_engine import RayEngine
    from polyphony.trainer.engine.vllm import Request
    from polyphony.trainer.grpo import DomainGRPOTrainer

PAIRS = 5


def bench_workers() -> list[Result]:
    """Timing 64 prompts x 8 through both workers and through one of them, in turns; one thread each."""
    from polyphony.launch.measures.rollouts import requests_of

    trainer, engine = _running()
    asked = requests_of(trainer)
    trainer.policy.sync()
    pairs = in_turns(lambda: _rate(engine, asked, workers=2), lambda: _rate(engine, asked, workers=1), pairs=PAIRS)
    return [paired("workers", "tok/s", pairs, target=Target(relation=">=", limit=1.6), note="two workers over one")]


def bench_worker_sync() -> list[Result]:
    """Send the lab policy's weights to two workers."""
    from polyphony.launch.measures.rollouts import sync_seconds

    trainer, _ = _running()
    seconds = sync_seconds(trainer.policy.sync)
    return [repeated("worker sync", "s", seconds, target=Target(relation="<=", limit=0.05), note="to two workers")]


def _rate(engine: RayEngine, asked: list[Request], *, workers: int) -> Timing:
    """Return tokens a second with the pool cut down to its first `workers`."""
    from polyphony.launch.measures.rollouts import rate_of

    assert engine.pool is not None
    pool = engine.pool.workers
    engine.pool.workers = pool[:workers]
    _, rate = rate_of(lambda: [c.ids for c in engine.complete(asked)], tree_cpu_s)
    engine.pool.workers = pool
    return rate


@cache
def _running() -> tuple[DomainGRPOTrainer, RayEngine]:
    """Return the demo's trainer over two workers, started once a process."""
    from polyphony.launch.build import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPES / "demo.yaml", ["rollouts={engine: ray, workers: 2}"])
        trainer = build_trainer(recipe, Path(folder))
    return trainer, trainer.policy.engine  # type: ignore[return-value]


BENCHMARKS = {"workers": bench_workers, "worker sync": bench_worker_sync}
