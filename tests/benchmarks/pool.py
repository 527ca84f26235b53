"""The prompt pool at a million prompts: saving, loading, and what a visit costs against a pool a thousandth of the size."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from polyphony.curricula.prompts.pool import PoolSettings, PromptPool
from polyphony.curricula.prompts.pool_file import Columns, load_pools, save_pools
from polyphony.launch.measures.result import Result, Target, Timing, in_turns, paired, repeated, timed
from polyphony.trainer.run.folder import POOL_FILE

PROMPTS, FEW = 1_000_000, 1_000
REPETITIONS, DRAWS, PER_DRAW = 3, 50, 128


def bench_pool(*, short: bool = False) -> list[Result]:
    """Measure saving and loading, then draw + observe in turns with the small pool."""
    size, repetitions = (PROMPTS // 100, 1) if short else (PROMPTS, REPETITIONS)
    large, small = known_pool(size), known_pool(FEW)
    saved, loaded = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / POOL_FILE
        for _ in range(repetitions):
            saved.append(timed(lambda: save_pools(path, {large.name: large.columns()})))
            # loaded is what could draw
            loaded.append(timed(lambda: large.adopt(load_pools(path)[large.name])))
    limit = Target(relation="<=", limit=2.0)
    visits = in_turns(lambda: visit_micros(large), lambda: visit_micros(small), pairs=repetitions)
    return [
        repeated("pool_save_1e6", "s", saved, target=limit),
        repeated("pool_load_1e6", "s", loaded, target=limit),
        paired(
            "pool_visit_1e6",
            "us/prompt",
            visits,
            target=limit,
            note="draw + observe against 1e3 prompts; log n doubles",
        ),
    ]


def known_pool(size: int) -> PromptPool:
    """Return a pool whose prompts have had two visits each, at pass rates from 0 to 1."""
    ids = [hashlib.sha256(str(k).encode()).hexdigest()[:16] for k in range(size)]
    pool = PromptPool(ids, name="math", seed=1, settings=PoolSettings())
    passed = np.random.default_rng(0).integers(0, 17, size).astype(np.float32)
    visits, due = np.full(size, 2, dtype=np.int32), np.zeros(size, dtype=np.int32)
    pool.adopt(Columns(ids=ids, successes=passed, failures=16 - passed, visits=visits, due=due, clock=0))
    return pool


def visit_micros(pool: PromptPool) -> Timing:
    """Return microseconds a prompt of drawing it and taking in its group."""
    rewards = (np.random.default_rng(1).random((DRAWS, PER_DRAW, 8)) < 0.5).astype(float).tolist()

    def visit() -> None:
        for of_draw in rewards:
            for prompt_id, graded in zip(pool.draw(PER_DRAW), of_draw, strict=True):
                pool.observe(prompt_id, graded)

    return timed(visit).scaled(1e6 / DRAWS / PER_DRAW)


BENCHMARKS = {"pool": bench_pool}
