"""The W&B dashboard as code: one section a family of metrics, one panel a metric with all domains in it.

Built from domain names and `METRICS` alone, so it is the same for a run that is over and for one that has not begun.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from polyphony.curricula.files import replace_file
from polyphony.trainer.metrics import METRICS, key
from polyphony.trainer.run.tracking import is_reachable, server_url

SECTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Held out": {"heldout": ("score", "greedy", "majority", "pass_at_k")},
    "Forgetting": {"transfer": ("bwt", "drawdown", "fwt")},
    "Entropy": {"domain": ("entropy", "entropy_place", "entropy_slope", "entropy_coef"), "heldout": ("entropy",)},
    "Training": {
        "domain": ("reward", "pass_rate", "frac_dead", "mean_length", "clipped_ratio"),
        "curriculum": ("mixture",),
    },
    "Calibration and form": {"heldout": ("overconfidence", "ece", "brier", "auroc", "format_valid", "format_share")},
    "Diversity": {
        "diversity": ("classes", "mean", "collapsed", "reward"),
        "heldout": ("distinct_2", "vendi", "unique_correct"),
    },
    "Distance to the base model": {"heldout": ("kl_base",)},
}
"""Titles of sections, and per family the metrics of a panel each; what is not listed W&B finds by itself."""
OVERALL = ("transfer/bwt", "transfer/drawdown_max", "rollout/useful_token_frac", "rollout/tokens_per_s")
TABLES = ("completions", "decisions", "transfer")
"""Names that the run logs its tables under; each can be filtered by domain."""


def build_workspace(*, name: str, entity: str, project: str, domains: Sequence[str]) -> ws.Workspace:
    """Return the dashboard of a project's runs over these domains; nothing is sent anywhere."""
    sections = [
        ws.Section(name=title, panels=[*_panels(rows, domains)], is_open=True) for title, rows in SECTIONS.items()
    ]
    overall = [wr.LinePlot(title=metric, x="Step", y=[metric]) for metric in OVERALL]
    tables = [wr.WeavePanelSummaryTable(table_name=table) for table in TABLES]
    sections.append(ws.Section(name="The whole run", panels=[*overall]))
    sections.append(ws.Section(name="Completions, decisions, transfer", panels=[*tables]))
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections)


def specification(workspace: ws.Workspace) -> dict[str, Any]:
    """Return the dashboard as W&B stores it, as plain JSON."""
    return workspace._to_model().model_dump(mode="json")


def obstacle() -> str | None:
    """Return in words why nothing can be sent to W&B now: no API key, or no answer; None where it can."""
    server = server_url()
    if not (os.environ.get("WANDB_API_KEY") or _is_logged_in(server)):
        return "no API key is set"
    return None if is_reachable(server) else f"{server} does not answer"


def default_entity() -> str:
    """Return whose projects the logged-in account writes to."""
    return str(wandb.Api().default_entity)


def save_workspace(workspace: ws.Workspace, place: Path) -> str:
    """Create the dashboard at W&B, or update the one whose URL `place` remembers; return the URL."""
    if place.is_file():
        known = ws.Workspace.from_url(place.read_text(encoding="utf-8").strip())
        known.name, known.sections = workspace.name, workspace.sections
        workspace = known
    url = workspace.save().url
    replace_file(place, url)
    return url


def _is_logged_in(server: str) -> bool:
    """Say whether `wandb login` left a key for this server."""
    try:
        return netrc.netrc().authenticators(urlparse(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _panels(rows: Mapping[str, Sequence[str]], domains: Sequence[str]) -> list[wr.LinePlot]:
    return [
        wr.LinePlot(
            title=f"{metric.replace('_', ' ')}: {METRICS[family][metric]}",
            x="Step",
            y=[key(family, metric, domain) for domain in domains],
        )
        for family, metrics in rows.items()
        for metric in metrics
    ]
