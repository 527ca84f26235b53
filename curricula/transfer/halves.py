"""The two halves of every held-out set: `steer` decides, `report` is published. No item is ever in both.

Whatever chooses (probe, plan, scheduler, guardrail, best checkpoint) sees only `steer`; every published score and
curve is `report`, so that no published number was picked for being high.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from polyphony.curricula.records import Evaluation

Half = Literal["steer", "report"]


def half(item_id: str) -> Half:
    """Return the half of one item: the parity of its sha256, a fair coin that depends on nothing but the id.

    So an item stays in its half when the held-out set is cut, reordered or extended. Use `halves` for a whole set.
    """
    return "steer" if hashlib.sha256(item_id.encode()).digest()[-1] % 2 == 0 else "report"


def halves(ids: Sequence[str]) -> tuple[Half, ...]:
    """Return the half of every item of one held-out set, in its order; neither half is empty.

    Where the coin puts all items on one side (2 items: every other time; n items: 2^(1-n)), the id with the smallest
    sha256 changes sides, so only in sets that small can an item's half depend on its neighbours. Raises ValueError
    for fewer than two different ids.
    """
    if len(set(ids)) < 2:
        raise ValueError(f"a held-out set needs at least 2 different items to be split, got ids {list(ids)}")
    sides: list[Half] = [half(item_id) for item_id in ids]
    if len(set(sides)) == 2:
        return tuple(sides)
    other: Half = "report" if sides[0] == "steer" else "steer"
    moved = min(ids, key=lambda item_id: hashlib.sha256(item_id.encode()).digest())
    return tuple(other if item_id == moved else side for item_id, side in zip(ids, sides, strict=True))


def on_half(evaluation: Evaluation, items: Mapping[str, Sequence[str]], which: Half) -> Evaluation:
    """Return the evaluation with only the items of one half; `items` names each domain's ids in the scores' order."""
    scores = {}
    for name, values in evaluation.scores.items():
        if len(items[name]) != len(values):
            raise ValueError(f"domain {name!r}: {len(values)} scores for {len(items[name])} item ids")
        scores[name] = tuple(v for v, side in zip(values, halves(items[name]), strict=True) if side == which)
    return replace(evaluation, scores=scores)
