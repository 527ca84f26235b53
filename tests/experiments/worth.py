"""Rollouts to the same held-out score, with the prompt pool and without it, where half of the prompts can teach nothing.

    python -m tests.experiments.worth --out runs/worth --seeds 1 2 3 4 5

Half of the training rows have a wrong reference answer, so that every group of theirs is dead. `passes` draws every prompt
once a pass, as stock TRL does; `pool` judges, defers, prefers prompts in doubt, and leaves a group at its look, without
refill. The number in an arm's name is the groups of a draw: every arm has about the same budget of tokens, in few large
draws or many small ones, so that `passes` is compared at its own best. The target is what an arm of `passes` has reached at
its end (mean of its last three evaluations), or with `--share 0.9` nine tenths of the way there; a run is there when the
mean of three evaluations is. Every token generated in training counts. Prints each seed and, against every arm of `passes`,
the mean log-ratio with its 95 % t-interval, as a ratio, and holds it to `TARGET`. A run takes one to three minutes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polyphony.curricula.intervals import Interval
from polyphony.curricula.records import mean
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.measures.result import Result, Target, table
from polyphony.trainer.run.folder import RunFolder
from tests.experiments.trials import Trials, over_seeds

RECIPE = Path(__file__).parent / "worth.yaml"
COMPLETIONS, GROUP, EVALUATIONS = 20_480, 8, 10
"""Of every run: without a pool five passes over the 512 prompts."""
LONGER = 17
"""Evaluations of a run with the pool: its looks leave three fifths of the completions of a draw, and all runs are to spend
about as many tokens."""
TARGET = Target(relation="<=", limit=0.7)
"""Of the ratio."""
WINDOW = 3
"""Evaluations that are averaged: one alone moves by two points from sampling."""


def draws_of(groups: int, evaluations: int = EVALUATIONS) -> tuple[str, ...]:
    """Return the overrides that spend the budget in draws of so many groups, or more of it in more evaluations."""
    rows, every = GROUP * groups, COMPLETIONS // (GROUP * groups) // EVALUATIONS
    steps = every * evaluations
    return (
        f"grpo.per_device_train_batch_size={rows}",
        f"grpo.max_steps={steps}",
        f"eval.every={every}",
        f"checkpoint.every={steps}",
    )


PASSES = {f"passes-{groups}": ("pool=null", *draws_of(groups)) for groups in (8, 4, 2)}
POOL = {"pool-2": draws_of(2, LONGER)}


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return rollout tokens and mean held-out score at every evaluation of a run, [evaluations] each.

    The scores are of all items: nothing in these runs is decided by any of them.
    """
    tokens, spent = 0.0, {0: 0.0}
    for line in RunFolder(folder).read("metrics"):
        names = [key.split("/")[1] for key in line if key.startswith("domain/") and key.endswith("/n")]
        tokens += sum(line[f"domain/{d}/n"] * line[f"domain/{d}/mean_length"] for d in names)
        spent[line["step"]] = tokens
    rows = TransferMatrix.load(RunFolder(folder).transfer).rows
    scores = [mean([row.mean_score(name) for name in row.scores]) for row in rows]
    return np.array([spent[row.step] for row in rows]), np.array(scores)


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


def ratio(passes: Path, pool: Path, share: float = 1.0) -> tuple[float, str]:
    """Return the pool's tokens over those of `passes` to a share of what the latter gained by its end, and both in words.

    A run that never got there counts with all that it spent, at least with what `passes` spent.
    """
    (spent, score), (pool_spent, pool_score) = curve(passes), curve(pool)
    target = float(score[0] + share * (smoothed(score)[-1] - score[0]))
    base, ours = tokens_to(target, spent, score), tokens_to(target, pool_spent, pool_score)
    is_there = not math.isnan(ours)
    ours = ours if is_there else float(max(pool_spent[-1], spent[-1]))
    words = (
        f"score {target:.3f} after {base:.0f} tokens; {pool.name}: after {'' if is_there else 'more than '}{ours:.0f}"
    )
    return ours / base, f"{passes.name}: {words}, ratio {ours / base:.3f}, at its end {smoothed(pool_score)[-1]:.3f}"


def summary(pairs: Sequence[tuple[Path, Path]], share: float = 1.0) -> tuple[Interval, str]:
    """Return the ratio over seeds, and one line a seed with it."""
    found = [ratio(passes, pool, share) for passes, pool in pairs]
    low, mid, high = (math.exp(x) for x in over_seeds([math.log(value) for value, _ in found]))
    last = f"ratio of rollout tokens, {len(pairs)} seeds: {mid:.3f} [{low:.3f}, {high:.3f}]"
    return Interval(low=low, mid=mid, high=high), "\n".join([*(line for _, line in found), last])


def compare(
    out: Path, seeds: Sequence[int], overrides: Sequence[str] = (), share: float = 1.0
) -> list[tuple[Interval, str]]:
    """Run what is missing in `out`; return, against each arm of `PASSES`, the ratio over seeds and the seeds in words."""
    trials = Trials(recipe=RECIPE, arms=PASSES | POOL, out=out, overrides=overrides)
    runs = {(arm, seed): trials.run(arm, seed) for seed in seeds for arm in trials.arms}
    (pool,) = POOL
    return [summary([(runs[stock, seed], runs[pool, seed]) for seed in seeds], share) for stock in PASSES]


def main() -> None:
    """Read the arguments, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change the recipe of all arms")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--share", type=float, default=1.0, help="of the gain of a run without the pool, as the target")
    arguments = parser.parse_args()
    found = compare(arguments.out, arguments.seeds, arguments.overrides, arguments.share)
    print("\n".join(words for _, words in found))
    print(table([_result(stock, ratio, arguments) for stock, (ratio, _) in zip(PASSES, found, strict=True)]))


def _result(stock: str, ratio: Interval, arguments: argparse.Namespace) -> Result:
    return Result(
        name=f"rollout tokens to {arguments.share:.0%} of the gain of {stock}",
        value=ratio.mid,
        unit="x",
        ratio=ratio.mid,
        target=TARGET,
        repetitions=len(arguments.seeds),
        spread=(ratio.low, ratio.high),
        note="geometric mean, spread its 95 % interval over seeds",
    )


if __name__ == "__main__":
    main()
