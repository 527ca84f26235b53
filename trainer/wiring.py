"""The parts that a trainer is made of, wired to its engine, rewards, tables and forward passes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from polyphony.trainer.answers import Answer, read_answer
from polyphony.trainer.draws import Draws
from polyphony.trainer.evaluation import EvaluationSettings, Evaluator
from polyphony.trainer.forward import Forward
from polyphony.trainer.scoring import Sample
from polyphony.trainer.seam import refuse_uneven

if TYPE_CHECKING:
    from polyphony.trainer.grpo import DomainGRPOTrainer


def draws_of(trainer: DomainGRPOTrainer, *, max_grader_failures: float) -> Draws:
    """Return the walk of a draw; groups go to the ranks in order, and one may straddle two."""
    pool = trainer.curriculum.pool
    refill_rounds = pool.refill_rounds if pool else 0
    look = pool.look if pool else None
    refuse_uneven(trainer, refill_rounds, look)
    return Draws(
        data=trainer.data,
        curriculum=trainer.curriculum,
        scorer=trainer.scorer,
        fusion=trainer.fusion.on(trainer.accelerator),
        seed=trainer.args.seed,
        group_size=trainer.num_generations,
        max_grader_failures=max_grader_failures,
        complete=trainer.complete,
        to_samples=trainer.to_samples,
        rank=trainer.accelerator.process_index,
        world_size=trainer.accelerator.num_processes,
        look=look,
        refill_rounds=refill_rounds,
        is_useful=trainer.advantages.is_useful,
        inspect=trainer.shortcuts.inspect,
        with_texts=trainer.data.names if trainer.advantages.partitioner else (),
    )


def forward_of(trainer: DomainGRPOTrainer, *, passes: Any) -> Forward:
    """Return the forward passes of the trainer's policy; `passes` is TRL's own method."""
    return Forward(
        passes=passes,
        policy=lambda: trainer.model,
        batch_size=trainer.args.per_device_eval_batch_size,
        padding=trainer._tokenizer.pad_token_id,  # type: ignore[arg-type]
        device=trainer.accelerator.device,
    )


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
        entropy_sums=trainer.forward.entropy_sums,
        log_probabilities=trainer.forward.log_probabilities,
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
