"""Which option a plan recommends where one is planted to be truly best, and where none is.

    python -m tests.experiments.options --seeds 10

Simulated probes of four domains, 400 items each, two seeds, every training with a luck of its own, with all arms measured:
a sequence, groups, two merges, distillation. In each of five worlds one option is truly better than mixing, by .12 (a
sequence by .16), and than every other by at least .05, or none is better than mixing. Prints the true gains over mixing and
how often each option is recommended.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.planner import PlanSettings, make_plan

NAMES = ("a", "b", "c", "d")
ITEMS, SEEDS, LUCK, OWN = 400, 2, 0.02, 0.15
SETTINGS = PlanSettings(resamples=200)
HELP = 0.16 / 1.5
"""What each domain takes from every earlier one and gives to every later one, so that the best of orders gains .16."""
BEHIND = np.triu(np.ones((4, 4)), 1)
ACROSS = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
ARMS: Mapping[str, Mapping[str, object]] = {
    "sequence": {"kind": "sequence", "stages": [["d"], ["c"], ["b"], ["a"]]},
    "groups": {"kind": "groups", "stages": [["a", "b"], ["c", "d"]]},
    "linear": {"kind": "merge", "method": "linear"},
    "ties": {"kind": "merge", "method": "ties"},
    "distil": {"kind": "distil"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionWorld:
    """A world in which it is known what pays.

    Example: `WORLDS["merge"].matrix(np.random.default_rng(0))`
    """

    transfer: np.ndarray = field(default_factory=lambda: np.zeros((4, 4)))
    """T[j -> i] beside the diagonal."""
    arms: Mapping[str, float] = field(default_factory=dict)
    """True gain of each arm over mixing; 0 where it is not named."""

    def truth(self) -> dict[str, float]:
        """Return every option's true gain over mixing."""
        return {"mix": 0.0} | {
            str(arm["kind"]): self.arms.get(name, 0.0) for name, arm in ARMS.items() if name != "linear"
        }

    def matrix(self, rng: np.random.Generator) -> TransferMatrix:
        """Return its probes, measured with noise."""
        level = 0.2 + 0.3 * rng.beta(2, 2, (4, ITEMS))
        rows = [_row(rng, level, np.zeros(4), trained=(), seed=0, step=0)]
        for seed in range(SEEDS):
            for name, moved in zip(NAMES, self.transfer + OWN * np.eye(4), strict=True):
                rows.append(_row(rng, level, moved + _luck(rng), trained=(name,), seed=seed, step=1, tokens=100))
            for name, arm in {"": {}, **ARMS}.items():
                reached = OWN + self.arms.get(name, 0.0) + _luck(rng)
                rows.append(_row(rng, level, reached, trained=NAMES, seed=seed, step=4, arm=arm, tokens=400))
        return TransferMatrix(domains=NAMES, kinds=dict.fromkeys(NAMES, "structured"), rows=tuple(rows))


def _row(rng: np.random.Generator, level: np.ndarray, shift: np.ndarray, **fields) -> Evaluation:
    solved = rng.random(level.shape) < level + shift[:, None]
    scores = {name: tuple(items.astype(float)) for name, items in zip(NAMES, solved, strict=True)}
    return Evaluation(scores=scores, probe=True, **fields)


def _luck(rng: np.random.Generator) -> np.ndarray:
    return LUCK * (math.sqrt(0.3) * rng.normal() + math.sqrt(0.7) * rng.normal(size=4))


WORLDS = {
    "sequence": OptionWorld(transfer=HELP * (BEHIND.T - BEHIND), arms={"sequence": 0.16, "groups": 0.02, "ties": 0.05}),
    "groups": OptionWorld(transfer=-0.05 * ACROSS, arms={"groups": 0.12, "ties": 0.04, "distil": 0.05}),
    "merge": OptionWorld(arms={"linear": 0.02, "ties": 0.12, "distil": 0.05}),
    "distil": OptionWorld(arms={"linear": 0.02, "ties": 0.05, "distil": 0.12}),
    "nothing": OptionWorld(),
}


def recommended(world: str, seed: int) -> str:
    """Return what the plan of one noisy measurement of a world recommends."""
    matrix = WORLDS[world].matrix(np.random.default_rng(seed))
    return make_plan(matrix, SETTINGS).options[0].kind


def main() -> None:
    """Read the arguments, print one line a world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    arguments = parser.parse_args()
    for name in arguments.worlds:
        counts = Counter(recommended(name, seed) for seed in range(arguments.seeds))
        truth = "  ".join(f"{kind} {gain:+.2f}" for kind, gain in WORLDS[name].truth().items())
        said = ", ".join(f"{kind} {n}" for kind, n in counts.most_common())
        print(f"{name:<9} true gains: {truth}   recommended of {arguments.seeds}: {said}", flush=True)


if __name__ == "__main__":
    main()
