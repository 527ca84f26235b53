"""How far the policy has moved from the base model, by domain: KL(base || policy) on the base model's own completions.

    KL = E_{y ~ base} [log base(y) - log policy(y)], summed over tokens, in nats per token

The direction that forgetting was found to follow (arXiv:2509.04259). It needs no second model in memory: the base's
completions and their log-probabilities are kept from the evaluation before the first step. The other direction, on the
policy's completions, needs the base model itself: `polyphony eval` loads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from polyphony.curricula.records import mean, per_token

LogProbabilities = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[float]]
"""Summed log-probability of each completion after its prompt, under the policy as it is; collective over ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseCompletion:
    """What the base model said to one held-out prompt."""

    domain: str
    item: str
    prompt_ids: list[int]
    ids: list[int]
    logp: float
    """Summed over `ids`, under the base model, at the run's temperature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseReference:
    """The base model's completions of some items of every domain.

    Example: `BaseReference.from_json(text).kl(policy)["math"]["a1"] == (nats, tokens)`
    """

    completions: tuple[BaseCompletion, ...]

    def kl(self, log_probabilities: LogProbabilities) -> dict[str, dict[str, tuple[float, int]]]:
        """Return (nats, tokens) of every item by domain."""
        now = log_probabilities([c.prompt_ids for c in self.completions], [c.ids for c in self.completions])
        found: dict[str, dict[str, tuple[float, int]]] = {}
        for completion, logp in zip(self.completions, now, strict=True):
            found.setdefault(completion.domain, {})[completion.item] = (completion.logp - logp, len(completion.ids))
        return found

    def to_json(self) -> str:
        """Return what `from_json` reads back to an equal reference."""
        return json.dumps([asdict(c) for c in self.completions])

    @classmethod
    def from_json(cls, text: str) -> BaseReference:
        """Read what `to_json` wrote."""
        return cls(completions=tuple(BaseCompletion(**fields) for fields in json.loads(text)))


def mean_kl(kl: Mapping[str, Mapping[str, tuple[float, int]]], domains: Sequence[str]) -> float:
    """Return the mean over these domains of nats per token; NaN where none of them was measured."""
    per_domain = [per_token(items.values()) for name, items in kl.items() if name in domains]
    return mean([nats for nats in per_domain if not math.isnan(nats)])
