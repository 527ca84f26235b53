"""`visatb`: a fixed mixture from measured transfer and how hard each domain is (VisATB's task balancing)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from curricula.boltzmann import softmax
from curricula.crossfit import own_levels, square
from curricula.effects import Effects
from curricula.records import Decision, Evidence
from curricula.transfer import TransferMatrix


@dataclass(frozen=True, kw_only=True, slots=True)
class VisAtb:
    """p proportional to w = ((w_out + w_in) / 2 + w_dif) / 2 with

        w_out = K softmax(out / temperature)          out_k = mean over i of T[k -> i]: prefer givers
        w_in  = K softmax(-in / temperature)          in_k = mean over j of T[j -> k]: protect poor receivers
        w_dif = K softmax((1 - d) / temperature)      d_k = score before training / score after training on k alone

    After the code of VisATB (github.com/YanqiDai/VisATB). Changed: there, contributions come from models trained on
    one task with a small share of the others; here from the probes of the transfer file.
    """

    transfer: Any = None
    """A `TransferMatrix` or the path of a `transfer.json`."""
    temperature: float = 0.5
    mixture: Mapping[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.transfer is None:
            raise ValueError(
                "visatb: transfer is missing; run `polyphony probe` and give the path of its transfer.json"
            )
        if not self.temperature > 0:
            raise ValueError(f"visatb: temperature must be above 0, got {self.temperature}")
        matrix = TransferMatrix.load(self.transfer) if isinstance(self.transfer, (str, Path)) else self.transfer
        effects = Effects(matrix.on("steer"))
        means = effects.means()
        table, size = square(effects, means)[0], len(effects.trained)
        others = ~np.eye(size, dtype=bool)
        given = np.array([table[k, others[k]].mean() if size > 1 else 0.0 for k in range(size)])
        received = np.array([table[others[:, k], k].mean() if size > 1 else 0.0 for k in range(size)])
        base = np.array([means.base[0, effects.domains.index(name)] for name in effects.trained])
        level = own_levels(effects, means)[0]
        ease = np.divide(base, level, out=np.ones(size), where=level > 0)
        parts = [softmax(score.tolist(), temperature=self.temperature) for score in (given, -received, 1 - ease)]
        weights = [((o + i) / 2 + d) / 2 for o, i, d in zip(*parts, strict=True)]
        object.__setattr__(self, "mixture", dict(zip(effects.trained, weights, strict=True)))

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        if set(self.mixture) != set(evidence.domains):
            raise ValueError(
                f"visatb: the transfer file has {sorted(self.mixture)}, the run trains {sorted(evidence.domains)}"
            )
        mixture = tuple(self.mixture[name] for name in evidence.domains)
        return Decision(mixture=mixture, reason="fixed: givers, poor receivers and hard domains get more")
