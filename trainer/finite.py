"""Steps whose loss or gradient is not finite: skipped and counted; too many in a row stop the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(kw_only=True, slots=True)
class FiniteSteps:
    """Remember which steps were left out."""

    most: int
    """Left out in a row before the run stops: one batch may be bad, a policy that is broken gives nothing else."""
    skipped: int = 0
    """Since the last log."""
    in_a_row: int = 0
    loss_is_finite: bool = True
    """Of all micro-batches of this step, on this rank."""

    def see_loss(self, loss: torch.Tensor) -> None:
        """Take in the loss of one micro-batch."""
        self.loss_is_finite = self.loss_is_finite and bool(torch.isfinite(loss).all())

    def judge(self, *, grad_norm: float, all_losses_finite: bool) -> bool:
        """Return whether this step may be taken; every rank has to be given the same."""
        self.loss_is_finite = True
        if all_losses_finite and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    def flush(self) -> int:
        """Return the steps left out since the last call."""
        skipped, self.skipped = self.skipped, 0
        return skipped


def forget_gradients(model: torch.nn.Module) -> None:
    """Take all gradients away: an optimizer passes over parameters that have none, and keeps its moments."""
    for parameter in model.parameters():
        parameter.grad = None


def save_batch(batch: Any, folder: Path, *, step: int, rank: int) -> Path:
    """Keep the micro-batches that led to a stop, for `torch.load`."""
    path = folder / f"nonfinite-step-{step}-rank-{rank}.pt"
    torch.save(batch, path)
    return path
