"""`polyphony dashboard`: the W&B dashboard of a run, created or brought up to date; without W&B, its specification."""

from __future__ import annotations

import json
from pathlib import Path

from polyphony.launch.recipe import RecipeError
from polyphony.launch.report.run import read_run
from polyphony.trainer.run.folder import RunFolder


def dashboard(run: Path) -> None:
    """Write the specification of a run's dashboard beside it, send it to W&B where that can be, and print both places.

    The same run's dashboard is updated the next time.
    """
    from polyphony.trainer.run.wandb_dashboard import (  # slow to import
        build_workspace,
        default_entity,
        obstacle,
        save_workspace,
        specification,
    )

    found = read_run(run)
    if not found.domains:
        raise RecipeError(f"run {run} names no domains: neither its recipe nor its metrics can be read")
    tracking = found.setting("tracking", "wandb") or {}
    missing = obstacle()
    workspace = build_workspace(
        name=f"Polyphony: {found.setting('name') or found.name}",
        entity=tracking.get("entity") or ("your-entity" if missing else default_entity()),
        project=tracking.get("project") or "polyphony",
        domains=found.domains,
    )
    folder = RunFolder(run)
    folder.write(folder.dashboard, json.dumps(specification(workspace), indent=1))
    print(folder.dashboard)
    if missing is None:
        print(save_workspace(workspace, folder.dashboard.with_suffix(".url")))
        return
    print(
        f"not sent to W&B: {missing}. To push: `wandb login`, `wandb sync {folder.wandb}/offline-run-*`, then "
        f"`polyphony dashboard {run}` again"
    )
