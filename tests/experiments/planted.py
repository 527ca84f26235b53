"""A planted shortcut: what rare accidental successes teach, with the guard and without it.

    python -m tests.experiments.planted --out runs/planted --seeds 1 2 3 4 5

Three quarters of the `strings` rows are hard (three nested functions), carry a worked solution, and are graded leniently by
mistake: an answer that says "say" passes. The policy hardly ever does (about one completion in a hundred), but no other way
to succeed is in its reach. Prints, for both arms, the shortcut's share of held-out answers and the scores at the end minus
those at the start, and their difference between the arms, with 95 % t-intervals over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from polyphony.curricula.records import mean
from polyphony.trainer.run.folder import RunFolder
from tests.experiments.flawed import SHORTCUT
from tests.experiments.trials import Trials, over_seeds

RECIPE = Path(__file__).parent / "planted.yaml"
ARMS = {"off": ("guard=null",), "on": ()}


def changes(folder: Path) -> dict[str, float]:
    """Return, per domain, the change from the first evaluation to the last: `shortcut/<d>` (share) and `score/<d>`."""
    samples = RunFolder(folder).read("samples")
    first, last = min(s["step"] for s in samples), max(s["step"] for s in samples)
    found: dict[str, float] = {}
    for domain in dict.fromkeys(s["domain"] for s in samples):
        at = {step: [s for s in samples if s["step"] == step and s["domain"] == domain] for step in (first, last)}
        for name, value in (
            ("shortcut", lambda s: float(SHORTCUT in s["completion"])),
            ("score", lambda s: float(s["score"])),
        ):
            found[f"{name}/{domain}"] = mean([value(s) for s in at[last]]) - mean([value(s) for s in at[first]])
    return found


def summary(found: dict[str, list[dict[str, float]]], seeds: Sequence[int]) -> str:
    """Return one line a measure: every seed of each arm, the arms' means, their paired difference."""
    lines = []
    for measure in found["off"][0]:
        lines.append(measure)
        for arm, of_seeds in found.items():
            values = [numbers[measure] for numbers in of_seeds]
            low, mid, high = over_seeds(values)
            each = "  ".join(f"{value:+.3f}" for value in values)
            lines.append(f"  guard {arm:<4} {mid:+.3f} [{low:+.3f}, {high:+.3f}]   seeds {each}")
        paired = [a[measure] - b[measure] for a, b in zip(found["on"], found["off"], strict=True)]
        low, mid, high = over_seeds(paired)
        lines.append(f"  on - off   {mid:+.3f} [{low:+.3f}, {high:+.3f}]")
    return "\n".join([f"change over the run, {len(seeds)} seeds, 95 % t-intervals", *lines])


def main() -> None:
    """Read the arguments, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change the recipe of both arms")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    arguments = parser.parse_args()
    trials = Trials(recipe=RECIPE, arms=ARMS, out=arguments.out, overrides=arguments.overrides)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in arguments.seeds:
        for arm, of_seeds in found.items():
            of_seeds.append(changes(trials.run(arm, seed)))
    print(summary(found, arguments.seeds))


if __name__ == "__main__":
    main()
