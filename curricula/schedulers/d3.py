"""`d3`: more to domains whose distance to their teacher is large and still shrinking; for `algorithm: distil`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, Evidence, mean, nan_of, null_of
from polyphony.curricula.schedulers.shares import listed, softmax, uniform


@settings
class D3:
    """p_k = floor + (1 - K floor) softmax(s / tau)_k with s_k = (KL_k / KL_k0) max(0, descent_k), anew every `every` draws.

    KL_k: mean over the last `every` draws of the policy's distance to domain k's teacher (`DomainStats.teacher_kl`); KL_k0:
    the same over the first window; descent_k: how far KL_k fell since the window before, over KL_k0. Uniform for `warm_up`
    draws. A domain that is near its teacher, or comes no nearer, falls to the floor.

    Source: D3-MOPD, arXiv:2608.24987, by a description of its sampler; not compared with the released code. Ours: the unit
    of the descent, windows in draws, a domain without a teacher keeps 1 / K, and so does every one before its second window.
    """

    temperature: float = Field(default=0.5, gt=0)
    """tau; 0.5 as in the source."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Smallest share of a domain, 0.1 as in the source; above 1 / K all shares are equal."""
    every: int = Field(default=10, ge=1)
    """Draws of a window, after each of which shares are set anew; 10 as in the source, which counts steps."""
    warm_up: int = Field(default=20, ge=0)
    """Draws before the shares first move; 20 as in the source. Never before two windows are over."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        k = len(evidence.domains)
        old = state or {"draw": 0, "window": [[]] * k, "means": [[]] * k, "mixture": list(uniform(k))}
        window, means, mixture = old["window"], old["means"], old["mixture"]
        if evidence.draw > old["draw"]:
            seen = [null_of(stats.teacher_kl) for stats in evidence.last]
            window = [
                [*values, value] if value is not None else values for values, value in zip(window, seen, strict=True)
            ]
            if evidence.draw % self.every == 0:
                means = [_with(past, values) for past, values in zip(means, window, strict=True)]
                window = [[] for _ in range(k)]
                if evidence.draw >= self.warm_up:
                    mixture = list(self._mixture(means))
        new_state = {"draw": evidence.draw, "window": window, "means": means, "mixture": mixture}
        return Decision(mixture=tuple(mixture), reason=self._reason(evidence, means), state=new_state)

    def _mixture(self, means: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """Return the shares [K] by the first, the last but one and the last window's mean of each domain."""
        k = len(means)
        rated = [n for n, of in enumerate(means) if len(of) == 3]
        if not rated:
            return uniform(k)
        floor, room = min(self.floor, 1 / k), len(rated) / k
        by_score = softmax([_score(*means[n]) for n in rated], temperature=self.temperature)
        shares = [1 / k] * k
        for n, part in zip(rated, by_score, strict=True):
            shares[n] = floor + (room - len(rated) * floor) * part
        return tuple(shares)

    def _reason(self, evidence: Evidence, means: Sequence[Sequence[float]]) -> str:
        if not any(len(of) == 3 for of in means):
            return "uniform: two windows of distances to a teacher are not over yet"
        now = listed(evidence.domains, [nan_of(of[-1] if of else None) for of in means])
        scores = listed(evidence.domains, [nan_of(_score(*of) if len(of) == 3 else None) for of in means])
        return f"more to domains far from their teacher and coming nearer: KL {now}; score {scores}"


def _with(past: Sequence[float], values: Sequence[float]) -> list[float]:
    """Return a domain's first window, the one before and the last, with that of `values`; unchanged where it is empty."""
    if not values:
        return list(past)
    return [*past[:1], *past[-1:], mean(values)] if past else [mean(values)]


def _score(first: float, before: float, now: float) -> float:
    """Return what remains of the distance times its descent; 0 where there was none."""
    return max(0.0, now / first) * max(0.0, (before - now) / first) if first > 0 else 0.0
