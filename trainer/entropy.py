"""Entropy by domain inside the trainer: the monitor's inputs, its alarms, and the term it may add to the loss.

Entropies are TRL's: exact, from the policy's logits over the whole vocabulary, divided by the run's temperature. The
term is off unless asked for, and then, for coefficients c_i of the rows in units of advantage a nat,

    loss = TRL's loss - sum_i c_i * (sum of the token entropies of row i) / (tokens of all rows) / accumulation

which for equal coefficients is TRL's own bonus (`entropy_coef`), so the two exclude each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polyphony.curricula.monitors import Alarm
from polyphony.curricula.monitors.entropy import EntropyMonitor, Sums
from polyphony.curricula.monitors.entropy_control import EntropyControl, EntropySettings
from polyphony.curricula.records import Group
from polyphony.trainer.metrics import defined, key

ROW_COEFFICIENT = "entropy_coefficient"
"""Key of the rows' coefficients in TRL's batch, which it shuffles and splits like every tensor of one entry a row."""


class DomainEntropy:
    """Watch the entropy of all domains and, if asked, hold it in its band.

    Example: `DomainEntropy(("math",), EntropySettings(control="adaptive"))`
    """

    def __init__(self, domains: Sequence[str], settings: EntropySettings) -> None:
        self.domains = tuple(domains)
        self.monitor = EntropyMonitor(domains=domains, band=settings.band)
        self.control: EntropyControl | None = None
        self.pending: list[Alarm] = []
        """Alarms that nobody has written down yet."""
        if held := settings.held("coefficient", domains):
            self.control = EntropyControl(domains=held, settings=settings)

    def after_draw(
        self, step: int, sums: Mapping[str, Sums], groups: Sequence[Group], discarded: Sequence[Group] = ()
    ) -> None:
        """Take in one draw: the groups of the update and those that refills replaced; `step` is the one it is for."""
        self.pending += self.monitor.observe(step, sums, drawn=Counter(g.domain for g in (*groups, *discarded)))
        if self.control is None:
            return
        raised = {group.domain for group in groups if self.control.can_raise(group)}
        for name in self.control.domains:
            if name in sums:
                nats, tokens = sums[name]
                self.control.move(
                    name,
                    level=nats / tokens,
                    band=self.monitor.band(name),
                    base=self.monitor.watches[name].base,
                    can_raise=name in raised,
                )

    def after_evaluation(self, step: int, items: Mapping[str, Sequence[tuple[float, int]]]) -> None:
        """Take in one evaluation: per domain the (nats, tokens) of each item."""
        columns = {n: ([nats for nats, _ in pairs], [k for _, k in pairs]) for n, pairs in items.items() if pairs}
        self.pending += self.monitor.measure(step, columns)

    def rows(self, groups: Sequence[Group], device: torch.device) -> dict[str, torch.Tensor]:
        """Return what the loss needs to know of each row, for TRL's batch; nothing while control is off.

        `groups` are those that this rank's rows belong to, [B].
        """
        if self.control is None:
            return {}
        return {ROW_COEFFICIENT: torch.tensor([self.control.of_row(group) for group in groups], device=device)}

    def bonus(self, entropy: torch.Tensor, mask: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """Return sum_i c_i H_i of one micro-batch, to be subtracted from its loss.

        `entropy` and `mask` are [B, T], `coefficients` [B].
        """
        return (coefficients.unsqueeze(1) * entropy * mask).sum() / mask.sum().clamp(min=1)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of this step, by full name."""
        found: dict[str, float] = {}
        for name, values in self.monitor.metrics().items():
            found |= {key("domain", metric, name): value for metric, value in values.items()}
            if self.control is not None and name in self.control.domains:
                found[key("domain", "entropy_coef", name)] = self.control.coefficients[name]
        return defined(found)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on; JSON-able."""
        return {
            "monitor": self.monitor.state_dict(),
            "control": None if self.control is None else self.control.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.monitor.load_state_dict(state["monitor"])
        if self.control is not None and state["control"] is not None:
            self.control.load_state_dict(state["control"])
