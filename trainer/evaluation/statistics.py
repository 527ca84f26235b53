"""Statistics of held-out answers, each with an interval over prompts, paired across models.

A prompt's samples stay together: its mean, or its sum, is one observation. Means and ratios have the intervals of
`curricula/intervals.py`; calibration, which has no formula, the percentiles of a bootstrap. N items, k samples an item, R
resamples.

Over several samples of a prompt: unbiased pass@k and majority vote. Calibration: confidences [N] in [0, 1] against
correctness [N], 0 or 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtr
from scipy.stats import rankdata

from polyphony.curricula.intervals import UNDEFINED, Interval, bounded_mean, changed, changed_ratio, ratio, student
from polyphony.curricula.records import nan_of, passed, passes
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

    None is no vote; where nobody votes, the mean over all graded samples stands. NaN where no sample of a commonest
    answer was graded.
    """
    counts = Counter(vote for vote in votes if vote is not None) or Counter(votes)
    most = max(counts.values())
    means = []
    for vote in (vote for vote, count in counts.items() if count == most):
        graded = [s for v, s in zip(votes, scores, strict=True) if v == vote and s is not None]
        if graded:
            means.append(sum(graded) / len(graded))
    return sum(means) / len(means) if means else math.nan


def consistency(votes: Sequence[Hashable]) -> float:
    """Return the share of all samples that give the commonest answer: confidence by self-consistency. None is no vote."""
    return max(Counter(vote for vote in votes if vote is not None).values(), default=0) / len(votes)


BINS = 10
"""Of equal mass, so that none is nearly empty; ten as in Guo et al. (arXiv:1706.04599), whose bins have equal width."""


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, bins: int = BINS) -> float:
    """Return the mean of |accuracy - mean confidence| over bins of equal mass, weighted by size; NaN for no answers.

    An answer's bin follows from its rank among the confidences, and equal ones share their middle rank: ties are never
    split, and no order of the answers matters. Where many tie, bins are fewer and of unequal mass.

    Biased upwards in small samples: N perfectly calibrated answers give about sqrt(bins / N) / 2.
    """
    if not len(confidence):
        return math.nan
    n = len(confidence)
    places = ((rankdata(confidence) - 0.5) * min(bins, n) / n).astype(int)
    return float(np.abs(np.bincount(places, weights=correct - confidence)).sum()) / n


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


Statistic = Callable[[np.ndarray, np.ndarray], float]
"""A number of the items at these places [N], which may repeat; where the second array [N] is true, right is wrong."""


