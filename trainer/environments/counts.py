"""What is counted of episodes between two logs: the metrics `environment/<d>/..`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from polyphony.curricula.records import FAILURES, Episode

TURNS = 4
"""Turns that are told apart; the last stands for all later ones too."""


@dataclass(slots=True)
class EpisodeSums:
    """Running sums of one domain's episodes."""

    episodes: int = 0
    turns: int = 0
    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    forfeits: int = 0
    faults: int = 0
    rewards: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)] * TURNS)
    """Of the episodes of each number of turns their sum and how many there are."""
    entropy: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)] * TURNS)
    """Of each turn its nats and tokens."""

    def add(self, episode: Episode, reward: float | None) -> None:
        """Count an episode."""
        self.episodes += 1
        self.turns += episode.turns
        self.calls += episode.calls
        self.failures.update(episode.failures)
        self.cuts.update([episode.cut] if episode.cut else [])
        self.forfeits += episode.is_forfeit
        self.faults += episode.fault is not None and not episode.is_forfeit
        if reward is not None and episode.turns:
            total, count = self.rewards[n := min(episode.turns, TURNS) - 1]
            self.rewards[n] = total + reward, count + 1

    def add_entropy(self, by_turn: Sequence[tuple[float, float]]) -> None:
        """Add the nats and tokens of each turn."""
        self.entropy = [(a + c, b + d) for (a, b), (c, d) in zip(self.entropy, by_turn, strict=True)]

    def metrics(self) -> dict[str, float]:
        """Return the `environment/<d>` metrics; NaN where nothing was counted."""
        asked = self.calls + self.failures["malformed_calls"]
        shares = {kind: _ratio(self.failures[kind], asked) for kind in FAILURES}
        by_turn = {f"entropy_turn_{n}": _ratio(*of) for n, of in enumerate(self.entropy, 1)}
        by_turn |= {f"reward_turns_{n}": _ratio(*of) for n, of in enumerate(self.rewards, 1)}
        return by_turn | {
            "turns": self.turns / self.episodes,
            "calls": self.calls / self.episodes,
            **shares,
            "cut_by_turns": self.cuts["turns"] / self.episodes,
            "cut_by_length": self.cuts["length"] / self.episodes,
            "forfeits": self.forfeits,
            "faults": self.faults,
        }


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
