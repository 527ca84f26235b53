"""Replay: the share of a draw that goes to domains whose stage is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from polyphony.curricula.schedulers.shares import check_counts, check_numbers

MOST = 0.5
"""Largest share of a draw that all earlier domains get together, so that a stage stays the stage of its domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """q_j = fraction age_j^-exponent / sum over earlier domains of the same, age_j in draws since its stage ended.

    Power-law rehearsal matches or beats regularisation in domain-incremental learning (arXiv:2401.10393); there the
    age counts from the last practice, which under constant replay would be the last draw.
    """

    kind: str = "power_law"
    """The only kind."""
    fraction: float = 0.25
    """Share of a draw for all earlier domains together; the paper uses 1 to 10 %, in our lab 25 % still lost the worst
    one."""
    exponent: float = 1.0
    """0 spreads the fraction evenly, 1 gives a domain twice as old half as much; 0.5 to 1.5 are usual."""

    def __post_init__(self) -> None:
        if self.kind != "power_law":
            raise ValueError(f"replay: kind is power_law, got {self.kind!r}")
        check_numbers(self, fraction=f"[0, {MOST}]", exponent="[0, inf)")

    def shares(self, ages: Mapping[str, int]) -> dict[str, float]:
        """Return the share of each earlier domain; `ages` in draws, at least 1. Empty without any."""
        weights = {name: age**-self.exponent for name, age in ages.items()}
        total = sum(weights.values())
        return {name: self.fraction * weight / total for name, weight in weights.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Protection:
    """More replay for a past domain while its measured backward transfer is below `-max_drop` with 95 % confidence."""

    max_drop: float = 0.02
    """Tolerated loss of held-out score since the end of the domain's stage."""
    share: float = 0.25
    """Share of a draw for each protected domain; all replay and protection together get half of a draw at most."""

    def __post_init__(self) -> None:
        check_numbers(self, max_drop="[0, 1]", share=f"[0, {MOST}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plateau:
    """A stage has plateaued when the mean score of its last `window` evaluations is less than `gain` above that of the
    `window` before.
    """

    window: int = 2
    """Evaluations averaged on each side; with 2 of 200 items the difference has a standard error of about 0.025."""
    gain: float = 0.01
    """Rise of the score below which the stage ends; 0 or less waits until the score falls."""

    def __post_init__(self) -> None:
        check_counts(self, window=1)
        check_numbers(self, gain="(-inf, inf)")

    def is_reached(self, scores: list[float]) -> bool:
        """Return whether the scores of a stage's evaluations, oldest first, have stopped rising."""
        recent, earlier = scores[-self.window :], scores[-2 * self.window : -self.window]
        return len(earlier) == self.window and sum(recent) - sum(earlier) < self.gain * self.window


Settings = TypeVar("Settings")


def read_settings(kind: type[Settings], given: Any, *, where: str) -> Settings:
    """Return settings given as such or as a mapping. Raises ValueError that names what they do not have."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a mapping of settings, got {given!r}")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{where} has no setting {unknown}; it has {known}")
    return kind(**given)


def combine(replay: Mapping[str, float], protected: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of earlier domains, scaled down together where they would exceed `MOST`."""
    shares = {name: share + protected.get(name, 0.0) for name, share in replay.items()}
    total = sum(shares.values())
    return {name: share * min(1.0, MOST / total) if total else 0.0 for name, share in shares.items()}
