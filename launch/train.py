"""`polyphony train`: a recipe becomes a run folder.

What needs torch is imported inside functions: the folder is claimed, or refused, before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.prompts.pool_file import POOL_FILE, PoolFileError, load_pools, own_pool
from polyphony.launch.build import build_trainer, load_transfer
from polyphony.launch.import_paths import PROVENANCE_FILE, looked_in
from polyphony.launch.recipe import Recipe, RecipeError, load_recipe
from polyphony.rewards.registry import other_versions
from polyphony.trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from polyphony.trainer.engine.engine import Engine
    from polyphony.trainer.grpo import DomainGRPOTrainer
    from polyphony.trainer.run.stopping import StopOnSignal

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
        trainer = started.trainer
        trainer.train(resume_from_checkpoint=str(started.checkpoint) if started.checkpoint else None)
        for line in _judged(trainer) if trainer.accelerator.is_main_process else ():
            say(line)
    except ValueError:  # what TRL and torch refuse comes to light when training begins
        if not resume and is_first_rank() and not (folder / "metrics.jsonl").exists():
            give_up_folder(folder)
        raise
    if started.stopper.stopped is not None:
        raise Interrupted(*started.stopper.stopped)
    from polyphony.trainer.checkpoints import save_final

    save_final(trainer.policy, out / "final")
    if trainer.accelerator.is_main_process:
        from polyphony.launch.report.report import write_report

        write_report([out], out / "report.html")
    return trainer.engine


def _judged(trainer: DomainGRPOTrainer) -> list[str]:
    """Return what judges read and wrote for each domain, training and held-out samples together."""
    whole = trainer.scorer.logged.whole + trainer.heldout_scorer.logged.whole
    tokens = {domain: total for (domain, name), total in sorted(whole.items()) if name == "judge_tokens"}
    return [f"judge: {total:,.0f} tokens for {domain}" for domain, total in tokens.items()]


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

    from polyphony.trainer.checkpoints import checkpoint_step
    from polyphony.trainer.run.callbacks import CheckWeights, RunCallback
    from polyphony.trainer.run.progress import ProgressLine
    from polyphony.trainer.run.provenance import provenance
    from polyphony.trainer.run.recorder import Recorder
    from polyphony.trainer.run.stopping import StopOnSignal
    from polyphony.trainer.run.tracking import WandbSettings, WandbTracker

    folder = RunFolder(out)
    trainer = build_trainer(recipe, folder.checkpoints, engine=engine)
    checkpoint = clean_up(trainer, folder)
    step = checkpoint_step(checkpoint) if checkpoint else -1
    trainer.remove_callback(PrinterCallback)
    if checkpoint is None and (known := adopt_known(trainer, recipe)):
        say(known)
    if trainer.accelerator.is_main_process:
        own_pool(out / POOL_FILE, {name: table.ids for name, table in trainer.data.train.items()}, say=say)
    trainer.add_callback(CheckWeights(trainer, say=say))
    places = {t.where: t for tables in (trainer.data.train, trainer.data.heldout) for t in tables.values()}
    origin = provenance(model=recipe.model, tables=places, rewards=trainer.scorer.rewards)
    is_main = trainer.accelerator.is_main_process
    if is_main:
        for line in _other_versions(out / PROVENANCE_FILE):
            say(f"--resume {out}: {line}; its scores before and from now on are not comparable")
        folder.write(PROVENANCE_FILE, json.dumps({**origin, "imports_from": looked_in()}, indent=1))
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
    for what in _slow_or_lossy(trainer) if is_main else ():
        say(what)
    return Started(trainer=trainer, checkpoint=checkpoint, stopper=stopper)


def _other_versions(saved: Path) -> list[str]:
    """Return which graders of the run so far were of another version than today's."""
    return other_versions(json.loads(saved.read_text()).get("graders", {})) if saved.is_file() else []


def _slow_or_lossy(trainer: DomainGRPOTrainer) -> list[str]:
    """Return what works, but not as well as it could."""
    import torch

    found = []
    if not trainer.use_vllm:
        found.append(
            "rollouts.engine transformers: no vLLM; slower on real models, and completions have no seeds of their own"
        )
    if trainer.policy.loses_small_steps:
        found.append(
            f"the policy's weights are {trainer.model.dtype}, too coarse for steps of {trainer.args.learning_rate:g}: "
            "set grpo.model_init_kwargs={dtype: float32}, or cluster.strategy zero2 or fsdp, or train an adapter"
        )
    if trainer.accelerator.num_processes == 1 and (gpus := torch.cuda.device_count()) > 1:
        found.append(f"one of {gpus} GPUs trains: more with `polyphony launch local` and cluster.processes")
    return found


def clean_up(trainer: DomainGRPOTrainer, folder: RunFolder) -> Path | None:
    """Take away what a run that broke off left half done; return the checkpoint to go on from. Collective over ranks."""
    from polyphony.trainer.checkpoints import checkpoint_step, remove_unfinished, whole_checkpoints

    if trainer.accelerator.is_main_process:
        folder.checkpoints.mkdir(exist_ok=True)
        remove_unfinished(folder.checkpoints)
        whole = whole_checkpoints(folder.checkpoints)
        folder.cut(checkpoint_step(whole[-1]) if whole else -1)
    trainer.accelerator.wait_for_everyone()
    return (whole_checkpoints(folder.checkpoints) or [None])[-1]


def say(text: str) -> None:
    """Tell the person who runs the command; results go to standard output, this does not."""
    print(text, file=sys.stderr, flush=True)


def adopt_known(trainer: DomainGRPOTrainer, recipe: Recipe) -> str | None:
    """Start from what `pool.from` knows of the prompts; return what was found in words, None where nothing is named.

    Raises RecipeError for a file that cannot be read or knows none of these prompts.
    """
    if recipe.pool is None or recipe.pool.start is None:
        return None
    path = Path(recipe.pool.start)
    try:
        found = trainer.curriculum.adopt_pools(load_pools(path))
    except PoolFileError as error:
        raise RecipeError(f"pool.from: {error}") from error
    if not found:
        raise RecipeError(f"pool.from: {path} is of another data set: it knows none of the training prompts")
    return f"pool.from: {found} of {trainer.data.n_train} training prompts are known"
