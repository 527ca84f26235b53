"""`adaptive`: shares by learnability, progress and transfer of each domain, re-estimated at every draw."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from polyphony.curricula.declarations import settings
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.records import Decision, Evidence
from polyphony.curricula.schedulers.learnability import Learnability
from polyphony.curricula.schedulers.online_transfer import entropy_prior, score_prior
from polyphony.curricula.schedulers.transfer_value import TransferValue
from polyphony.curricula.transfer.matrix import Probes

UNSEEN = (1.0, 0.04)
"""Mean and variance of learnability before a domain was drawn: the largest there is, so that each is tried."""


@settings
class Adaptive:
    """p_k = (1 - floor) u_k / sum_j u_j + floor / K with the utility

        u_k = L_k (1 + P_k) (1 + strength X_k) F_k

    L: mean |A| of the domain's groups, its learnability (SEC, arXiv:2505.14970): one sample a draw of the posterior of
       PAC (arXiv:2608.30528), see `posterior`.
    P: |slope of the mean reward over the last `window` draws| over the sum of the same. PAC takes the signed slope;
       the size is used here, so that a domain that is being lost is practised too.
    X: transfer in [-1, 1], (V_k - mean V) / (mean |V| + mean sd of V), with V_k one posterior sample of what a step on k
    adds to
       the held-out scores of all domains, itself and watch-only ones included, see `transfer_value`: measured by the
       probes and then by this run's own evaluations. TAC (arXiv:2606.25178) multiplies learnability by gradient cosines;
       evaluations need no gradients and see watch-only domains.
    F: 2^E_k with E_k in [-1, 1], above 1 where k raises the entropy of domains below their band, see `transfer_value`; 1
    unless
       `entropy_control` names domains.

    No source has the four together; the product is ours.
    """

    transfer: Probes = None
    """A `TransferMatrix`, the path of a `transfer.json` (`curriculum.transfer`), or None: transfer is estimated from this
    run's evaluations alone."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Share of a draw spread evenly over the domains, so that each keeps being measured."""
    strength: float = Field(default=0.9, ge=0, lt=1)
    """Weight of transfer; below 1, so that transfer alone never takes a domain's share to 0."""
    focus: float = Field(default=0.2, gt=0)
    """Difference in score over which a domain's weight grows e times: with .2 a domain at .3 weighs 3 times one at .5."""
    alarm: float = Field(default=0.05, gt=0)
    """Drawdown that doubles a domain's weight: two standard errors of a paired difference of about 200 items."""
    window: int = Field(default=16, ge=3)
    """Draws over which the slope of the mean reward is fitted (PAC's W)."""
    entropy_band: tuple[float, float] = EntropySettings().band
    """Multiples of a domain's entropy at the run's first evaluation; a recipe says it in `entropy.band`."""
    entropy_control: tuple[str, ...] = ()
    """Domains, trained or only watched, whose entropy moves the shares; a recipe says it in `entropy.control`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the posterior samples, together with the draw's index."""
    values: TransferValue = field(init=False, repr=False, compare=False)

    @field_validator("entropy_band")
    @classmethod
    def _is_a_band(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= band[0] < band[1]:
            raise ValueError("expected low < high, both >= 0")
        return band

    def __post_init__(self) -> None:
        values = TransferValue(
            scores=None if self.transfer is None else score_prior(self.transfer),
            entropies=None if self.transfer is None else entropy_prior(self.transfer),
            focus=self.focus,
            alarm=self.alarm,
            band=self.entropy_band,
            held=self.entropy_control,
        )
        object.__setattr__(self, "values", values)

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        rng = random.Random(f"{self.seed}/{evidence.draw}")
        known = Learnability.of(state.get("arms"), evidence, window=self.window, start=UNSEEN)
        assessed = self.values.assess(evidence, state.get("worth", {}))
        learnability = np.maximum(known.sample(rng), 1e-3)
        progress = known.progress()
        sampled = [rng.gauss(v, sd) for v, sd in zip(assessed["value"], assessed["value_sd"], strict=True)]
        transfer = _relative(np.array(sampled), np.array(assessed["value"]), np.array(assessed["value_sd"]))
        entropy = 2 ** np.clip(np.array(assessed["pull"]), -1, 1)
        utility = learnability * (1 + np.abs(progress)) * (1 + self.strength * transfer) * entropy
        size = len(evidence.domains)
        mixture = (1 - self.floor) * utility / utility.sum() + self.floor / size
        factors = {"learnability": learnability, "progress": progress, "transfer": transfer, "entropy": entropy}
        if (entropy == 1).all():
            del factors["entropy"]
        reason = "; ".join(f"{name} " + " ".join(f"{value:.2f}" for value in of) for name, of in factors.items())
        next_state = {"arms": known.as_json(), "worth": assessed}  # names of saved states, which old runs have too
        return Decision(mixture=tuple(mixture.tolist()), reason=reason, state=next_state)


def _relative(sampled: np.ndarray, value: np.ndarray, sd: np.ndarray) -> np.ndarray:
    scale = np.abs(value).mean() + sd.mean()
    return np.clip((sampled - sampled.mean()) / scale, -1, 1) if scale > 0 else np.zeros_like(value)
