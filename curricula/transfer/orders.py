"""The best order under a rule in which each domain cares only about the set of domains trained after it.

    J(order) = sum_i [ sum_{j after i} after[i, j]  -  penalty max(0, floor_i - own_i - sum_{j after i} dH[j -> i]) ]

with after[i, j] = T[j -> i]. The first part alone is the linear ordering problem. Built from the last stage
backwards, the term of i is known when i is put in front of the set S that follows it, so a dynamic programme over
subsets is exact with the entropy part too: K 2^(K-1) steps. Above `EXACT_UP_TO` domains: insertion moves until none
helps, from several starts. K domains, B problems solved at once.

`Chooser` gives the order that the evidence asks for, over B resamples and J domains, with a prior where it is silent:
structured before open-ended, which Omni-Thinker (arXiv:2507.14783) found best; here it only breaks ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from polyphony.curricula.transfer.effects import LEVELS

EXACT_UP_TO = 16
"""Domains up to which the subset programme is used: 2^16 sets of 16 terms are 8 MB and 40 ms a problem."""


MANY_EXACT_UP_TO = 12
"""The same where many problems near a solved one are asked for: a thousand of 12 domains take about a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyTerm:
    """What an order costs in entropy. NaN in a domain's row means not measured: it has no entropy term."""

    own: np.ndarray
    """[K] nats after the domain's own stage."""
    change: np.ndarray
    """[K, K]; change[j, i] is dH[j -> i] in nats."""
    floor: np.ndarray
    """[K] nats below which it costs."""
    penalty: float
    """Score that one nat below the floor costs, summed over domains."""

    def part(self, kept: Sequence[int]) -> EntropyTerm:
        """Return the term for some of the domains."""
        return replace(self, own=self.own[kept], change=self.change[np.ix_(kept, kept)], floor=self.floor[kept])

    def cost(self, is_after: np.ndarray) -> np.ndarray:
        """Return the cost [..., K] of each domain; `is_after` [..., K, K] says which j come after i."""
        nats = self.own + np.einsum("...ij,ji->...i", is_after, np.nan_to_num(self.change))
        missing = np.isnan(self.own) | np.isnan(self.floor) | np.isnan(self.change).any(axis=0)
        return np.where(missing, 0.0, self.penalty * np.maximum(0.0, self.floor - nats))


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """B ordering problems that share their entropy term."""

    after: np.ndarray
    """[B, K, K]; after[b, i, j] is what i gains if j comes after it. The diagonal is ignored."""
    entropy: EntropyTerm | None = None

    def value(self, orders: np.ndarray) -> np.ndarray:
        """Return J of `orders` [B or 1, K] (positions first: orders[b, 0] is trained first), [B]."""
        rank = np.argsort(orders, axis=1)
        is_after = (rank[:, :, None] < rank[:, None, :]).astype(float)
        gained = (self.after * is_after).sum(axis=(1, 2))
        return gained if self.entropy is None else gained - self.entropy.cost(is_after).sum(axis=1)


