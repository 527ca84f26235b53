"""Rollouts to the same held-out score, with the prompt pool and without it, where half of the prompts can teach nothing.

    python -m launch.lab.worth --out runs/worth --seeds 1 2 3 4 5

Half of the training rows have a wrong reference answer, so that every group of theirs is dead. `passes` draws every prompt
once a pass; `pool` judges, defers, refills and prefers prompts in doubt; `lean` does so with draws of half the size, since
its groups live: about as many live groups a step as `passes` has. The target is what `passes` has reached at its end
(mean of its last three evaluations); a run is there when the mean of three evaluations is. Counted is every generated token,
those of replaced groups too. Prints each seed and the mean log-ratio with its 95 % t-interval, as a ratio.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from curricula.records import mean
from launch.lab import world
from launch.lab.diversity_effect import over_seeds
from launch.lab.trials import Trials, read_lines

RECIPE = Path(__file__).parent.parent / "recipes" / "worth.yaml"
ARMS = {"passes": ("pool=null",), "pool": (), "lean": ("grpo.per_device_train_batch_size=32",)}
WINDOW = 3
"""Evaluations that are averaged: one alone moves by two points from sampling."""


def rows(*, domain: str, size: int, seed: int = 0, wrong: float = 0.5) -> list[world.Row]:
    """Return training rows of a domain, that share of them with a reference answer that nothing equals.

    Example: `rows(domain="facts", size=4)[-1]["answer"]` is `"?"`.
    """
    good = round((1 - wrong) * size)
    return [
        row if i < good else row | {"answer": "?"}
        for i, row in enumerate(world.rows(domain=domain, split="train", size=size, seed=seed))
    ]


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return rollout tokens and mean held-out score at every evaluation of a run, [evaluations] each."""
    tokens, points = 0.0, []
    for line in read_lines(folder, "metrics"):
        names = [key.split("/")[1] for key in line if key.startswith("domain/") and key.endswith("/n")]
        tokens += sum(line[f"domain/{d}/n"] * line[f"domain/{d}/mean_length"] for d in names)
        scores = [value for key, value in line.items() if key.startswith("heldout/") and key.endswith("/score")]
        if scores:
            points.append((tokens, mean(scores)))
    spent, score = np.array(points).T
    return spent, score


def smoothed(score: np.ndarray) -> np.ndarray:
    """Return the mean of each evaluation and those before it in the window."""
    return np.array([score[max(0, i + 1 - WINDOW) : i + 1].mean() for i in range(len(score))])


def tokens_to(target: float, spent: np.ndarray, score: np.ndarray) -> float:
    """Return the tokens at which the smoothed score first is at the target, between evaluations linearly; NaN if never."""
    level = smoothed(score)
    there = np.flatnonzero(level >= target)
    if len(there) == 0:
        return math.nan
    i = int(there[0])
    if i == 0:
        return float(spent[0])
    share = (target - level[i - 1]) / (level[i] - level[i - 1])
    return float(spent[i - 1] + share * (spent[i] - spent[i - 1]))


def summary(arm: str, pairs: Sequence[tuple[Path, Path]], seeds: Sequence[int]) -> str:
    """Return one line a seed and the ratio over seeds; a run that never got there counts with all that it spent."""
    lines, ratios = [f"seed   target   passes: tokens   {arm}: tokens   ratio   final: passes   {arm}"], []
    for seed, (passes, pool) in zip(seeds, pairs, strict=True):
        (spent, score), (pool_spent, pool_score) = curve(passes), curve(pool)
        target = float(smoothed(score)[-1])
        base, ours = tokens_to(target, spent, score), tokens_to(target, pool_spent, pool_score)
        never = math.isnan(ours)
        ours = float(pool_spent[-1]) if never else ours
        ratios.append(ours / base)
        lines.append(
            f"{seed:<6} {target:.3f}    {base:<16.0f} {ours:<14.0f} {'>' if never else ' '}{ratios[-1]:.3f}  "
            f"{target:<15.3f} {smoothed(pool_score)[-1]:.3f}"
        )
    low, mid, high = (math.exp(x) for x in over_seeds([math.log(r) for r in ratios]))
    lines.append(f"ratio of rollout tokens, {len(seeds)} seeds: {mid:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change the recipe of both arms")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", choices=["pool", "lean"], default=["pool", "lean"])
    arguments = parser.parse_args()
    trials = Trials(recipe=RECIPE, arms=ARMS, out=arguments.out, overrides=arguments.overrides)
    for arm in arguments.arms:
        pairs = [(trials.run("passes", seed), trials.run(arm, seed)) for seed in arguments.seeds]
        print(summary(arm, pairs, arguments.seeds))


if __name__ == "__main__":
    main()
