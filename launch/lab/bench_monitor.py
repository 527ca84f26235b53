"""Watching: what everything that is logged every step costs, and how long the report of a long run takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from polyphony.launch.lab.bench_result import Result, Target, paired, repeated
from polyphony.launch.lab.bench_training import WARM_UP, describe, step_recipe

if TYPE_CHECKING:
    from polyphony.launch.lab.side_by_side import Block, SideBySide
    from polyphony.trainer.grpo import DomainGRPOTrainer

PAIRS, STEPS = 10, 40
"""Of runs and of steps in each: a step's time varies by a tenth, and 2 % is to be told."""
REPORT_STEPS, REPORT_DOMAINS = 2000, 20


def bench_logging() -> list[Result]:
    """Time steps with everything that is logged on, and with all of it off, in turns; and what logging itself takes."""
    from polyphony.launch.lab.side_by_side import SideBySide, twin_engine

    with tempfile.TemporaryDirectory() as folder:
        # the same prompts whatever was measured of the last ones
        recipe = step_recipe("curriculum.scheduler=joint", steps=STEPS)
        engine = twin_engine(recipe, Path(folder) / "engine")
        sides = SideBySide(recipe=recipe, engine=engine, folder=Path(folder), warm_up=WARM_UP)
        pairs, inside = [], []
        for i in range(PAIRS + 1):
            spent: list[float] = []
            runs = {"loud": lambda spent=spent: _loud(sides, spent), "quiet": lambda: _quiet(sides)}
            order = ("loud", "quiet") if i % 2 == 0 else ("quiet", "loud")
            blocks = {name: runs[name]() for name in order}
            if i:  # the first pair warms up
                pairs.append((blocks["loud"], blocks["quiet"]))
                inside.append(sum(spent) / recipe.grpo["max_steps"] / blocks["loud"].seconds)
    loud, quiet = zip(*pairs, strict=True)
    return [
        paired(
            "logging",
            "s",
            ours=[block.median_seconds for block in loud],
            baseline=[block.median_seconds for block in quiet],
            target=Target(relation="<=", limit=1.02),
            note=f"median of {STEPS} steps a run; {describe(loud, quiet)}",
        ),
        repeated(
            "logging, by its own clock",
            "of a step",
            inside,
            target=Target(relation="<=", limit=0.02),
            note="processor time in the hooks that log; entropy's share of TRL's kernel is in the line above",
        ),
    ]


def bench_report() -> list[Result]:
    """Time the report of a synthetic run of 2,000 steps and 20 domains, and weigh it."""
    from polyphony.launch.lab.synthetic_run import write_run
    from polyphony.trainer.report import write_report

    with tempfile.TemporaryDirectory() as folder:
        names = [f"domain-{k}" for k in range(REPORT_DOMAINS)]
        run = write_run(
            Path(folder) / "run", domains=names, watch_only=(), scheduler="joint", steps=REPORT_STEPS, eval_every=50
        )
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            out = write_report([run], Path(folder) / "report.html")
            seconds.append(time.perf_counter() - started)
        size = out.stat().st_size / 1e6
    what = f"{REPORT_STEPS:,} steps, {REPORT_DOMAINS} domains"
    return [
        repeated("report", "s", seconds, target=Target(relation="<=", limit=10.0), note=what),
        repeated("report size", "MB", [size], target=Target(relation="<=", limit=10.0), note=what),
    ]


def _loud(sides: SideBySide, spent: list[float]) -> Block:
    """Run as `polyphony train` does, and add up the processor time of what only logs."""
    from polyphony.trainer.callbacks import RunCallback

    trainer = sides.our_trainer()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunCallback))
    callback.on_log = _timed(callback.on_log, spent)
    trainer.draws.listeners = [_timed(listen, spent) for listen in trainer.draws.listeners]
    trainer.entropy.after_draw = _timed(trainer.entropy.after_draw, spent)
    trainer.draws.inspect = _timed(trainer.draws.inspect, spent)
    trainer.shortcuts.observe = _timed(trainer.shortcuts.observe, spent)
    meter = trainer.meter
    trainer.meter = SimpleNamespace(add=_timed(meter.add, spent), flush=_timed(meter.flush, spent))  # type: ignore
    return sides.run(trainer)


def _quiet(sides: SideBySide) -> Block:
    """Run the same recipe with nothing measured by domain, nothing written and nobody told."""
    from polyphony.launch.build import build_trainer

    folder = sides.next_folder()
    recipe = sides.recipe.model_copy(update={"grpo": {**sides.recipe.grpo, "logging_strategy": "no"}})
    sides.engine.twin_seeds = None
    trainer = build_trainer(recipe, folder, engine=sides.engine)
    return sides.run(_silenced(trainer))


def _silenced(trainer: DomainGRPOTrainer) -> DomainGRPOTrainer:
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer.remove_callback(PrinterCallback)
    trainer.meter = SimpleNamespace(add=_nothing, flush=dict)  # type: ignore[assignment]
    trainer.entropy.after_draw = _nothing  # type: ignore[method-assign]
    trainer.draws.inspect = lambda sample: ()
    trainer.shortcuts.observe = _nothing  # type: ignore[method-assign]
    trainer._domain_entropy = lambda *args: {}  # type: ignore[method-assign]
    trainer._get_per_token_logps_and_entropies = MethodType(  # type: ignore[method-assign]
        GRPOTrainer._get_per_token_logps_and_entropies, trainer
    )
    return trainer


def _timed(function: Callable, spent: list[float]) -> Callable:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.thread_time() - started)

    return timed


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take anything, do nothing."""


BENCHMARKS = {"logging": bench_logging, "report": bench_report}
