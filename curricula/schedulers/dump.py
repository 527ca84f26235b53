"""`dump`: more to domains with a large |advantage| or few completions so far (upper confidence bound)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, DomainStats, Evidence
from polyphony.curricula.schedulers.shares import listed, softmax, uniform


@settings
class DUMP:
    """p = softmax(U / tau) with U_k = A_k + sqrt(2 ln(N + 1) / (n_k + 1)).

    A_k: mean |advantage| over the last `window` completions of domain k, 0 before any. n_k: graded completions of k so
    far; N = sum_k n_k. tau: `temperature`.

    Source: arXiv:2504.09710. Changed: fed by training rollouts as the paper says (the released code feeds it those of
    validation, and keeps a Beta that nothing reads). The evidence counts groups, so a group stands for `group_size`
    completions, and the window's oldest draw counts with the part of it that is inside. A domain that was not drawn
    keeps A and n, so its bonus grows as N does: the bound brings it back. One never drawn has bonus sqrt(2 ln(N + 1))
    and takes nearly the whole next draw, as intended by the bound.
    """

    window: int = Field(default=300, ge=1)
    """Completions a domain's mean |advantage| is taken over; 300 as in the released code."""
    group_size: int = Field(default=16, ge=1)
    """Completions a group; 16 in the paper. Give your `num_generations` for the paper's bonus at your group size."""
    temperature: float = Field(default=0.1, gt=0)
    """tau; 0.1 as in the released code: a U larger by 0.07 doubles a domain's share."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        k = len(evidence.domains)
        recent = state.get("recent", [[]] * k)
        recent = [self._with(old, stats) for old, stats in zip(recent, evidence.last, strict=True)]
        counts = [
            n + self.group_size * _graded_groups(stats)
            for n, stats in zip(state.get("counts", [0] * k), evidence.last, strict=True)
        ]
        new_state = {"recent": recent, "counts": counts}
        if not any(counts):
            return Decision(mixture=uniform(k), reason="no draw has been graded yet: uniform", state=new_state)
        means = [_weighted_mean(draws) for draws in recent]
        bonuses = [math.sqrt(2 * math.log(sum(counts) + 1) / (n + 1)) for n in counts]
        bounds = [mean + bonus for mean, bonus in zip(means, bonuses, strict=True)]
        reason = (
            f"more to a larger upper bound: {listed(evidence.domains, bounds)}, which is recent |advantage| "
            f"({listed(evidence.domains, means)}) plus a bonus for few completions ({listed(evidence.domains, bonuses)})"
        )
        return Decision(mixture=softmax(bounds, temperature=self.temperature), reason=reason, state=new_state)

    def _with(self, draws: Sequence[Sequence[float]], stats: DomainStats) -> list[list[float]]:
        """Return the window's [completions, mean |advantage|] pairs, oldest first, with the last draw's added."""
        newest_first = [[count, mean] for count, mean in reversed(draws)]
        if groups := _graded_groups(stats):
            newest_first.insert(0, [groups * self.group_size, stats.abs_advantage])
        kept, room = [], self.window
        for count, mean in newest_first:
            if room > 0:
                kept.append([min(count, room), mean])
                room -= count
        return kept[::-1]


def _graded_groups(stats: DomainStats) -> int:
    return 0 if math.isnan(stats.abs_advantage) else stats.groups


def _weighted_mean(draws: Sequence[Sequence[float]]) -> float:
    total = sum(count for count, _ in draws)
    return sum(count * mean for count, mean in draws) / total if total else 0.0
