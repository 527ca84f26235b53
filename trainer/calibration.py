"""Whether the policy knows what it knows: confidences [N] in [0, 1] against what was correct [N], 0 or 1."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata

BINS = 10
"""Of equal mass, so that no bin is empty; ten as in Guo et al. (arXiv:1706.04599), whose bins have equal width."""


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, bins: int = BINS) -> float:
    """Return the mean of |accuracy - mean confidence| over bins of equal mass, weighted by size; NaN for no answers.

    Biased upwards in small samples: N perfectly calibrated answers give about sqrt(bins / N) / 2.
    """
    if not len(confidence):
        return math.nan
    order = np.argsort(confidence, kind="stable")
    gaps = [
        abs(float(correct[part].sum() - confidence[part].sum()))
        for part in np.array_split(order, min(bins, len(order)))
    ]
    return sum(gaps) / len(confidence)


def auroc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the probability that a correct answer has more confidence than a wrong one, ties by half.

    The Mann-Whitney statistic by ranks; NaN where all answers are correct, or none.
    """
    n = len(correct)
    positive = float(correct.sum())
    if not 0 < positive < n:
        return math.nan
    ranks = rankdata(confidence)
    return float((ranks @ correct - positive * (positive + 1) / 2) / (positive * (n - positive)))


def brier(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the mean squared distance of confidence and outcome; NaN for no answers."""
    return float(np.mean((confidence - correct) ** 2)) if len(confidence) else math.nan
