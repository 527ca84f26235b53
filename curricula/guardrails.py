"""Limits on what a domain may lose, and the verdict at each evaluation. Pure: the trainer carries verdicts out.

    guardrails: {safety: {max_drop: 0.02, action: stop}, writing: {max_drop: 0.05, action: rollback}}

A watch-only domain is compared with the run's first evaluation, a trained one with its cross-fitted best so far (see
`forgetting.drawdown`), item by item. The limit is broken when the interval of the change lies wholly below
`-max_drop`. A limit looked at often enough is broken by noise, so look t is allowed the chance

    alpha_t = 0.05 / (zeta(3/2) t^(3/2)),     sum over all looks = 0.05

of a false alarm for each domain, however long the run turns out to be: z = 2.1 at the first look, 3.5 at the 20th.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from curricula.forgetting import drawdown
from curricula.intervals import Interval, paired
from curricula.records import Evaluation

FALSE_ALARMS = 0.05
"""Chance that a domain which loses exactly `max_drop` is ever reported, over a whole run."""

ZETA = 2.612375348685488
"""Riemann's zeta at 3/2: the sum of t^(-3/2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guardrail:
    """What one domain may lose and what happens when it has lost more.

    Example: `Guardrail(max_drop=0.02, action="stop")`
    """

    max_drop: float
    """In score, [0, 1)."""
    action: Literal["warn", "stop", "rollback"] = "warn"

    def __post_init__(self) -> None:
        if not (isinstance(self.max_drop, (int, float)) and 0 <= self.max_drop < 1):
            raise ValueError(f"guardrail: max_drop must lie in [0, 1), got {self.max_drop!r}")
        if self.action not in ("warn", "stop", "rollback"):
            raise ValueError(f"guardrail: action is warn, stop or rollback, got {self.action!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one evaluation says about one guarded domain."""

    domain: str
    action: str
    step: int
    change: Interval
    """Score now minus its reference, at the level that this look is allowed."""
    is_broken: bool
    text: str
    """For the log, and for the scheduler after a rollback (`Curriculum.note`)."""


def read_guardrails(settings: Mapping[str, Mapping[str, Any]], domains: Iterable[str]) -> dict[str, Guardrail]:
    """Return the recipe's guardrails. Raises ValueError for an unknown domain or setting."""
    known = list(domains)
    found = {}
    for name, values in settings.items():
        if name not in known:
            raise ValueError(f"guardrails: unknown domain {name!r}; known: {known}")
        if not {"max_drop"} <= set(values) <= {"max_drop", "action"}:
            raise ValueError(f"guardrails.{name}: expected max_drop and optionally action, got {sorted(values)}")
        try:
            found[name] = Guardrail(**values)
        except ValueError as error:
            raise ValueError(f"guardrails.{name}: {error}") from error
    return found


def check_guardrails(
    guardrails: Mapping[str, Guardrail], evaluations: Sequence[Evaluation], *, watch_only: Sequence[str] = ()
) -> list[Verdict]:
    """Return a verdict for each guarded domain at the last evaluation; none before the second.

    `evaluations` are the run's rows, oldest first, reduced to the `steer` half.
    """
    look = len(evaluations) - 1
    if look < 1:
        return []
    level = 1 - 2 * allowance(look)  # two-sided interval of which only the upper bound is used
    return [_verdict(name, rule, evaluations, name in watch_only, level) for name, rule in guardrails.items()]


def allowance(look: int) -> float:
    """Return the chance of a false alarm that look 1, 2, .. may spend."""
    return FALSE_ALARMS / ZETA / look**1.5


def _verdict(name: str, rule: Guardrail, rows: Sequence[Evaluation], watched: bool, level: float) -> Verdict:
    if watched:
        change, reference = paired(rows[-1].scores[name], rows[0].scores[name], level=level), "its baseline"
    else:
        change, reference = drawdown([row.scores[name] for row in rows], level=level), "its best"
    is_broken = change.high < -rule.max_drop
    said = "lost more than" if is_broken else "is not shown to have lost"
    text = (
        f"guardrail: {name} {said} {rule.max_drop:.3f} against {reference} at step {rows[-1].step} "
        f"({change.mid:+.3f}, {change.low:+.3f} to {change.high:+.3f}; {rule.action})"
    )
    return Verdict(domain=name, action=rule.action, step=rows[-1].step, change=change, is_broken=is_broken, text=text)