PSEUDO = 4
"""Items' worth of doubt that a bootstrap adds, half of it against what was seen: without it, answers that are all right
leave no doubt at all. Agresti and Coull's four (The American Statistician 52, 1998), two for a difference, of which each
side gets half."""


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
    means: dict[str, np.ndarray] = field(init=False, repr=False)
    """Of each statistic that is a mean, its items' values [N] in [0, 1]; NaN where one is undefined."""
    ratios: dict[str, np.ndarray] = field(init=False, repr=False)
    """Of each that is a sum over a sum, its items' parts [N, 2]."""
    calibration: dict[str, Statistic] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.means, self.ratios, self.calibration = self._means(), self._ratios(), self._calibration()

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

    def graded_with(self, other: Answers) -> int:
        """Return how many items have a score on both sides."""
        return int((~np.isnan(self.means["score"]) & ~np.isnan(other.means["score"])).sum())

    def values(self) -> dict[str, float]:
        """Return every statistic of all items; NaN where it is undefined."""
        n = len(self.sampled)
        found = {name: _mean(column) for name, column in self.means.items()}
        found |= {name: _ratio(pairs) for name, pairs in self.ratios.items()}
        return found | {name: of(np.arange(n), np.zeros(n, dtype=bool)) for name, of in self.calibration.items()}

    def intervals(self, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Interval]:
        """Return every defined statistic with its 95 % interval."""
        values = self.values()
        (drawn,) = _resampled(self, seed=seed, resamples=resamples)
        found = {name: bounded_mean(column[~np.isnan(column)].tolist()) for name, column in self.means.items()}
        found |= {name: ratio(*pairs[pairs[:, 1] > 0].T.tolist()) for name, pairs in self.ratios.items()}
        found |= {name: _bounded(values[name], rows, len(self.sampled)) for name, rows in drawn.items()}
        return {name: found[name]._replace(mid=value) for name, value in values.items() if not math.isnan(value)}

    def styles(self) -> dict[str, float]:
        """Return the share of each output style, the commonest first."""
        counts = Counter(answer.style for row in self.sampled for answer in row)
        total = sum(counts.values())
        return {name: count / total for name, count in counts.most_common()}

    def _means(self) -> dict[str, np.ndarray]:
        """Statistics that are means over items."""
        k = min(len(row) for row in self.sampled)
        common = next(iter(self.styles()))
        graded = [[a.score for a in row if a.score is not None] for row in self.sampled]
        columns = {
            "score": [sum(g) / len(g) if g else math.nan for g in graded],
            **{
                f"pass@{j}": [pass_at_k(len(g), len(passed(g)), j) for g in graded]
                for j in sorted({2**e for e in range(k.bit_length())} & set(range(1, k + 1)) | {k})
            },
            "majority": [majority_score([a.vote for a in row], [a.score for a in row]) for row in self.sampled],
            "format_valid": [sum(a.is_valid for a in row) / len(row) for row in self.sampled],
            "format_share": [sum(a.style == common for a in row) / len(row) for row in self.sampled],
        }
        if k == 1:
            del columns["majority"]
        if self.greedy is not None:
            columns["greedy"] = [nan_of(a.score) for a in self.greedy]
        return {name: np.array(values, dtype=float) for name, values in columns.items()}

    def _ratios(self) -> dict[str, np.ndarray]:
        """Statistics that are sums over sums."""
        pairs = {"entropy": self.entropy, "kl": self.kl}
        return {name: np.array(rows, dtype=float) for name, rows in pairs.items() if rows is not None}

    def _calibration(self) -> dict[str, Statistic]:
        """Statistics of confidence against outcome; none where no answer has a confidence."""
        confidence = np.array([[a.confidence for a in row] for row in self.sampled], dtype=float)
        right = np.array([_passes(row) for row in self.sampled], dtype=float)
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

    A mean's difference is over the items for which both have it. Raises ValueError where the two are not about the same
    number of items.
    """
    if len(first.sampled) != len(second.sampled):
        raise ValueError(f"only the same items can be compared, got {len(first.sampled)} and {len(second.sampled)}")
    ours, theirs = first.values(), second.values()
    before, after = _resampled(first, second, seed=seed, resamples=resamples)
    found: dict[str, Interval] = {}
    for name in ours:
        if math.isnan(ours[name]) or math.isnan(theirs.get(name, math.nan)):
            continue
        if name in first.means:
            both = ~np.isnan(first.means[name]) & ~np.isnan(second.means[name])
            found[name] = changed(second.means[name][both].tolist(), first.means[name][both].tolist())
        elif name in first.ratios:
            found[name] = changed_ratio(second.ratios[name].tolist(), first.ratios[name].tolist())
        else:
            found[name] = _bounded(theirs[name] - ours[name], after[name] - before[name], len(first.sampled))
    return found


def _resampled(*sides: Answers, seed: int, resamples: int) -> list[dict[str, np.ndarray]]:
    """Return each side's calibration over the same resamples, [R]; these depend on seed and number of items alone."""
    n, rng = len(sides[0].sampled), np.random.default_rng(seed)
    places = rng.integers(n, size=(resamples, n))
    doubt = PSEUDO / len(sides)
    found = []
    for side in sides:
        turned = rng.random((resamples, n)) < 0.5 * PSEUDO / len(sides) / (n + doubt)
        rows = list(zip(places, turned, strict=True))
        found.append({name: np.array([of(p, t) for p, t in rows]) for name, of in side.calibration.items()})
    return found


def _bounded(value: float, drawn: np.ndarray, n: int) -> Interval:
    """Return a value of n items between the percentiles of its resamples, as far out as Student's t lies beyond the
    normal: plain ones are too narrow for few items (Hesterberg, The American Statistician 69, 2015)."""
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return UNDEFINED
    freedom = max(n - 1, 1)
    tail = float(ndtr(-math.sqrt((freedom + 1) / freedom) * student(0.95, freedom)))
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(min(float(low), value), value, max(float(high), value))


def _mean(column: np.ndarray) -> float:
    known = ~np.isnan(column)
    return float(np.where(known, column, 0.0).sum() / known.sum()) if known.any() else math.nan


def _ratio(pairs: np.ndarray) -> float:
    total, count = pairs.sum(axis=0)
    return float(total / count) if count else math.nan


def _calibrated(prefix: str, confidence: np.ndarray, right: np.ndarray) -> dict[str, Statistic]:
    """Return the four calibration statistics of answers [N, k] that have both a confidence and a grade."""

    def over(measure: Callable[[np.ndarray, np.ndarray], float]) -> Statistic:
        def statistic(places: np.ndarray, turned: np.ndarray) -> float:
            sure, correct = confidence[places].ravel(), np.abs(right[places] - turned[:, None]).ravel()
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
    return [None if a.score is None else float(passes(a.score)) for a in row]


def as_lists(intervals: Mapping[str, Interval]) -> dict[str, list[float]]:
    """Return the intervals as plain lists [low, value, high], for JSON; an unbounded one, of a single item, is left out."""
    return {name: [*interval] for name, interval in intervals.items() if all(map(math.isfinite, interval))}
