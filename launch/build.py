"""A recipe becomes a trainer: rows checked first, weights loaded last, every error one line.

What a run folder needs beside it (records, checkpoints, reports) is `polyphony.launch.train`.
What needs torch, TRL or vLLM is imported inside functions, late: a recipe and its rows are refused within a second.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.curricula import schedulers
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.cluster.local import check_heads
from polyphony.launch.grpo_fields import OURS
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.rewards import find_reward
from polyphony.rewards.partitions import find_partitioner
from polyphony.trainer.data import check_source
from polyphony.trainer.settings import UpdateSettings

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from polyphony.trainer.domains import DomainData
    from polyphony.trainer.engine.engine import Engine, EngineFactory
    from polyphony.trainer.grpo import DomainGRPOTrainer


def check_probe(recipe: Recipe) -> None:
    """Raise RecipeError where `probe.from` names no place to start from."""
    start = recipe.probe.start
    if start.startswith("joint:"):
        steps = start.removeprefix("joint:")
        if not steps.isdecimal() or int(steps) < 1:
            raise RecipeError(f"probe.from: expected joint:<steps> with a whole number of steps, got {start!r}")
    elif start != "base" and not Path(start).is_dir():
        raise RecipeError(f"probe.from: {start!r} is neither base, joint:<steps> nor the folder of a checkpoint")


def update_settings(recipe: Recipe) -> UpdateSettings:
    """Return how the recipe's rewards become an update."""
    return UpdateSettings(
        advantages=recipe.advantages,
        guard=recipe.guard,
        rft=recipe.rft if recipe.algorithm == "rft" else None,
        drop_dead=recipe.update.drop_dead,
    )


def check_names(recipe: Recipe) -> None:
    """Raise RecipeError for a scheduler, reward, partitioner, pool or file that does not exist; imports no torch."""
    build_scheduler(recipe)
    check_probe(recipe)
    try:
        if recipe.pool is not None:
            recipe.pool.check_parts()
    except ValueError as error:
        raise RecipeError(str(error)) from error
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
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    args = grpo_config(recipe, output)
    scheduler = build_scheduler(recipe)
    check_heads(recipe)
    data = load_data(recipe, args)

    from polyphony.trainer.grpo import DomainGRPOTrainer

    try:
        return DomainGRPOTrainer(
            recipe.model,
            args,
            domains=data,
            curriculum=scheduler,
            engine=engine or rollout_engine(recipe),
            evaluation=recipe.eval,
            entropy=recipe.entropy,
            pool=recipe.pool,
            update=update_settings(recipe),
            faults=recipe.faults,
            max_grader_failures=recipe.rollouts.max_grader_failures,
            run=run,
            guardrails=list(recipe.guardrails.values()) if run else [],
            processing_class=data.tokenizer,
            peft_config=_peft_config(recipe),
        )
    except (ValueError, OSError) as error:  # what TRL's arguments are called where they are checked
        raise RecipeError(re.sub(r"^(eval|save)_steps=", lambda m: f"{OURS[m[0][:-1]]}=", str(error))) from error


def rollout_engine(recipe: Recipe) -> str | EngineFactory:
    """Return the name of the recipe's engine, or what makes it."""
    rollouts = recipe.rollouts
    if rollouts.engine == "vllm" and rollouts.engine_args:
        from polyphony.trainer.engine.engine import InProcessEngine

        return partial(InProcessEngine, engine_args=rollouts.engine_args)
    if rollouts.engine != "ray":
        return rollouts.engine
    from polyphony.launch.cluster.ray_engine import WORKERS_SHARE, RayEngine

    share = recipe.grpo.get("vllm_gpu_memory_utilization", WORKERS_SHARE)
    return partial(RayEngine, rollouts=rollouts, gpu_memory_utilization=share, engine_args=rollouts.engine_args)


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
            list(recipe.domains.values()),
            tokenizer=tokenizer,
            args=args,
            context=context,
            settings=recipe.data,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


def build_scheduler(recipe: Recipe) -> Any:
    """Return the recipe's scheduler; one that has a field `transfer` gets the probe's matrix."""
    given = recipe.curriculum.model_dump(exclude_unset=True, exclude={"transfer"})
    try:
        takes = getattr(schedulers.find_scheduler(recipe.curriculum.scheduler), "__dataclass_fields__", {})
        probes = {"transfer": load_transfer(recipe)} if recipe.curriculum.transfer and "transfer" in takes else {}
        return schedulers.as_scheduler(given | probes, entropy=recipe.entropy, domains=list(recipe.domains))
    except ValueError as error:
        raise RecipeError(f"curriculum: {error}") from error


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
