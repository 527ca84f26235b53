"""What teachers did in a run, by domain: how far from them the policy was, what of their advantages was cut or missing."""

from __future__ import annotations

from typing import NamedTuple

from polyphony.launch.report.run import LoadedRun
from polyphony.launch.report.theme import Sheet


class Taught(NamedTuple):
    """What its teacher, or its own best checkpoint in a recovery, did in one domain."""

    domain: str
    first: float
    """Nats a token to the teacher, KL(policy || teacher), at the first draw that was logged."""
    last: float
    clipped: float
    """Share of tokens whose advantage was cut, the mean over the log."""
    missing: float
    """Completions without an advantage, in all."""


def lessons(sheet: Sheet) -> list[list[Taught]]:
    """Return it of each run; nothing of domains without a teacher."""
    return [[found for name in f.run.domains if (found := _taught(f.run, name)) is not None] for f in sheet.findings]


def _taught(run: LoadedRun, name: str) -> Taught | None:
    kl, clipped, missing = (run.metrics.get(f"distil/{name}/{metric}") for metric in ("kl", "clipped", "missing"))
    if kl is None or clipped is None or missing is None:
        return None
    return Taught(
        domain=name,
        first=float(kl.values[0]),
        last=float(kl.values[-1]),
        clipped=float(clipped.values.mean()),
        missing=float(missing.values.sum()),
    )
