"""The engine behind TRL's seam: attached, shown to follow the policy's weights, and watched draw by draw.

TRL asks `vllm_generation` for completions once `use_vllm` is set; that also switches its importance correction on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object, set_seed

from polyphony.trainer.rollouts import Completion, Engine, EngineFactory, InProcessEngine, Request, Sampling
from polyphony.trainer.weight_check import WeightCheck, check_weights, tolerance_of

if TYPE_CHECKING:
    from polyphony.trainer.grpo import DomainGRPOTrainer

COARSE_STEP = 1e-4
CHECKED_TOKENS = 8
"""Of each prompt in the check of weights."""


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
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation,  # type: ignore[operator]
            dtype=str(trainer.precision).removeprefix("torch."),
            longest=trainer.data.longest,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
        )
    engine.max_completion_length = trainer.max_completion_length
    trainer.vllm_generation, trainer.use_vllm, trainer._last_loaded_step = engine, True, -1
    set_seed(args.seed, device_specific=True)  # starting vLLM reseeds the process's generators
    return engine


def refuse_uneven(trainer: DomainGRPOTrainer, refill_rounds: int, look: int | None) -> None:
    """Raise ValueError where ranks that generate together would ask for unlike numbers: refills and looks do.

    TRL cuts the joint answer of one engine into equal parts, and waits for a rank that asks for nothing. Where Transformers
    generates and the policy's weights are split over the ranks, every token is made by all of them.
    """
    if trainer.engine is not None or not (refill_rounds or look) or trainer.accelerator.num_processes == 1:
        return
    if trainer.use_vllm and (trainer.vllm_mode == "server" or trainer.args.vllm_tensor_parallel_size > 1):
        joint = "several ranks on one engine of TRL's (grpo.use_vllm)"
    elif not trainer.use_vllm and _splits_weights(trainer):
        joint = (
            "rollouts.engine transformers over ranks that split the policy's weights (cluster.strategy zero3 or fsdp)"
        )
    else:
        return
    name, value, none = ("look", look, "null") if look else ("refill.max_rounds", refill_rounds, "0")
    raise ValueError(f"pool.{name}={value} with {joint}: use rollouts.engine vllm or ray, or set it to {none}")


def _splits_weights(trainer: DomainGRPOTrainer) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3)


def refuse_odd_look(trainer: DomainGRPOTrainer) -> None:
    """Raise ValueError for a `pool.look` that is no part of a group, or where ranks share groups.

    What a rank puts in the place of what was not sampled is its own.
    """
    args, size = trainer.args, trainer.num_generations
    look = trainer.curriculum.pool.look if trainer.curriculum.pool else None
    if look is None:
        return
    if look >= size:
        raise ValueError(f"pool.look: must be below grpo.num_generations={size}, got {look}")
    rows = args.per_device_train_batch_size * args.steps_per_generation  # type: ignore[operator]
    if trainer.accelerator.num_processes > 1 and rows % size:
        raise ValueError(
            f"pool.look={look}: a rank's {rows} rows of a draw (grpo.per_device_train_batch_size x "
            f"grpo.steps_per_generation) must be whole groups of grpo.num_generations={size}"
        )


def check_sync(trainer: DomainGRPOTrainer) -> WeightCheck:
    """Check, on a few held-out prompts, that the engine follows the policy's weights; the next draw syncs again."""
    data = trainer.data
    prompts = [prompt for table in data.heldout.values() for prompt in list(table)[:2]]
    ids = data.tokenize(prompts)
    requests = [
        Request(prompt_ids=i, seed=n, max_tokens=min(CHECKED_TOKENS, data.limits[prompt.domain]))
        for n, (prompt, i) in enumerate(zip(prompts, ids, strict=True))
    ]
    with _whole_distribution(trainer):
        check = check_weights(
            model=trainer.model,
            sync=trainer.sync_engine,
            sample=lambda: trainer.complete(requests, 1),
            score=lambda completions: trainer.forward.token_logps(ids, [c.ids for c in completions]),
            tolerance=_tolerance(trainer),
        )
    trainer._last_loaded_step = -1
    return check


@contextmanager
def _whole_distribution(trainer: DomainGRPOTrainer) -> Iterator[None]:
    """Sample without top-k and its like for a while: what they leave out, the policy's log-probabilities do not know."""
    whole = Sampling(temperature=trainer.temperature)
    generation = trainer.vllm_generation
    changed = asdict(whole) if trainer.engine is None else {"sampling": whole}  # TRL's own modes name each by itself
    kept = {name: getattr(generation, name) for name in changed}
    for name, value in changed.items():
        setattr(generation, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(generation, name, value)


def _tolerance(trainer: DomainGRPOTrainer) -> float:
    return tolerance_of(trainer.precision, device=trainer.accelerator.device.type)


def check_agreement(trainer: DomainGRPOTrainer, completions: Sequence[Completion]) -> None:
    """Raise RuntimeError where engine and policy no longer agree on what was sampled: a broken weight sync.

    Completions of older weights, which the recipe may allow, differ by right; importance correction is there for them.
    So do those that were sampled with top-k and its like.
    """
    if trainer.sampling != Sampling(temperature=trainer.temperature) or _is_stale(trainer.engine, completions):
        return
    allowed = _tolerance(trainer)
    differences = trainer._metrics["train"].get("sampling/sampling_logp_difference/mean")
    if differences and differences[-1] > allowed:
        raise RuntimeError(
            f"engine and policy differ by {differences[-1]:.2g} in the mean log-probability of sampled tokens "
            f"(allowed {allowed:g}): the engine does not hold the policy's weights"
        )


def loses_small_steps(trainer: DomainGRPOTrainer) -> bool:
    """Tell whether the optimizer adds steps to weights of half precision that are as coarse as they.

    DeepSpeed and FSDP keep float32 weights for the optimizer. Adam moves a weight by about the learning rate; bfloat16
    numbers of size w are w / 128 to w / 256 apart, so that a step below 1e-4 is rounded away in a weight of 0.05.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.args.learning_rate >= COARSE_STEP:
        return False
    return any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in trainer.model.parameters())


def _is_stale(engine: Engine | None, completions: Sequence[Completion]) -> bool:
    """True where a completion of any rank came from an older weight version than the engine's."""
    if engine is None:
        return False
    versions = [c.version for c in completions if c.version is not None]
    return min(gather_object(versions), default=engine.version) < engine.version
