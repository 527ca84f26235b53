"""`visatb`: a mixture fixed before training, by transfer given, transfer received and difficulty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, Evidence, mean
from polyphony.curricula.schedulers.shares import listed, softmax
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.matrix import NeededProbes


@settings
class VisATB:
    """p = ((softmax(out / tau) + softmax(-in / tau)) / 2 + softmax((1 - d) / tau)) / 2, the same for the whole run.

    With T[j -> i] the change of domain i's score after training on j alone: out_k = mean over i != k of T[k -> i], what
    k gives to others; in_k = mean over j != k of T[j -> k], what it gets from them; d_k: its score in [0, 1] after
    training on itself, so 1 - d is how hard it is. tau: `temperature`.

    Source: the code of VisATB (YanqiDai/VisATB). Changed: its weights (mean 1) multiply losses, our shares divide
    prompts; its contributions come from runs on one task plus small sets of the others, ours from the probe's matrix,
    on the `steer` half. It is static: rewards are not used, and the mixture of the first draw is that of all.
    """

    transfer: NeededProbes = Field(default=None, validate_default=True)
    """Needed: a `TransferMatrix` or the path of a `transfer.json` (`curriculum.transfer`), which `polyphony probe`
    writes."""
    temperature: float = Field(default=0.5, gt=0)
    """tau; 0.5 as in the code: a contribution larger by 0.35 doubles its term."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        state = state or self._weigh(evidence.domains)  # worked out once: the matrix does not change
        return Decision(mixture=tuple(state["mixture"]), reason=state["reason"], state=dict(state))

    def _weigh(self, domains: tuple[str, ...]) -> dict[str, Any]:
        effects = Effects(self.transfer.on("steer"))
        if missing := [name for name in domains if name not in effects.trained]:
            raise ValueError(
                f"VisATB: the transfer matrix has no training on {missing}, only on {list(effects.trained)}; "
                "run `polyphony probe` on this recipe"
            )
        rows = [effects.trained.index(name) for name in domains]
        table = effects.square(effects.means())[0][rows][:, rows]
        level = effects.own_levels(effects.means())[0][rows].tolist()
        given = [_mean_without(table[k], k) for k in range(len(rows))]
        got = [_mean_without(table[:, k], k) for k in range(len(rows))]
        terms = zip(
            softmax(given, temperature=self.temperature),
            softmax([-x for x in got], temperature=self.temperature),
            softmax([1 - d for d in level], temperature=self.temperature),
            strict=True,
        )
        reason = (
            f"fixed by the probe: more to domains that give to others ({listed(domains, given)}), that get little "
            f"({listed(domains, got)}) and that stay hard (own score {listed(domains, level)})"
        )
        return {"mixture": [((out + into) / 2 + hard) / 2 for out, into, hard in terms], "reason": reason}


def _mean_without(values: Any, k: int) -> float:
    """Return the mean of all values but the k-th; 0 where there is no other: a lone domain gives and gets nothing."""
    others = [float(value) for i, value in enumerate(values) if i != k]
    return mean(others) if others else 0.0
