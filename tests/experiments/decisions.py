"""How often a plan calls an order promising: where none matters, and where the best truly gains four standard errors.

    python -m tests.experiments.decisions --worlds 300 --sizes 3 4 5 8

Simulated probes of K domains: items of different difficulty, marked right or wrong (`binary`) or by a share (`graded`),
every training with a luck of its own, part of it shared by all domains. Three kinds of transfer: `zero`; `chain`, where each
domain takes the same from all later ones, so that no single pair stands out; `random`, every entry drawn from a normal.
The last two are scaled so that the best order gains four standard errors over the mean order. A standard error is the
spread, over the matrices with zero transfer, of the plain gain of an order that is fixed beforehand. Prints one line a
setting; a share's own 95 % interval is at most +- .06 with 300 worlds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from polyphony.curricula.records import Evaluation, Kind
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.orders import Objective, best_orders
from polyphony.curricula.transfer.planner import PlanSettings, make_plan

SETTINGS = PlanSettings(resamples=200)
ERRORS = 4
"""True gain of the best order over the mean order, in standard errors."""
OWN = 0.1
"""What a training adds to its own domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """How probes are made.

    Example: `World(size=4).matrix(np.random.default_rng(0), 0.1 * np.eye(4))`
    """

    size: int
    items: int = 100
    """Of each domain."""
    marks: Literal["binary", "graded"] = "binary"
    seeds: int = 2
    luck: float = 0.03
    """Standard deviation of a domain's score between two trainings that differ in their seed."""
    joint: float | None = None
    """What the joint run adds to every domain; None: there is none."""

    def matrix(self, rng: np.random.Generator, transfer: np.ndarray) -> TransferMatrix:
        """Return probes under a true T [K, K]."""
        names = tuple(f"d{k}" for k in range(self.size))
        level = rng.beta(2, 2, (self.size, self.items))
        rows = [self._row(rng, level, np.zeros(self.size), trained=(), seed=0, step=0)]
        for seed in range(self.seeds):
            for name, effect in zip(names, transfer, strict=True):
                rows.append(self._row(rng, level, effect + self._luck(rng), trained=(name,), seed=seed, step=1))
            if self.joint is not None:
                reached = self.joint + self._luck(rng)
                rows.append(self._row(rng, level, reached, trained=names, seed=seed, step=self.size))
        kinds: dict[str, Kind] = {**dict.fromkeys(names, "structured"), names[-1]: "open_ended"}
        return TransferMatrix(domains=names, kinds=kinds, rows=tuple(rows))

    def _row(self, rng: np.random.Generator, level: np.ndarray, shift: np.ndarray, **fields) -> Evaluation:
        chances = np.clip(level + shift[:, None], 1e-3, 1 - 1e-3)
        graded = (
            rng.beta(4 * chances, 4 * (1 - chances)) if self.marks == "graded" else rng.random(level.shape) < chances
        )
        scores = {f"d{k}": tuple(items.astype(float)) for k, items in enumerate(graded)}
        return Evaluation(scores=scores, probe=bool(fields["trained"]), **fields)

    def _luck(self, rng: np.random.Generator) -> np.ndarray:
        return self.luck * (math.sqrt(0.3) * rng.normal() + math.sqrt(0.7) * rng.normal(size=self.size))


def no_transfer(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a T [K, K] in which no order matters."""
    return np.zeros((size, size))


def chain(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a T in which training on a domain takes one and the same from each domain after it in the list."""
    return -np.triu(np.ones((size, size)), 1)


def random(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a T of independent normal entries."""
    return np.where(np.eye(size, dtype=bool), 0.0, rng.normal(size=(size, size)))


def gain(transfer: np.ndarray, order: np.ndarray | None = None) -> float:
    """Return what an order (the best one by default) gains over the mean order, in the mean score."""
    problem = Objective(after=transfer.T[None])
    chosen = best_orders(problem) if order is None else order[None]
    off_diagonal = transfer.sum() - np.trace(transfer)
    return float(problem.value(chosen)[0] - off_diagonal / 2) / len(transfer)


def standard_error(matrices: Sequence[TransferMatrix], *, seed: int = 0) -> float:
    """Return the spread of the plain gain of fixed orders (50 of them) over matrices with zero transfer."""
    rng = np.random.default_rng(seed)
    tables = [Effects(matrix).transfer() for matrix in matrices]
    orders = [rng.permutation(len(tables[0])) for _ in range(50)]
    return float(np.sqrt(np.mean([gain(table, order) ** 2 for table in tables for order in orders])))


def share_of_sequences(matrices: Sequence[TransferMatrix]) -> float:
    """Return how often the plan says `sequence`."""
    return float(np.mean([make_plan(matrix, SETTINGS).is_promising for matrix in matrices]))


def simulate(
    world: World,
    kind: Callable[[np.random.Generator, int], np.ndarray],
    worlds: int,
    rng: np.random.Generator,
    *,
    error: float = 0.0,
) -> list[TransferMatrix]:
    """Return matrices whose best order truly gains `ERRORS` x `error`."""
    found = []
    for _ in range(worlds):
        table = kind(rng, world.size)
        largest = gain(table)
        scaled = table * ERRORS * error / largest if largest else table
        found.append(world.matrix(rng, OWN * np.eye(world.size) + scaled))
    return found


def shares(world: World, worlds: int, *, seed: int = 0) -> dict[str, float]:
    """Return the standard error and the share of `sequence` under each kind of transfer."""
    rng = np.random.default_rng(seed)
    none = simulate(world, no_transfer, worlds, rng)
    error = standard_error(none)
    found = {"error": error, "zero": share_of_sequences(none)}
    for kind in (chain, random):
        found[kind.__name__] = share_of_sequences(simulate(world, kind, worlds, rng, error=error))
    return found


def main() -> None:
    """Read the arguments, print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3, 4, 5, 8])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("  K marks  seeds  luck  standard error   zero  chain  random")
    noises = ((2, 0.03), (2, 0.01), (1, 0.0))
    for size, (seeds, luck), marks in product(arguments.sizes, noises, ("binary", "graded")):
        world = World(size=size, marks=marks, seeds=seeds, luck=luck)
        found = shares(world, arguments.worlds, seed=arguments.seed)
        numbers = f"{found['error']:>15.4f}  {found['zero']:>5.3f}  {found['chain']:>5.3f}  {found['random']:>6.3f}"
        print(f"{size:>3} {marks:<7}{seeds:>5}{luck:>6}{numbers}", flush=True)


if __name__ == "__main__":
    main()
