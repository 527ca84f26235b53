"""A recipe becomes a trainer: rows checked first, weights loaded last, every error one line.

What a run folder needs beside it (records, checkpoints, reports) is `polyphony.launch.train`.
What needs torch, TRL or vLLM is imported inside functions, late: a recipe and its rows are refused within a second.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.curricula.schedulers import Scheduler, as_scheduler
from polyphony.launch.cluster.local import check_heads
from polyphony.launch.grpo_fields import OURS
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.launch.remarks import remarks
from polyphony.rewards import find_reward
from polyphony.rewards.partitions import find_partitioner
from polyphony.trainer.engine.here import engine_here
from polyphony.trainer.environments.calls import functions_of, made_in_time, make_environment
from polyphony.trainer.rows import check_source
from polyphony.trainer.run import say
from polyphony.trainer.settings import with_probes
from polyphony.trainer.sft.settings import OF_DRAWS, answers_file
from polyphony.trainer.teachers.weights import TeacherWeights

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from polyphony.trainer.domains import DomainData, Told
    from polyphony.trainer.engine.engine import Engine, EngineFactory
    from polyphony.trainer.grpo import DomainGRPOTrainer
    from polyphony.trainer.run.folder import RunFolder


def check_probe(recipe: Recipe) -> None:
    """Raise RecipeError where `probe.from` names no place to start from."""
    start = recipe.probe.start
    if start.startswith("joint:"):
        steps = start.removeprefix("joint:")
        if not steps.isdecimal() or int(steps) < 1:
            raise RecipeError(f"probe.from: expected joint:<steps> with a whole number of steps, got {start!r}")
    elif start != "base" and not Path(start).is_dir():
        raise RecipeError(f"probe.from: {start!r} is neither base, joint:<steps> nor the folder of a checkpoint")


def untaught(recipe: Recipe) -> Recipe:
    """Return a recipe for what only samples: no teacher is looked for, and groups are of two at least."""
    if recipe.algorithm != "distil":
        return recipe
    domains = {name: replace(domain, teacher=None) for name, domain in recipe.domains.items()}
    grpo = dict(recipe.grpo)
    if grpo.get("num_generations") == 1:
        grpo |= {
            "num_generations": 2,
            "per_device_train_batch_size": 2 * int(grpo.get("per_device_train_batch_size", 8)),
        }
    return recipe.model_copy(update={"algorithm": "grpo", "teachers": {}, "domains": domains, "grpo": grpo})


def check_names(recipe: Recipe) -> None:
    """Raise RecipeError with all that `missing_names` finds."""
    if found := [line for lines in missing_names(recipe).values() for line in lines]:
        raise RecipeError(*found)


def missing_names(recipe: Recipe) -> dict[str, list[str]]:
    """Return what a recipe names and there is not, a line each, by domain; under no name what belongs to none.

    A scheduler, reward, partitioner, engine, pool, file. Imports no torch but for an engine of the recipe's own.
    """
    found: dict[str, list[str]] = {"": [*_refused(build_scheduler, recipe), *_refused(check_probe, recipe)]}
    found[""] += _refused(rollout_engine if recipe.rollouts.is_imported else engine_of, recipe)
    if recipe.pool is not None:
        found[""] += _refused(recipe.pool.check_parts)
    found[""] += _refused(check_weights, recipe)
    if recipe.sft.answers is not None and recipe.algorithm == "sft":
        found[""] += _refused(answers_file, recipe.sft.answers)
    if recipe.rft.dedup is not None:
        found[""] += [f"rft.dedup: {line}" for line in _refused(find_partitioner, recipe.rft.dedup)]
    for name, rows in recipe.of_trainer.spare.items():
        found[""] += _refused(lambda rows, where: check_source(rows, where=where), rows, f"guardrails.{name}.prompts")
    for name, section in recipe.domains.items():
        for key, check in _CHECKS.items():
            if (value := getattr(section, key)) is not None:
                where = f"domains.{name}.{key}"
                lines = _refused(check, value, where)
                found.setdefault(name, []).extend(f"{where}: {line.removeprefix(f'{where}: ')}" for line in lines)
    return found


def check_weights(recipe: Recipe) -> None:
    """Raise RecipeError where the weights of a teacher that a domain names are not there, or not whole."""
    for name in sorted({str(d.teacher) for d in recipe.domains.values() if d.teacher in recipe.teachers}):
        try:
            TeacherWeights.of(name, recipe.teachers[name], base=recipe.model)
        except ValueError as error:
            raise RecipeError(str(error)) from error


def _refused(check: Callable[..., Any], *given: Any) -> list[str]:
    try:
        check(*given)
    except (ValueError, OSError) as error:  # OSError: a name that no file can have
        return [str(error)]
    return []


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "environment": lambda environment, where: made_in_time(make_environment, environment),
    "tools": lambda tools, where: made_in_time(functions_of, tools),
    "train": lambda source, where: check_source(source, where=where),
    "heldout": lambda source, where: check_source(source, where=where),
    "reward": lambda reward, where: find_reward(reward),
    "diversity": lambda diversity, where: find_partitioner(diversity.partitioner),
}
"""What of a domain names something that has to be there."""


def build_trainer(
    recipe: Recipe,
    output: Path,
    *,
    engine: Engine | None = None,
    run: RunFolder | None = None,
    data: DomainData | None = None,
) -> DomainGRPOTrainer:
    """Return the trainer of a recipe; reads and checks all rows before weights are loaded, or takes `data`, which has been.

    Checkpoints go to `output`, or into the folder `run`, which was claimed for the recipe and is then kept as a run's. Under
    `algorithm: sft` it samples and evaluates only. Raises RecipeError.
    """
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    args = grpo_config(recipe, output)
    build_scheduler(recipe)
    check_heads(recipe)
    data = data or load_data(recipe, args)
    if args.process_index == 0:
        for line in remarks(recipe, args):
            say(line)

    from polyphony.trainer.grpo import DomainGRPOTrainer

    ours = recipe.of_trainer
    if engine is not None:
        engine.draws_ahead = recipe.rollouts.ahead
    try:
        return DomainGRPOTrainer(
            recipe.model,
            args,
            domains=data,
            curriculum=recipe.curriculum.model_dump(exclude_unset=True),
            engine=engine or rollout_engine(recipe),
            evaluation=ours.evaluation,
            entropy=ours.entropy,
            pool=ours.pool,
            update=ours.update,
            faults=ours.faults,
            checkpoint=ours.checkpoint,
            environments=ours.environments,
            max_grader_failures=ours.max_grader_failures,
            run=run,
            guardrails=ours.guardrails if run else (),
            processing_class=data.tokenizer,
            peft_config=_peft_config(recipe),
        )
    except (ValueError, OSError) as error:
        raise refusal(error) from error


def refusal(error: Exception) -> RecipeError:
    """Return what a trainer refuses with a recipe's names for what TRL's arguments are called where they are checked."""
    return RecipeError(re.sub(r"^(eval|save)_steps=", lambda m: f"{OURS[m[0][:-1]]}=", str(error)))


def engine_of(recipe: Recipe) -> str:
    """Return the name of the recipe's engine, as this machine has it. Raises RecipeError where there is no vLLM."""
    try:
        return engine_here(recipe.rollouts.engine, use_vllm=bool(recipe.grpo.get("use_vllm")))
    except ValueError as error:
        raise RecipeError(f"{'' if recipe.grpo.get('use_vllm') else 'rollouts.'}{error}") from error


