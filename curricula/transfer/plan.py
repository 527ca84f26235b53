"""A plan as a record: the order, whether to follow it, how sure that is, and the same in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from polyphony.curricula.intervals import Interval
from polyphony.curricula.transfer.forgetting import Measured
from polyphony.curricula.transfer.options import MEASURES_ORDER, Option, as_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The best order of the trainable domains by measured transfer. Scores are means over items, in [0, 1]."""

    order: tuple[str, ...]
    decision: Literal["sequence", "mix"]
    """`sequence` only where an order was trained (`probe.ways=[sequence]`) and is shown to be better than mixing."""
    is_promising: bool
    """Whether each gain below, which is predicted, has a 95 % interval above zero: worth a measurement, and no more."""
    over_mean_order: Interval
    """Cross-fitted gain in the mean score over a random order."""
    over_joint: Interval | None
    """Cross-fitted gain in the mean score over training on all domains at once; None where that was not measured."""
    precedence: Mapping[str, Mapping[str, float]]
    """precedence[a][b]: share of resamples whose own best order has a before b."""
    expected_regret: float
    """Mean over resamples of what their own best order would gain over this one, in the mean score."""
    predicted: Mapping[str, float]
    """Score of each domain at the end of the order; watch-only domains included. Additive, so it may leave [0, 1]."""
    interval: Mapping[str, tuple[float, float]]
    """95 % interval of `predicted`."""
    transfer: Mapping[str, Mapping[str, float]]
    """transfer[j][i] = T[j -> i]; beyond the placebo where there is one."""
    search: Mapping[Literal["order", "resamples"], Literal["exact", "insertions"]]
    """How the order and those of the resamples were found: proven best, or the best that insertions led to."""
    notes: tuple[str, ...] = ()
    """What the reader should know about the evidence."""
    placebo: Mapping[str, Mapping[str, float]] | None = None
    """placebo[j][i]: what training on j's prompts with shuffled rewards did to i; None without placebo runs. The order, its
    gains and the predictions are of both together, which a run at the same learning rate will see."""
    measured: Measured | None = None
    """What the stages in the file say, where it holds a run."""
    options: tuple[Option, ...] = ()
    """All ways to one model of all domains, the recommended one first; none where there is one domain."""

    def as_json(self) -> dict[str, Any]:
        """Return the object that `polyphony plan --json` prints; undefined values as None."""
        document: dict[str, Any] = {
            "order": list(self.order),
            "decision": self.decision,
            "is_promising": self.is_promising,
            "gain": {
                "over_mean_order": list(self.over_mean_order),
                "over_joint": None if self.over_joint is None else list(self.over_joint),
            },
            "confidence": {"precedence": self.precedence, "expected_regret": self.expected_regret},
            "predicted": self.predicted,
            "interval": {name: list(bounds) for name, bounds in self.interval.items()},
            "transfer": self.transfer,
            "options": [option.as_json() for option in self.options],
        }
        if self.placebo is not None:
            document["placebo"] = self.placebo
        if "insertions" in self.search.values():
            document["search"] = dict(self.search)
        if self.measured is not None:
            document["measured"] = {
                "average": self.measured.average,
                "bwt": self.measured.bwt,
                "fwt": self.measured.fwt,
                "forgetting": self.measured.forgetting,
            }
        return _without_nan(document)

    def explain(self) -> str:
        """Return a paragraph that says what to do, why, and how sure that is."""
        if len(self.order) == 1:
            return f"There is one trainable domain, {self.order[0]}: nothing to order."
        parts = [self._choice(), self._advice(), self._reason(), self._doubt(), self._prediction(), *self.notes]
        return " ".join(part for part in parts if part)

    def _choice(self) -> str:
        """Name what is better than both mixing and an order, where anything is."""
        if (best := self._best) is None or best.over_mix is None:
            return ""
        how = as_recipe(best) or ", ".join(f"{key} {value}" for key, value in best.how.items())
        what = {"groups": "train in groups", "merge": "merge experts", "distil": "distil experts into one model"}
        return (
            f"Best is to {what[best.kind]} ({how}): it gains {_signed(best.over_mix)} in mean score over training on all "
            "domains at once."
        )

    @property
    def _best(self) -> Option | None:
        """What is recommended, where that is neither mixing nor an order."""
        best = self.options[0] if self.options else None
        return best if best is not None and best.kind not in ("mix", "sequence") and best.is_shown else None

    def _advice(self) -> str:
        gain = f"The best order by measured transfer is {', '.join(self.order)}. "
        gain += f"It is to gain {_signed(self.over_mean_order)} in mean score over a random order"
        if self.over_joint is not None:
            gain += f" and {_signed(self.over_joint)} over training on all domains at once"
        if self._best is not None:
            return f"{gain}."
        if self.decision == "sequence":
            return f"{gain}. Train in this order (scheduler: bwt)."
        doubt = "that is not shown to be better than nothing" if self.over_joint is None else "not both are above zero"
        if self.is_promising:
            doubt = f"that is predicted, and such predictions did not come true where they were tried; {MEASURES_ORDER}"
        return f"{gain}; {doubt}, so train on all domains together (scheduler: adaptive)."

    def _reason(self) -> str:
        """Name the largest transfer between two domains and what the order makes of it."""
        pairs = [(j, i) for j in self.order for i in self.order if i != j]
        j, i = max(pairs, key=lambda pair: abs(self.transfer[pair[0]][pair[1]]))
        change = self.transfer[j][i]
        effect = f"adds {change:.3f} to {i}" if change > 0 else f"takes {-change:.3f} from {i}"
        beyond = "" if self.placebo is None else f", beyond the {self.placebo[j][i]:+.3f} of shuffled rewards"
        stays = self.order.index(j) > self.order.index(i)
        outcome = "so it stays" if stays else f"so the stage on {i} overwrites it"
        place = "after" if stays else "before"
        return f"The largest transfer: training on {j} {effect}{beyond}; {j} comes {place}, {outcome}."

    def _doubt(self) -> str:
        neighbours = list(zip(self.order, self.order[1:], strict=False))
        first, second = min(neighbours, key=lambda pair: self.precedence[pair[0]][pair[1]])
        share = self.precedence[first][second]
        regret = f"the expected regret of choosing this order now is {self.expected_regret:.3f} in mean score"
        return f"Least certain is {first} before {second} ({share:.0%} of resamples); {regret}."

    def _prediction(self) -> str:
        parts = [
            f"{name} {score:.2f} ({self.interval[name][0]:.2f} to {self.interval[name][1]:.2f})"
            for name, score in self.predicted.items()
        ]
        return f"Predicted at the end of this order: {', '.join(parts)}."


def _signed(interval: Interval) -> str:
    return f"{interval.mid:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
