"""Prompts without a pool: every prompt once a pass, each pass in a new order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


class PassSampler:
    """Draw ids without replacement; when all were seen, start the next pass in a fresh permutation.

    A draw that crosses into the next pass takes first what it does not have yet, so that no prompt comes twice in one
    draw. The order of pass k is a function of (seed, name, k) and of what was taken so, and the position (pass, cursor,
    lead) is the whole state.

    Example: `PassSampler(["a", "b", "c"], seed=1, name="math").draw(4)` gives all three, then one of the next pass.
    """

    def __init__(self, ids: Sequence[str], *, seed: int, name: str) -> None:
        if not ids:
            raise ValueError(f"domain {name!r}: no training prompts to draw from")
        self.ids = ids
        self.seed = seed
        self.name = name
        self.passes = 0
        self.cursor = 0
        self.lead: list[int] = []
        """Places that begin this pass, whatever its permutation says."""
        self.places: list[int] = []
        """Of the last draw."""
        self._order = self._permutation()
        self._digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]

    def draw(self, n: int) -> list[str]:
        """Return the next `n` ids, different ones as long as there are enough."""
        places = self._take(n)
        begun = places.copy()
        while len(places) < n:
            self._begin_pass(begun, n - len(places))
            places += self._take(n - len(places))
        self.places = places
        return [self.ids[place] for place in places]

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "cursor": self.cursor, "lead": self.lead, "ids": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position. Raises ValueError if the ids are not those of the saved run."""
        if state["ids"] != self._digest:
            raise ValueError(f"domain {self.name!r}: the training rows differ from those of the saved run")
        self.passes, self.cursor, self.lead = state["passes"], state["cursor"], state["lead"]
        self._order = self._led_by(self.lead)

    def _take(self, n: int) -> list[int]:
        taken: list[int] = self._order[self.cursor : self.cursor + n].tolist()
        self.cursor += len(taken)
        return taken

    def _begin_pass(self, begun: Sequence[int], n: int) -> None:
        """Start the next pass for a draw that needs `n` more and has `begun` from the pass that it began in."""
        self.passes, self.cursor = self.passes + 1, 0
        order = self._permutation()
        is_held = np.isin(order, begun)
        self.lead = np.concatenate([order[~is_held], order[is_held]])[:n].tolist() if begun else []
        self._order = self._led_by(self.lead)

    def _led_by(self, lead: Sequence[int]) -> np.ndarray:
        order = self._permutation()
        return np.concatenate([np.array(lead, dtype=order.dtype), order[~np.isin(order, lead)]]) if lead else order

    def _permutation(self) -> np.ndarray:
        key = hashlib.sha256(f"{self.seed}/{self.name}/{self.passes}".encode()).digest()
        return np.random.default_rng(np.frombuffer(key, dtype=np.uint32)).permutation(len(self.ids)).astype(np.uint32)
