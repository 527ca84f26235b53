"""Which domain to probe next when there are many, and when enough were: a Gaussian process over what is known.

    T[x -> i] = m_i + g_i(x),   g_i ~ GP(0, s^2 [(1 - c) exp(-d(x, y)^2 / 2 l^2) + c cos(x, y)])
    d(x, y)^2 = mean over probed j, neither x nor y, of (T[j -> x] - T[j -> y])^2

Domains that respond alike to training on others, or whose own training moves the weights in like directions (`shared`),
are believed to move others alike; c is 1/2 where any cosine is known, else 0. m_i is the mean effect of the probed domains
on i, s^2 the variance around it, l the median distance, noise a tenth of s^2 (MBTL, arXiv:2408.04498). The next domain is
MBTL's, with predicted transfer in place of its slope times distance:

    argmax_x  mean_i max(0, mu(x -> i) + sqrt(log(n + 1)) sigma(x) - best_i),    best_i: largest T[j -> i] of the n probed

mu(x -> x) is the mean gain of a probed domain by its own training. K domains; a row of T [K, K] is NaN until it is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.matrix import TransferMatrix

NOISE = 0.1
"""Variance of the noise relative to that of the process."""
SETTLED = 3
"""Plans in a row that are alike, each with a domain more, after which no domain more is probed."""


def posterior(transfer: np.ndarray, cosines: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [K, K] and standard deviation [K] of T by row: of known rows what they are and 0.

    `cosines` [K, K], NaN where unknown. Without two known rows nothing is learned: the mean is 0 or what the one says.
    """
    weights, spread = weigh_rows(transfer, cosines)
    known = np.flatnonzero(~np.isnan(transfer).any(axis=1))
    mean = transfer.copy()
    for x in np.flatnonzero(np.isnan(transfer).any(axis=1)):
        mean[x] = np.einsum("ij,ji->i", weights[x][:, known], transfer[known])
        mean[x, x] = np.mean([transfer[j, j] for j in known]) if len(known) else 0.0
    return mean, spread


