"""What a transfer file says about a run before it starts: the probes' effects per step, as the prior of `online`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from polyphony.curricula.effects import Effects
from polyphony.curricula.intervals import quantile
from polyphony.curricula.online import ENTROPY_NOISE, Prior
from polyphony.curricula.transfer import TransferMatrix

MISFIT = 0.5
"""Prior standard deviation of an effect in units of the effect: a probe's rate is half believed later in a run."""

ELSEWHERE = 0.02
"""And in score: a probe that found no effect may be two points off from where the run will be."""


def score_prior(matrix: TransferMatrix) -> Prior:
    """Return the prior of the scores, from the `steer` half. Raises ValueError for a probe without steps."""
    effects = Effects(matrix.on("steer"))
    bounds = effects.intervals()
    noise = np.hypot((bounds.high - bounds.low) / 2 / quantile(0.95), ELSEWHERE)
    return _prior(effects, effects.domains, effects.transfer(), noise)


def entropy_prior(matrix: TransferMatrix) -> Prior:
    """Return the prior of the entropies, in nats, for the domains whose entropy every training measured."""
    effects = Effects(matrix.on("steer"))
    change = effects.entropy_transfer()
    measured = [name for k, name in enumerate(effects.domains) if not np.isnan(change[:, k]).any()]
    columns = [effects.domains.index(name) for name in measured]
    level = np.array([_level(effects, name) for name in measured])
    noise = np.maximum(ENTROPY_NOISE * math.sqrt(2) * level, 1e-6)  # a level of 0 nats has no noise to divide by
    return _prior(effects, measured, change[:, columns], np.broadcast_to(noise, change[:, columns].shape))


def _prior(effects: Effects, measured: Sequence[str], change: np.ndarray, noise: np.ndarray) -> Prior:
    """Return the prior of effects [J, I] that were measured with `noise`."""
    steps = _steps(effects)
    rate, sd = change / steps[:, None], np.hypot(noise, MISFIT * change) / steps[:, None]
    return Prior(trained=effects.trained, measured=tuple(measured), mean=rate.T, sd=sd.T, steps=steps)


def _steps(effects: Effects) -> np.ndarray:
    """Return the mean number of steps that the trainings on each domain took, [J]."""
    taken = [
        np.mean([effects.rows[n].step - effects.before_rows[n][0].step for n in effects.rows_of(name)])
        for name in effects.trained
    ]
    for name, steps in zip(effects.trained, taken, strict=True):
        if steps <= 0:
            raise ValueError(f"domain {name!r}: its probe ends at the baseline's step, its effect a step is undefined")
    return np.array(taken)


def _level(effects: Effects, name: str) -> float:
    return float(np.mean([row.entropy[name] for row in effects.rows]))
