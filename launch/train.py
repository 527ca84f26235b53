"""`polyphony train`: a recipe becomes a run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import Recipe, RecipeError, load_recipe
from launch.local import check_heads
from launch.practice import adopt_known, own_pool, pool_settings, update_settings

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from trainer.domains import DomainData
    from trainer.grpo import DomainGRPOTrainer
    from trainer.rollouts import Engine, EngineFactory
    from trainer.run_folder import RunFolder
    from trainer.slots import DrawPlan
    from trainer.stopping import StopOnSignal

RECIPE_FILE = "recipe.yaml"
LOGS = "logs"
"""Folder in a run's folder that a batch system writes to before the run begins."""


class Interrupted(BaseException):
    """A signal ended the run after its checkpoint was saved; not an error, and no handler of errors takes it."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(number, step)
        self.number = number
        self.step = step

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name}: checkpoint at step {self.step} saved"


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A run that is ready to train."""

    trainer: DomainGRPOTrainer
    checkpoint: Path | None
    """Where it goes on from; None for a start from the recipe's model."""
    stopper: StopOnSignal


def train(recipe: Recipe, out: Path, *, resume: bool = False, engine: Engine | None = None) -> Engine | None:
    """Run a recipe into the folder `out`; return the engine, so that a next run of the same model can use it.

    With `resume`, go on from the newest complete checkpoint in `out`, or from the start if there is none.
    """
    folder = claim_folder(recipe, out, resume=resume) if is_first_rank() else out
    try:
        started = start(recipe, folder, engine=engine)
    except RecipeError:
        if not resume and is_first_rank():
            give_up_folder(folder)
        raise
    trainer = started.trainer
    trainer.train(resume_from_checkpoint=str(started.checkpoint) if started.checkpoint else None)
    if started.stopper.stopped is not None:
        raise Interrupted(*started.stopper.stopped)
    save_final(trainer, out / "final")
    if trainer.accelerator.is_main_process:
        from trainer.report import write_report

        write_report([out], out / "report.html")
    return trainer.engine


def is_first_rank() -> bool:
    """Tell rank 0 of a group that torchrun or accelerate started, before anything is imported that knows."""
    return os.environ.get("RANK", "0") == "0"


