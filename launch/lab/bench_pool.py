"""The prompt pool at a million prompts: saving, loading, and what a visit costs against a pool a thousandth of the size.

`python -m polyphony.launch.lab.bench pool` prints them. Visits are timed by this process's processor, the file by the clock.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path

import numpy as np

from polyphony.curricula.pool import PromptPool
from polyphony.curricula.pool_file import POOL_FILE, Columns, load_pools, save_pools
from polyphony.curricula.pool_settings import PoolSettings
from polyphony.launch.lab.bench_result import Result, Target, paired, repeated

PROMPTS, FEW = 1_000_000, 1_000
REPETITIONS, DRAWS, PER_DRAW = 3, 50, 128


def bench_pool() -> list[Result]:
    """Measure saving and loading, then draw + observe in turns with the small pool."""
    large, small = known_pool(PROMPTS), known_pool(FEW)
    with tempfile.TemporaryDirectory() as folder:
        times = [file_seconds(large, Path(folder) / POOL_FILE) for _ in range(REPETITIONS)]
    limit = Target(relation="<=", limit=2.0)
    visits = [(visit_micros(large), visit_micros(small)) for _ in range(REPETITIONS)]
    return [
        repeated("pool_save_1e6", "s", [saved for saved, _ in times], target=limit),
        repeated("pool_load_1e6", "s", [loaded for _, loaded in times], target=limit),
        paired(
            "pool_visit_1e6",
            "us/prompt",
            ours=[of_large for of_large, _ in visits],
            baseline=[of_small for _, of_small in visits],
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


def file_seconds(pool: PromptPool, path: Path) -> tuple[float, float]:
    """Return the seconds that saving a pool took, and those that loading took until the pool could draw."""
    began = time.perf_counter()
    save_pools(path, {pool.name: pool.columns()})
    saved = time.perf_counter()
    pool.adopt(load_pools(path)[pool.name])
    return saved - began, time.perf_counter() - saved


def visit_micros(pool: PromptPool) -> float:
    """Return processor microseconds a prompt of drawing it and taking in its group."""
    rewards = (np.random.default_rng(1).random((DRAWS, PER_DRAW, 8)) < 0.5).astype(float).tolist()
    began = time.process_time()
    for of_draw in rewards:
        for prompt_id, graded in zip(pool.draw(PER_DRAW), of_draw, strict=True):
            pool.observe(prompt_id, graded)
    return (time.process_time() - began) / DRAWS / PER_DRAW * 1e6


BENCHMARKS = {"pool": bench_pool}
