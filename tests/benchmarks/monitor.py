"""Watching: what everything that is logged every step costs, and how long the report of a long run takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from polyphony.launch.measures.result import Result, Target, Timing, in_turns, paired, repeated, timed
from tests.benchmarks.training import step_recipe

if TYPE_CHECKING:
    from polyphony.launch.measures.side_by_side import Block, SideBySide
    from polyphony.trainer.grpo import DomainGRPOTrainer

PAIRS, STEPS = 10, 40
"""Of runs and of steps in each: a step's time varies by a tenth, and 2 % is to be told."""
REPORT_STEPS, REPORT_DOMAINS = 2000, 20


def bench_logging(*, short: bool = False) -> list[Result]:
    """Time steps with everything that is logged on, and with all of it off, in turns; and what logging itself takes."""
    from polyphony.launch.measures.side_by_side import SideBySide, describe, lab_engine

    with tempfile.TemporaryDirectory() as folder:
        # the same prompts whatever was measured of the last ones
        recipe = step_recipe("curriculum.scheduler=joint", steps=STEPS, short=short)
        sides = SideBySide(recipe=recipe, engine=lab_engine(), folder=Path(folder))
        inside: list[float] = []
        blocks = in_turns(lambda: _loud(sides, inside), lambda: _quiet(sides), pairs=1 if short else PAIRS)
    return [
        paired(
            "logging",
            "s",
            [(_median(loud), _median(quiet)) for loud, quiet in blocks],
            target=Target(relation="<=", limit=1.02),
            note=f"median of a run's steps, cpu their mean; {describe(blocks)}",
        ),
        repeated(
            "logging, by its own clock",
            "of a step",
            inside[1:],  # the first one warms up
            target=Target(relation="<=", limit=0.02),
            note="processor time in the hooks that log; entropy's share of TRL's kernel is in the line above",
        ),
    ]


def bench_report(*, short: bool = False) -> list[Result]:
    """Time the report of a synthetic run of 2,000 steps and 20 domains, and weigh it."""
    from polyphony.launch.report.report import write_report
    from tests.benchmarks.synthetic_run import write_run

    steps, repetitions = (200, 1) if short else (REPORT_STEPS, 3)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"domain-{k}" for k in range(REPORT_DOMAINS)]
        run = write_run(
            Path(folder) / "run", domains=names, watch_only=(), scheduler="joint", steps=steps, eval_every=50
        )
        out = Path(folder) / "report.html"
        seconds = [timed(lambda: write_report([run], out)) for _ in range(repetitions)]
        size = out.stat().st_size / 1e6
    what = f"{steps:,} steps, {REPORT_DOMAINS} domains"
    return [
        repeated("report", "s", seconds, target=Target(relation="<=", limit=10.0), note=what),
        repeated("report size", "MB", [size], target=Target(relation="<=", limit=10.0), note=what),
    ]


def _median(block: Block) -> Timing:
    return Timing(block.median_seconds, block.cpu_seconds)


def _loud(sides: SideBySide, shares: list[float]) -> Block:
    """Run as `polyphony train` does, and append the share of the time that the processor spent on what only logs."""
    trainer = sides.our_trainer()
    spent: list[float] = []
    assert trainer.run is not None
    trainer.run.on_log = _timed(trainer.run.on_log, spent)
    recorder: Any = trainer.draws.recorder
    recorder.record_draw = _timed(recorder.record_draw, spent)
    trainer.entropy.after_draw = _timed(trainer.entropy.after_draw, spent)
    trainer.shortcuts.inspect = _timed(trainer.shortcuts.inspect, spent)
    trainer.shortcuts.observe = _timed(trainer.shortcuts.observe, spent)
    meter = trainer.meter
    trainer.meter = SimpleNamespace(add=_timed(meter.add, spent), flush=_timed(meter.flush, spent))  # type: ignore
    block = sides.run(trainer)
    shares.append(sum(spent) / sides.recipe.grpo["max_steps"] / block.seconds)
    return block


def _quiet(sides: SideBySide) -> Block:
    """Run the same recipe with nothing measured by domain, nothing written and nobody told."""
    from polyphony.launch.build import build_trainer

    folder = sides.next_folder()
    recipe = sides.recipe.model_copy(update={"grpo": {**sides.recipe.grpo, "logging_strategy": "no"}})
    trainer = build_trainer(recipe, folder, engine=sides.engine)
    return sides.run(_silenced(trainer))


def _silenced(trainer: DomainGRPOTrainer) -> DomainGRPOTrainer:
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer.remove_callback(PrinterCallback)
    trainer.meter = SimpleNamespace(add=_nothing, flush=dict)  # type: ignore[assignment]
    trainer.entropy.after_draw = _nothing  # type: ignore[method-assign]
    trainer.shortcuts.inspect = lambda completions: [()] * len(completions)
    trainer.shortcuts.observe = _nothing  # type: ignore[method-assign]
    trainer._domain_entropy = lambda *args: ({}, {})  # type: ignore[method-assign]
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
