"""The engine behind TRL's seam: attached, shown to follow the policy's weights, and watched draw by draw.

TRL asks `vllm_generation` for completions once `use_vllm` is set; that also switches its importance correction on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accelerate.utils import gather_object, set_seed

from trainer.rollouts import Completion, Engine, EngineFactory, InProcessEngine, Request
from trainer.weight_check import TOLERANCE, WeightCheck, check_weights

if TYPE_CHECKING:
    from trainer.grpo import DomainGRPOTrainer


def attach(trainer: DomainGRPOTrainer, engine: str | Engine | EngineFactory) -> Engine | None:
    """Attach an engine to a trainer and return it; None for `transformers`, with which TRL itself generates.

    Raises ValueError for a name that does not exist.
    """
    if engine == "transformers":
        return None
    if isinstance(engine, str) and engine != "vllm":
        raise ValueError(f"rollouts.engine {engine!r} does not exist; known: vllm, transformers")
    args = trainer.args
    if isinstance(engine, Engine):
        engine.attach(trainer.model, trainer.accelerator)
    else:
        make = InProcessEngine if isinstance(engine, str) else engine
        engine = make(
            trainer.model,
            trainer.accelerator,
            trainer.processing_class,
            sampling=trainer.sampling,
            max_model_length=trainer.data.context,
            max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation,  # type: ignore[operator]
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            dtype=str(trainer.model.dtype).removeprefix("torch."),
        )
    engine.max_completion_length = trainer.max_completion_length
    trainer.vllm_generation, trainer.use_vllm, trainer._last_loaded_step = engine, True, -1
    set_seed(args.seed, device_specific=True)  # starting vLLM reseeds the process's generators
    return engine


def check_sync(trainer: DomainGRPOTrainer) -> WeightCheck:
    """Check, on a few held-out prompts, that the engine follows the policy's weights; the next draw syncs again."""
    prompts = [prompt for table in trainer.data.heldout.values() for prompt in list(table)[:2]]
    ids = trainer.data.tokenize(prompts)
    requests = [Request(prompt_ids=i, seed=n, max_tokens=8) for n, i in enumerate(ids)]
    check = check_weights(
        model=trainer.model,
        sync=trainer.sync_engine,
        sample=lambda: trainer.complete(requests, 1),
        score=lambda completions: trainer.forward.token_logps(ids, [c.ids for c in completions]),
        precision=trainer.precision,
    )
    trainer._last_loaded_step = -1
    return check


def check_agreement(trainer: DomainGRPOTrainer, completions: Sequence[Completion]) -> None:
    """Raise RuntimeError where engine and policy no longer agree on what was sampled: a broken weight sync.

    Completions of older weights, which the recipe may allow, differ by right; importance correction is there for them.
    """
    if _is_stale(trainer.engine, completions):
        return
    differences = trainer._metrics["train"].get("sampling/sampling_logp_difference/mean")
    if differences and differences[-1] > TOLERANCE[trainer.precision]:
        raise RuntimeError(
            f"engine and policy differ by {differences[-1]:.2g} in the mean log-probability of sampled tokens "
            f"(allowed {TOLERANCE[trainer.precision]:g}): the engine does not hold the policy's weights"
        )


def _is_stale(engine: Engine | None, completions: Sequence[Completion]) -> bool:
    """True where a completion of any rank came from an older weight version than the engine's."""
    if engine is None:
        return False
    versions = [c.version for c in completions if c.version is not None]
    return min(gather_object(versions), default=engine.version) < engine.version
