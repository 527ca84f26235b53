"""The held-out evaluator of a trainer: its tables, engine, rewards and forward pass, wired together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from trainer.evaluation import EvaluationSettings, Evaluator

if TYPE_CHECKING:
    from trainer.grpo import DomainGRPOTrainer


def evaluator_of(trainer: DomainGRPOTrainer, settings: EvaluationSettings) -> Evaluator:
    """Return the evaluator that scores the trainer's policy as it is at each call."""
    return Evaluator(
        tables=trainer.data.heldout,
        settings=settings,
        seed=trainer.args.seed,
        tokenize=trainer.data.tokenize,
        complete=lambda requests: trainer.complete(requests, settings.samples),
        to_samples=trainer.to_samples,
        score=trainer.scorer,
        entropy_sums=trainer.entropy_sums,
        limit=trainer.data.limits.__getitem__,
        gather=gather_object,
        rank=trainer.accelerator.process_index,
        world_size=trainer.accelerator.num_processes,
        diversity=trainer.fusion.by_domain,
    )
