"""Training: what a step costs with everything of ours on, as a ratio to stock TRL doing the same work."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyphony.launch.config import Recipe, load_recipe
from polyphony.launch.lab.bench_commands import RECIPES
from polyphony.launch.lab.bench_result import Result, Target, paired

if TYPE_CHECKING:
    from polyphony.launch.lab.side_by_side import Block, SideBySide

PAIRS = 7
STEPS = 10
WARM_UP = 2


def bench_step() -> list[Result]:
    """Time optimizer steps of ours and of stock TRL on the same prompts, seeds, rewards and engine, in turns."""
    from polyphony.launch.lab.side_by_side import SideBySide, twin_engine

    with tempfile.TemporaryDirectory() as folder:
        recipe = step_recipe()
        engine = twin_engine(recipe, Path(folder) / "engine")
        sides = SideBySide(recipe=recipe, engine=engine, folder=Path(folder), warm_up=WARM_UP)
        return [step_result(sides, pairs=PAIRS)[0]]


def step_result(sides: SideBySide, *, pairs: int) -> tuple[Result, list[Block]]:
    """Run both sides in turns; return the comparison and our blocks."""
    # the first pair is a warm-up and always begins with ours, whose draws it hands to stock
    seen = [_pair(sides, ours_first=i % 2 == 0) for i in range(pairs + 1)][1:]
    ours, stock = [pair[0] for pair in seen], [pair[1] for pair in seen]
    result = paired(
        "step",
        "s",
        ours=[block.seconds for block in ours],
        baseline=[block.seconds for block in stock],
        target=Target(relation="<=", limit=1.05),
        note=describe(ours, stock),
    )
    return result, ours


def step_recipe(*more: str, steps: int = STEPS) -> Recipe:
    """Return the demo's recipe with a policy that stays still and as little evaluation as there can be."""
    overrides = [
        *more,
        "name=bench",
        "grpo.learning_rate=0.0",
        f"grpo.max_steps={WARM_UP + steps + 1}",
        "eval.every=1000",
        "eval.samples=1",
        *(f"domains.{name}.heldout.size=8" for name in load_recipe(RECIPES / "demo.yaml").domains),
    ]
    return load_recipe(RECIPES / "demo.yaml", overrides)


def _pair(sides: SideBySide, *, ours_first: bool) -> tuple[Block, Block]:
    if ours_first:
        ours = sides.ours()
        return ours, sides.stock()
    stock = sides.stock()
    return sides.ours(), stock


def describe(ours: Sequence[Block], stock: Sequence[Block]) -> str:
    """Say how much both sides generated, and the ratio by processor time, which a busy machine disturbs less."""
    ratio = statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in zip(ours, stock, strict=True))
    tokens = [statistics.mean(block.tokens for block in side) for side in (ours, stock)]
    return f"by cpu time {ratio:.3f}; {tokens[0]:.1f} and {tokens[1]:.1f} tokens a step"


BENCHMARKS = {"step": bench_step}
