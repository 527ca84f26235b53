"""What a transfer file says about a run before it starts: the probes' effects per step, as the prior of `online`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from curricula.effects import Effects
from curricula.intervals import quantile
from curricula.online import ENTROPY_NOISE, Prior
from curricula.transfer import TransferMatrix

MISFIT = 0.5
"""Prior standard deviation of an effect in units of the effect: a probe's rate is half believed later in a run."""

SMALLEST = 0.002
"""Score that a probe leaves unknown however many items agree: two tenths of a point."""


def score_prior(matrix: TransferMatrix) -> Prior:
    """Return the prior of the scores, from the `steer` half. Raises ValueError for a probe without steps."""
    effects = Effects(matrix.on("steer"))
    steps = _steps(effects)
    low, high = effects.transfer_interval()
    noise = np.maximum((high - low) / 2 / quantile(0.95), SMALLEST)
    return _prior(effects, effects.domains, effects.transfer() / steps, noise / steps)


def entropy_prior(matrix: TransferMatrix) -> Prior:
    """Return the prior of the entropies, in nats, for the domains whose entropy every training measured."""
    effects = Effects(matrix.on("steer"))
    change = effects.entropy_transfer()
    measured = [name for k, name in enumerate(effects.domains) if not np.isnan(change[:, k]).any()]
    columns = [effects.domains.index(name) for name in measured]
    level = np.array([_level(effects, name) for name in measured])
    steps = _steps(effects)
    noise = np.maximum(ENTROPY_NOISE * math.sqrt(2) * level, SMALLEST)
    return _prior(effects, measured, change[:, columns] / steps, noise / steps)


def _prior(effects: Effects, measured: Sequence[str], rate: np.ndarray, noise: np.ndarray) -> Prior:
    sd = np.hypot(noise, MISFIT * rate)
    return Prior(trained=effects.trained, measured=tuple(measured), mean=rate.T, sd=sd.T)


def _steps(effects: Effects) -> np.ndarray:
    """Return the mean number of steps that the trainings on each domain took, [J, 1]."""
    taken = [
        np.mean([effects.rows[n].step - effects.before_rows[n][0].step for n in effects.rows_of(name)])
        for name in effects.trained
    ]
    for name, steps in zip(effects.trained, taken, strict=True):
        if steps <= 0:
            raise ValueError(f"domain {name!r}: its probe ends at the baseline's step, its effect a step is undefined")
    return np.array(taken)[:, None]


def _level(effects: Effects, name: str) -> float:
    return float(np.mean([row.entropy[name] for row in effects.rows]))
