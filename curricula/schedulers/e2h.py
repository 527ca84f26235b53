"""`e2h`: easy domains first, faded out towards the hard ones (E2H Reasoner, arXiv:2506.06632)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curricula.records import Decision, Evidence, mean


@dataclass(frozen=True, kw_only=True, slots=True)
class E2H:
    """With K domains from easy (i = 0) to hard (i = K - 1), progress t in [0, 1) and S = K (K + 1) / 2:

        cosine:    p_i = w (K - i) / S + (1 - w) (i + 1) / S,   w = (1 + cos(pi t)) / 2
        gaussian:  p_i proportional to max(1 / S, N_i),  N_i = exp(-(i - mu)^2 / (2 width^2)) normalised,
                   mu = t^exponent (K - 1)

    1 / S is the paper's floor, which the cosine never falls below. Changed: levels are domains. Without an `order`,
    easy means a high score at the run's first evaluation.
    """

    kind: str = "cosine"
    order: tuple[str, ...] | None = None
    """From easy to hard."""
    exponent: float = 0.5
    """Of the gaussian's path; below 1 it leaves the easy domains early."""
    width: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "gaussian"):
            raise ValueError(f"e2h: kind is cosine or gaussian, got {self.kind!r}")
        if not (self.exponent > 0 and self.width > 0):
            raise ValueError(f"e2h: exponent and width must be above 0, got {self.exponent}, {self.width}")
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        order = self._order(evidence)
        shares = dict(zip(order, self._shares(len(order), evidence.progress), strict=True))
        reason = f"{self.kind}, {evidence.progress:.0%} of the way from {order[0]} to {order[-1]}"
        return Decision(mixture=tuple(shares[name] for name in evidence.domains), reason=reason)

    def _shares(self, size: int, progress: float) -> list[float]:
        floor = 2 / (size * (size + 1))
        if self.kind == "cosine":
            w = (1 + math.cos(math.pi * progress)) / 2
            return [w * (size - i) * floor + (1 - w) * (i + 1) * floor for i in range(size)]
        mu = progress**self.exponent * (size - 1)
        heights = [math.exp(-((i - mu) ** 2) / (2 * self.width**2)) for i in range(size)]
        raised = [max(floor, height / sum(heights)) for height in heights]
        return [share / sum(raised) for share in raised]

    def _order(self, evidence: Evidence) -> Sequence[str]:
        if self.order is not None:
            if sorted(self.order) != sorted(evidence.domains):
                raise ValueError(f"e2h: order {list(self.order)} must name each of {list(evidence.domains)} once")
            return self.order
        if not evidence.evaluations:
            raise ValueError("e2h: without an order, easy is what scores high at first: an evaluation must come first")
        scores = evidence.evaluations[0].scores
        return sorted(evidence.domains, key=lambda name: -mean(scores[name]))
