"""The same recipe in several arms and seeds, one run folder each, all on one engine; what is finished is kept."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polyphony.curricula.intervals import Interval, student
from polyphony.curricula.records import mean
from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import train
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from polyphony.trainer.engine.engine import Engine


@dataclass(kw_only=True, slots=True)
class Trials:
    """Train what is not trained yet.

    Example: `Trials(recipe=path, arms={"on": ("guard.cap=2.0",), "off": ()}, out=out).run("on", 1)` is a run folder.
    """

    recipe: Path
    arms: Mapping[str, Sequence[str]]
    out: Path
    overrides: Sequence[str] = ()
    """Of all arms."""
    engine: Engine | None = None

    def run(self, arm: str, seed: int) -> Path:
        """Return the folder of a finished run."""
        folder = self.out / f"{arm}-{seed}"
        recipe = load_recipe(self.recipe, [*self.overrides, *self.arms[arm], f"grpo.seed={seed}"])
        if not RunFolder(folder).has_ended:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            self.engine = train(recipe, folder, engine=self.engine)
            say(f"{arm} seed {seed}: done")
        elif load_recipe(RunFolder(folder).recipe) != recipe:
            raise ValueError(f"{folder} is a run of another recipe; choose another --out")
        return folder


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the mean of independent seeds with its 95 % t-interval; unbounded with a single seed."""
    n, mid = len(values), mean(values)
    if n < 2:
        return Interval(-math.inf, mid, math.inf)
    half = student(0.95, n - 1) * math.sqrt(sum((v - mid) ** 2 for v in values) / (n - 1) / n)
    return Interval(mid - half, mid, mid + half)
