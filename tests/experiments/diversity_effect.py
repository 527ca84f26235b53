"""The same run with and without a reward for difference, over several seeds: what it buys and what it costs.

    python -m tests.experiments.diversity_effect --out runs/diversity-effect --seeds 1 2 3 4 5

Trains the writing domain alone, so that nothing but the arm differs: `without` a diversity reward; `centred`, which
only takes the standard deviation out of the advantages as the reward for difference does (`floor: 1` measures and does
not reward); `with` it. Every final policy answers the same held-out items eight times with the same sampling seeds, and
all are measured by the same partitioner. Prints each seed, and the differences with 95 % t-intervals over seeds. What
is measured already is kept, so that seeds can be added and a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.curricula.records import graded, mean
from polyphony.launch.build import build_trainer
from polyphony.launch.recipe import Recipe, load_recipe
from polyphony.launch.train import train
from polyphony.trainer.run import say
from tests.experiments.trials import over_seeds

if TYPE_CHECKING:
    from polyphony.trainer.engine.engine import Engine
    from polyphony.trainer.evaluation.result import HeldoutResult

RECIPE = Path(__file__).parent / "stories.yaml"
DOMAIN = "stories"
SAMPLES = 8
"""Held-out answers an item: as many as a group has in training."""

ARMS: Mapping[str, tuple[str, ...]] = {
    "without": (f"domains.{DOMAIN}.diversity=null",),
    "centred": (f"domains.{DOMAIN}.diversity.floor=1.0",),
    "with": (),
}
MEASURES = ("classes", "quality", "pass_at_k", "best_of_k", "unique_correct", "distinct_2", "entropy")

Numbers = dict[str, float]


def measure(result: HeldoutResult) -> Numbers:
    """Return the means over all held-out items. `pass_at_k`: any full score; `best_of_k`: the highest score."""
    samples, variety = result.samples[DOMAIN], result.variety[DOMAIN]
    return {
        "classes": mean([v.classes for v in variety]),
        "quality": mean(graded(result.scores()[DOMAIN])),
        "pass_at_k": mean(graded(result.passed()[DOMAIN])),
        "best_of_k": mean([max(s for s in item if s is not None) for item in samples]),
        "unique_correct": mean([v.unique_correct for v in variety]),
        "distinct_2": mean([v.distinct_2 for v in variety]),
        "entropy": result.entropy[DOMAIN],
    }


class Effect:
    """Trains and measures what is not measured yet, all on one engine."""

    def __init__(self, out: Path, overrides: Sequence[str]) -> None:
        self.out = out
        self.overrides = tuple(overrides)
        self.engine: Engine | None = None
        settings = out / "settings.json"
        out.mkdir(parents=True, exist_ok=True)
        if settings.exists() and json.loads(settings.read_text()) != list(overrides):
            raise ValueError(f"{out} holds runs with other overrides: {settings.read_text()}; choose another --out")
        settings.write_text(json.dumps(list(overrides)))

    def numbers(self, arm: str, seed: int) -> Numbers:
        """Return what an arm reached with a seed."""
        file = self.out / f"{arm}-{seed}.json"
        if not file.exists():
            found = self._run(arm, seed)
            file.write_text(json.dumps(found))
            say(f"{arm} seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
        return json.loads(file.read_text())

    def base(self) -> Numbers:
        """Return where all arms start."""
        file = self.out / "base.json"
        if not file.exists():
            file.write_text(json.dumps(self._measured(self._recipe((), 1))))
        return json.loads(file.read_text())

    def _recipe(self, overrides: Sequence[str], seed: int) -> Recipe:
        return load_recipe(RECIPE, [*self.overrides, *overrides, f"grpo.seed={seed}"])

    def _run(self, arm: str, seed: int) -> Numbers:
        folder = self.out / f"{arm}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        self.engine = train(self._recipe(ARMS[arm], seed), folder, engine=self.engine)
        return self._measured(self._recipe((), seed).model_copy(update={"model": str(folder / "final")}))

    def _measured(self, recipe: Recipe) -> Numbers:
        recipe = recipe.model_copy(update={"eval": replace(recipe.eval, samples=SAMPLES)})
        with tempfile.TemporaryDirectory() as scratch:
            trainer = build_trainer(recipe, Path(scratch), engine=self.engine)
            self.engine = trainer.policy.engine
            return measure(trainer.evaluator.run())


def summary(base: Numbers, found: Mapping[str, Sequence[Numbers]], seeds: Sequence[int]) -> str:
    """Return the tables: every seed of every arm, then paired differences between the last arm and the others."""
    lines = [f"{'':<10}{'seed':>5}" + "".join(f"{name:>16}" for name in MEASURES)]
    lines.append(f"{'base':<10}{'':>5}" + "".join(f"{base[name]:>16.3f}" for name in MEASURES))
    for arm, of_seeds in found.items():
        for seed, numbers in zip(seeds, of_seeds, strict=True):
            lines.append(f"{arm:<10}{seed:>5}" + "".join(f"{numbers[name]:>16.3f}" for name in MEASURES))
    *others, last = found
    for other in others:
        lines.append(f"\n{last} minus {other}, {len(seeds)} seeds, 95 % t-interval; * excludes zero")
        for name in MEASURES:
            pairs = zip(found[last], found[other], strict=True)
            interval = over_seeds([a[name] - b[name] for a, b in pairs])
            sure = " *" if interval.is_above_zero or interval.is_below_zero else ""
            lines.append(f"  {name:<16}{interval.mid:+.3f}  [{interval.low:+.3f}, {interval.high:+.3f}]{sure}")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change the recipe of all arms")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments: Any = parser.parse_args()
    effect = Effect(arguments.out, arguments.overrides)
    base = effect.base()
    found: dict[str, list[Numbers]] = {arm: [] for arm in ARMS if arm in arguments.arms}
    for seed in arguments.seeds:
        for arm, numbers in found.items():
            numbers.append(effect.numbers(arm, seed))
    print(summary(base, found, arguments.seeds))


if __name__ == "__main__":
    main()
