"""Rejection-sampling fine-tuning: the policy is trained on its own accepted samples only (RAFT, arXiv:2304.06767).

On the same draws, scores and update as GRPO: an accepted row gets advantage 1, any other 0, so that on policy the
gradient is that of the log-likelihood of the accepted samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polyphony.curricula.records import Group
from polyphony.rewards.partitions import connected
from polyphony.trainer.scoring import Graded


@dataclass(frozen=True, kw_only=True, slots=True)
class RftSettings:
    """Which samples are accepted."""

    accept_from: float = 1.0
    """Smallest reward of an accepted sample; 1 is the full reward of a verifiable answer."""
    top_k: int | None = None
    """Most samples a prompt, the best first; None takes all accepted."""
    dedup: Any = None
    """A partitioner (`exact`, `normalised`, `answer_signature`, ..): one sample of each semantic class; None keeps all."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"rft: top_k must be at least 1, got {self.top_k}")

    def is_useful(self, group: Group) -> bool:
        """Whether a group has anything to be learned from."""
        return any(r >= self.accept_from for r in group.graded)


def accepted(group: Sequence[Graded], settings: RftSettings, partitioner: Any = None) -> list[int]:
    """Return the places of the samples of one group that are trained on, in order."""
    passed = [i for i, g in enumerate(group) if g.reward is not None and g.reward >= settings.accept_from]
    best = sorted(passed, key=lambda i: -float(group[i].reward or 0.0))  # stable: the earlier of equals first
    if partitioner is not None and best:
        best = _first_of_classes(best, [str(group[i].text) for i in best], partitioner)
    return sorted(best[: settings.top_k])


def _first_of_classes(places: Sequence[int], texts: Sequence[str], partitioner: Any) -> list[int]:
    same = partitioner.same([list(texts)], [None])[0]
    if same is None:  # it could not tell: nothing is thrown away
        return list(places)
    seen: set[int] = set()
    return [i for i, c in zip(places, connected(same), strict=True) if not (c in seen or seen.add(c))]
