"""The best order under a rule in which each domain cares only about the set of domains trained after it.

    J(order) = sum_i [ sum_{j after i} after[i, j]  -  penalty max(0, floor_i - own_i - sum_{j after i} dH[j -> i]) ]

with after[i, j] = T[j -> i]. The first part alone is the linear ordering problem. Built from the last stage
backwards, the term of i is known when i is put in front of the set S that follows it, so a dynamic programme over
subsets is exact with the entropy part too: K 2^(K-1) steps. More domains than `is_exact` allows are searched: the value of
a domain in each of K places is one running sum, in all problems at once. K domains, B problems solved at once.

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
"""The same where many problems are asked for at once: a thousand of 12 domains take about a second."""


WALKS, SHAKES, DOMAINS_A_SWAP = 20, 10, 6
"""Of `search_orders`. 20 walks find the best of 12 domains in 50 random problems of 50 (`bench plan`); with one walk, as
each of a thousand resamples has, ten shakes leave .2 % of the gain at 12 domains and .8 % at 40, none would leave 2 and 4 %.
"""


LEAST_GAIN, MOST_SWEEPS = 1e-12, 100
"""What a move must gain, as less is rounding; rounds over all domains, of which about five are needed."""


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

    def without_gaps(self) -> EntropyTerm:
        """Return the term with a floor of minus infinity where a domain has none, and no change by a domain itself."""
        missing = np.isnan(self.own) | np.isnan(self.floor) | np.isnan(self.change).any(axis=0)
        return replace(
            self,
            own=np.nan_to_num(self.own),
            change=np.nan_to_num(self.change) * ~np.eye(len(self.own), dtype=bool),
            floor=np.where(missing, -np.inf, self.floor),
        )

    def nats(self, is_after: np.ndarray) -> np.ndarray:
        """Return each domain's entropy at the end [..., K]; `is_after` [..., K, K] says which j come after i."""
        return self.own + np.einsum("...ij,ji->...i", is_after, self.change)

    def cost(self, nats: np.ndarray) -> np.ndarray:
        """Return what each domain's entropy at the end costs, [..., K]."""
        return self.penalty * np.maximum(0.0, self.floor - nats)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """B ordering problems that share their entropy term."""

    after: np.ndarray
    """[B, K, K]; after[b, i, j] is what i gains if j comes after it. The diagonal is ignored."""
    entropy: EntropyTerm | None = None

    def value(self, orders: np.ndarray) -> np.ndarray:
        """Return J of `orders` [B or 1, K] (positions first: orders[b, 0] is trained first), [B]."""
        is_after = _is_after(np.argsort(orders, axis=1))
        gained = (self.after * is_after).sum(axis=(1, 2))
        if self.entropy is None:
            return gained
        term = self.entropy.without_gaps()
        return gained - term.cost(term.nats(is_after)).sum(axis=1)


def _is_after(ranks: np.ndarray) -> np.ndarray:
    """Return which j come after i [B, K, K], 1 or 0, from the places [B, K] of the domains."""
    return (ranks[:, :, None] < ranks[:, None, :]).astype(float)


