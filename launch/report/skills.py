"""What a report says of the parts of domains: rows with a column `skill`."""

from __future__ import annotations

from typing import NamedTuple

from polyphony.launch.report.run import LoadedRun
from polyphony.launch.report.theme import Sheet


class Skill(NamedTuple):
    """One skill of a domain: first and last values of what was logged for it; None where nothing was."""

    domain: str
    name: str
    reward: tuple[float, float] | None
    score: tuple[float, float] | None
    entropy: tuple[float, float] | None


def skills(sheet: Sheet) -> list[list[Skill]]:
    """Return the skills of every run, by domain."""
    return [_of(f.run) for f in sheet.findings]


def _of(run: LoadedRun) -> list[Skill]:
    found = {tuple(key.split("/")[1:3]) for key in run.metrics if key.startswith("skill/")}

    def ends(domain: str, name: str, metric: str) -> tuple[float, float] | None:
        series = run.metrics.get(f"skill/{domain}/{name}/{metric}")
        return None if series is None else (float(series.values[0]), float(series.values[-1]))

    return [
        Skill(d, s, ends(d, s, "reward"), ends(d, s, "score"), ends(d, s, "heldout_entropy")) for d, s in sorted(found)
    ]
