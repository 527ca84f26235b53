"""`polyphony plan`: from measured transfer to an order, or to the advice not to order at all; and replays of a saved run."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyphony.curricula.decision_log import Replayed, replay
from polyphony.curricula.schedulers import Scheduler
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.options import FOLDER, RECIPE
from polyphony.curricula.transfer.planner import Plan, make_plan
from polyphony.launch.build import build_scheduler
from polyphony.launch.import_paths import renamed
from polyphony.launch.recipe import RecipeError, recipe_of_run
from polyphony.launch.report.report import write_replay
from polyphony.rewards.registry import other_versions
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder, holds_transfer, read_transfer


def plan(path: Path) -> Plan:
    """Return what a transfer file recommends; what would measure an option is told as a command of the file's own probe.

    Says on standard error where its graders have other versions now, what its halves have in common, and what spoke against
    the learning rate of its probes.
    """
    if not holds_transfer(path):
        raise RecipeError(f"transfer file {path} does not exist; `polyphony probe` writes one")
    matrix = read_transfer(path)
    if matrix.unsplit:
        say(f"{path} {matrix.unsplit}")
    for line in other_versions(matrix.provenance.get("graders", {})):
        say(f"{line}; scores measured now are not comparable with the file's")
    for line in matrix.provenance.get("harm", ()):
        rate = matrix.provenance.get("learning_rate")
        say(f"its probes were made at a learning rate of {rate}, which is too high: {line}")
    made, folder = make_plan(matrix), RunFolder(path.parent)
    if not folder.recipe.is_file() or "probe" not in matrix.provenance:
        return made
    names = {RECIPE: str(folder.recipe), FOLDER: str(folder.path)}
    notes = [functools.reduce(lambda text, name: text.replace(name, names[name]), names, o.note) for o in made.options]
    return replace(made, options=tuple(replace(o, note=n) for o, n in zip(made.options, notes, strict=True)))


def replay_table(replayed: Sequence[Replayed], *, scheduler: str) -> str:
    """Return, draw by draw (40 at most), the mixture that ran beside the one another scheduler would have asked for."""
    names = replayed[0].domains
    width = max(12, *(len(name) + 2 for name in names))
    lines = [f"{'draw':>6}  " + "".join(f"{name:>{width}}" for name in names) + f"   ran / {scheduler}"]
    for r in replayed[:: max(1, len(replayed) // 40)]:
        shares = "".join(f"{f'{a:.2f}/{b:.2f}':>{width}}" for a, b in zip(r.ran, r.replayed, strict=True))
        lines.append(f"{r.draw:>6}  {shares}   {r.reason}")
    return "\n".join(lines)


def replay_as_json(replayed: Sequence[Replayed]) -> list[dict[str, Any]]:
    """Return both mixtures of every draw."""
    return [{"draw": r.draw, "ran": _shares(r, r.ran), "replayed": _shares(r, r.replayed)} for r in replayed]


def page_of(run: Path, scheduler: str) -> Path:
    """Return where the page of a replay goes by default: the working directory, for a run folder is the run's own."""
    return Path(f"{run.resolve().name}-replay-{''.join(c if c.isalnum() else '-' for c in scheduler)}.html")


def drawn(run: Path, replayed: Sequence[Replayed], *, scheduler: str, out: Path) -> Path:
    """Draw both mixtures one below the other; return the page, `out`."""
    lines = [{"draw": r.draw, "mixture": _shares(r, r.replayed), "reason": r.reason} for r in replayed]
    return write_replay(run, lines, scheduler=scheduler, out=out)


def replay_run(
    run: Path, *, scheduler: str, transfer: Path | None = None, overrides: Sequence[str] = ()
) -> list[Replayed]:
    """Return every draw of a saved run with the mixture that `scheduler` gives for the same evidence.

    The run's own scheduler keeps its settings, another has its defaults; `overrides` of the recipe change
    either. One that plans starts from the probes in `transfer`, by default from those in the run's own file.
    """
    folder = RunFolder(run)
    lines = folder.decisions()
    if not lines:
        name = folder.ledger("decisions").name
        raise RecipeError(f"{run} holds no {name} with a draw in it: not a run folder, or one just begun")
    matrix = read_transfer(folder.transfer)
    rows = [row for row in matrix.on("steer").rows if not row.probe]
    return replay(lines, _scheduler_of(run, matrix, scheduler, transfer, overrides), rows)


def _scheduler_of(
    run: Path, matrix: TransferMatrix, name: str, transfer: Path | None, overrides: Sequence[str]
) -> Scheduler:
    name, folder = renamed(name), RunFolder(run)
    recipe = recipe_of_run(folder)
    if recipe.curriculum.scheduler != name:
        overrides = [f"curriculum={{scheduler: {json.dumps(name)}}}", *overrides]
    recipe = recipe_of_run(folder, overrides)
    source = folder.transfer if transfer is None and matrix.probes else transfer
    section = recipe.curriculum.model_copy(update={"transfer": None if source is None else str(source)})
    try:
        return build_scheduler(recipe.model_copy(update={"curriculum": section}))
    except RecipeError as error:
        if source is not None or "transfer: " not in str(error):
            raise
        told = f"polyphony plan TRANSFER.json --replay {run} --scheduler {name}"
        raise RecipeError(f"{name} starts from probes, and {run} holds none; name their file: {told}") from error


def _shares(replayed: Replayed, mixture: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(replayed.domains, mixture, strict=True))
