"""How a run ended, for a terminal: each domain at the start and at the end, the best checkpoint, alarms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from polyphony.launch.report.numbers import Findings
from polyphony.launch.report.story import bounds, signed
from polyphony.trainer.run import visible

SAID = 3
"""Alarms that are said in full; the report has them all."""


def closing(findings: Findings) -> str:
    """Return what a run prints last: held-out scores with 95 % intervals of their change, the best checkpoint, alarms."""
    return visible("\n".join([table(findings), *_best(findings), *_alarms(findings)]))


def table(findings: Findings) -> str:
    """Return each domain's held-out score, its change with a 95 % interval, and its entropy, before and after the run."""
    if not findings.change:
        return f"{findings.run.title}: no evaluation, so nothing is known of held-out scores"
    width = max(14, *(len(visible(name)) + 1 for name in findings.change))
    lines = [findings.run.title, f"{'':<{width}}{'held-out score':>18}{'change, 95 % interval':>28}{'entropy':>18}"]
    for name, change in findings.change.items():
        entropy, scores = findings.entropy[name], [score.mid for score in findings.scores[name]]
        moved = f"{signed(change.mid)} {bounds(change)}" if math.isfinite(change.mid) else "–"
        line = f"{visible(name):<{width}}{_ends(scores[:1] + scores[1:][-1:]):>18}{moved:>28}"
        line += f"{_ends([entropy.before, entropy.after]):>18}"
        place = {"below": "   below its band", "above": "   above its band"}.get(entropy.place, "")
        lines.append(line + ("   only watched" if name in findings.run.watch_only else "") + place)
    return "\n".join(lines)


def _ends(values: Sequence[float]) -> str:
    """Write a first and a last value as `0.25 → 0.61`; one where the other is unknown."""
    return " → ".join(f"{value:.2f}" for value in values if math.isfinite(value)) or "–"


def _best(findings: Findings) -> list[str]:
    best = findings.run.best
    if not best:
        return []
    score = best.get("worst_domain_score")
    by = f" ({score:.3f})" if isinstance(score, float) else ""
    return [f"best checkpoint, by its worst trained domain{by}: {best.get('checkpoint', 'its name is not on record')}"]


def _alarms(findings: Findings) -> list[str]:
    alarms = findings.run.alarms
    if not alarms:
        return ["no alarm"]
    kinds = Counter(" of ".join(str(a[key]) for key in ("kind", "domain") if a.get(key)) for a in alarms)
    said = [f"{kind}{f' ({n} times)' if n > 1 else ''}" for kind, n in kinds.items()]
    more = f" and {len(said) - SAID} more" if len(said) > SAID else ""
    return [f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''}: {', '.join(said[:SAID])}{more}"]
