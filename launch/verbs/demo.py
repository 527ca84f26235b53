"""`polyphony demo`: probe four small domains, train one policy over them, and show who moved whom."""

from __future__ import annotations

import itertools
from pathlib import Path

from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.train import train
from polyphony.launch.verbs.probe import probe
from polyphony.launch.verbs.tables import transfer_table
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"


def demo(out: Path | None = None) -> Path:
    """Run the demo into `out` (or the next free `runs/demo*`) and return that folder."""
    out = out or _next_free(Path("runs"))
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"folder {out} is not empty; remove it, or choose another --out")
    recipe = load_recipe(RECIPE)
    say("probing: what does a little training on one domain do to the others?")
    probed, run = RunFolder(out / "probe"), RunFolder(out / "run")
    engine = probe(recipe, probed.path)
    planned = recipe.curriculum.model_copy(update={"transfer": str(probed.transfer.resolve())})
    say("training on all domains")
    train(recipe.model_copy(update={"curriculum": planned}), run.path, engine=engine)
    return out


def demo_tables(out: Path) -> str:
    """Return what the demo in this folder did to each domain, what its probes found, and where the report lies."""
    probed, run = RunFolder(out / "probe"), RunFolder(out / "run")
    told = [table(TransferMatrix.load(run.transfer).on("report")), ""]
    told += [transfer_table(TransferMatrix.load(probed.transfer).on("report")), "* the 95 % interval excludes zero"]
    return "\n".join([*told, f"report: {run.report}"])


def _next_free(runs: Path) -> Path:
    names = itertools.chain(["demo"], (f"demo-{n}" for n in itertools.count(2)))
    return next(runs / name for name in names if not (runs / name).exists())


def table(matrix: TransferMatrix) -> str:
    """Return each domain's held-out score and entropy before and after the run."""
    (run,) = matrix.runs()
    before, after = run[0], run[-1]
    lines = [f"{'domain':<14}{'held-out score':>18}{'entropy':>18}"]
    for name in matrix.domains:
        watched = "   only watched" if name in matrix.watch_only else ""
        lines.append(f"{name:<14}{_change(before, after, name)}{_entropy(before, after, name)}{watched}")
    return "\n".join(lines)


def _change(before: Evaluation, after: Evaluation, name: str) -> str:
    return f"{before.mean_score(name):>11.2f} → {after.mean_score(name):.2f}"


def _entropy(before: Evaluation, after: Evaluation, name: str) -> str:
    return f"{before.entropy[name]:>11.2f} → {after.entropy[name]:.2f}"
