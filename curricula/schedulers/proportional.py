"""`proportional`: domains in proportion to how many prompts they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyphony.curricula.records import Decision, Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Proportional:
    """p_k = n_k / sum_j n_j, with n the number of training prompts: what concatenating the datasets would do."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        total = sum(evidence.sizes)
        return Decision(mixture=tuple(n / total for n in evidence.sizes), reason="in proportion to dataset sizes")
