"""Steps whose loss or gradient is not finite: skipped and counted; too many in a row stop the run, whatever its loss."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from polyphony.trainer.metrics import key


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


def norm_of_step(trainer: Any, norm: Any, batch: Any) -> Any:
    """Return the gradient's norm of the step that is about to be taken; of one that is not finite, leave the step out.

    `trainer.finite` has seen its losses. Raises RuntimeError, with `batch` kept, where too many in a row are not, or where
    it is too late.
    """
    losses = torch.tensor(float(not trainer.finite.loss_is_finite), device=trainer.accelerator.device)
    worst = trainer.accelerator.reduce(losses, reduction="sum").item()
    size = 0.0 if norm is None else float(norm)
    if trainer.finite.judge(grad_norm=size, all_losses_finite=not worst):
        return norm
    # DeepSpeed steps inside the backward pass; it leaves a step out by itself only in half precision
    is_too_late = trainer.is_deepspeed_enabled and trainer.model_wrapped.was_step_applied()
    if not is_too_late:
        forget_gradients(trainer.model)
    if is_too_late or trainer.finite.in_a_row > trainer.finite.most:
        folder, step = Path(trainer.args.output_dir), trainer.state.global_step + 1
        path = save_batch(batch, folder, step=step, rank=trainer.accelerator.process_index)
        raise RuntimeError(
            f"step {step}: loss or gradient is not finite, {trainer.finite.in_a_row} in a row "
            f"(faults.max_skipped={trainer.finite.most}); the batch is kept in {path}"
        )
    return norm


def faults_of(trainer: Any) -> dict[str, float]:
    """Return the counts of a trainer's recovered faults since the last log, as metrics."""
    counts: dict[str, float] = {"skipped_steps": trainer.finite.flush()}
    if trainer.policy.engine is not None:
        counts |= asdict(trainer.policy.engine.flush_faults())
    return {key("faults", name): count for name, count in counts.items()}
