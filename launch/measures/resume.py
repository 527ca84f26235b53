"""A run whose end is taken away and that goes on from its checkpoint: does it get where it was?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from polyphony.launch.measures import RECIPES
from polyphony.launch.measures.result import Result
from polyphony.launch.recipe import Recipe, load_recipe
from polyphony.launch.train import train
from polyphony.trainer.checkpoints import checkpoint_step, whole_checkpoints
from polyphony.trainer.run.folder import RunFolder

STEPS = 4
"""The checkpoint lies in the middle."""


def rows(policy: Path, folder: Path) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Yield the one row."""
    yield "resume", lambda: resumed(recipe_of(policy), folder / "run")


def recipe_of(policy: Path, *more: str) -> Recipe:
    """Return the debug recipe over a policy, with its only checkpoint before the last in the middle."""
    every = STEPS // 2
    overrides = [f"model={policy}", f"grpo.max_steps={STEPS}", f"checkpoint.every={every}", f"eval.every={STEPS}"]
    return load_recipe(RECIPES / "debug.yaml", [*overrides, "eval.samples=1", "tracking.wandb=null", *more])


def resumed(recipe: Recipe, out: Path) -> Result:
    """Train, forget the second half, go on, and compare: draws have to be the same, weights are on a CPU.

    The value is how far apart the final weights are, as a share of how far training has moved them. Raises RuntimeError.
    """
    folder = RunFolder(out)
    engine = train(recipe, out)
    (draws, rates), whole = _trained(folder), _weights(folder.final)
    first, last = sorted(whole_checkpoints(folder.checkpoints), key=checkpoint_step)
    halfway = _weights(first)
    for lost in (last, folder.final):
        shutil.rmtree(lost)
    train(recipe, out, resume=True, engine=engine)
    (again, its_rates), its_weights = _trained(folder), _weights(folder.final)
    if again != draws or its_rates != rates:
        what = "other prompts are drawn" if again != draws else f"learning rates are {its_rates}, not {rates}"
        raise RuntimeError(f"after a resume at step {checkpoint_step(first)} of {STEPS} {what}")
    apart, moved = _distance(its_weights, whole), _distance(whole, halfway)
    how = "weights bit for bit" if apart == 0 else "weights apart, as a share of what the second half moves"
    note = f"step {checkpoint_step(first)} of {STEPS}; same prompts and learning rates, {how}"
    return Result(name="resume", value=apart / moved if moved else apart, unit="x", note=note)


def _trained(folder: RunFolder) -> tuple[list[tuple[Any, ...]], list[float]]:
    """Return what was drawn for each step, and the learning rates."""
    draws = [(line["step"], line["draw"], line["prompts"]) for line in folder.decisions()]
    return draws, [line["learning_rate"] for line in folder.read("metrics") if "learning_rate" in line]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    squares = [(left[name].double() - right[name].double()).square().sum() for name in left]
    return float(torch.stack(squares).sum().sqrt())
