"""Several samples of one prompt taken together: pass@k without bias, and what the majority says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the probability that k of the n samples, drawn without replacement, hold a correct one; NaN for n < k.

    1 - C(n - c, k) / C(n, k) as a product, the unbiased estimator of arXiv:2107.03374.
    """
    if not 0 <= correct <= n or k < 1:
        raise ValueError(f"pass@k needs 0 <= correct <= n and k >= 1, got correct={correct}, n={n}, k={k}")
    if n < k:
        return math.nan
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def majority_score(votes: Sequence[Hashable], scores: Sequence[float | None]) -> float:
    """Return the score of the commonest answer: the mean over its graded samples, and over answers that tie for it.

    NaN where no sample of a commonest answer was graded.
    """
    counts = Counter(votes)
    most = max(counts.values())
    means = []
    for vote in (vote for vote, count in counts.items() if count == most):
        graded = [s for v, s in zip(votes, scores, strict=True) if v == vote and s is not None]
        if graded:
            means.append(sum(graded) / len(graded))
    return sum(means) / len(means) if means else math.nan


def consistency(votes: Sequence[Hashable]) -> float:
    """Return the share of the samples that give the commonest answer: confidence by self-consistency."""
    return max(Counter(votes).values()) / len(votes)
