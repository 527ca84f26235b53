"""What a training step of domains of one turn costs now, against an older checkout of this house, in interleaved pairs.

    git worktree add ../before COMMIT && python -m tests.experiments.before ../before --pairs 20

Both are processes of their own that have loaded everything, run the demo's domains with a policy that stays still (as the
benchmark `step`), and are told by turns to run a block of steps. Prints the median ratio of now to before over the pairs,
which a pair that others on the machine disturb hardly moves, with its 95 % interval by bootstrap, by the clock and by
processor time, and holds the upper end to `MOST`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOUSE = Path(__file__).resolve().parent.parent.parent
WINGS = ("curricula", "launch", "rewards", "trainer")
MOST = 1.03
RESAMPLES = 10_000
SIDE = """
import json, sys, tempfile
from pathlib import Path
from polyphony.launch.cli import set_environment
set_environment()
try:
    from polyphony.launch.measures.side_by_side import SideBySide, lab_engine
except ImportError:  # where older checkouts have it
    from tests.benchmarks.side_by_side import SideBySide, lab_engine
from tests.benchmarks.training import step_recipe
told = sys.stdout
sys.stdout = sys.stderr
sides = SideBySide(recipe=step_recipe(steps=int(sys.argv[1])), engine=lab_engine(), folder=Path(tempfile.mkdtemp()))
for _ in sys.stdin:
    block = sides.ours()
    told.write(json.dumps([block.median_seconds, block.cpu_seconds]) + chr(10))
    told.flush()
"""
"""What a side does: a block of steps for every line that it is sent."""


class Side:
    """A checkout in a process of its own.

    Example: `Side(Path("."), folder, steps=10).block() == (0.51, 0.32)`
    """

    def __init__(self, checkout: Path, folder: Path, *, steps: int) -> None:
        """`folder` gets links by which the checkout is the package that is imported."""
        package = folder / "polyphony"
        package.mkdir(parents=True)
        for wing in WINGS:
            (package / wing).symlink_to(checkout / wing)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(checkout))), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SIDE, str(steps)],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def block(self) -> tuple[float, float]:
        """Return the seconds of a step, the block's median, and those of the processor, its mean."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told: Any = json.loads(self.process.stdout.readline())
        return told[0], told[1]


def compare(before: Path, folder: Path, *, pairs: int, steps: int) -> str:
    """Return the ratios of both clocks, in words."""
    sides = {name: Side(of.resolve(), folder / name, steps=steps) for name, of in (("now", HOUSE), ("before", before))}
    seen: list[dict[str, tuple[float, float]]] = []
    for n in range(pairs + 1):  # the first warms up
        order = ("now", "before") if n % 2 else ("before", "now")
        seen.append({name: sides[name].block() for name in order})
    for side in sides.values():
        side.process.stdin.close()  # type: ignore[union-attr]
        side.process.wait()
    lines = []
    for clock, name in enumerate(("by the clock", "processor time")):
        ratios = [pair["now"][clock] / pair["before"][clock] for pair in seen[1:]]
        low, high = bootstrapped(ratios)
        verdict = "met" if high <= MOST else "MISSED"
        spread = f"{pairs} pairs from {min(ratios):.3f} to {max(ratios):.3f}"
        lines.append(
            f"{name}: {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}], {spread}, held to {MOST}: {verdict}"
        )
    return "\n".join(lines)


def bootstrapped(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a median: of those of samples drawn from the values, with replacement."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[round(0.025 * RESAMPLES)], medians[round(0.975 * RESAMPLES) - 1]


def main() -> None:
    """Run both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="an older checkout")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(compare(arguments.before, Path(folder), pairs=arguments.pairs, steps=arguments.steps))


if __name__ == "__main__":
    main()
