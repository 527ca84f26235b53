"""What a probe says beside transfer: how other ways to one model scored, and who shares parameters with whom."""

from __future__ import annotations

from typing import NamedTuple

from polyphony.curricula.records import Evaluation, mean
from polyphony.curricula.transfer.effects import label_of
from polyphony.launch.report.theme import Sheet


class Way(NamedTuple):
    """One way to one model: its name, and each domain's published score, the mean over seeds."""

    name: str
    scores: tuple[float, ...]


def ways(sheet: Sheet) -> list[list[Way]]:
    """Return the start, training on all at once and every other way that was measured; nothing without one of these."""
    found = []
    for run in (f.run for f in sheet.findings):
        matrix = run.transfer
        by_label: dict[str, list[Evaluation]] = {}
        for row in (*matrix.baselines(probe=True), *matrix.joint_arm, *matrix.arms) if matrix and matrix.arms else ():
            by_label.setdefault(_name(row), []).append(row)
        names = matrix.domains if matrix else ()
        found.append([Way(name, tuple(_score(rows, d) for d in names)) for name, rows in by_label.items()])
    return found


def _name(row: Evaluation) -> str:
    if not row.arm:
        return "all at once" if label_of(row) == "" and row.trained else "start"
    stages = " → ".join("+".join(stage) for stage in row.arm.get("stages", ()))
    return f"{row.arm['kind']} {row.arm.get('method', stages)}".strip()


def _score(rows: list[Evaluation], domain: str) -> float:
    return mean([row.mean_score(domain) for row in rows])


def shared(sheet: Sheet) -> list[list[tuple[str, str, float | None, float | None, float | None]]]:
    """Return (domain, other domain, overlap of cores, sign conflicts in both, cosine) of each two kept experts."""
    return [
        [
            (a, b, told["core_overlap"], told["sign_conflicts"], told["cosine"])
            for a, of in (f.run.transfer.shared if f.run.transfer else {}).items()
            for b, told in of.items()
        ]
        for f in sheet.findings
    ]