def rollout_engine(recipe: Recipe) -> str | EngineFactory:
    """Return the name of the recipe's engine, or what makes it. Raises RecipeError for one that cannot be had here."""
    rollouts = recipe.rollouts
    if (here := engine_of(recipe)) != rollouts.engine:
        return here
    if rollouts.engine == "ray":
        from polyphony.launch.cluster.ray_engine import WORKERS_SHARE, RayEngine

        share = recipe.grpo.get("vllm_gpu_memory_utilization", WORKERS_SHARE)
        return partial(RayEngine, rollouts=rollouts, gpu_memory_utilization=share, engine_args=rollouts.engine_args)
    if not rollouts.engine_args and not rollouts.is_imported:
        return rollouts.engine
    from polyphony.trainer.engine.engine import find_engine

    try:
        make = find_engine(rollouts.engine)
    except ValueError as error:
        raise RecipeError(f"rollouts.{error}") from error
    return partial(make, engine_args=rollouts.engine_args) if rollouts.engine_args else make


OF_ROWS = ("max_completion_length", "model_init_kwargs", "trust_remote_code")
"""Fields of TRL's that say how rows are read."""


def load_data(recipe: Recipe, args: GRPOConfig, *, told: Told | None = None) -> DomainData:
    """Return the rows of a recipe, checked against its model's tokenizer and context; `told` as for `DomainData.load`.

    Raises RecipeError.
    """
    from polyphony.trainer.domains import DomainData

    tokenizer, context = tokenizer_of(recipe)
    try:
        return DomainData.load(
            list(recipe.domains.values()),
            tokenizer=tokenizer,
            args=args,
            context=context,
            settings=recipe.data,
            spare=recipe.of_trainer.spare,
            told=told,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


def tokenizer_of(recipe: Recipe) -> tuple[Any, int | None]:
    """Return the tokenizer of a recipe's model, and its context in tokens. Raises RecipeError."""
    from transformers import AutoTokenizer

    from polyphony.trainer.domains import code_of, context_of

    try:
        code = code_of(recipe.grpo)
        return AutoTokenizer.from_pretrained(recipe.model, **code), context_of(recipe.model, **code)
    except (ValueError, OSError) as error:
        raise RecipeError(f"model {recipe.model!r} cannot be loaded: {error}") from error


def build_scheduler(recipe: Recipe) -> Scheduler:
    """Return the recipe's scheduler; one that has a field `transfer` gets the probe's matrix."""
    try:
        given, _ = with_probes(recipe.curriculum.model_dump(exclude_unset=True))
        return as_scheduler(given, entropy=recipe.entropy, domains=list(recipe.domains))
    except ValueError as error:
        where = "" if str(error).startswith("curriculum.") else "curriculum: "
        raise RecipeError(f"{where}{error}") from error


def _peft_config(recipe: Recipe) -> Any:
    if recipe.lora is None and recipe.adapter is None:
        return None
    from peft import LoraConfig, OSFConfig

    if recipe.adapter is not None:
        adapter = recipe.adapter
        modules = adapter.target_modules
        return OSFConfig(effective_rank=adapter.frozen, target_modules=modules, task_type="CAUSAL_LM")
    lora = recipe.lora
    assert lora is not None
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")


def grpo_config(recipe: Recipe, output: Path) -> Any:
    """Return TRL's GRPOConfig: the recipe's `grpo` untouched, beside it what the run folder decides."""
    import torch
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.sft_config import SFTConfig

    from polyphony.trainer.single import single_config

    ours: dict[str, Any] = {
        "output_dir": str(output),
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint.every or recipe.eval.every,
        "save_total_limit": recipe.checkpoint.keep,
        "eval_steps": recipe.eval.every,
        "disable_tqdm": True,
        "report_to": "none",
        "run_name": recipe.name,
        "logging_steps": 1,
    }
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not torch.cuda.is_available():
        ours["ddp_backend"] = "gloo"  # accelerate finds none by itself for DeepSpeed on CPU, and each rank trains alone
    if not recipe.grpo.get("fp16") and (recipe.grpo.get("use_cpu") or not torch.accelerator.is_available()):
        ours["bf16"] = False  # which TRL takes for granted, and Transformers refuses here
    if recipe.algorithm == "distil":
        ours["loss_type"] = "grpo"  # TRL's own default averages over tokens
    said = {name: value for name, value in recipe.grpo.items() if (name, value) != ("bf16", None)}
    is_single = recipe.algorithm == "distil" and said.get("num_generations") == 1
    if recipe.algorithm == "sft":
        ours["learning_rate"], is_single = SFTConfig.learning_rate, True
        said = {name: value for name, value in said.items() if name not in OF_DRAWS}
    try:
        config = (single_config if is_single else GRPOConfig)(**{**ours, **said})
    except Exception as error:  # TRL and Transformers look into what they are given before they check it
        of = [
            name for name, v in recipe.grpo.items() if isinstance(v, str) and v in str(error) and name not in str(error)
        ]
        raise RecipeError(f"{f'grpo.{of[0]}' if len(of) == 1 else 'grpo'}: {error}") from error
    if started == 1 and config.n_gpu > 1:
        config._n_gpu = 1  # else Transformers would wrap the policy in DataParallel, which TRL refuses
    if config.world_size != started:
        raise RecipeError(
            f"{started} ranks were started, but each sees {config.world_size}: start them with `polyphony launch local`, "
            "or set ACCELERATE_USE_CPU=true where there is no GPU"
        )
    return config
