"""A prompt's posterior pass rate, the five states that follow from it, and how a prompt is sampled among the open ones.

Prior Beta(1, 1); a visit of G graded completions adds their successes and failures after what was known is discounted, so
that old evidence about an old policy fades (MoPPS, arXiv:2507.04632, uses the same posterior). A reward counts as that
share of a success, cut to [0, 1]. N prompts.

Open prompts are sampled uniformly or by their learnability p (1 - p) (Thompson sampling). `RankedSet` keeps places 0..N-1
so that the k-th smallest member is found in O(log N), a Fenwick tree over the members of blocks of places: its order is that
of the places, whatever happened before, so that a set rebuilt after a restart picks alike.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from pydantic import Field

from polyphony.curricula.declarations import find_class, settings

CONFIDENCE = 0.95
"""One-sided confidence that a pass rate lies below `impossible_below`."""


FEWEST_VISITS = 2
"""A prompt is never called impossible after one visit, however many completions it had."""


class State(IntEnum):
    """Where a prompt stands; every state has a way back."""

    UNSEEN = 0
    ACTIVE = 1
    DEFERRED = 2
    """Too hard for now."""
    IMPOSSIBLE = 3
    """Too hard with confidence: a wrong reference answer is the likeliest reason."""
    MASTERED = 4


UNSEEN, ACTIVE, DEFERRED, IMPOSSIBLE, MASTERED = STATES = tuple(State)
"""By these names because a look into an Enum costs as much as a visit's arithmetic."""


RETRIED = (DEFERRED, MASTERED, IMPOSSIBLE)
"""States that are practised by schedule only, the least bad first: nearest to a pass rate that teaches something."""


WAITING = (ACTIVE, *RETRIED)
"""States in which a prompt may have to wait; an ACTIVE one only rests."""


@settings
class Band:
    """The pass rates between which a prompt is selected for training."""

    impossible_below: float = Field(default=0.05, gt=0, lt=1)
    """A prompt whose pass rate is below this with 95 % confidence is IMPOSSIBLE: 64 failures in a row, or 8 groups of 8."""
    defer_below: float = Field(default=0.125, gt=0, lt=1)
    """Posterior mean below it: DEFERRED. One visit of 8 failures says so (1/10)."""
    mastered_above: float = Field(default=0.9, gt=0, lt=1)
    """Posterior mean above it: MASTERED. Two visits of 8 successes say so (17/18), one does not (9/10)."""

    def __post_init__(self) -> None:
        if not self.impossible_below <= self.defer_below < self.mastered_above:
            raise ValueError("expected impossible_below <= defer_below < mastered_above")

    def classify(self, successes: Any, failures: Any, visits: Any) -> np.ndarray:
        """Return the state of each prompt, [N], from its discounted counts and its visits, [N] each."""
        from scipy.special import betainc  # slow to import, and settings are read without it

        a, b = 1.0 + np.asarray(successes, dtype=float), 1.0 + np.asarray(failures, dtype=float)
        mean = a / (a + b)
        states = np.where(mean > self.mastered_above, MASTERED, ACTIVE)
        states = np.where(mean < self.defer_below, DEFERRED, states)
        hopeless = (betainc(a, b, self.impossible_below) >= CONFIDENCE) & (np.asarray(visits) >= FEWEST_VISITS)
        states = np.where(hopeless, IMPOSSIBLE, states)
        return np.where(np.asarray(visits) == 0, UNSEEN, states).astype(np.uint8)

    def classify_one(self, a: float, b: float, visits: int) -> State:
        """Return the state of one prompt that was visited, by its Beta posterior; as `classify`, without arrays."""
        mean = a / (a + b)
        if mean >= self.defer_below:  # of a log-concave density at most 1 - 1/e lies below its mean: not impossible
            return MASTERED if mean > self.mastered_above else ACTIVE
        if visits < FEWEST_VISITS:
            return DEFERRED
        from scipy.special import betainc  # slow to import, and settings are read without it

        return IMPOSSIBLE if betainc(a, b, self.impossible_below) >= CONFIDENCE else DEFERRED


SAMPLINGS = {
    "uniform": "polyphony.curricula.prompts.estimate:Uniform",
    "thompson": "polyphony.curricula.prompts.estimate:Thompson",
}
"""Registry name to `module:Class`. One says by `candidates(n)` how many it wants to see, drawn uniformly from the open
prompts of a domain, to choose `n`; it chooses by `choose(posteriors, n, generator)`, their places by each one's Beta."""


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
    try:
        return find_class("pool.sampling", SAMPLINGS, name)()
    except TypeError as error:
        raise ValueError(f"pool.sampling {name!r} cannot be used: {error}") from error


BLOCK = 256
"""Places that a `RankedSet` counts together: numpy finds a member among so many as fast as Python goes five levels down."""


class RankedSet:
    """Members of 0..N-1, counted and picked by rank.

    Example: `RankedSet(np.array([True, False, True])).pop(1)` is 2.
    """

    def __init__(self, member: np.ndarray) -> None:
        """Build from a mask [N] in O(N)."""
        self._bytes = bytearray(member.astype(bool).tobytes())  # a byte of it is read and written faster than numpy's
        self.member = np.frombuffer(self._bytes, dtype=bool)
        """Who is in, [N]: a view, for reading."""
        counts = np.add.reduceat(self.member, np.arange(0, len(member), BLOCK), dtype=np.int64) if len(member) else []
        n = len(counts)
        before = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        places = np.arange(1, n + 1)
        self._tree = np.concatenate([[0], before[places] - before[places - (places & -places)]]).tolist()
        self._top = 1 << n.bit_length() - 1 if n else 0
        self._count = int(before[-1])

    def __len__(self) -> int:
        return self._count

    def add(self, place: int) -> None:
        if not self._bytes[place]:
            self._change(place, 1)

    def remove(self, place: int) -> None:
        if self._bytes[place]:
            self._change(place, -1)

    def pop(self, rank: int) -> int:
        """Take out the member with `rank` smaller members; return it. Raises IndexError for a rank that no member has."""
        if not 0 <= rank < self._count:
            raise IndexError(f"rank {rank} in a set of {self._count}")
        tree, size, block, step = self._tree, len(self._tree), 0, self._top
        while step:
            ahead = block + step
            if ahead < size:
                if tree[ahead] <= rank:
                    block = ahead
                    rank -= tree[ahead]
                else:
                    tree[ahead] -= 1  # it counts the member
            step >>= 1
        start = block * BLOCK
        place = start + self.member[start : start + BLOCK].nonzero()[0].item(rank)
        self._bytes[place] = 0
        self._count -= 1
        return place

    def _change(self, place: int, by: int) -> None:
        self._bytes[place] = by > 0
        self._count += by
        tree, size, i = self._tree, len(self._tree), place // BLOCK + 1
        while i < size:
            tree[i] += by
            i += i & -i
