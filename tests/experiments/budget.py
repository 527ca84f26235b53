"""Which domains to probe: the Gaussian process's choice against random choice, on the fast lab's recorded matrices.

    python -m tests.experiments.budget

Each matrix is uncovered row by row: what is not known yet is predicted by `curricula/transfer/budget.py`, and the best order
by the matrix so completed is valued under the whole one. Prints, for every number of probes, the regret in mean score of the
order after the chosen domains beside the mean of that after random ones, the same of the mean absolute error of what is
predicted, and after how many probes `polyphony probe --budget` would stop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from polyphony.curricula.transfer.budget import choose, next_domain, posterior
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.orders import Objective, best_orders
from polyphony.curricula.transfer.settled import is_settled

RECORDED = Path(__file__).parent / "fast" / "studies" / "default" / "probes"
Pick = Callable[[np.ndarray, np.ndarray], int]


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return T [K, K] of a recorded matrix and the scores [K] before any training."""
    effects = Effects(TransferMatrix.load(path))
    columns = [effects.domains.index(name) for name in effects.trained]
    return effects.transfer()[:, columns], effects.means().base[0, columns]


def value(transfer: np.ndarray, order: np.ndarray) -> float:
    """Return what an order gains by the domains after each, in the mean score."""
    return float(Objective(after=transfer.T[None]).value(order[None])[0]) / len(transfer)


def course(transfer: np.ndarray, scores: np.ndarray, pick: Pick) -> tuple[list[float], list[float]]:
    """Return, after every probe, the regret of the order, and the mean absolute error of what was not probed."""
    size = len(transfer)
    known, regrets, errors = np.full((size, size), np.nan), [], []
    best = value(transfer, best_orders(Objective(after=transfer.T[None]))[0])
    off = ~np.eye(size, dtype=bool)
    for _ in range(size):
        x = pick(known, scores)
        known[x] = transfer[x]
        guess, _ = posterior(known)
        regrets.append(best - value(transfer, best_orders(Objective(after=guess.T[None]))[0]))
        hidden = off & np.isnan(known)
        errors.append(float(np.abs(guess - transfer)[hidden].mean()) if hidden.any() else np.nan)
    return regrets, errors


def at_random(rng: np.random.Generator) -> Pick:
    """Return what picks any domain that is left."""
    return lambda known, scores: int(rng.choice(np.flatnonzero(np.isnan(known).any(axis=1))))


def stop(matrix: TransferMatrix) -> str:
    """Return after how many probes the plan no longer changes."""
    done: list[str] = []
    part = matrix
    while len(done) < len(matrix.trainable):
        rows = tuple(row for row in matrix.rows if not row.trained or row.trained[0] in done)
        part = replace(matrix, rows=rows)
        if is_settled(part):
            return f"after {len(done)} of {len(matrix.trainable)}: {', '.join(done)}"
        done.append(next_domain(part))
    return f"not before all {len(done)} are probed"


def main() -> None:
    """Read the arguments, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="default: all that the default study has recorded")
    parser.add_argument("--draws", type=int, default=100, help="random orders of probing a matrix")
    arguments = parser.parse_args()
    files = arguments.files or sorted(RECORDED.glob("*.json"))
    rng = np.random.default_rng(0)
    print(
        f"{'matrix':<16}{'K':>2}  regret in mean score, chosen / random, after 1, 2, .. probes; |T| beside the diagonal"
    )
    for path in files:
        transfer, scores = load(path)
        chosen, error = course(transfer, scores, choose)
        drawn = [course(transfer, scores, at_random(rng)) for _ in range(arguments.draws)]
        random, blind = np.mean([d[0] for d in drawn], axis=0), np.nanmean([d[1][:-1] for d in drawn], axis=0)
        cells = "  ".join(f"{a:.3f}/{b:.3f}" for a, b in zip(chosen, random, strict=True))
        size = np.abs(transfer[~np.eye(len(transfer), dtype=bool)]).mean()
        print(f"{path.stem:<16}{len(transfer):>2}  {cells}; {size:.3f}")
        print(f"{'  stops':<20}{stop(TransferMatrix.load(path))}")
        told = "  ".join(f"{a:.3f}/{b:.3f}" for a, b in zip(error, blind, strict=False))
        print(f"{'  its error':<20}{told}", flush=True)


if __name__ == "__main__":
    main()
