"""Training: what a step costs with everything of ours on, as a ratio to stock TRL doing the same work."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyphony.launch.recipe import Recipe, load_recipe
from tests.benchmarks.commands import RECIPES
from tests.benchmarks.result import Result, Target, in_turns, paired

if TYPE_CHECKING:
    from tests.benchmarks.side_by_side import Block, SideBySide

PAIRS = 7
STEPS = 10
WARM_UP = 2


def bench_step(*, short: bool = False) -> list[Result]:
    """Time optimizer steps of ours and of stock TRL on the same prompts, seeds, rewards and engine, in turns."""
    from tests.benchmarks.side_by_side import SideBySide, lab_engine

    with tempfile.TemporaryDirectory() as folder:
        sides = SideBySide(recipe=step_recipe(short=short), engine=lab_engine(), folder=Path(folder), warm_up=WARM_UP)
        return [step_result(sides, pairs=1 if short else PAIRS)[0]]


def step_result(sides: SideBySide, *, pairs: int) -> tuple[Result, list[Block]]:
    """Run both sides in turns; return the comparison and our blocks."""
    seen = in_turns(sides.ours, sides.stock, pairs=pairs)
    result = paired(
        "step",
        "s",
        [(ours.sample, stock.sample) for ours, stock in seen],
        target=Target(relation="<=", limit=1.05),
        note=describe(seen),
    )
    return result, [ours for ours, _ in seen]


def step_recipe(*more: str, steps: int = STEPS, short: bool = False) -> Recipe:
    """Return the demo's recipe with a policy that stays still and as little evaluation as there can be.

    The short one has one step that counts, of two prompts, and tells no tracker.
    """
    overrides = [
        *more,
        "name=bench",
        "grpo.learning_rate=0.0",
        f"grpo.max_steps={WARM_UP + (1 if short else steps) + 1}",
        "eval.every=1000",
        "eval.samples=1",
        *(f"domains.{name}.heldout.size=8" for name in load_recipe(RECIPES / "demo.yaml").domains),
        *(["grpo.per_device_train_batch_size=16", "tracking.wandb=null"] if short else []),
    ]
    return load_recipe(RECIPES / "demo.yaml", overrides)


def describe(pairs: Sequence[tuple[Block, Block]]) -> str:
    """Say how much both sides generated."""
    ours, stock = (statistics.mean(block.tokens for block in side) for side in zip(*pairs, strict=True))
    return f"{ours:.1f} and {stock:.1f} tokens a step"


BENCHMARKS = {"step": bench_step}
