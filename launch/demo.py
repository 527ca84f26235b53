"""`polyphony demo`: probe four small domains, train one policy over them, and show who moved whom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from curricula.effects import Effects
from curricula.records import Evaluation, mean
from curricula.transfer import TransferMatrix
from launch.config import Recipe, RecipeError, load_recipe
from launch.probe import TRANSFER_FILE, probe
from launch.train import say, train

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"


def demo(out: Path) -> None:
    """Run the demo into `out` and print its table and where the report lies."""
    if out.exists() and any(out.iterdir()):
        raise RecipeError(f"folder {out} is not empty; remove it, or choose another --out")
    recipe = load_recipe(RECIPE)
    say("probing: what does a little training on one domain do to the others?")
    engine = probe(recipe, out / "probe")
    run = out / "run"
    planned = recipe.curriculum.model_copy(update={"transfer": str((out / "probe" / TRANSFER_FILE).resolve())})
    say("training on all domains")
    train(recipe.model_copy(update={"curriculum": planned}), run, engine=engine)
    print(table(recipe, TransferMatrix.load(run / "transfer.json").on("report")))
    print(f"report: {run / 'report.html'}")


def table(recipe: Recipe, matrix: TransferMatrix) -> str:
    """Return the demo's table: each domain before and after the run, and what a probe on it did to every domain."""
    (run,) = matrix.runs()
    before, after = run[0], run[-1]
    lines = [f"{'domain':<12}{'score':>15}{'entropy':>17}    training on it alone changed"]
    effects = Effects(matrix)
    transfer = dict(zip(matrix.trainable, effects.transfer(), strict=True))
    for name in recipe.domains:
        moved = (
            "  ".join(f"{other} {change:+.2f}" for other, change in zip(matrix.domains, transfer[name], strict=True))
            if (name in transfer)
            else "(only watched)"
        )
        lines.append(
            f"{name:<12}{_change(before.scores, after.scores, name)}{_entropy(before, after, name)}    {moved}"
        )
    return "\n".join(lines)


def _change(before: Mapping[str, tuple[float, ...]], after: Mapping[str, tuple[float, ...]], name: str) -> str:
    return f"{mean(before[name]):>7.2f} → {mean(after[name]):.2f}"


def _entropy(before: Evaluation, after: Evaluation, name: str) -> str:
    return f"{before.entropy[name]:>9.2f} → {after.entropy[name]:.2f}"
