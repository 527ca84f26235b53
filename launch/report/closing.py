"""How a run ended, for a terminal: each domain at the start and at the end, the best checkpoint, alarms."""

from __future__ import annotations

from collections import Counter

from polyphony.launch.report.numbers import Findings
from polyphony.launch.report.story import bounds, signed

SAID = 3
"""Alarms that are said in full; the report has them all."""


def closing(findings: Findings) -> str:
    """Return what a run prints last: held-out scores with 95 % intervals of their change, the best checkpoint, alarms."""
    return "\n".join([table(findings), *_best(findings), *_alarms(findings)])


def table(findings: Findings) -> str:
    """Return each domain's held-out score, its change with a 95 % interval, and its entropy, before and after the run."""
    if not findings.change:
        return f"{findings.run.title}: no evaluation, so nothing is known of held-out scores"
    lines = [findings.run.title, f"{'':<14}{'held-out score':>18}{'change, 95 % interval':>28}{'entropy':>18}"]
    for name, change in findings.change.items():
        before, after = findings.scores[name][0].mid, findings.scores[name][-1].mid
        entropy = findings.entropy[name]
        line = f"{name:<14}{before:>11.2f} → {after:.2f}{f'{signed(change.mid)} {bounds(change)}':>28}"
        line += f"{entropy.before:>11.2f} → {entropy.after:.2f}"
        place = {"below": "   below its band", "above": "   above its band"}.get(entropy.place, "")
        lines.append(line + ("   only watched" if name in findings.run.watch_only else "") + place)
    return "\n".join(lines)


def _best(findings: Findings) -> list[str]:
    best = findings.run.best
    if not best:
        return []
    return [f"best checkpoint, by its worst trained domain ({best['worst_domain_score']:.3f}): {best['checkpoint']}"]


def _alarms(findings: Findings) -> list[str]:
    alarms = findings.run.alarms
    if not alarms:
        return ["no alarm"]
    kinds = Counter(" of ".join(str(a[key]) for key in ("kind", "domain") if a.get(key)) for a in alarms)
    said = [f"{kind}{f' ({n} times)' if n > 1 else ''}" for kind, n in kinds.items()]
    more = f" and {len(said) - SAID} more" if len(said) > SAID else ""
    return [f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''}: {', '.join(said[:SAID])}{more}"]
