"""Whether a probe's learning rate does harm by itself, and which of several to take.

All is judged on the `steer` half of the items, by three signs. The policy leaves its start by more nats a token in a step
than the alarm `kl_step` allows. A domain that is practised alone ends below its own start, which no other domain can be
blamed for. Shuffled rewards, which teach nothing, take score from a domain other than the one practised; that one's own
answers they move at random, as no reward does, so that it says nothing. The last two are tested with 95 % confidence over
all domains: that nothing is shown against a rate means as much as the held-out sets are large. Tried once in the demo's
world (20 steps, one seed, no table kept): nothing spoke against 2e-4, noise alone against 5e-4, which passes without placebo
runs, all three against 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from polyphony.curricula.records import mean, per_token
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.halves import taken
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.run.signals import KL_STEP

ERROR = 0.05
"""Chance that any domain is said to have lost at a rate that does no harm, for each of the two signs."""


def harm(matrix: TransferMatrix) -> list[str]:
    """Return what says that the probes' learning rate is too high, a line a sign; empty where nothing does."""
    found = [
        f"practising {name} moved the policy by {nats:.2g} nats a token in each step, more than {KL_STEP:g}"
        for name, nats in kl_steps(matrix).items()
        if nats > KL_STEP
    ]
    steer = matrix.on("steer")
    own = Effects(steer)
    high = own.transfer_interval(1 - 2 * ERROR / len(own.trained))[1]
    for j, name in enumerate(own.trained):
        if (most := high[j, own.domains.index(name)]) < 0:
            found.append(f"{name}, practised alone, lost at least {-most:.3f} of its own score")
    return found + (_damage(steer.of_placebo()) if steer.placebo else [])


def kl_steps(matrix: TransferMatrix) -> dict[str, float]:
    """Return, of each domain practised alone, KL(start || policy) on it in nats a token and step, the mean over seeds; a
    domain where it was not measured is absent."""
    found: dict[str, list[float]] = {}
    for row in matrix.probes:
        (name,) = row.trained
        kl = row.kl_items.get(name, ())
        items = taken(kl, matrix.items[name], "steer") if matrix.items and kl else kl
        nats = per_token([pair for pair in items if pair is not None]) / row.step
        if not math.isnan(nats):
            found.setdefault(name, []).append(nats)
    return {name: mean(steps) for name, steps in found.items()}


def _damage(placebo: TransferMatrix) -> list[str]:
    """Return where shuffled rewards took score: of each domain practised the one that lost most."""
    effects, found = Effects(placebo), []
    table = effects.transfer()
    high = effects.transfer_interval(1 - 2 * ERROR / (table.size - len(table)))[1]
    for j, name in enumerate(effects.trained):
        high[j, effects.domains.index(name)] = math.inf
        i = int(np.nan_to_num(high[j], nan=math.inf).argmin())
        if high[j, i] < 0:
            to = effects.domains[i]
            found.append(f"shuffled rewards on {name} took {-table[j, i]:.3f} from {to}, at least {-high[j, i]:.3f}")
    return found


def proposal(harms: Mapping[float, list[str]]) -> str:
    """Return which of the rates to take, in words: the highest below every rate that did harm."""
    bad = min((rate for rate, found in harms.items() if found), default=math.inf)
    good = [rate for rate in harms if rate < bad]
    tried = ", ".join(f"{rate:g}" for rate in sorted(harms))
    if not good:
        return f"of the learning rates {tried} even the lowest does harm: try lower ones"
    beyond = "" if math.isfinite(bad) else "; none was too high, so try higher ones"
    return f"of the learning rates {tried} take {max(good):g} (grpo.learning_rate), the highest without harm{beyond}"
