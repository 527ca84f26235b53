"""The engine: tokens per second against a bare `LLM.generate`, and how long the policy's weights take to arrive."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from polyphony.launch.measures.result import Result
from polyphony.launch.recipe import load_recipe
from tests.benchmarks.commands import RECIPES

if TYPE_CHECKING:
    from polyphony.trainer.engine.engine import InProcessEngine
    from polyphony.trainer.grpo import DomainGRPOTrainer

PAIRS = 7


def bench_engine(*, short: bool = False) -> list[Result]:
    """Timing 64 prompts x 8 through our engine and through the `LLM` inside it, in turns."""
    from polyphony.launch.measures.rollouts import against_bare, requests_of

    trainer, engine = _attached()
    requests = requests_of(trainer)
    return [against_bare(engine, requests[:64] if short else requests, pairs=1 if short else PAIRS)]


def bench_sync(*, short: bool = False) -> list[Result]:
    """Load the lab policy's weights into the engine."""
    from polyphony.launch.measures.rollouts import SYNCS, sync_result

    return [sync_result(*_attached(), times=2 if short else SYNCS)]


def _attached() -> tuple[DomainGRPOTrainer, InProcessEngine]:
    """Return the demo's trainer and the engine that the benchmarks share, attached to it."""
    from polyphony.launch.build import build_trainer
    from polyphony.launch.measures.side_by_side import lab_engine

    engine = lab_engine()
    with tempfile.TemporaryDirectory() as folder:
        return build_trainer(load_recipe(RECIPES / "demo.yaml"), Path(folder), engine=engine), engine


BENCHMARKS = {"engine": bench_engine, "sync": bench_sync}
