"""A coefficient of the entropy term of each domain's loss, moved towards what keeps the domain inside its band.

    e = (edge - H) / base       beyond an edge of the band, drawn in by `MARGIN` of its width; 0 between the two
    S <- S + e                  beyond an edge;    S <- DECAY * S    inside
    c = clip(push * e + rate * S, -most, most)

Proportional and integral control: the push answers at once, because a collapse feeds on itself, and the sum grows for as
long as the domain stays out and fades once it is back. Positive coefficients raise entropy, negative ones lower it. One
global coefficient, as in Skywork-OR1 (arXiv:2505.22312), would raise a structured domain's entropy because an
open-ended one lost its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Means = Literal["coefficient", "sampling"]
"""What can move a domain's entropy: its coefficient in the loss, or how much is practised of what raises or lowers it."""
Control = Literal["none", "adaptive", "coefficient", "sampling"]
"""What a recipe asks for; `adaptive` is both means."""

PUSH = 1.0
"""Coefficient for an entropy that is off by the base model's whole entropy."""
RATE = 0.05
"""Growth of the coefficient per draw for the same distance."""
MOST = 1.0
"""Largest coefficient either way, as TRL's own `entropy_coef_max`: there the term weighs as much as an advantage of 1."""
MARGIN = 0.1
"""Share of the band's width that the control begins before each edge: a push needs time to be felt."""
DECAY = 0.9
"""Of the sum, per draw inside: half is gone in 7."""


def controlled(control: Control | Mapping[str, Control], means: Means, domains: Sequence[str]) -> tuple[str, ...]:
    """Return the domains whose entropy is held by these means; under a mapping, one that it does not name is not held.

    Example: `controlled({"math": "adaptive"}, "sampling", ("math", "code")) == ("math",)`
    """
    asked = control if isinstance(control, Mapping) else dict.fromkeys(domains, control)
    return tuple(name for name in domains if asked.get(name, "none") in ("adaptive", means))


@dataclass(kw_only=True, slots=True)
class EntropyControl:
    """The coefficients of the domains that are held so; the same on every rank, because what they are moved by is.

    Example: `EntropyControl(domains=("math",)).move("math", level=0.2, band=(0.4, 1.2), base=0.8)`
    """

    domains: Sequence[str]
    push: float = PUSH
    rate: float = RATE
    most: float = MOST
    coefficients: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    """S of each domain."""

    def __post_init__(self) -> None:
        self.coefficients = dict.fromkeys(self.domains, 0.0)
        self.sums = dict.fromkeys(self.domains, 0.0)

    def move(self, domain: str, *, level: float, band: tuple[float, float], base: float) -> float:
        """Return the domain's next coefficient; unchanged while level or band are unknown (NaN)."""
        if math.isnan(level) or not base > 0:
            return self.coefficients[domain]
        room = MARGIN * (band[1] - band[0])
        low, high = band[0] + room, band[1] - room
        error = (low - level if level < low else high - level if level > high else 0.0) / base
        # the sum stops where it alone would reach the limit, so that it is not long in coming back
        most = self.most / self.rate
        total = self.sums[domain] + error if error else self.sums[domain] * DECAY
        self.sums[domain] = min(most, max(-most, total))
        wanted = self.push * error + self.rate * self.sums[domain]
        self.coefficients[domain] = min(self.most, max(-self.most, wanted))
        return self.coefficients[domain]

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return what is remembered; JSON-able."""
        return {"coefficients": dict(self.coefficients), "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Restore `state_dict`."""
        self.coefficients = {name: float(state["coefficients"][name]) for name in self.domains}
        self.sums = {name: float(state["sums"][name]) for name in self.domains}
