"""The update where half of the groups are dead: forward and backward of ours, which leaves them out, against stock TRL's."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.launch.measures.result import Result, Target, Timing, in_turns, paired
from polyphony.launch.recipe import Recipe, load_recipe
from tests.benchmarks.commands import RECIPES
from tests.benchmarks.training import step_recipe

if TYPE_CHECKING:
    from polyphony.launch.measures.side_by_side import Block, SideBySide

PAIRS = 5


class HalfDead:
    """Fail every completion of half of the prompts; of the others pass those whose length in tokens is odd.

    Example: a group of the second half with lengths 3, 4, 5 gets 1, 0, 1.
    """

    def __call__(self, prompts: list, completion_ids: list, **columns: Any) -> list[float]:
        return [float(is_live(p) and len(ids) % 2 == 1) for p, ids in zip(prompts, completion_ids, strict=True)]


def is_live(prompt: Any) -> bool:
    """Tell the half of a prompt from a hash of what it says."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 0


@dataclass(slots=True)
class UpdateClock:
    """Time a trainer's training steps without the preparation of their inputs, which is where it generates."""

    warm_up: int
    """Training steps at the start that are not counted."""
    clock: float = 0.0
    cpu: float = 0.0
    """Seconds of forward and backward, over all counted steps."""
    seen: int = 0

    def attach(self, trainer: Any) -> None:
        trainer.training_step = self._timed(trainer.training_step, sign=1)
        trainer._prepare_inputs = self._timed(trainer._prepare_inputs, sign=-1)

    def _timed(self, method: Callable, *, sign: int) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, cpu_began = time.perf_counter(), time.process_time()
            result = method(*args, **kwargs)
            if self.seen >= self.warm_up:
                self.clock += sign * (time.perf_counter() - began)
                self.cpu += sign * (time.process_time() - cpu_began)
            self.seen += sign > 0
            return result

        return timed


def bench_update(*, short: bool = False) -> list[Result]:
    """Time updates and whole steps of ours and of stock TRL on the same prompts, completions and rewards, in turns."""
    from polyphony.launch.measures.side_by_side import SideBySide, lab_engine

    with tempfile.TemporaryDirectory() as folder:
        recipe = half_dead_recipe(short=short)
        sides = SideBySide(recipe=recipe, engine=lab_engine(), folder=Path(folder))
        pairs = in_turns(
            lambda: _run(sides, sides.our_trainer()),
            lambda: _run(sides, sides.stock_trainer()),
            pairs=1 if short else PAIRS,
        )
    return [
        paired(
            "update, half of the groups dead",
            "s",
            [(ours[1], stock[1]) for ours, stock in pairs],
            target=Target(relation="<=", limit=0.6),
            note="forward and backward of all counted steps",
        ),
        paired(
            "whole step, half of the groups dead",
            "s",
            [(ours[0].sample, stock[0].sample) for ours, stock in pairs],
            target=Target(relation="<=", limit=1.05),
        ),
    ]


def _run(sides: SideBySide, trainer: Any) -> tuple[Block, Timing]:
    clock = UpdateClock(warm_up=sides.warm_up)
    clock.attach(trainer)
    return sides.run(trainer), Timing(clock.clock, clock.cpu)


def half_dead_recipe(*, short: bool = False) -> Recipe:
    """Return the recipe of the step benchmark with rewards that leave half of the groups without signal."""
    names = [name for name, section in load_recipe(RECIPES / "demo.yaml").domains.items() if section.train is not None]
    return step_recipe(*(f"domains.{name}.reward=tests.benchmarks.update:HalfDead" for name in names), short=short)


BENCHMARKS = {"update": bench_update}
