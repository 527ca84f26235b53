"""What held-out answers say of a domain, each number with an interval: bootstrap over prompts, paired across models.

A prompt's samples stay together in every resample, and the same resamples serve every statistic and every model, so a
difference between two models on the same items is paired. N items, k samples an item, R resamples.

Of several samples of one prompt: pass@k without bias, and what the majority says. Of calibration, whether the policy knows
what it knows: confidences [N] in [0, 1] against what was correct [N], 0 or 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import rankdata

from polyphony.curricula.intervals import UNDEFINED, Interval
from polyphony.trainer.evaluation.answers import Answer


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


RESAMPLES = 1000
"""Bootstrap resamples: the ends of a 95 % interval then move by a twentieth of its width between seeds."""


Statistic = Callable[[np.ndarray], float]
"""A number of the items at these places [N], which may repeat."""


@dataclass(kw_only=True, slots=True)
class Answers:
    """The answers of one domain's items in their order.

    Example: `Answers(sampled=rows, greedy=None, ...).values()["score"]`
    """

    sampled: Sequence[Sequence[Answer]]
    """[N][k]"""
    greedy: Sequence[Answer] | None = None
    """[N]; None where nothing was decoded greedily."""
    entropy: Sequence[tuple[float, float]] | None = None
    """[N] (nats, tokens)."""
    kl: Sequence[tuple[float, float]] | None = None
    """[N] (nats, tokens) of log-probability ratios to the base model."""
    statistics: dict[str, Statistic] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.statistics = self._means() | self._ratios() | self._calibration()

    def take(self, places: Sequence[int]) -> Answers:
        """Return the answers of some items."""

        def chosen(rows: Sequence | None) -> list | None:
            return None if rows is None else [rows[i] for i in places]

        return Answers(
            sampled=[self.sampled[i] for i in places],
            greedy=chosen(self.greedy),
            entropy=chosen(self.entropy),
            kl=chosen(self.kl),
        )

    def values(self) -> dict[str, float]:
        """Return every statistic of all items; NaN where it is undefined."""
        every = np.arange(len(self.sampled))
        return {name: statistic(every) for name, statistic in self.statistics.items()}

    def intervals(self, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Interval]:
        """Return every defined statistic with its 95 % interval."""
        drawn = _resampled(self, seed, resamples)
        return {name: _bounded(value, drawn[name]) for name, value in self.values().items() if not math.isnan(value)}

    def styles(self) -> dict[str, float]:
        """Return the share of each output style, the commonest first."""
        counts = Counter(answer.style for row in self.sampled for answer in row)
        total = sum(counts.values())
        return {name: count / total for name, count in counts.most_common()}

    def _means(self) -> dict[str, Statistic]:
        """Statistics that are means over items."""
        k = min(len(row) for row in self.sampled)
        common = next(iter(self.styles()))
        graded = [[a.score for a in row if a.score is not None] for row in self.sampled]
        columns = {
            "score": [sum(g) / len(g) if g else math.nan for g in graded],
            **{
                f"pass@{j}": [pass_at_k(len(g), sum(s >= 1.0 for s in g), j) for g in graded]
                for j in sorted({2**e for e in range(k.bit_length())} & set(range(1, k + 1)) | {k})
            },
            "majority": [majority_score([a.vote for a in row], [a.score for a in row]) for row in self.sampled],
            "format_valid": [sum(a.is_valid for a in row) / len(row) for row in self.sampled],
            "format_share": [sum(a.style == common for a in row) / len(row) for row in self.sampled],
        }
        if k == 1:
            del columns["majority"]
        if self.greedy is not None:
            columns["greedy"] = [math.nan if a.score is None else a.score for a in self.greedy]
        return {name: _mean_of(np.array(values, dtype=float)) for name, values in columns.items()}

    def _ratios(self) -> dict[str, Statistic]:
        """Statistics that are sums over sums."""
        pairs = {"entropy": self.entropy, "kl": self.kl}
        return {name: _ratio_of(np.array(rows, dtype=float)) for name, rows in pairs.items() if rows is not None}

    def _calibration(self) -> dict[str, Statistic]:
        """Statistics of confidence against outcome; none where no answer has a confidence."""
        confidence = np.array([[a.confidence for a in row] for row in self.sampled], dtype=float)
        right = np.array([[np.nan if a.score is None else a.score >= 1.0 for a in row] for row in self.sampled])
        found: dict[str, Statistic] = {}
        if not np.isnan(confidence).all():
            found |= _calibrated("", confidence, right)
            if confidence.shape[1] > 1:
                shares = np.array([[consistency([a.vote for a in row])] for row in self.sampled])
                majority = np.array([[majority_score([a.vote for a in r], _passes(r))] for r in self.sampled])
                found |= _calibrated("consistency_", shares, majority)
        return found


def compare(first: Answers, second: Answers, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Return, for each statistic that both define, second minus first with its paired 95 % interval.

    Raises ValueError where the two are not about the same number of items.
    """
    if len(first.sampled) != len(second.sampled):
        raise ValueError(f"only the same items can be compared, got {len(first.sampled)} and {len(second.sampled)}")
    before, after = _resampled(first, seed, resamples), _resampled(second, seed, resamples)
    ours, theirs = first.values(), second.values()
    shared = [name for name in ours if not math.isnan(ours[name]) and not math.isnan(theirs.get(name, math.nan))]
    return {name: _bounded(theirs[name] - ours[name], after[name] - before[name]) for name in shared}


