"""The update where half of the groups are dead: forward and backward of ours, which leaves them out, against stock TRL's."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.launch.config import Recipe, load_recipe
from polyphony.launch.lab.bench_commands import RECIPES
from polyphony.launch.lab.bench_result import Result, Target, paired
from polyphony.launch.lab.bench_training import step_recipe

if TYPE_CHECKING:
    from polyphony.launch.lab.side_by_side import Block

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

    steps: float = 0.0
    inputs: float = 0.0
    warm_up: int = 0
    """Training steps at the start that are not counted."""
    seen: int = 0

    def attach(self, trainer: Any) -> None:
        trainer.training_step = self._timed(trainer.training_step, "steps")
        trainer._prepare_inputs = self._timed(trainer._prepare_inputs, "inputs")

    @property
    def seconds(self) -> float:
        """Of forward and backward, over all counted steps."""
        return self.steps - self.inputs

    def _timed(self, method: Callable, name: str) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = method(*args, **kwargs)
            if self.seen >= self.warm_up:
                setattr(self, name, getattr(self, name) + time.perf_counter() - began)
            self.seen += name == "steps"
            return result

        return timed


def bench_update() -> list[Result]:
    """Time updates and whole steps of ours and of stock TRL on the same prompts, completions and rewards, in turns."""
    from polyphony.launch.lab.side_by_side import SideBySide, twin_engine

    class Timed(SideBySide):
        """Keeps an update clock on every run."""

        def run(self, trainer: Any) -> tuple[Block, float]:  # type: ignore[override]
            clock = UpdateClock(warm_up=self.warm_up)
            clock.attach(trainer)
            return super().run(trainer), clock.seconds

    with tempfile.TemporaryDirectory() as folder:
        recipe = half_dead_recipe()
        engine = twin_engine(recipe, Path(folder) / "engine")
        sides = Timed(recipe=recipe, engine=engine, folder=Path(folder))
        pairs: list[Any] = [(sides.ours(), sides.stock()) for _ in range(PAIRS + 1)][1:]  # the first one warms up
    return [
        paired(
            "update, half of the groups dead",
            "s",
            ours=[ours[1] for ours, _ in pairs],
            baseline=[stock[1] for _, stock in pairs],
            target=Target(relation="<=", limit=0.6),
            note="forward and backward of all counted steps",
        ),
        paired(
            "whole step, half of the groups dead",
            "s",
            ours=[ours[0].seconds for ours, _ in pairs],
            baseline=[stock[0].seconds for _, stock in pairs],
            target=Target(relation="<=", limit=1.05),
        ),
    ]


def half_dead_recipe() -> Recipe:
    """Return the recipe of the step benchmark with rewards that leave half of the groups without signal."""
    plain = step_recipe()
    names = [name for name, section in plain.domains.items() if section.train is not None]
    overrides = [f"domains.{name}.reward=polyphony.launch.lab.bench_update:HalfDead" for name in names]
    overrides += [f"domains.{name}.heldout.size=8" for name in plain.domains]
    kept = {"grpo": plain.grpo, "eval": plain.eval, "name": plain.name}
    return load_recipe(RECIPES / "demo.yaml", overrides).model_copy(update=kept)


BENCHMARKS = {"update": bench_update}
