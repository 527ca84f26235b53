"""Every order of a recipe's domains, trained for real, against what probes predicted.

    python -m tests.experiments.orders RECIPE --out runs/orders --transfer runs/a/transfer.json runs/b/transfer.json

Orders share their beginnings, so the K! orders are walked as a tree: every node is one stage from its parent's weights
(with a fresh optimizer), every leaf is evaluated. Prints, for each transfer file, the rank correlation between the
predicted and the measured mean score of all orders, and where the planned order landed. A killed walk goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from polyphony.curricula.records import Evaluation, mean
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.halves import on_half
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.planner import make_plan
from polyphony.launch.recipe import Recipe, load_recipe
from polyphony.launch.verbs.arms import Arm
from polyphony.launch.verbs.claim import claim_probe
from polyphony.launch.verbs.probe import Probe
from polyphony.trainer.run import say

MEASURED_FILE = "orders.json"


class Orders(Probe):
    """Walk the tree of orders with the probe's engine and restricted recipes."""

    def walk(self, steps: int) -> dict[str, dict[str, float]]:
        """Return, for every order, each trained domain's score at its end (`report` half), and under `se` the standard
        error of their mean over items.
        """
        names = [name for name, section in self.recipe.domains.items() if section.train is not None]
        file = self.out / MEASURED_FILE
        measured = json.loads(file.read_text()) if file.exists() else {}
        for order in itertools.permutations(names):
            label = ",".join(order)
            if label in measured:
                continue
            measured[label] = self._end(order, steps, names)
            file.write_text(json.dumps(measured, indent=1))
            say(f"{label}: {average(measured[label]):.4f} +- {measured[label]['se']:.4f}  ({len(measured)} orders)")
        return measured

    def _end(self, order: tuple[str, ...], steps: int, names: Sequence[str]) -> dict[str, float]:
        seed = int(self.recipe.grpo.get("seed", 42))
        trainer = self._train(Arm(trained=order[-1:], steps=steps, seed=seed), self._weights(order[:-1], steps, seed))
        result = trainer.evaluator.run()
        row = on_half(Evaluation(trained=order, step=0, seed=seed, scores=result.scores()), result.items, "report")
        scores = {name: np.array(row.scores[name]) for name in names}
        variance = sum(items.var(ddof=1) / len(items) for items in scores.values()) / len(names) ** 2
        return {name: float(items.mean()) for name, items in scores.items()} | {"se": float(np.sqrt(variance))}

    def _weights(self, prefix: tuple[str, ...], steps: int, seed: int) -> str:
        """Return the folder of the policy after these stages; siblings reuse it, finished branches are deleted."""
        if not prefix:
            return self._start(seed)
        folder = self.out / ("after-" + "-".join(prefix))
        if not folder.is_dir():
            for old in self.out.glob("after-*"):
                if not "-".join(prefix).startswith(old.name.removeprefix("after-")):
                    shutil.rmtree(old)
            trainer = self._train(
                Arm(trained=prefix[-1:], steps=steps, seed=seed), self._weights(prefix[:-1], steps, seed)
            )
            from polyphony.trainer.checkpoints import save_final

            save_final(trainer.policy, folder)
        return str(folder)


def average(end: dict[str, float]) -> float:
    """Return the mean score over the trained domains at the end of an order."""
    return mean([score for name, score in end.items() if name != "se"])


def predicted(matrix: TransferMatrix) -> dict[str, float]:
    """Return the planner's score of every order, up to a constant: the mean over i of what comes after i does to i."""
    transfer = Effects(matrix.on("steer")).transfer()
    place = {name: i for i, name in enumerate(matrix.domains)}
    trained = matrix.trainable
    table = {(j, i): transfer[a, place[i]] for a, j in enumerate(trained) for i in trained}
    return {
        ",".join(order): float(np.mean([sum(table[j, i] for j in order[n + 1 :]) for n, i in enumerate(order)]))
        for order in itertools.permutations(trained)
    }


def summary(ends: dict[str, dict[str, float]], files: Sequence[Path]) -> str:
    """Return the spread of the measured orders, and for each transfer file how well it had predicted them."""
    measured = {order: average(end) for order, end in ends.items()}
    values = np.array(list(measured.values()))
    error = mean([end["se"] for end in ends.values()])
    best, worst = max(measured, key=measured.__getitem__), min(measured, key=measured.__getitem__)
    lines = [
        f"{len(values)} orders: mean {values.mean():.4f}, sd {values.std(ddof=1):.4f}; standard error of one {error:.4f}",
        f"best {best} {measured[best]:.4f}, worst {worst} {measured[worst]:.4f}: "
        f"{(measured[best] - measured[worst]) / error:.1f} standard errors apart",
        *(f"ends with {name}: {ending:.4f}" for name, ending in _by_last(measured).items()),
    ]
    for file in files:
        matrix = TransferMatrix.load(file)
        guess = predicted(matrix)
        correlation = spearmanr([guess[o] for o in measured], list(measured.values()))[0]
        plan = make_plan(matrix)
        own = measured[",".join(plan.order)]
        rank = 1 + sum(value > own for value in measured.values())
        lines.append(
            f"{file}: rank correlation {correlation:+.2f}; promising: {plan.is_promising}; planned order "
            f"{','.join(plan.order)} reached {own:.4f}, rank {rank} of {len(values)}"
        )
    return "\n".join(lines)


def _by_last(measured: dict[str, float]) -> dict[str, float]:
    """Return the mean over the orders that end with each domain."""
    ends: dict[str, list[float]] = {}
    for order, value in measured.items():
        ends.setdefault(order.split(",")[-1], []).append(value)
    return {name: mean(values) for name, values in ends.items()}


def run(recipe: Recipe, out: Path, *, steps: int, files: Sequence[Path]) -> None:
    """Walk all orders of a recipe and print the summary."""
    claim_probe(recipe, out)
    print(summary(Orders(recipe, out, None).walk(steps), files))


def main() -> None:
    """Read the arguments and walk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of a stage")
    parser.add_argument("--transfer", type=Path, nargs="*", default=[], help="transfer files to be judged")
    arguments = parser.parse_args()
    run(
        load_recipe(arguments.recipe, arguments.overrides),
        arguments.out,
        steps=arguments.steps,
        files=arguments.transfer,
    )


if __name__ == "__main__":
    main()
