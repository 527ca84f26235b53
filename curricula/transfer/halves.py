"""The two halves of every held-out set: `steer` decides, `report` is published. No item is ever in both.

Whatever chooses (probe, plan, scheduler, guardrail, entropy band, best checkpoint) sees only `steer`; every published
score, entropy, distance and sample is `report`, so that no published number was picked for being high. Everything that
is known item by item is split here. What acts says what it saw: an alarm, or a place in the entropy band, is of `steer`.
`polyphony eval` and the counts of failed gradings are of all items: the score that it gives of a checkpoint which was
chosen as the best is a little high.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Literal, TypeVar

from polyphony.curricula.records import Evaluation, per_token

T = TypeVar("T")
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


def taken(values: Sequence[T], ids: Sequence[str], which: Half) -> tuple[T, ...]:
    """Return what belongs to the items of one half; `values` has an entry an item, in the order of `ids`."""
    return _taker(tuple(ids), which)(values)


@lru_cache(maxsize=4096)
def _taker(ids: tuple[str, ...], which: Half) -> Callable[[Sequence[T]], tuple[T, ...]]:
    """Return what takes one half out of a set's values: an id is hashed once, however many evaluations there are."""
    places = [i for i, side in enumerate(halves(ids)) if side == which]
    return itemgetter(*places) if len(places) > 1 else lambda values: (values[places[0]],)


def on_half(evaluation: Evaluation, items: Mapping[str, Sequence[str]], which: Half) -> Evaluation:
    """Return the evaluation of one half of the items; `items` names each domain's ids in the scores' order.

    Scores item by item, entropy as one number a domain: of that half where the row has it by item, else of all.
    """
    scores = {}
    for name, values in evaluation.scores.items():
        if len(items[name]) != len(values):
            raise ValueError(f"domain {name!r}: {len(values)} scores for {len(items[name])} item ids")
        scores[name] = taken(values, items[name], which)
    by_item = evaluation.entropy_items
    entropy = {
        name: per_token(taken(by_item[name], items[name], which)) if name in by_item else nats
        for name, nats in evaluation.entropy.items()
    }
    measured = {name: nats for name, nats in entropy.items() if not math.isnan(nats)}
    return replace(evaluation, scores=scores, entropy=measured, entropy_items={}, kl_items={})
