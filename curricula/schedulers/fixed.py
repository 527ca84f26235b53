"""Mixtures fixed in advance, whatever the rewards.

`joint`: every draw shows every domain, in shares that never change. `proportional`: domains in proportion to how many
prompts they have. `sequential`: one domain, or one group of domains, after the other, each domain for an equal share of
the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, Evidence


@settings
class Joint:
    """p_k = w_k / sum_j w_j, with w the recipe's domain weights (all 1 by default: uniform over domains).

    The opponent to fear: in a study with 12 matched seeds no adaptive data policy was better than uniform with a 95 %
    interval that excludes zero (arXiv:2609.06107).
    """

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        total = sum(evidence.weights)
        if not total:
            raise ValueError(f"joint: the weight of every domain is 0: {list(evidence.domains)}")
        return Decision(mixture=tuple(w / total for w in evidence.weights), reason="fixed weights")


@settings
class Proportional:
    """p_k = n_k / sum_j n_j, with n the number of training prompts: what concatenating the datasets would do."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        total = sum(evidence.sizes)
        return Decision(mixture=tuple(n / total for n in evidence.sizes), reason="in proportion to dataset sizes")


@settings
class Sequential:
    """Stage s of K lasts draws [floor(s D / K), floor((s + 1) D / K)) of D; within it p is 1 on the stage's domain.

    A stage may be a group of m domains: it lasts m times as long, and within it p_k = w_k / sum_j w_j over the group, as
    under `joint`. Without an `order`, structured domains come before open-ended ones, each in the recipe's order
    (Omni-Thinker, arXiv:2507.14783, finds that order best).
    """

    order: tuple[str | tuple[str, ...], ...] | None = None
    """Domains from first to last, or groups of them, `[[math, code], stories]`; None puts structured before open-ended,
    each in the recipe's order."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        stages = self.stages(evidence)
        places = [n for n, group in enumerate(stages) for _ in group]  # the stage of each domain's share of the run
        n = places[min(evidence.draw * len(places) // evidence.total_draws, len(places) - 1)]
        weights = {d: w for d, w in zip(evidence.domains, evidence.weights, strict=True) if d in stages[n]}
        total = sum(weights.values())
        shares = {d: w / total if total else 1 / len(weights) for d, w in weights.items()}
        name = ", ".join(stages[n])  # no domain's name has a space in it
        return Decision(
            mixture=tuple(shares.get(d, 0.0) for d in evidence.domains),
            reason=f"stage {n + 1} of {len(stages)}: {name}",
            stage=name,
        )

    def stages(self, evidence: Evidence) -> tuple[tuple[str, ...], ...]:
        """Return the domains of each stage: as given, checked, or structured before open-ended."""
        if self.order is None:
            ranked = sorted(zip(evidence.kinds, evidence.domains, strict=True), key=_open_ended_last)
            return tuple((name,) for _, name in ranked)
        found = tuple((stage,) if isinstance(stage, str) else stage for stage in self.order)
        named = sorted(name for group in found for name in group)
        if named != sorted(evidence.domains) or not all(found):
            raise ValueError(f"order {list(self.order)} must name each trainable domain once: {list(evidence.domains)}")
        return found


def _open_ended_last(pair: tuple[str, str]) -> bool:
    return pair[0] == "open_ended"
