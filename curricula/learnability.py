"""Which of the prompts worth practising to take: any, or those whose outcome is most in doubt."""

from __future__ import annotations

import pkgutil
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

SAMPLINGS = {
    "uniform": "polyphony.curricula.learnability:Uniform",
    "thompson": "polyphony.curricula.learnability:Thompson",
}
"""Registry name to `module:Class`."""


class PromptSampling(Protocol):
    """Chooses among candidates that were drawn uniformly from the open prompts of a domain."""

    def candidates(self, n: int) -> int:
        """Return how many candidates it wants to see to choose `n`."""
        ...

    def choose(self, posteriors: Sequence[tuple[float, float]], n: int, generator: random.Random) -> list[int]:
        """Return the places of `n` candidates, given the Beta parameters of each."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every prompt alike."""

    def candidates(self, n: int) -> int:
        return n

    def choose(self, posteriors: Sequence[tuple[float, float]], n: int, generator: random.Random) -> list[int]:
        return list(range(min(n, len(posteriors))))


@dataclass(frozen=True, slots=True)
class Thompson:
    """Draw p of each candidate from its posterior and take the largest p (1 - p).

    p (1 - p) is the variance of a binary reward and so the size of the policy gradient (SFL, arXiv:2408.15099); drawing
    p rather than taking its mean keeps trying prompts that little is known of (MoPPS, arXiv:2507.04632).
    """

    pool_factor: int = 8
    """Candidates seen for each one taken: enough that the best eighth is well above the mean."""

    def candidates(self, n: int) -> int:
        return self.pool_factor * n

    def choose(self, posteriors: Sequence[tuple[float, float]], n: int, generator: random.Random) -> list[int]:
        rates = [generator.betavariate(a, b) for a, b in posteriors]
        best = sorted(range(len(rates)), key=lambda i: -rates[i] * (1 - rates[i]))
        return best[:n]


def find_sampling(name: str) -> Any:
    """Return the sampling of a registry name or an import path `pkg.module:Class`."""
    path = SAMPLINGS.get(name, name)
    if ":" not in path:
        raise ValueError(f"pool.sampling {name!r} does not exist; known: {', '.join(SAMPLINGS)}, or pkg.module:Class")
    try:
        return pkgutil.resolve_name(path)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"pool.sampling {name!r} cannot be used: {error}") from error