def _resampled(answers: Answers, seed: int, resamples: int) -> dict[str, np.ndarray]:
    """Return each statistic over the resamples, [R]; the places depend on seed and number of items alone."""
    n = len(answers.sampled)
    places = np.random.default_rng(seed).integers(n, size=(resamples, n))
    return {name: np.array([statistic(row) for row in places]) for name, statistic in answers.statistics.items()}


def _bounded(value: float, drawn: np.ndarray) -> Interval:
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return UNDEFINED
    low, high = np.quantile(defined, [0.025, 0.975])
    return Interval(min(float(low), value), value, max(float(high), value))


def _mean_of(column: np.ndarray) -> Statistic:
    known = ~np.isnan(column)
    filled = np.where(known, column, 0.0)

    def statistic(places: np.ndarray) -> float:
        count = known[places].sum()
        return float(filled[places].sum() / count) if count else math.nan

    return statistic


def _ratio_of(pairs: np.ndarray) -> Statistic:
    def statistic(places: np.ndarray) -> float:
        total, count = pairs[places].sum(axis=0)
        return float(total / count) if count else math.nan

    return statistic


def _calibrated(prefix: str, confidence: np.ndarray, right: np.ndarray) -> dict[str, Statistic]:
    """Return the four calibration statistics of answers [N, k] that have both a confidence and a grade."""

    def over(measure: Callable[[np.ndarray, np.ndarray], float]) -> Statistic:
        def statistic(places: np.ndarray) -> float:
            sure, correct = confidence[places].ravel(), right[places].ravel()
            known = ~(np.isnan(sure) | np.isnan(correct))
            return measure(sure[known], correct[known])

        return statistic

    def overconfidence(sure: np.ndarray, correct: np.ndarray) -> float:
        return float(sure.mean() - correct.mean()) if len(sure) else math.nan

    measures = {
        "ece": expected_calibration_error,
        "brier": brier,
        "auroc": auroc,
        "overconfidence": overconfidence,
    }
    return {f"{prefix}{name}": over(measure) for name, measure in measures.items()}


def _passes(row: Sequence[Answer]) -> list[float | None]:
    return [None if a.score is None else float(a.score >= 1.0) for a in row]


def as_lists(intervals: Mapping[str, Interval]) -> dict[str, list[float]]:
    """Return the intervals as plain lists [low, value, high], for JSON."""
    return {name: [*interval] for name, interval in intervals.items() if math.isfinite(interval.mid)}
