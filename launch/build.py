"""A recipe becomes a trainer: rows checked first, weights loaded last, every error one line.

What a run folder needs beside it (records, checkpoints, reports) is `polyphony.launch.train`.
What needs torch, TRL or vLLM is imported inside functions, late: a recipe and its rows are refused within a second.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.curricula import schedulers
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.prompts.estimate import Band
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import Domain
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.cluster.local import check_heads
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.rewards import find_reward
from polyphony.rewards.partitions import find_partitioner
from polyphony.trainer.data import check_source
from polyphony.trainer.settings import EntropySettings, EvaluationSettings, Guard, RftSettings, UpdateSettings

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from polyphony.trainer.domains import DomainData
    from polyphony.trainer.engine.engine import Engine, EngineFactory
    from polyphony.trainer.grpo import DomainGRPOTrainer
    from polyphony.trainer.slots import DrawPlan


def pool_settings(recipe: Recipe) -> PoolSettings | None:
    """Return how the recipe's pool works; None where it has none.

    Raises RecipeError for an unknown sampling, or a file to start from that is not there.
    """
    section = recipe.pool
    if section is None:
        return None
    if section.start is not None and not Path(section.start).is_file():
        raise RecipeError(f"pool.from: file {section.start} does not exist; `polyphony screen` writes it")
    given = section.model_dump(exclude={"refill", "start", "impossible_below", "defer_below", "mastered_above"})
    band = Band(
        impossible_below=section.impossible_below,
        defer_below=section.defer_below,
        mastered_above=section.mastered_above,
    )
    try:
        return PoolSettings(band=band, refill_rounds=section.refill.max_rounds, **given)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def update_settings(recipe: Recipe) -> UpdateSettings:
    """Return how the recipe's rewards become an update."""
    return UpdateSettings(
        advantages=recipe.advantages,
        guard=None if recipe.guard is None else Guard(**recipe.guard.model_dump()),
        rft=RftSettings(**recipe.rft.model_dump()) if recipe.algorithm == "rft" else None,
        drop_dead=recipe.update.drop_dead,
    )


def check_names(recipe: Recipe) -> None:
    """Raise RecipeError for a scheduler, reward, partitioner, pool or file that does not exist; imports no torch."""
    build_scheduler(recipe)
    pool_settings(recipe)
    for name, section in recipe.domains.items():
        for key in ("train", "heldout", "reward", "diversity"):
            value, where = getattr(section, key), f"domains.{name}.{key}"
            try:
                if key in ("train", "heldout"):
                    check_source(value, where=where)
                elif key == "reward":
                    find_reward(value)
                elif value is not None:
                    find_partitioner(value.partitioner)
            except ValueError as error:
                raise RecipeError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


def build_trainer(
    recipe: Recipe, output: Path, *, engine: Engine | None = None, run: Path | None = None
) -> DomainGRPOTrainer:
    """Return the trainer of a recipe; reads and checks all rows before weights are loaded. Raises RecipeError.

    Checkpoints go to `output`, or into the folder `run`, which is then kept as a run's.
    """
    from polyphony.trainer.slots import plan_draws

    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    args = grpo_config(recipe, output)
    scheduler, pool = build_scheduler(recipe), pool_settings(recipe)
    check_heads(recipe)
    data = load_data(recipe, args)
    check_boundaries(recipe, plan_draws(args, data.n_train))

    from polyphony.trainer.grpo import DomainGRPOTrainer

    try:
        return DomainGRPOTrainer(
            recipe.model,
            args,
            domains=data,
            curriculum=scheduler,
            engine=engine or rollout_engine(recipe),
            evaluation=EvaluationSettings(**recipe.eval.model_dump(exclude={"every"})),
            entropy=EntropySettings(**recipe.entropy.model_dump()),
            pool=pool,
            update=update_settings(recipe),
            max_grader_failures=recipe.rollouts.max_grader_failures,
            max_skipped=recipe.faults.max_skipped,
            run=run,
            guardrails=[Guardrail(domain=name, **g.model_dump()) for name, g in recipe.guardrails.items()]
            if run
            else [],
            processing_class=data.tokenizer,
            peft_config=_peft_config(recipe),
        )
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from error


def rollout_engine(recipe: Recipe) -> str | EngineFactory:
    """Return the name of the recipe's engine, or what makes it."""
    rollouts = recipe.rollouts
    if rollouts.engine == "vllm" and rollouts.engine_args:
        from polyphony.trainer.engine.engine import InProcessEngine

        return partial(InProcessEngine, engine_args=rollouts.engine_args)
    if rollouts.engine != "ray":
        return rollouts.engine
    from polyphony.launch.cluster.ray_engine import RayEngine
    from polyphony.launch.cluster.ray_workers import WorkerSettings

    fields = ("workers", "tensor_parallel", "timeout_s", "start_timeout_s", "address")
    given = {name: getattr(rollouts, name) for name in fields}
    if (share := recipe.grpo.get("vllm_gpu_memory_utilization")) is not None:
        given["gpu_memory_utilization"] = share
    pool = WorkerSettings(**given)
    return partial(RayEngine, pool=pool, max_staleness=rollouts.max_staleness, engine_args=rollouts.engine_args)


