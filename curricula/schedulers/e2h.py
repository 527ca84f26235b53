"""`e2h`: from easy to hard on a fixed schedule in which every level always has a share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, Evidence
from polyphony.curricula.schedulers.fixed import Sequential
from polyphony.curricula.schedulers.shares import listed, normalised


@settings
class E2H:
    """Level i = 0 .. K-1 of an order, at draw t of T, with S = K (K + 1) / 2:

    cosine:    p_i = w (K - i) / S + (1 - w) (i + 1) / S,   w = (1 + cos(pi t / T)) / 2
    gaussian:  p_i = f + (1 - K f) q_i,   q_i ~ exp(-(i - mu)^2 / (2 sigma^2)),   mu = (t / T)^b (K - 1),   f = 1 / S

    w: how early it is. mu: the level in focus. sigma: `sigma`. b: `exponent`. f: the floor, below which no level falls
    (under `cosine` both ends are at or above it, so it needs no enforcing).

    Source: arXiv:2506.06632 and its code. Changed: levels are domains in an order instead of difficulties within one
    task, by default structured before open-ended (arXiv:2507.14783). It is a fixed schedule that uses no evidence, so
    what a domain showed, or that it was not drawn, changes nothing, and its first draw is not uniform.
    """

    kind: Literal["cosine", "gaussian"] = "gaussian"
    """`gaussian` fades easy levels out, which the paper finds to matter; `cosine` keeps more of all."""
    order: tuple[str, ...] | None = None
    """Domains from first to last; None puts structured before open-ended, each in the recipe's order."""
    exponent: float = Field(default=0.5, gt=0)
    """b; 0.5 as released: the focus moves fast at first, and half of the levels are passed in a quarter of the run."""
    sigma: float = Field(default=0.5, gt=0)
    """Width of the focus, in levels; 0.5 as released: a neighbour of the level in focus has e^-2 = 0.14 of its q."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        order = [name for (name,) in Sequential(order=self.order).stages(evidence)]
        shares = self._cosine(evidence) if self.kind == "cosine" else self._gaussian(evidence)
        by_name = dict(zip(order, shares, strict=True))
        reason = (
            f"{self.kind} schedule, draw {evidence.draw + 1} of {evidence.total_draws}, from easy to hard: "
            f"{listed(order, shares)}"
        )
        return Decision(mixture=tuple(by_name[name] for name in evidence.domains), reason=reason)

    def _cosine(self, evidence: Evidence) -> tuple[float, ...]:
        k = len(evidence.domains)
        early = (1 + math.cos(math.pi * evidence.progress)) / 2
        return normalised([early * (k - i) + (1 - early) * (i + 1) for i in range(k)])

    def _gaussian(self, evidence: Evidence) -> tuple[float, ...]:
        k = len(evidence.domains)
        floor = 2 / (k * (k + 1))
        focus = evidence.progress**self.exponent * (k - 1)
        distances = [(i - focus) ** 2 / (2 * self.sigma**2) for i in range(k)]
        nearest = min(distances)  # subtracted so that a small sigma cannot leave every q at 0
        q = normalised([math.exp(nearest - distance) for distance in distances])
        return tuple(floor + (1 - k * floor) * share for share in q)
