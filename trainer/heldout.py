"""The held-out evaluator of a trainer: its tables, engine, rewards and forward pass, wired together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from trainer.answers import Answer, read_answer
from trainer.evaluation import EvaluationSettings, Evaluator
from trainer.scoring import Sample

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
        log_probabilities=trainer.log_probabilities,
        read=partial(_read, trainer),
        limit=trainer.data.limits.__getitem__,
        gather=gather_object,
        rank=trainer.accelerator.process_index,
        world_size=trainer.accelerator.num_processes,
        diversity=trainer.fusion.by_domain,
    )


def _read(trainer: DomainGRPOTrainer, sample: Sample, score: float | None) -> Answer:
    domain = next(d for d in trainer.data.domains if d.name == sample.prompt.domain)
    return read_answer(
        sample,
        score,
        reward=trainer.scorer.rewards[domain.name],
        has_one_answer=domain.kind == "structured",
        decode=partial(trainer.processing_class.decode, skip_special_tokens=True),  # type: ignore[arg-type]
    )