def over_mean_order(transfer: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Return, [B], what `orders` [B or 1, K] gain over the mean of all orders under T [B, K, K], summed over domains."""
    after = transfer.transpose(0, 2, 1)
    off_diagonal = after.sum(axis=(1, 2)) - np.trace(after, axis1=1, axis2=2)
    return Objective(after=after).value(orders) - off_diagonal / 2


def best_orders(objective: Objective, *, start: np.ndarray | None = None) -> np.ndarray:
    """Return the best order of each problem, [B, K]; ties go to the order that comes first in the domains' order.

    With a `start` [K], the solution of a problem near all of these, more than `MANY_EXACT_UP_TO` domains are searched
    from there; without one, more than `EXACT_UP_TO` from several starts.
    """
    problems, size = objective.after.shape[:2]
    if size > (EXACT_UP_TO if start is None else MANY_EXACT_UP_TO):
        starts = None if start is None else start[None]
        return np.stack([search_order(_part(objective, b, b + 1), starts=starts) for b in range(problems)])
    chunk = max(1, 2**22 // (size * 2**size))
    solved = [_exact(_part(objective, b, b + chunk)) for b in range(0, problems, chunk)]
    return np.concatenate(solved)


def search_order(objective: Objective, *, starts: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Return a good order [K] of one problem: the best end of insertion moves from each start."""
    size = objective.after.shape[1]
    if starts is None:
        rng = np.random.default_rng(seed)
        preference = objective.after[0] - objective.after[0].T
        borda = np.argsort(-(preference - np.diag(np.diag(preference))).sum(axis=1), kind="stable")
        starts = np.stack([borda, np.arange(size), *(rng.permutation(size) for _ in range(18))])
    ends = np.stack([_descend(objective, order) for order in starts])
    return ends[np.argmax(objective.value(ends))]


def _part(objective: Objective, start: int, stop: int) -> Objective:
    return replace(objective, after=objective.after[start:stop])


def _descend(objective: Objective, order: np.ndarray) -> np.ndarray:
    value = objective.value(order[None])[0]
    while len(order) > 1:
        moved = order[_insertions(len(order))]
        values = objective.value(moved)
        best = int(np.argmax(values))
        if values[best] <= value + 1e-12:
            return order
        order, value = moved[best], values[best]
    return order


@lru_cache(maxsize=4)
def _insertions(size: int) -> np.ndarray:
    """Return the position lists [moves, K] that take one place out and put it back elsewhere."""
    places = list(range(size))
    moves = []
    for old in places:
        rest = places[:old] + places[old + 1 :]
        moves += [[*rest[:new], old, *rest[new:]] for new in places if new != old]
    return np.array(moves)


def _exact(objective: Objective) -> np.ndarray:
    problems, size = objective.after.shape[:2]
    terms = _terms(objective)
    best = np.zeros((problems, 2**size))
    first = np.zeros((problems, 2**size), dtype=np.int8)
    for masks, members, rest in _levels(size):
        candidates = best[:, rest] + terms[:, members, rest]  # [B, sets, members]
        chosen = candidates.argmax(axis=2)
        best[:, masks] = np.take_along_axis(candidates, chosen[..., None], axis=2)[..., 0]
        first[:, masks] = members[np.arange(len(masks)), chosen]
    left = np.full(problems, 2**size - 1)
    orders = np.empty((problems, size), dtype=np.int64)
    for place in range(size):
        orders[:, place] = first[np.arange(problems), left]
        left = left ^ (1 << orders[:, place])
    return orders


def _terms(objective: Objective) -> np.ndarray:
    """Return [B, K, 2^K]: the term of i when exactly the domains of the set come after it."""
    size = objective.after.shape[1]
    sets = _membership(size)
    terms = objective.after @ sets.T
    if objective.entropy is not None:
        is_after = np.broadcast_to(sets[:, None, :], (len(sets), size, size))
        terms = terms - objective.entropy.cost(is_after).T
    return terms


@lru_cache(maxsize=4)
def _membership(size: int) -> np.ndarray:
    return ((np.arange(2**size)[:, None] >> np.arange(size)) & 1).astype(float)


@lru_cache(maxsize=4)
def _levels(size: int) -> Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return, for each number of members, the sets, their members [sets, n] and each set without that member."""
    sets = _membership(size).astype(bool)
    counts = sets.sum(axis=1)
    levels = []
    for count in range(1, size + 1):
        masks = np.flatnonzero(counts == count)
        members = np.nonzero(sets[masks])[1].reshape(len(masks), count)
        levels.append((masks, members, masks[:, None] ^ (1 << members)))
    return levels


PRIOR = 1e-6
"""Score by which structured before open-ended is preferred in a tie; below anything that a held-out set can show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chooser:
    """Choose the order of J domains from their transfer, with a prior where the evidence is silent."""

    is_structured: np.ndarray
    """[J]"""
    entropy: EntropyTerm | None = None
    has_prior: bool = True
    """Whether structured goes before open-ended in a tie."""

    def choose(self, transfer: np.ndarray, resampled: np.ndarray) -> np.ndarray:
        """Return the best order [J] under T [J, J]; `resampled` [B, J, J] says which preferences are certain.

        i before j is preferred by T[j -> i] - T[i -> j]. Where its 95 % interval contains zero and the kinds differ,
        both entries become their mean and the structured one goes first unless certain pairs stand against it.
        """
        after, drawn = transfer.T, resampled.transpose(0, 2, 1)
        if not self.has_prior:
            return best_orders(self.objective(after[None]))[0]
        low, high = np.quantile(drawn - drawn.transpose(0, 2, 1), LEVELS, axis=0)
        mixed = self.is_structured[:, None] != self.is_structured[None, :]
        tied = mixed & ~((low > 0) | (high < 0))
        prior = PRIOR * (self.is_structured[:, None] & ~self.is_structured[None, :])
        return best_orders(self.objective(np.where(tied, (after + after.T) / 2 + prior, after)[None]))[0]

    def part(self, kept: Sequence[int]) -> Chooser:
        """Return the chooser for some of the domains."""
        return replace(
            self,
            is_structured=self.is_structured[kept],
            entropy=None if self.entropy is None else self.entropy.part(kept),
        )

    def overruled(self, transfer: np.ndarray, resampled: np.ndarray) -> Chooser:
        """Return the chooser without its prior where all pairs together speak against it, else itself.

        No single pair may be certain while the order as a whole is. Two cases, each against the 95 % point of what noise
        alone lets the best order gain: the best order by evidence beats the one with the prior by more than that; or it
        beats the mean order by more than that, and the one with the prior does not.
        """
        careful = self.choose(transfer, resampled)[None]
        drawn = resampled - transfer
        noise = Objective(after=drawn.transpose(0, 2, 1))
        luckiest = best_orders(noise, start=careful[0])
        problem = self.objective(transfer.T[None])
        best = best_orders(problem)
        gap = problem.value(best) - problem.value(careful)
        is_better = gap[0] > np.quantile(noise.value(luckiest) - noise.value(careful), 0.95)
        q = np.quantile(over_mean_order(drawn, luckiest), 0.95)
        table = transfer[None]
        is_needed = over_mean_order(table, best)[0] > q >= over_mean_order(table, careful)[0]
        return replace(self, has_prior=False) if is_better or is_needed else self

    def objective(self, after: np.ndarray) -> Objective:
        """Return the ordering problems [B, J, J] with this chooser's entropy term."""
        return Objective(after=after, entropy=self.entropy)
