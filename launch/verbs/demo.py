"""`polyphony demo`: probe four small domains, train one policy over them, and show who moved whom."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.report.closing import closing
from polyphony.launch.report.numbers import Findings, between, find
from polyphony.launch.report.report import write_report
from polyphony.launch.report.run import read_run
from polyphony.launch.report.story import bounds, signed
from polyphony.launch.train import train
from polyphony.launch.verbs.probe import probe
from polyphony.launch.verbs.tables import transfer_table
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"

TOO_HIGH = "5e-4"
"""The learning rate of the second run of `--compare`: the same recipe, but what one domain gains others lose."""

COMPARED = "compared.html"
"""Both runs of `--compare` in one report."""


def demo(out: Path | None = None, *, compare: bool = False) -> Path:
    """Run the demo into `out` (or the next free `runs/demo*`) and return that folder.

    With `compare`, train once more at a learning rate that is too high, and lay both runs side by side.
    """
    out = out or _next_free(Path("runs"))
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"folder {out} is not empty; remove it, or choose another --out")
    recipe = load_recipe(RECIPE)
    say("probing: what does a little training on one domain do to the others?")
    probed, (run, *others) = RunFolder(out / "probe"), _runs(out, compare=compare)
    engine = probe(recipe, probed.path)
    planned = {"curriculum": recipe.curriculum.model_copy(update={"transfer": str(probed.transfer.resolve())})}
    say("training on all domains")
    engine = train(recipe.model_copy(update=planned), run.path, engine=engine)
    for other in others:
        say(f"training once more, at a learning rate that is too high ({TOO_HIGH})")
        faster = load_recipe(RECIPE, [f"grpo.learning_rate={TOO_HIGH}"])
        train(faster.model_copy(update=planned), other.path, engine=engine)
        write_report([run.path, other.path], out / COMPARED)
    return out


def demo_tables(out: Path) -> str:
    """Return what the demo in this folder did to each domain, what its probes found, and where the report lies."""
    runs = _runs(out, compare=(out / COMPARED).exists())
    found = [find(read_run(run.path)) for run in runs]
    told = [f"{closing(findings)}\n" for findings in found]
    if len(found) > 1:
        told.append(f"{differences(*found)}\n")
    probes = TransferMatrix.load(RunFolder(out / "probe").transfer)
    told += [transfer_table(probes.on("report")), "* the 95 % interval excludes zero"]
    if len(found) > 1:
        return "\n".join([*told, f"report: {out / COMPARED}"])
    told.append(
        f"polyphony demo --compare trains once more at {TOO_HIGH}, which is too high: what does that cost, and whom?"
    )
    return "\n".join([*told, f"report: {runs[0].report}"])


def differences(first: Findings, second: Findings) -> str:
    """Return by how much each domain ends higher or lower in the second run, over the same held-out items."""
    lines = [f"{second.run.name} minus {first.run.name}, at the end, 95 % interval"]
    for name in first.change:
        gap = between(first, second, name)
        lines.append(f"{name:<14}{f'{signed(gap.mid)} {bounds(gap)}':>46}")
    return "\n".join(lines)


def _runs(out: Path, *, compare: bool) -> Sequence[RunFolder]:
    return [RunFolder(out / name) for name in ("run", f"run-{TOO_HIGH}")[: 1 + compare]]


def _next_free(runs: Path) -> Path:
    names = itertools.chain(["demo"], (f"demo-{n}" for n in itertools.count(2)))
    return next(runs / name for name in names if not (runs / name).exists())
