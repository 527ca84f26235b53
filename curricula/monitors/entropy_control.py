"""Control of each domain's entropy by the coefficient of an entropy term in the loss.

    e = (edge - H) / base       beyond an edge of the band, drawn in by `MARGIN` of its width; 0 between the two
    S <- S + e                  beyond an edge;    S <- DECAY * S    inside
    c = clip(push * e + rate * S, -most, most)

Proportional-integral control: the proportional part acts at once, because a collapse reinforces itself; the sum S grows
for as long as the domain is outside the band and decays slowly once it is back. Positive coefficients raise entropy,
negative ones lower it. One global coefficient, as in Skywork-OR1 (arXiv:2505.22312), would raise a structured domain's
entropy because an open-ended one lost its own.

A coefficient that raises entropy acts where no completion of the group got the full reward (`rows: unsolved`): there the
reward prefers no answer yet, while raising the entropy of a solved prompt costs reward (R = b - a e^H). In a draw without
such a group c is 0 and S stays. A coefficient that lowers entropy acts on all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Group

Means = Literal["coefficient", "sampling"]
"""What can move a domain's entropy: its coefficient in the loss, or how much is practised of what raises or lowers it."""
Control = Literal["none", "adaptive", "coefficient", "sampling"]
"""What a recipe asks for; `adaptive` is both means."""

MARGIN = 0.15
"""Share of the band's width that the control begins before each edge: a push needs time to be felt."""
WIDEST = 1000
"""Largest upper edge of a band: beyond that no policy comes."""
DECAY = 0.98
"""Of the sum, per draw inside: half is gone in 34. What held a domain inside is still needed there; 0.9 swung."""


def controlled(control: Control | Mapping[str, Control], means: Means, domains: Sequence[str]) -> tuple[str, ...]:
    """Return the domains whose entropy is held by these means; under a mapping, one that it does not name is not held.

    Example: `controlled({"math": "adaptive"}, "sampling", ("math", "code")) == ("math",)`
    """
    asked = control if isinstance(control, Mapping) else dict.fromkeys(domains, control)
    return tuple(name for name in domains if asked.get(name, "none") in ("adaptive", means))


@settings
class EntropySettings:
    """Token entropy of every domain: the band it is watched against, and what may keep it there."""

    band: tuple[float, float] = (0.5, 1.5)
    """Where it should stay, in multiples of the domain's entropy at the run's first evaluation. Half: structured domains of
    the lab lose that much while their score still rises. Leaving the band raises an alarm."""
    control: Control | Mapping[str, Control] = "none"
    """What keeps it there, for all domains or by domain (`{math: coefficient}`; those not named are not controlled).
    `coefficient`: an entropy term in the loss with a coefficient of each domain's own, which decays inside the band.
    `sampling`: the scheduler `adaptive` gives more to domains whose training moves the entropy back. `adaptive`: both, as
    far as the scheduler can."""
    push: float = Field(default=1.0, ge=0)
    """Proportional gain: the coefficient for an entropy outside the band by the base model's whole entropy."""
    rate: float = Field(default=0.02, gt=0)
    """Integral gain: how much the coefficient grows per draw at the same distance."""
    max_coefficient: float = Field(default=1.0, gt=0)
    """Largest absolute coefficient, as TRL's `entropy_coef_max`: at 1 the term weighs as much as an advantage of 1."""
    rows: Literal["unsolved", "all"] = "unsolved"
    """Where a coefficient that raises entropy acts: `unsolved` in groups without a full reward, so that solved prompts may
    keep a low entropy; `all` everywhere, as TRL's own entropy bonus."""

    def held(self, means: Means, domains: Sequence[str]) -> tuple[str, ...]:
        """Return the domains whose entropy is held by these means."""
        return controlled(self.control, means, domains)

    @property
    def asks_for_sampling(self) -> bool:
        """By that very word, so that a scheduler which cannot is an error; `adaptive` takes what there is."""
        return "sampling" in ([self.control] if isinstance(self.control, str) else self.control.values())

    @field_validator("control", mode="before")
    @classmethod
    def _is_a_word(cls, control: Any) -> Any:
        words = get_args(Control)
        if any(word not in words for word in (control.values() if isinstance(control, Mapping) else [control])):
            raise ValueError(f"expected {', '.join(words[:-1])} or {words[-1]}, or one of them by domain")
        return control

    @field_validator("band")
    @classmethod
    def _holds_the_base_model(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= band[0] < 1 < band[1] <= WIDEST:
            raise ValueError(f"expected multiples 0 <= low < 1 < high <= {WIDEST} of the base model's entropy")
        return band


@dataclass(kw_only=True, slots=True)
class EntropyControl:
    """The coefficients of the domains that are held so; the same on every rank, because what they are moved by is.

    Example: `EntropyControl(domains=("math",)).move("math", level=0.2, band=(0.4, 1.2), base=0.8)`
    """

    domains: Sequence[str]
    settings: EntropySettings = field(default_factory=EntropySettings)
    coefficients: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    """S of each domain."""

    def __post_init__(self) -> None:
        self.coefficients = dict.fromkeys(self.domains, 0.0)
        self.sums = dict.fromkeys(self.domains, 0.0)

    def move(
        self, domain: str, *, level: float, band: tuple[float, float], base: float, can_raise: bool = True
    ) -> float:
        """Return the domain's next coefficient; unchanged while level or band are unknown (NaN).

        `can_raise` says whether the draw has a row that a coefficient above 0 would act on.
        """
        if math.isnan(level) or not base > 0:
            return self.coefficients[domain]
        room = MARGIN * (band[1] - band[0])
        low, high = band[0] + room, band[1] - room
        error = (low - level if level < low else high - level if level > high else 0.0) / base
        if error > 0 and not can_raise:
            self.coefficients[domain] = 0.0
            return 0.0
        # the sum stops where it alone would reach the limit, so that it is not long in coming back
        limit, rate = self.settings.max_coefficient, self.settings.rate
        most = limit / rate
        total = self.sums[domain] + error if error else self.sums[domain] * DECAY
        self.sums[domain] = min(most, max(-most, total))
        wanted = self.settings.push * error + rate * self.sums[domain]
        self.coefficients[domain] = min(limit, max(-limit, wanted))
        return self.coefficients[domain]

    def can_raise(self, group: Group) -> bool:
        """Return whether a coefficient above 0 acts on this group's rows."""
        return group.domain in self.coefficients and (self.settings.rows == "all" or group.pass_rate == 0)

    def of_row(self, group: Group) -> float:
        """Return the coefficient of a row of this group, in units of advantage per nat."""
        coefficient = self.coefficients.get(group.domain, 0.0)
        return coefficient if coefficient < 0 or self.can_raise(group) else 0.0

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return what is remembered; JSON-able."""
        return {"coefficients": dict(self.coefficients), "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Restore `state_dict`."""
        self.coefficients = {name: float(state["coefficients"][name]) for name in self.domains}
        self.sums = {name: float(state["sums"][name]) for name in self.domains}
