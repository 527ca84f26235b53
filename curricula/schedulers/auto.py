"""`auto`, the default: `bwt` where the plan of the transfer file says `sequence`, else `adaptive`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, Evidence
from polyphony.curricula.schedulers.adaptive import Adaptive
from polyphony.curricula.schedulers.bwt import Bwt
from polyphony.curricula.schedulers.replay import Replay
from polyphony.curricula.transfer.matrix import Probes
from polyphony.curricula.transfer.planner import make_plan


@settings
class Auto:
    """The plan's decision: `sequence` is `bwt`, `mix` is `adaptive`; without a transfer file, `adaptive`.

    A sequence is chosen only where one was trained by the probe (`probe.ways=[sequence]`) and is shown to beat the joint
    run: in a study with 12 matched seeds no data policy beat uniform mixing (arXiv:2609.06107), and in our lab predicted
    gains of an order did not come true. Where the plan says `mix`, what was measured moves no share unless
    `adaptive.strength` is above 0.
    """

    transfer: Probes = None
    """A `TransferMatrix`, the path of a `transfer.json` (`curriculum.transfer`), or None."""
    replay: Replay | None = None
    """`replay` of `bwt`, used where the plan says `sequence`; None: its defaults."""
    adaptive: Adaptive = Adaptive()
    """Settings of `adaptive`, used where the plan says `mix`."""
    why: str = field(init=False, repr=False, compare=False)
    inner: Bwt | Adaptive = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.transfer is None:
            inner, why = self.adaptive, "adaptive, for no transfer file was given"
        elif (plan := make_plan(self.transfer)).decision == "sequence":
            inner = Bwt(transfer=self.transfer, replay=self.replay or Replay())
            why = f"bwt, for the plan says sequence (gain {_signed(plan.over_mean_order)} over a random order)"
            if self.adaptive.entropy_control:
                why += ", so that entropy moves no shares"
        else:
            inner = replace(self.adaptive, transfer=self.transfer)
            why = f"adaptive, for the plan says mix (gain {_signed(plan.over_mean_order)} over a random order)"
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "why", why)

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        decision = self.inner.decide(evidence, state)
        return replace(decision, reason=f"{self.why}; {decision.reason}")

    def reviews(self, evidence: Evidence, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the reviews of a planned sequence; empty under `adaptive`."""
        return self.inner.reviews(evidence, state) if isinstance(self.inner, Bwt) else []


def _signed(gain: tuple[float, float, float]) -> str:
    low, mid, high = gain
    return f"{mid:+.3f}, {low:+.3f} to {high:+.3f}"
