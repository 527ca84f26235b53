"""`pac`: learnability times progress, explored by Thompson sampling (PAC, arXiv:2608.30528)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from curricula.arms import Arms
from curricula.records import Decision, Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Pac:
    """p_k = share of posterior samples in which arm k is the best, after `warmup` uniform draws.

    Utility u_k = (1 + progress_k) advantage_k; advantage_k: mean |A| over the last `window` draws; progress_k: slope of
    the mean reward over them, over the sum of the slopes' sizes. Posterior N(0, 1) at first; a draw with share c of
    arm k adds precision c K at u_k, then every variance grows by 0.02. Changed: PAC takes the best arm of one sample
    for each prompt; here 1,000 samples give the mixture from which the quotas are drawn, which is the same in
    expectation and keeps the counts exact.
    """

    window: int = 16
    """Draws (PAC's W)."""
    warmup: int = 50
    """Uniform draws at the start (PAC)."""
    samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.window >= 3 and self.warmup >= 0 and self.samples >= 1):
            raise ValueError(
                "pac: expected window >= 3, warmup >= 0 and samples >= 1, got "
                f"{self.window}, {self.warmup}, {self.samples}"
            )

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        arms = Arms.of(state.get("arms"), evidence, window=self.window, observe=_utility)
        size = len(evidence.domains)
        next_state = {"arms": arms.as_json()}
        if evidence.draw < self.warmup:
            reason = f"uniform until draw {self.warmup}"
            return Decision(mixture=(1 / size,) * size, reason=reason, state=next_state)
        seed = random.Random(f"{self.seed}/{evidence.draw}").getrandbits(64)
        normal = np.random.default_rng(seed).standard_normal((self.samples, size))
        best = (np.array(arms.mean) + normal * np.sqrt(arms.variance)).argmax(axis=1)
        mixture = np.bincount(best, minlength=size) / self.samples
        posterior = zip(evidence.domains, arms.mean, arms.variance, strict=True)
        reason = "posterior utility " + ", ".join(f"{name} {m:.2f} +- {v**0.5:.2f}" for name, m, v in posterior)
        return Decision(mixture=tuple(mixture.tolist()), reason=reason, state=next_state)


def _utility(arms: Arms) -> np.ndarray:
    return (1 + arms.progress()) * arms.advantage()