def claim_folder(recipe: Recipe, out: Path, *, resume: bool) -> Path:
    """Make the run folder, or check that it is this recipe's. Raises RecipeError in one line."""
    saved = out / RECIPE_FILE
    if resume:
        if not saved.is_file():
            raise RecipeError(f"--resume {out}: no run there ({RECIPE_FILE} is missing)")
        if load_recipe(saved) != recipe:
            raise RecipeError(
                f"--resume {out}: its recipe differs from this one; resume without overrides, or start anew"
            )
        return out
    if out.is_dir() and any(path.name != LOGS for path in out.iterdir()):
        raise RecipeError(f"run folder {out} is not empty; choose another --out, or go on with --resume {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        saved.write_text(recipe.as_yaml(), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"run folder {out} cannot be written: {error.strerror}") from error
    return out


def give_up_folder(folder: Path) -> None:
    """Take a folder away in which nothing was trained: the corrected recipe finds the name free. Logs stay."""
    for path in folder.iterdir():
        if path.name != LOGS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def start(recipe: Recipe, out: Path, *, engine: Engine | None = None) -> Started:
    """Build everything a run needs and wire up the run folder."""
    from transformers.trainer_callback import PrinterCallback

    from curricula.guardrails import Guardrail
    from curricula.pool_file import POOL_FILE
    from trainer.callbacks import CheckWeights, RunCallback
    from trainer.checkpoints import checkpoint_step
    from trainer.progress import ProgressLine
    from trainer.provenance import provenance
    from trainer.recorder import Recorder
    from trainer.run_folder import RunFolder
    from trainer.stopping import StopOnSignal
    from trainer.tracking import WandbSettings, WandbTracker

    folder = RunFolder(out)
    trainer = build_trainer(recipe, folder.checkpoints, engine=engine)
    checkpoint = clean_up(trainer, folder)
    step = checkpoint_step(checkpoint) if checkpoint else -1
    trainer.remove_callback(PrinterCallback)
    if checkpoint is None and (known := adopt_known(trainer, recipe)):
        say(known)
    if trainer.accelerator.is_main_process:
        own_pool(out / POOL_FILE, {name: table.ids for name, table in trainer.data.train.items()})
    trainer.add_callback(CheckWeights(trainer, say=say))
    places = {t.where: t for tables in (trainer.data.train, trainer.data.heldout) for t in tables.values()}
    origin = provenance(model=recipe.model, tables=places)
    is_main = trainer.accelerator.is_main_process
    if is_main:
        folder.write("provenance.json", json.dumps(origin, indent=1))
    recorder = Recorder(
        folder=folder,
        domains=trainer.data.domains,
        curriculum=trainer.curriculum,
        seed=trainer.args.seed,
        provenance=origin,
        is_main=is_main,
    )
    if checkpoint is None and recipe.curriculum.transfer is not None:
        recorder.adopt(load_transfer(recipe))
    else:
        recorder.restore(step)
    wandb = recipe.tracking.wandb
    tracker = None
    if wandb is not None and is_main:
        settings = WandbSettings(**wandb.model_dump())
        tracker = WandbTracker(settings, name=recipe.name, folder=out, config=recipe.model_dump())
    trainer.add_callback(
        RunCallback(
            trainer,
            recorder,
            evaluate_every=recipe.eval.every,
            keep_checkpoints=recipe.checkpoint.keep,
            guardrails=[Guardrail(domain=name, **g.model_dump()) for name, g in recipe.guardrails.items()],
            tracker=tracker,
            progress=ProgressLine(recipe.name, trainer.plan.steps, domains=trainer.data.names) if is_main else None,
        )
    )
    stopper = StopOnSignal(trainer.plan, grace_s=recipe.faults.grace_s, agree=trainer.largest)
    trainer.add_callback(stopper)
    if not trainer.use_vllm:
        say("rollouts.engine transformers: no vLLM; slower on real models, and completions have no seeds of their own")
    return Started(trainer=trainer, checkpoint=checkpoint, stopper=stopper)


def clean_up(trainer: DomainGRPOTrainer, folder: RunFolder) -> Path | None:
    """Take away what a run that broke off left half done; return the checkpoint to go on from. Collective over ranks."""
    from trainer.checkpoints import checkpoint_step, remove_unfinished, whole_checkpoints

    if trainer.accelerator.is_main_process:
        folder.checkpoints.mkdir(exist_ok=True)
        remove_unfinished(folder.checkpoints)
        whole = whole_checkpoints(folder.checkpoints)
        folder.cut(checkpoint_step(whole[-1]) if whole else -1)
    trainer.accelerator.wait_for_everyone()
    return (whole_checkpoints(folder.checkpoints) or [None])[-1]


def build_trainer(recipe: Recipe, output: Path, *, engine: Engine | None = None) -> DomainGRPOTrainer:
    """Return the trainer of a recipe; reads and checks all rows before weights are loaded. Raises RecipeError."""
    import warnings

    from trainer.slots import plan_draws

    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    args = grpo_config(recipe, output)
    scheduler, pool = build_scheduler(recipe), pool_settings(recipe)
    check_heads(recipe)
    data = load_data(recipe, args)
    check_boundaries(recipe, plan_draws(args, data.n_train))

    from trainer.entropy import EntropySettings  # TRL brings vLLM along, some ten seconds: only once all rows are good
    from trainer.evaluation import EvaluationSettings
    from trainer.grpo import DomainGRPOTrainer

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
            processing_class=data.tokenizer,
            peft_config=_peft_config(recipe),
        )
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from error


