"""Rollout workers on Ray: tokens a second of two beside one, the way of weights to both, draws ahead of training."""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


STEPS, WARM_UP = 14, 3
ROWS = (16, 32, 64, 128)
"""Completions a draw; generation takes hardly longer for more, an update does."""


def bench_ahead() -> list[Result]:
    """Train with one draw ahead and with none, by turns: one worker of one thread, a trainer of one, a core each.

    Draws have as many completions as make generation and update most nearly equally long.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine = _trained(Path(folder), 16, 0, None, steps=1)[0].policy.engine
        try:
            shares = {rows: _trained(Path(folder), rows, 0, engine)[2] for rows in ROWS}
            rows = min(shares, key=lambda rows: abs(shares[rows] - 0.5))
            pairs = in_turns(
                lambda: _trained(Path(folder), rows, 1, engine)[1],
                lambda: _trained(Path(folder), rows, 0, engine)[1],
                pairs=PAIRS,
            )
        finally:
            engine.close()
            torch.set_num_threads(threads)
    note = f"a draw of {rows} completions, of which sampling is {shares[rows]:.2f}"
    return [paired("ahead", "s/draw", pairs, target=Target(relation="<=", limit=0.62), note=note)]


def _trained(folder: Path, rows: int, ahead: int, engine: Any, *, steps: int = STEPS) -> tuple[Any, Timing, float]:
    """Train some draws; return the trainer, seconds a draw after the first few, and the share that waited for samples."""
    from transformers import PrinterCallback

    from polyphony.launch.build import build_trainer
    from polyphony.launch.measures.side_by_side import StepClock

    of_size = [
        f"grpo.per_device_train_batch_size={rows}",
        f"grpo.max_steps={steps}",
        "grpo.gradient_accumulation_steps=1",
    ]
    workers = f"rollouts={{engine: ray, workers: 1, ahead: {ahead}}}"
    recipe = load_recipe(RECIPES / "demo.yaml", [workers, "tracking.wandb=null", *of_size])
    trainer = build_trainer(recipe, folder, engine=engine)
    waited: list[float] = []
    clock, make = StepClock(lambda: sum(waited)), trainer._roll_out
    trainer._roll_out = lambda n: waited.append(-time.perf_counter()) or _ended(make(n), waited)  # type: ignore
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if steps <= WARM_UP:
        return trainer, Timing(0.0, 0.0), 0.0
    block = clock.block(WARM_UP)
    return trainer, Timing(block.seconds, block.cpu_seconds), block.tokens / block.seconds


def _ended(rollout: Any, waited: list[float]) -> Any:
    waited[-1] += time.perf_counter()
    return rollout


@cache
def _running() -> tuple[DomainGRPOTrainer, RayEngine]:
    """Return the demo's trainer over two workers, started once a process."""
    from polyphony.launch.build import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPES / "demo.yaml", ["rollouts={engine: ray, workers: 2}"])
        trainer = build_trainer(recipe, Path(folder))
    return trainer, trainer.policy.engine  # type: ignore[return-value]


BENCHMARKS = {"workers": bench_workers, "worker sync": bench_worker_sync, "ahead": bench_ahead}
