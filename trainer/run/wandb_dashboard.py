"""The W&B dashboard as code: first entropy, forgetting and score of each domain with their bands, then a panel a metric.

Built from domain names, `METRICS` and the names that a run has logged, where it has begun.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from polyphony.curricula.files import replace_file
from polyphony.trainer.metrics import METRICS, key
from polyphony.trainer.run.tracking import is_reachable, server_url

CURVES: Mapping[str, Sequence[Sequence[tuple[str, str]]]] = {
    "Entropy against its band": [
        [("domain", "entropy"), ("heldout", "entropy"), ("heldout", "entropy_low"), ("heldout", "entropy_high")]
    ],
    "Forgetting, with 95 % intervals": [
        [("transfer", name), ("transfer", f"{name}_low"), ("transfer", f"{name}_high")] for name in ("drawdown", "bwt")
    ],
    "Held-out score, with 95 % intervals": [
        [("heldout", "score"), ("heldout", "score_low"), ("heldout", "score_high")]
    ],
}
"""Titles of sections, and the curves (family, metric) of a panel for each domain: what the dashboard opens on."""
SECTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Held out": {"heldout": ("greedy", "majority", "pass_at_k"), "transfer": ("fwt",)},
    "Training": {
        "domain": ("reward", "pass_rate", "frac_dead", "mean_length", "clipped_ratio"),
        "curriculum": ("mixture",),
    },
    "Entropy": {"heldout": ("entropy_place",), "domain": ("entropy_place", "entropy_slope", "entropy_coef")},
    "Calibration and form": {"heldout": ("overconfidence", "ece", "brier", "auroc", "format_valid", "format_share")},
    "Diversity": {
        "diversity": ("classes", "mean", "collapsed", "reward"),
        "heldout": ("distinct_2", "vendi", "unique_correct"),
    },
    "Distance to the base model": {"heldout": ("kl_base",)},
}
"""Titles of sections, and per family the metrics of a panel each, with all domains in it; what is not listed W&B finds by
itself."""
OVERALL = ("transfer/bwt", "transfer/drawdown_max", "rollout/useful_token_frac", "rollout/tokens_per_s")
TABLES = ("completions", "decisions", "transfer")
"""Names that the run logs its tables under; each can be filtered by domain."""


def build_workspace(
    *,
    name: str,
    entity: str,
    project: str,
    domains: Sequence[str],
    logged: Collection[str] = (),
    tables: Sequence[str] = TABLES,
) -> ws.Workspace:
    """Return the dashboard of a project's runs over these domains; nothing is sent anywhere.

    `logged` are the names that a run has logged: panels of others are left out; without any, all are there. `tables` are
    those of `TABLES` that it has.
    """
    panels = {
        title: [
            (f"{domain}: {curves[0][1]}", [key(family, metric, domain) for family, metric in curves])
            for curves in kinds
            for domain in domains
        ]
        for title, kinds in CURVES.items()
    }
    for title, rows in SECTIONS.items():
        panels[title] = [
            (f"{metric.replace('_', ' ')}: {METRICS[family][metric]}", [key(family, metric, d) for d in domains])
            for family, metrics in rows.items()
            for metric in metrics
        ]
    panels["The whole run"] = [(metric, [metric]) for metric in OVERALL]
    sections = [
        ws.Section(name=title, panels=drawn, is_open=title != "The whole run")
        for title, wanted in panels.items()
        if (drawn := [*_drawn(wanted, logged)])
    ]
    drawn = [wr.WeavePanelSummaryTable(table_name=table) for table in tables]
    sections.append(ws.Section(name=", ".join(tables).capitalize(), panels=[*drawn]))
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections)


def layout(workspace: ws.Workspace, domains: Collection[str]) -> Iterator[tuple[str, bool, int, Sequence[str]]]:
    """Yield of each section its title, whether the dashboard opens with it unfolded, how many panels it has, and which names
    are drawn in them, a domain's as `<d>`."""
    for section in workspace.sections:
        curves = [str(getattr(y, "name", y)) for p in section.panels if isinstance(p, wr.LinePlot) for y in p.y or ()]
        curves += [str(p.table_name) for p in section.panels if isinstance(p, wr.WeavePanelSummaryTable)]
        names = ("/".join("<d>" if part in domains else part for part in curve.split("/")) for curve in curves)
        yield section.name, section.is_open, len(section.panels), tuple(dict.fromkeys(names))


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


def _drawn(wanted: Sequence[tuple[str, Sequence[str]]], logged: Collection[str]) -> Iterator[Any]:
    for title, curves in wanted:
        known: list[Any] = [curve for curve in curves if curve in logged or not logged]
        if known:
            yield wr.LinePlot(title=title, x="Step", y=known)