def rollout_engine(recipe: Recipe) -> str | EngineFactory:
    """Return the name of the recipe's engine, or what makes it."""
    rollouts = recipe.rollouts
    if rollouts.engine != "ray":
        return rollouts.engine
    from functools import partial

    from launch.ray_engine import RayEngine
    from launch.workers import PoolSettings

    fields = ("workers", "tensor_parallel", "timeout_s", "start_timeout_s", "address")
    pool = PoolSettings(**{name: getattr(rollouts, name) for name in fields})
    return partial(RayEngine, pool=pool, max_staleness=rollouts.max_staleness)


def load_data(recipe: Recipe, args: GRPOConfig) -> DomainData:
    """Return the rows of a recipe, checked against its model's tokenizer and context. Raises RecipeError."""
    from transformers import AutoConfig, AutoTokenizer

    from trainer.domains import DomainData

    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        config = AutoConfig.from_pretrained(recipe.model).get_text_config()
    except (ValueError, OSError) as error:
        raise RecipeError(f"model {recipe.model!r} cannot be loaded: {error}") from error
    try:
        return DomainData.load(
            domains_of(recipe),
            tokenizer=tokenizer,
            args=args,
            context=getattr(config, "max_position_embeddings", None),
            overlap=recipe.data.overlap,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


def check_boundaries(recipe: Recipe, plan: DrawPlan) -> None:
    """Raise RecipeError where an evaluation or a checkpoint would fall inside a draw."""
    checkpoints = recipe.checkpoint.every or recipe.eval.every
    for name, every in (("eval.every", recipe.eval.every), ("checkpoint.every", checkpoints)):
        if not plan.is_boundary(every):
            span = plan.micro_batches_per_draw / plan.micro_batches_per_step
            raise RecipeError(f"{name}={every} falls inside a draw; a draw spans {span:g} optimizer steps")


def build_scheduler(recipe: Recipe) -> Any:
    """Return the recipe's scheduler; one that has a field `transfer` gets the probe's matrix."""
    from curricula import schedulers

    settings = recipe.curriculum.settings
    try:
        takes = getattr(schedulers.find_scheduler(recipe.curriculum.scheduler), "__dataclass_fields__", {})
        if "entropy_band" in takes:
            settings.setdefault("entropy_band", recipe.entropy.band)
        if "adaptive" in takes:  # `auto` hands these on
            settings["adaptive"] = {"entropy_band": recipe.entropy.band, **settings.get("adaptive", {})}
        if recipe.curriculum.transfer is not None and "transfer" in takes:
            settings["transfer"] = load_transfer(recipe)
        return schedulers.build_scheduler(recipe.curriculum.scheduler, **settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"curriculum: {error}") from error


def load_transfer(recipe: Recipe) -> Any:
    """Return the probe's transfer matrix that the recipe names."""
    from curricula.transfer import TransferMatrix

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
    from curricula.records import Domain

    return [Domain(name=name, **section.model_dump()) for name, section in recipe.domains.items()]


def grpo_config(recipe: Recipe, output: Path) -> Any:
    """Return TRL's GRPOConfig: the recipe's `grpo` untouched, beside it what the run folder decides."""
    import torch
    from trl.trainer.grpo_config import GRPOConfig

    ours: dict[str, Any] = {
        "output_dir": str(output),
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint.every or recipe.eval.every,
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
    if config.world_size != started:
        raise RecipeError(
            f"{started} ranks were started, but each sees {config.world_size}: start them with `polyphony launch local`, "
            "or set ACCELERATE_USE_CPU=true where there is no GPU"
        )
    return config


def save_final(trainer: DomainGRPOTrainer, out: Path) -> None:
    """Save the policy as an ordinary Hugging Face folder, adapters merged; collective over ranks."""
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        if trainer.accelerator.is_main_process:
            model.merge_and_unload().save_pretrained(out)
    else:
        trainer.save_model(str(out))
    if trainer.accelerator.is_main_process:
        trainer.processing_class.save_pretrained(out)  # type: ignore[union-attr]


def say(text: str) -> None:
    """Tell the person who runs the command; results go to standard output, this does not."""
    print(text, file=sys.stderr, flush=True)
