"""A coefficient of the entropy term of each domain's loss, moved towards what keeps the domain inside its band.

    c <- clip(c + rate * (edge - H) / base, -most, most)     where the level H is beyond an edge of the band
    c <- c * decay                                            inside it

Integral control: the coefficient grows for as long as the domain stays out, by more the further out it is, and fades
once it is back. Positive coefficients raise entropy, negative ones lower it. One global coefficient, as in Skywork-OR1
(arXiv:2505.22312), would raise a structured domain's entropy because an open-ended one lost its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RATE = 0.02
"""Growth per draw for a level that is off its edge by the base model's whole entropy."""
MOST = 0.2
"""Largest coefficient either way; beyond, the entropy term outweighs a normalised advantage and text turns to noise."""
DECAY = 0.9
"""Inside the band, per draw: half is gone in 7."""


@dataclass(kw_only=True, slots=True)
class EntropyControl:
    """The coefficients of all domains; the same on every rank, because what they are moved by is.

    Example: `EntropyControl(domains=("math",)).move("math", level=0.2, band=(0.4, 1.2), base=0.8)`
    """

    domains: Sequence[str]
    rate: float = RATE
    most: float = MOST
    decay: float = DECAY
    coefficients: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coefficients = dict.fromkeys(self.domains, 0.0)

    def move(self, domain: str, *, level: float, band: tuple[float, float], base: float) -> float:
        """Return the domain's next coefficient; unchanged while level or band are unknown (NaN)."""
        low, high = band
        now = self.coefficients[domain]
        if math.isnan(level) or not base > 0:
            return now
        gap = low - level if level < low else high - level if level > high else 0.0
        moved = now + self.rate * gap / base if gap else now * self.decay
        self.coefficients[domain] = min(self.most, max(-self.most, moved))
        return self.coefficients[domain]

    def load(self, coefficients: Mapping[str, float]) -> None:
        """Restore what was saved."""
        self.coefficients = {name: float(coefficients[name]) for name in self.domains}
