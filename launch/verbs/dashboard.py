"""`polyphony dashboard`: the W&B dashboard of a run, created or brought up to date; without W&B, its specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polyphony.curricula.files import replace_file
from polyphony.launch.recipe import RecipeError
from polyphony.launch.report.numbers import find
from polyphony.launch.report.run import read_run
from polyphony.trainer.run.folder import RunFolder


def specification_of(run: Path) -> Path:
    """Return where the specification goes by default: the working directory, for a run folder is the run's own."""
    return Path(f"{run.resolve().name}-dashboard.json")


def specify(run: Path, out: Path) -> tuple[Any, str, str | None]:
    """Write the specification of a run's dashboard to `out`; return the workspace, its layout as a table, and what keeps it
    from W&B, if anything does."""
    from polyphony.trainer.run.wandb_dashboard import (  # slow to import
        TABLES,
        build_workspace,
        default_entity,
        layout,
        obstacle,
        specification,
    )

    found = read_run(run)
    if not found.domains:
        raise RecipeError(f"run {run} names no domains: neither its recipe nor its metrics can be read")
    told = {"transfer": find(found).transfer is not None, "decisions": found.decisions, "completions": found.samples}
    tracking = found.setting("tracking", "wandb") or {}
    missing = obstacle()
    workspace = build_workspace(
        name=f"Polyphony: {found.setting('name') or found.name}",
        entity=tracking.get("entity") or ("your-entity" if missing else default_entity()),
        project=tracking.get("project") or "polyphony",
        domains=found.domains,
        logged=found.metrics.keys(),
        tables=[table for table in TABLES if table not in told or told[table]],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, json.dumps(specification(workspace), indent=1))
    lines = [f"{'section':<42}{'panels':>7}  curves"]
    for title, is_open, panels, curves in layout(workspace, found.domains):
        lines.append(f"{title if is_open else f'{title} (folded)':<42}{panels:>7}  {', '.join(curves)}")
    return workspace, "\n".join(lines), missing


def send(workspace: Any, out: Path) -> str:
    """Send a dashboard to W&B and return its address, which is kept beside `out`: the next time that one is updated."""
    from polyphony.trainer.run.wandb_dashboard import save_workspace  # slow to import

    return save_workspace(workspace, out.with_suffix(".url"))


def way_to_send(run: Path, missing: str) -> str:
    """Say what has to be done before a dashboard can be sent."""
    synced = f"`wandb sync {RunFolder(run).wandb}/offline-run-*`"
    return f"not sent to W&B: {missing}. To push: `wandb login`, {synced}, then `polyphony dashboard {run}` again"
