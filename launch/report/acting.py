"""What a report says of domains that act: turns, calls, and entropy and reward turn by turn."""

from __future__ import annotations

from typing import NamedTuple

from polyphony.curricula.records import FAILURES
from polyphony.launch.report.run import LoadedRun
from polyphony.launch.report.theme import Sheet
from polyphony.trainer.environments.counts import TURNS

Ends = tuple[float, float]
"""The first value that was logged, and the last."""


class Acted(NamedTuple):
    """One domain that acts; None where nothing was logged."""

    domain: str
    turns: Ends | None
    calls: Ends | None
    failed: Ends | None
    """Share of the calls."""
    cut: Ends | None
    """Share of the completions."""
    entropy: list[Ends | None]
    """Of each turn."""
    reward: list[Ends | None]
    """Of completions by their number of turns."""


def acting(sheet: Sheet) -> list[list[Acted]]:
    """Return the domains of every run that act."""
    return [_of(f.run) for f in sheet.findings]


def _of(run: LoadedRun) -> list[Acted]:
    def ends(*metrics: str) -> Ends | None:
        found = [run.metrics[name] for metric in metrics if (name := f"environment/{domain}/{metric}") in run.metrics]
        return (sum(float(s.values[0]) for s in found), sum(float(s.values[-1]) for s in found)) if found else None

    found = []
    for domain in run.domains:
        if f"environment/{domain}/turns" not in run.metrics:
            continue
        by_turn = [[ends(f"{what}_{n}") for n in range(1, TURNS + 1)] for what in ("entropy_turn", "reward_turns")]
        cut = ends("cut_by_turns", "cut_by_length")
        found.append(Acted(domain, ends("turns"), ends("calls"), ends(*FAILURES), cut, *by_turn))
    return found
