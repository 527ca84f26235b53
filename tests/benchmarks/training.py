"""Training: what a step costs with everything of ours on, as a ratio to stock TRL doing the same work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from polyphony.launch.measures import WARM_UP
from polyphony.launch.measures.result import Result
from polyphony.launch.recipe import Recipe, load_recipe
from tests.benchmarks.commands import RECIPES

PAIRS = 7
STEPS = 10


def bench_step(*, short: bool = False) -> list[Result]:
    """Time optimizer steps of ours and of stock TRL on the same prompts, seeds, rewards and engine, in turns."""
    from polyphony.launch.measures.side_by_side import SideBySide, lab_engine, step_result

    with tempfile.TemporaryDirectory() as folder:
        sides = SideBySide(recipe=step_recipe(short=short), engine=lab_engine(), folder=Path(folder))
        return [step_result(sides, pairs=1 if short else PAIRS)[0]]


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


BENCHMARKS = {"step": bench_step}
