"""How experts are merged, checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from polyphony.curricula.declarations import nearest

Method = Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "interpolate", "cpi"]
METHODS: tuple[Method, ...] = get_args(Method)

BASELESS = ("linear", "slerp")
"""Methods of the experts' weights alone; the others are of their differences from a base."""
DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5, "cpi": 0.1}
"""Share of each difference that is kept where none is said: TIES keeps a fifth (arXiv:2306.01708, section 3), CPI isolates a
tenth (arXiv:2508.21741 says no number: our reading). DARE drops nine tenths of what supervised fine-tuning changed
(arXiv:2311.03099); of what reinforcement did we drop half."""
COUNT = {"slerp": 2, "interpolate": 1}
"""How many experts a method takes, where not any number."""
PROPORTIONS = ("linear", "ties", "cpi")
"""Methods whose weights count by their proportions alone."""
SHARE = ("slerp", "interpolate")
"""Methods whose one weight is a share: of the second expert, of the expert against its base."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeSettings:
    """One way to merge.

    Example: `MergeSettings(method="task_arithmetic", weights=(0.6, 0.4)).of(2) == (0.6, 0.4)`
    """

    method: Method = "ties"
    weights: tuple[float, ...] = ()
    """One for each expert, or one for all; none: 1, a half where it is a share. Under `linear`, `ties` and `cpi` only their
    proportions count."""
    density: float | None = None
    """Share of each difference that is kept; None: the method's own."""
    seed: int = 42
    """Of what DARE drops."""

    @property
    def kept(self) -> float:
        """The share of each difference that is kept."""
        return DENSITY.get(self.method, 1.0) if self.density is None else self.density

    def of(self, experts: int) -> tuple[float, ...]:
        """Return a weight for each of so many experts; of a share, that alone."""
        if self.method in SHARE:
            return self.weights or (0.5,)
        return self.weights * experts if len(self.weights) == 1 else self.weights or (1.0,) * experts

    def check(self, experts: int, *, has_base: bool) -> None:
        """Raise ValueError where so many experts, with or without a base, cannot be merged so."""
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r}: expected {', '.join(METHODS)}; {nearest(self.method, METHODS)}")
        if self.method not in BASELESS and not has_base:
            raise ValueError(f"method {self.method} needs the base that the experts were trained from: --base")
        if experts != (wanted := COUNT.get(self.method, max(experts, 1))):
            raise ValueError(f"method {self.method} takes {wanted} expert{'s'[: wanted > 1]}, got {experts}")
        wanted = 1 if self.method in SHARE else experts
        if len(self.weights) not in {0, 1, wanted}:
            raise ValueError(f"weights {_said(self.weights)}: expected one, or one for each of {experts} experts")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights {_said(self.weights)}: expected finite numbers")
        if self.method in PROPORTIONS and not all(w >= 0 for w in self.of(experts)):
            raise ValueError(f"weights {_said(self.weights)}: {self.method} takes proportions, none below 0")
        if not any(self.of(experts)) and self.method not in SHARE:
            raise ValueError(f"weights {_said(self.weights)}: expected one that is not 0")
        if self.method in SHARE and not 0 <= self.of(experts)[0] <= 1:
            raise ValueError(f"weight {_said(self.weights)}: under {self.method} a share, 0 to 1")
        if not 0 < self.kept <= 1:
            raise ValueError(f"density {self.density:g}: expected above 0, at most 1")
        if self.density is not None and self.method not in DENSITY:
            raise ValueError(f"density: method {self.method} keeps all of a difference; leave it out")


def check_out(out: Path) -> Path:
    """Return the folder that a merge goes to, where that is to be had. Raises ValueError where something is there."""
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; choose another --out")
    return out


def _said(weights: tuple[float, ...]) -> str:
    return ", ".join(f"{w:g}" for w in weights)
