"""Which prompt inside a domain: every prompt once a pass, each pass in a new order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


class PassSampler:
    """Draw ids without replacement; when all were seen, start the next pass in a fresh permutation.

    The order of pass k is a function of (seed, name, k) alone, so the position (pass, cursor) is the whole state.

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
        self._order = self._permutation()
        self._digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]

    def draw(self, n: int) -> list[str]:
        """Return the next `n` ids."""
        drawn: list[str] = []
        while len(drawn) < n:
            if self.cursor == len(self.ids):
                self.passes, self.cursor = self.passes + 1, 0
                self._order = self._permutation()
            taken: list[int] = self._order[self.cursor : self.cursor + n - len(drawn)].tolist()
            drawn.extend(self.ids[i] for i in taken)
            self.cursor += len(taken)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "cursor": self.cursor, "ids": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position. Raises ValueError if the ids are not those of the saved run."""
        if state["ids"] != self._digest:
            raise ValueError(f"domain {self.name!r}: the training rows differ from those of the saved run")
        self.passes, self.cursor = state["passes"], state["cursor"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        key = hashlib.sha256(f"{self.seed}/{self.name}/{self.passes}".encode()).digest()
        return np.random.default_rng(np.frombuffer(key, dtype=np.uint32)).permutation(len(self.ids)).astype(np.uint32)
