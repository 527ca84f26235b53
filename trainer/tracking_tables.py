"""The tables that a tracker gets beside the numbers: completions by domain, decisions, and what each domain did to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polyphony.curricula.effects import Effects
from polyphony.curricula.transfer import TransferMatrix
from polyphony.trainer.heldout_result import HeldoutResult
from polyphony.trainer.tracking import WandbTracker

MOST_ROWS = 2000
"""Of the decisions: every so-manieth, so that a table stays one that a browser can show."""


def track_completions(tracker: WandbTracker, step: int, result: HeldoutResult) -> None:
    """Log the samples that are kept for people, to be filtered by domain."""
    rows = [[step, s.prompt.domain, _text(s.prompt.prompt), s.text, score, s.truncated] for s, score in result.shown]
    tracker.log_table(step, "completions", ["step", "domain", "prompt", "completion", "score", "truncated"], rows)


def track_decisions(tracker: WandbTracker, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """Log the scheduler's decisions: a row a draw, a column a domain's share, and the reason."""
    if not lines:
        return
    names = list(lines[0]["mixture"])
    every = -(-len(lines) // MOST_ROWS)
    rows = [
        [line["step"], line["draw"], *(line["mixture"][n] for n in names), line["stage"] or "", line["reason"]]
        for line in lines[::every]
    ]
    tracker.log_table(step, "decisions", ["step", "draw", *names, "stage", "reason"], rows)


def track_transfer(tracker: WandbTracker, step: int, matrix: TransferMatrix) -> None:
    """Log what training on each domain did to each (`report` half), as a table with intervals and as a heatmap."""
    effects = Effects(matrix.on("report"))
    if not effects.trained:
        return
    table, (low, high) = effects.transfer(), effects.transfer_interval()
    rows = [
        [source, target, float(table[j, i]), float(low[j, i]), float(high[j, i])]
        for j, source in enumerate(effects.trained)
        for i, target in enumerate(effects.domains)
    ]
    tracker.log_table(step, "transfer", ["trained", "measured", "change", "low", "high"], rows)
    cells = [(row[0], row[1], row[2]) for row in rows]
    tracker.log_heatmap(step, "transfer_heatmap", "What training on one domain did to the others", cells)


def _text(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)
