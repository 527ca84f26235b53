"""Guardrails: how much held-out score a domain may lose, and what happens when it has lost more with confidence.

Tested on the `steer` half of the items, corrected for repeated testing at every evaluation (alpha spending).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.intervals import Interval
from polyphony.curricula.monitors import Alarm
from polyphony.curricula.records import Evaluation, graded
from polyphony.curricula.transfer.forgetting import moment


@settings
class Guardrail:
    """A limit on the loss of held-out score of one domain, trained or watch-only.

    Example: `Guardrail(domain="safety", max_drop=0.02, action="stop")`
    """

    domain: str
    """Its name."""
    max_drop: float = Field(ge=0, le=1)
    """Largest tolerated loss of the mean score. The guardrail acts where the interval of the loss lies wholly above it."""
    action: Literal["warn", "stop", "rollback", "recover"] = "warn"
    """`warn` raises an alarm; `stop` ends the run; `rollback` reloads the checkpoint whose lowest domain score is highest,
    and tells the scheduler; `recover` practises the domain alone, while the schedule waits, until the interval of what it
    lost holds zero, or `draws` are spent. They are steps of the run, which is not longer for them."""
    by: Literal["distil", "refresh"] = "distil"
    """How it is recovered. `distil`: from the checkpoint, or the start, at which it scored highest, as under `algorithm:
    distil`; it teaches every token where a lost reward teaches none. For each such guardrail one checkpoint more is kept on
    disk, of the usual size (with `lora` of the adapter alone), and a second model is in memory meanwhile. `refresh`: by its
    own reward."""
    draws: int = Field(default=20, ge=1)
    """Most draws of one recovery; after the last there is an evaluation, as at every `eval.every` steps. By default a
    recovery takes fewer steps than lie between two evaluations."""
    times: int = Field(default=3, ge=1)
    """Most recoveries in a run; from then on its guardrail warns. What three could not mend needs another recipe."""
    prompts: Any = None
    """Training rows, in the forms of `domains.<name>.train`, to recover a domain with that is only watched, which needs
    them. A trained domain is recovered with its own. Those that repeat a held-out row are left out, whatever
    `data.overlap` says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A guardrail that was broken at one evaluation."""

    guardrail: Guardrail
    step: int
    change: Interval
    """Score now minus score at the anchor, with an interval at this evaluation's share of the error rate."""
    since: str
    """What the anchor is, in words."""
    items: tuple[int, int]
    """How many of the domain's items were graded at this evaluation, and how many there are."""

    def alarm(self, done: str) -> Alarm:
        """Return the alarm that says so, and what was done."""
        return Alarm(step=self.step, domain=self.guardrail.domain, kind="guardrail", message=f"{self}: {done}")

    def __str__(self) -> str:
        return (
            f"{self.guardrail.domain} lost {-self.change.mid:.3f} {self.since} (at least {-self.change.high:.3f}, with "
            f"95 % confidence over all evaluations); {self.guardrail.max_drop:g} is allowed"
        ) + (f"; {self.items[0]} of {self.items[1]} items were graded" if self.items[0] < self.items[1] else "")


def check(
    guardrails: Sequence[Guardrail], run: Sequence[Evaluation], *, watch_only: Sequence[str] = (), error: float = 0.05
) -> list[Verdict]:
    """Return the guardrails that the last evaluation of `run` (baseline first, `steer` half) broke.

    A domain is compared with its anchor: its baseline if it is only watched, the end of its last stage if one has
    ended, else its cross-fitted best evaluation so far. It is broken where the upper end of the interval lies below
    `-max_drop`. Evaluation n spends error / (G n (n + 1)) on each of G guardrails, which sums to `error` however
    many evaluations there will be (alpha spending by a union bound).
    """
    tests = len(run) - 1
    if tests < 1 or not guardrails:
        return []
    one_sided = error / (len(guardrails) * tests * (tests + 1))
    now = moment(run, watch_only=watch_only, level=1 - 2 * one_sided)
    verdicts = []
    for guardrail in guardrails:
        change, since = _change(guardrail.domain, now.bwt, now.drawdown, watch_only)
        if change.high < -guardrail.max_drop:
            scores = run[-1].scores[guardrail.domain]
            items = len(graded(scores)), len(scores)
            verdicts.append(Verdict(guardrail=guardrail, step=run[-1].step, change=change, since=since, items=items))
    return verdicts


def regained(
    guardrail: Guardrail, run: Sequence[Evaluation], *, watch_only: Sequence[str] = ()
) -> tuple[Interval, str]:
    """Return what a domain in recovery has changed by now since its anchor, 95 %, and what that is, in words.

    The last evaluation stands in the place of the one that broke the guardrail, so that the anchor is the same. It is
    regained where the interval does not lie below zero.
    """
    broken = max(n for n, row in enumerate(run) if not row.recovery)
    now = replace(run[-1], trained=run[broken].trained, recovery=False)
    then = moment([*run[:broken], now], watch_only=watch_only)
    return _change(guardrail.domain, then.bwt, then.drawdown, watch_only)


def exceeded(
    guardrails: Sequence[Guardrail], run: Sequence[Evaluation], *, watch_only: Sequence[str] = ()
) -> list[str]:
    """Return the domains that, by what was measured at the last evaluation, lost more than may be lost, sure or not.

    To go back to such a checkpoint would be to go back to the damage.
    """
    if len(run) < 2:
        return []
    now = moment(run, watch_only=watch_only)
    changes = {g.domain: _change(g.domain, now.bwt, now.drawdown, watch_only)[0].mid for g in guardrails}
    return [g.domain for g in guardrails if changes[g.domain] < -g.max_drop]


def _change(
    domain: str, bwt: Mapping[str, Interval], drawdown: Mapping[str, Interval], watch_only: Sequence[str]
) -> tuple[Interval, str]:
    if domain in watch_only:
        return bwt[domain], "since the baseline"
    if not math.isnan(bwt[domain].mid):
        return bwt[domain], "since the end of its own stage"
    return drawdown[domain], "since its best evaluation"
