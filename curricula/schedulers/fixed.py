"""Mixtures fixed in advance, whatever the rewards.

`joint`: every draw shows every domain, in shares that never change. `proportional`: domains in proportion to how many
prompts they have. `sequential`: one domain after the other, each for an equal share of the run.
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

    Without an `order`, structured domains come before open-ended ones, each in the recipe's order (Omni-Thinker,
    arXiv:2507.14783, finds that order best).
    """

    order: tuple[str, ...] | None = None
    """Domains from first to last; None puts structured before open-ended, each in the recipe's order."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        order = self.resolve_order(evidence)
        stage = min(evidence.draw * len(order) // evidence.total_draws, len(order) - 1)
        mixture = tuple(float(name == order[stage]) for name in evidence.domains)
        reason = f"stage {stage + 1} of {len(order)}: {order[stage]}"
        return Decision(mixture=mixture, reason=reason, stage=order[stage])

    def resolve_order(self, evidence: Evidence) -> tuple[str, ...]:
        """Return the order given, checked, or structured before open-ended."""
        if self.order is None:
            return tuple(d for _, d in sorted(zip(evidence.kinds, evidence.domains, strict=True), key=_open_ended_last))
        if sorted(self.order) != sorted(evidence.domains):
            raise ValueError(f"order {list(self.order)} must name each trainable domain once: {list(evidence.domains)}")
        return self.order


def _open_ended_last(pair: tuple[str, str]) -> bool:
    return pair[0] == "open_ended"