def weigh_rows(transfer: np.ndarray, cosines: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of T[j -> i] is in the posterior mean of T[x -> i], [K (x), K (i), K (j)], and sigma [K].

    A row of a domain on itself is no transfer, so it is left out of its own column.
    """
    size = len(transfer)
    known = np.flatnonzero(~np.isnan(transfer).any(axis=1))
    kernel = _kernel(transfer, known, cosines)
    weights, spread = np.zeros((size, size, size)), np.zeros(size)
    off = [transfer[j, i] for j in known for i in range(size) if i != j]
    scale = float(np.std(off)) if len(known) > 1 else 1.0
    for x in set(range(size)) - set(known.tolist()):
        for i in range(size):
            rows = [j for j in known if j != i]
            if not rows:
                continue
            gram = kernel[np.ix_(rows, rows)] + NOISE * np.eye(len(rows))
            own = np.linalg.solve(gram, kernel[rows, x])
            weights[x, i, rows] = own + (1 - own.sum()) / len(rows)  # the rest is the mean's
        gram = kernel[np.ix_(known, known)] + NOISE * np.eye(len(known))
        explained = kernel[known, x] @ np.linalg.solve(gram, kernel[known, x]) if len(known) else 0.0
        spread[x] = scale * math.sqrt(max(0.0, 1 - explained))
    return weights, spread


def _kernel(transfer: np.ndarray, known: np.ndarray, cosines: np.ndarray | None) -> np.ndarray:
    """Return k(x, y) [K, K] for s = 1; both parts are made positive semidefinite where gaps have left them not."""
    size = len(transfer)
    squares = np.zeros((size, size))
    for x in range(size):
        for y in range(size):
            others = [j for j in known if j not in (x, y)]
            squares[x, y] = np.mean((transfer[others, x] - transfer[others, y]) ** 2) if others and x != y else 0.0
    apart = squares[~np.eye(size, dtype=bool)]
    length = np.median(apart) if apart.size and np.median(apart) > 0 else 1.0
    alike = _semidefinite(np.exp(-squares / 2 / length))
    if cosines is None or np.isnan(cosines[~np.eye(size, dtype=bool)]).all():
        return alike
    return (alike + _semidefinite(np.where(np.eye(size, dtype=bool), 1.0, np.nan_to_num(cosines)))) / 2


def _semidefinite(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.maximum(values, 0.0)) @ vectors.T


def choose(transfer: np.ndarray, scores: np.ndarray, cosines: np.ndarray | None = None) -> int:
    """Return the next domain to be probed; `scores` [K] before any training decide while nothing else is known: the one
    nearest to one half, where rewards differ most.
    """
    unknown = np.flatnonzero(np.isnan(transfer).any(axis=1))
    known = np.setdiff1d(np.arange(len(transfer)), unknown)
    if not len(known):
        return int(np.abs(scores - 0.5).argmin())
    mean, spread = posterior(transfer, cosines)
    best = transfer[known].max(axis=0)
    hoped = mean[unknown] + math.sqrt(math.log(len(known) + 1)) * spread[unknown, None]
    return int(unknown[np.maximum(0.0, hoped - best).mean(axis=1).argmax()])


# --- of a file ----------------------------------------------------------------------------------------------------------


def probed(matrix: TransferMatrix) -> tuple[str, ...]:
    """Return the domains that were probed, in the order in which they were."""
    return tuple(dict.fromkeys(row.trained[0] for row in matrix.probes))


def next_domain(matrix: TransferMatrix) -> str:
    """Return the next domain to be probed; decided on the `steer` half. Needs one that is left."""
    steer = matrix.on("steer")
    base = [np.mean([row.mean_score(name) for row in steer.baselines(probe=True)]) for name in matrix.trainable]
    return matrix.trainable[choose(table(steer), np.array(base), _cosines(matrix))]


def completed(matrix: TransferMatrix) -> TransferMatrix:
    """Return the matrix with a predicted row, of each seed, for every domain that was not probed: nothing to be saved.

    The posterior mean is a weighted sum of measured rows, so it is taken item by item.
    """
    missing = [name for name in matrix.trainable if name not in probed(matrix)]
    if not missing or not matrix.probes:
        return matrix
    weights, _ = weigh_rows(table(matrix.on("steer")), _cosines(matrix))
    rows = [_predicted(matrix, name, seed, weights) for name in missing for seed in _seeds(matrix)]
    return replace(matrix, rows=(*matrix.rows, *rows))


def _seeds(matrix: TransferMatrix) -> list[int]:
    """Return the seeds with which every probed domain was trained."""
    of = [{row.seed for row in matrix.probes if row.trained == (name,)} for name in probed(matrix)]
    return sorted(set.intersection(*of))


def _predicted(matrix: TransferMatrix, name: str, seed: int, weights: np.ndarray) -> Evaluation:
    rows = {row.trained[0]: row for row in matrix.probes if row.seed == seed}
    base = next((row for row in matrix.baselines(probe=True) if row.seed == seed), matrix.baselines(probe=True)[0])
    names, x = matrix.trainable, matrix.trainable.index(name)
    own = np.mean([row.mean_score(n) - base.mean_score(n) for n, row in rows.items()])
    even = np.array([n in rows for n in names]) / len(rows)
    scores = {}
    for domain in matrix.domains:
        start = _floats(base.scores[domain])
        if domain == name:
            moved = start + own
        else:
            share = weights[x, names.index(domain)] if domain in names else even
            moved = start + sum(share[names.index(n)] * (_floats(r.scores[domain]) - start) for n, r in rows.items())
        scores[domain] = tuple(None if math.isnan(v) else float(v) for v in np.clip(moved, 0, 1))
    counts = [row.tokens for row in rows.values()]
    tokens = None if None in counts else round(float(np.mean([n for n in counts if n is not None])))
    step = next(iter(rows.values())).step
    return Evaluation(trained=(name,), step=step, seed=seed, scores=scores, probe=True, tokens=tokens)


def _floats(items: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in items], dtype=float)


def table(matrix: TransferMatrix) -> np.ndarray:
    """Return T among the trainable domains, [K, K]; NaN in the rows of those not probed."""
    names = matrix.trainable
    table = np.full((len(names), len(names)), np.nan)
    if matrix.probes:
        effects = Effects(matrix)
        columns = [effects.domains.index(name) for name in names]
        for name, row in zip(effects.trained, effects.transfer(), strict=True):
            table[names.index(name)] = row[columns]
    return table


def _cosines(matrix: TransferMatrix) -> np.ndarray | None:
    names = matrix.trainable
    found = np.full((len(names), len(names)), np.nan)
    for a, of in matrix.shared.items():
        for b, told in of.items():
            if a in names and b in names and (cosine := told["cosine"]) is not None:
                found[names.index(a), names.index(b)] = found[names.index(b), names.index(a)] = cosine
    return found if matrix.shared else None