def load_data(recipe: Recipe, args: GRPOConfig) -> DomainData:
    """Return the rows of a recipe, checked against its model's tokenizer and context. Raises RecipeError."""
    from transformers import AutoTokenizer

    from polyphony.trainer.domains import DomainData, context_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        context = context_of(recipe.model)
    except (ValueError, OSError) as error:
        raise RecipeError(f"model {recipe.model!r} cannot be loaded: {error}") from error
    try:
        return DomainData.load(
            domains_of(recipe),
            tokenizer=tokenizer,
            args=args,
            context=context,
            overlap=recipe.data.overlap,
            max_unreadable=recipe.data.max_unreadable,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


def check_boundaries(recipe: Recipe, plan: DrawPlan) -> None:
    """Raise RecipeError where an evaluation or a checkpoint would fall inside a draw."""
    checkpoints = recipe.checkpoint.every or recipe.eval.every
    for name, every in (("eval.every", recipe.eval.every), ("checkpoint.every", checkpoints)):
        try:
            plan.check_boundary(name, every)
        except ValueError as error:
            raise RecipeError(str(error)) from error


def build_scheduler(recipe: Recipe) -> Any:
    """Return the recipe's scheduler; one that has a field `transfer` gets the probe's matrix."""
    settings, name = recipe.curriculum.settings, recipe.curriculum.scheduler
    held = recipe.entropy.held("sampling", list(recipe.domains))
    entropy = {"entropy_band": recipe.entropy.band, "entropy_control": held}
    try:
        takes = getattr(schedulers.find_scheduler(name), "__dataclass_fields__", {})
        if set(entropy) <= set(takes):
            settings = entropy | settings
        elif "adaptive" in takes:  # `auto` hands these on
            settings["adaptive"] = entropy | settings.get("adaptive", {})
        elif recipe.entropy.asks_for_sampling:
            raise ValueError(f"scheduler {name!r} does not do `entropy.control: sampling`; adaptive and auto do")
        if recipe.curriculum.transfer is not None and "transfer" in takes:
            settings["transfer"] = load_transfer(recipe)
        return schedulers.build_scheduler(name, **settings)
    except ValueError as error:
        raise RecipeError(f"curriculum: {error}") from error
    except TypeError as error:  # a setting of another type than the scheduler can work with
        given = recipe.curriculum.settings
        raise RecipeError(f"curriculum: scheduler {name!r} refuses {given}: {error}") from error


def load_transfer(recipe: Recipe) -> Any:
    """Return the probe's transfer matrix that the recipe names."""
    path = Path(str(recipe.curriculum.transfer))
    if not path.is_file():
        raise RecipeError(f"curriculum.transfer: file {path} does not exist; `polyphony probe` writes it")
    try:
        return TransferMatrix.load(path)
    except ValueError as error:
        raise RecipeError(f"curriculum.transfer: {error}") from error


def _peft_config(recipe: Recipe) -> Any:
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    lora = recipe.lora
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")


def domains_of(recipe: Recipe) -> list[Any]:
    """Return the recipe's domains as records."""
    return [Domain(name=name, **section.model_dump()) for name, section in recipe.domains.items()]


def grpo_config(recipe: Recipe, output: Path) -> Any:
    """Return TRL's GRPOConfig: the recipe's `grpo` untouched, beside it what the run folder decides."""
    import torch
    from trl.trainer.grpo_config import GRPOConfig

    ours: dict[str, Any] = {
        "output_dir": str(output),
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint.every or recipe.eval.every,
        "save_total_limit": recipe.checkpoint.keep,
        "eval_steps": recipe.eval.every,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_steps": 1,
    }
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not torch.cuda.is_available():
        ours["ddp_backend"] = "gloo"  # accelerate finds none by itself for DeepSpeed on CPU, and each rank trains alone
    try:
        config = GRPOConfig(**{**ours, **recipe.grpo})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"grpo: {error}") from error
    if started == 1 and config.n_gpu > 1:
        config._n_gpu = 1  # else Transformers would wrap the policy in DataParallel, which TRL refuses
    if config.world_size != started:
        raise RecipeError(
            f"{started} ranks were started, but each sees {config.world_size}: start them with `polyphony launch local`, "
            "or set ACCELERATE_USE_CPU=true where there is no GPU"
        )
    return config
