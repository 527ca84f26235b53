"""What is counted of episodes between two logs: the metrics `environment/<d>/..`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from polyphony.curricula.records import FAILURES, Episode


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

    def add(self, episode: Episode) -> None:
        """Count an episode."""
        self.episodes += 1
        self.turns += episode.turns
        self.calls += episode.calls
        self.failures.update(episode.failures)
        self.cuts.update([episode.cut] if episode.cut else [])
        self.forfeits += episode.is_forfeit
        self.faults += episode.fault is not None and not episode.is_forfeit

    def metrics(self) -> dict[str, float]:
        """Return the `environment/<d>` metrics; NaN where nothing was counted."""
        shares = {kind: self.failures[kind] / self.calls if self.calls else math.nan for kind in FAILURES}
        return {
            "turns": self.turns / self.episodes,
            "calls": self.calls / self.episodes,
            **shares,
            "cut_by_turns": self.cuts["turns"] / self.episodes,
            "cut_by_length": self.cuts["length"] / self.episodes,
            "forfeits": self.forfeits,
            "faults": self.faults,
        }
