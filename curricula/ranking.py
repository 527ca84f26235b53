"""A set of places 0..N-1 from which the k-th smallest member is found in O(log N): a Fenwick tree over membership.

The order is that of the places, whatever happened before, so that a set rebuilt after a restart picks alike.
"""

from __future__ import annotations

import numpy as np


class RankedSet:
    """Members of 0..N-1, counted and picked by rank.

    Example: `RankedSet(np.array([True, False, True])).find(1)` is 2.
    """

    def __init__(self, member: np.ndarray) -> None:
        """Build from a mask [N] in O(N)."""
        self.member = member.astype(bool).copy()
        n = len(member)
        before = np.concatenate([[0], np.cumsum(self.member, dtype=np.int64)])
        places = np.arange(1, n + 1)
        self._tree = np.concatenate([[0], before[places] - before[places - (places & -places)]]).tolist()
        self._top = 1 << n.bit_length() - 1 if n else 0
        self._count = int(before[-1])

    def __len__(self) -> int:
        return self._count

    def add(self, place: int) -> None:
        if not self.member[place]:
            self._change(place, 1)

    def remove(self, place: int) -> None:
        if self.member[place]:
            self._change(place, -1)

    def find(self, rank: int) -> int:
        """Return the member with `rank` smaller members. Raises IndexError for a rank that no member has."""
        if not 0 <= rank < self._count:
            raise IndexError(f"rank {rank} in a set of {self._count}")
        place, step = 0, self._top
        while step:
            if place + step < len(self._tree) and self._tree[place + step] <= rank:
                place += step
                rank -= self._tree[place]
            step >>= 1
        return place

    def _change(self, place: int, by: int) -> None:
        self.member[place] = by > 0
        self._count += by
        i = place + 1
        while i < len(self._tree):
            self._tree[i] += by
            i += i & -i