def over_mean_order(transfer: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Return, [B], what `orders` [B or 1, K] gain over the mean of all orders under T [B, K, K], summed over domains."""
    after = transfer.transpose(0, 2, 1)
    off_diagonal = after.sum(axis=(1, 2)) - np.trace(after, axis1=1, axis2=2)
    return Objective(after=after).value(orders) - off_diagonal / 2


def is_exact(size: int, *, problems: int = 1) -> bool:
    """Return whether `best_orders` proves its orders of `size` domains best; else it searches for good ones."""
    return size <= (EXACT_UP_TO if problems == 1 else MANY_EXACT_UP_TO)


def best_orders(objective: Objective, *, start: np.ndarray | None = None) -> np.ndarray:
    """Return the best order of each problem, [B, K]; ties go to the order that comes first in the domains' order.

    Where they are searched (see `is_exact`), none is worse than `start` [K].
    """
    problems, size = objective.after.shape[:2]
    if not is_exact(size, problems=problems):
        return search_orders(objective, start=start)
    chunk = max(1, 2**22 // (size * 2**size))
    solved = [_exact(_part(objective, b, b + chunk)) for b in range(0, problems, chunk)]
    return np.concatenate(solved)


def search_orders(objective: Objective, *, start: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Return a good order of each problem, [B, K], by iterated local search (Schiavinotto and Stuetzle, "The linear
    ordering problem: instances, search space analysis and algorithms", JMMA 3, 2004).

    `WALKS` walks are shared out among the problems, at least one to each. A problem's first begins at `start` [K], or
    with the domains that gain most by being early; others anywhere. Each is disturbed `SHAKES` times, and goes back
    where that gained nothing.
    """
    problems, size = objective.after.shape[:2]
    walks, rng = max(1, WALKS // problems), np.random.default_rng(seed)
    repeated = replace(objective, after=np.repeat(objective.after, walks, axis=0))
    early = np.ascontiguousarray((repeated.after - repeated.after.transpose(0, 2, 1)).transpose(1, 0, 2))
    greedy = np.argsort(-early[:, ::walks].sum(axis=2).T, axis=1, kind="stable")
    first = greedy if start is None else np.tile(start, (problems, 1))
    others = rng.permuted(np.tile(np.arange(size), (problems, walks - 1, 1)), axis=2)
    orders = _descend(early, objective.entropy, np.concatenate([first[:, None], others], axis=1).reshape(-1, size))
    values = repeated.value(orders)
    for _ in range(SHAKES):
        tried = _descend(early, objective.entropy, _shaken(orders, rng=rng))
        reached = repeated.value(tried)
        is_better = reached > values
        orders, values = np.where(is_better[:, None], tried, orders), np.where(is_better, reached, values)
    best = values.reshape(problems, walks).argmax(axis=1)
    return orders.reshape(problems, walks, size)[np.arange(problems), best]


def _part(objective: Objective, start: int, stop: int) -> Objective:
    return replace(objective, after=objective.after[start:stop])


def _shaken(orders: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """Return the orders [B, K] with pairs of places exchanged in each: one for every `DOMAINS_A_SWAP` domains."""
    shaken, rows, size = orders.copy(), np.arange(len(orders)), orders.shape[1]
    for _ in range(max(1, size // DOMAINS_A_SWAP)):
        one, other = rng.integers(size, size=(2, len(orders)))
        shaken[rows, one], shaken[rows, other] = shaken[rows, other], shaken[rows, one]
    return shaken


def _descend(early: np.ndarray, entropy: EntropyTerm | None, orders: np.ndarray) -> np.ndarray:
    """Return the orders [B, K] after insertions, the best of each domain in turn, until no insertion gains anything."""
    found, unfinished = orders.copy(), np.arange(len(orders))
    for _ in range(MOST_SWEEPS):  # where values are huge, rounding could turn two orders into each other for ever
        walks = _Walks(early[:, unfinished], entropy, found[unfinished])
        has_moved = np.any([walks.insert(domain) for domain in range(len(early))], axis=0)
        found[unfinished] = walks.orders
        unfinished = unfinished[has_moved]
        if not len(unfinished):
            break
    return found


class _Walks:
    """B orders on their way, each through a problem of its own."""

    def __init__(self, early: np.ndarray, entropy: EntropyTerm | None, orders: np.ndarray) -> None:
        self.early = early
        """[K, B, K]; early[i, b, j] is what problem b gains where i is before j rather than after it."""
        self.orders, self.ranks = orders, np.argsort(orders, axis=1)
        self.entropy = None if entropy is None else entropy.without_gaps()
        if self.entropy is not None:
            self.nats = self.entropy.nats(_is_after(self.ranks))

    def insert(self, domain: int) -> np.ndarray:
        """Put a domain where its order is worth most; return which orders that changed, [B]."""
        lost = self._lost_before_each_place(domain)
        rows, place, to = np.arange(len(lost)), self.ranks[:, domain], lost.argmin(axis=1)
        has_moved = lost[rows, to] < lost[rows, place] - LEAST_GAIN
        moved = np.flatnonzero(has_moved)
        place, to = place[moved], (to - (to > place))[moved]
        self._move(domain, moved, place[:, None], to[:, None])
        return has_moved

    def _lost_before_each_place(self, domain: int) -> np.ndarray:
        """Return, up to a constant, what is lost where the domain stands before the first, .., behind the last: [B, K + 1].

        A running sum over the domains passed, so all K places cost as much to know as one.
        """
        term, by_passing = self.entropy, self.early[domain]
        lost = np.zeros((len(self.orders), self.orders.shape[1] + 1))
        if term is not None:
            without = self.nats - term.change[domain] * (self.ranks < self.ranks[:, domain, None])
            by_passing = by_passing + term.cost(without + term.change[domain]) - term.cost(without)
        np.cumsum(np.take_along_axis(by_passing, self.orders, axis=1), axis=1, out=lost[:, 1:])
        if term is not None:
            nats = np.full(lost.shape, term.own[domain])
            nats[:, :-1] += term.change[:, domain][self.orders][:, ::-1].cumsum(axis=1)[:, ::-1]
            lost += term.penalty * np.maximum(0.0, term.floor[domain] - nats)
        return lost

    def _move(self, domain: int, rows: np.ndarray, place: np.ndarray, to: np.ndarray) -> None:
        """Move a domain in some of the orders, from its place to another, [rows, 1] each."""
        ranks = self.ranks[rows]
        overtaken = ((place < ranks) & (ranks <= to)).astype(int) - ((to <= ranks) & (ranks < place))
        ranks -= overtaken
        ranks[:, domain] = to[:, 0]
        self.ranks[rows] = ranks
        self.orders[rows] = np.argsort(ranks, axis=1)
        if self.entropy is not None:
            nats = self.nats[rows] + overtaken * self.entropy.change[domain]
            nats[:, domain] -= overtaken @ self.entropy.change[:, domain]
            self.nats[rows] = nats


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
        term = objective.entropy.without_gaps()
        terms = terms - term.cost(term.nats(is_after)).T
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

    def overruled(self, transfer: np.ndarray, resampled: np.ndarray, luckiest: np.ndarray) -> Chooser:
        """Return the chooser without its prior where all pairs together speak against it, else itself.

        `luckiest` [B, J] are the best orders under `resampled - transfer`.

        No single pair may be certain while the order as a whole is. Two cases, each against the 95 % point of what noise
        alone lets the best order gain: the best order by evidence beats the one with the prior by more than that; or it
        beats the mean order by more than that, and the one with the prior does not.
        """
        careful = self.choose(transfer, resampled)[None]
        drawn = resampled - transfer
        noise = Objective(after=drawn.transpose(0, 2, 1))
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
