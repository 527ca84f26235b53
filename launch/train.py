"""`polyphony train`: a recipe becomes a run folder.

What needs torch is imported inside functions: the folder is claimed, or refused, before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.launch.build import OF_ROWS, build_trainer, load_data
from polyphony.launch.build_sft import build_sft
from polyphony.launch.import_paths import looked_in
from polyphony.launch.recipe import Recipe, RecipeError, claimed_recipe, load_recipe
from polyphony.trainer.run import say, visible
from polyphony.trainer.run.folder import Interrupted, RunFolder

if TYPE_CHECKING:
    from polyphony.trainer.engine.engine import Engine
    from polyphony.trainer.grpo import DomainGRPOTrainer
    from polyphony.trainer.sft.trainer import DomainSFTTrainer


def train(recipe: Recipe, out: Path, *, resume: bool = False, engine: Engine | None = None) -> Engine | None:
    """Run a recipe into the folder `out`; return the engine, so that a next run of the same model can use it.

    With `resume`, go on from the newest complete checkpoint in `out`, or from the start if there is none. Raises Interrupted
    where a signal ended it; a report is written then too.
    """
    with claimed(recipe, out, resume=resume) as changed:
        trainer = start(recipe, out, engine=engine, changed=changed)
        is_main = trainer.accelerator.is_main_process
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Interrupted:
            if is_main:
                _report(out)
            raise
        finally:
            for line in _judged(trainer) if is_main else ():
                say(line)
        if is_main:
            _report(out)
    return trainer.policy.engine


def _report(out: Path) -> None:
    from polyphony.launch.report.report import write_report

    write_report([out], RunFolder(out).report)


def shown_prompts(recipe: Recipe, most: int) -> str:
    """Return up to `most` rows of each of a recipe's tables as the policy will read them, special tokens visible.

    Loads no weights. Raises RecipeError.
    """
    if most < 1:
        raise RecipeError(f"--show-prompts must be at least 1, got {most}")
    from trl.trainer.grpo_config import GRPOConfig

    said = {name: value for name, value in recipe.grpo.items() if name in OF_ROWS}
    data = load_data(recipe, GRPOConfig(bf16=False, report_to="none", **said))
    lines = []
    for where, table in data.tables.items():
        asked = data.tokenized(islice(table, most))
        lines.append(f"{where}: {len(table)} rows, completions of at most {data.limits[table.domain.name]} tokens")
        for prompt in asked:
            lines += [f"--- {table.row_of(prompt.id)}, id {prompt.id}, {len(prompt.ids)} tokens"]
            lines += [visible(str(data.tokenizer.decode(list(prompt.ids), skip_special_tokens=False)))]
            lines += [f"--- its answer: {prompt.columns['answer']!r:.200}"]
    return "\n".join(lines)


def _judged(trainer: DomainGRPOTrainer | DomainSFTTrainer) -> list[str]:
    """Return what judges read and wrote for each domain, training and held-out samples together."""
    whole = trainer.scorer.logged.whole + trainer.evaluator.logged_totals()
    tokens = {domain: total for (domain, name), total in sorted(whole.items()) if name == "judge_tokens"}
    return [f"judge: {total:,.0f} tokens for {domain}" for domain, total in tokens.items()]


def is_first_rank() -> bool:
    """Tell rank 0 of a group that torchrun or accelerate started, before anything is imported that knows."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def claimed(recipe: Recipe, out: Path, *, resume: bool) -> Iterator[Mapping[str, tuple[Any, Any]]]:
    """Have the run folder to oneself meanwhile; yields the keys that are others than they were, `changed_keys`.

    Of a run that never began, nothing stays but logs. Only the first rank acts. Raises RecipeError, ValueError.
    """
    folder = RunFolder(out)
    if not is_first_rank():
        yield {}
        return
    check_free(folder, resume=resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        own = folder.users_own
        lock = folder.locked(say=say)
        lock.__enter__()
    except OSError as error:
        raise RecipeError(f"run folder {out} cannot be written: {error.strerror}") from error
    try:
        claim_folder(recipe, out, resume=resume)
        yield changed_keys(recipe, folder) if resume else {}
    except BaseException:
        if not resume and not folder.holds_run:
            folder.give_up(keep=own)
        raise
    finally:
        lock.__exit__(None, None, None)


def claim_folder(recipe: Recipe, out: Path, *, resume: bool) -> Path:
    """Make the run folder, or check that it is this recipe's. Raises RecipeError in one line."""
    folder = RunFolder(out)
    check_free(folder, resume=resume)
    if resume:
        changed_keys(recipe, folder)
        return out
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder.claim(recipe.as_yaml())
    except OSError as error:
        raise RecipeError(f"run folder {out} cannot be written: {error.strerror}") from error
    return out


def check_free(folder: RunFolder, *, resume: bool) -> None:
    """Raise RecipeError for a folder that a new run would find taken."""
    if not resume and folder.path.is_dir() and not folder.is_free:
        raise RecipeError(
            f"run folder {folder.path} is not empty; choose another --out, or go on with --resume {folder.path}"
        )


def changed_keys(recipe: Recipe, folder: RunFolder) -> dict[str, tuple[Any, Any]]:
    """Return the keys by which a recipe differs from that of the folder's run, with both values.

    Raises RecipeError for one that shaped what the run has practised and measured.
    """
    then = load_recipe(claimed_recipe(folder.path))
    try:
        return folder.changed(then.model_dump(by_alias=True), recipe.model_dump(by_alias=True))
    except ValueError as error:
        raise RecipeError(f"--resume: {error}") from error


def start(
    recipe: Recipe,
    out: Path,
    *,
    engine: Engine | None = None,
    changed: Mapping[str, tuple[Any, Any]] | None = None,
) -> DomainGRPOTrainer | DomainSFTTrainer:
    """Return a recipe's trainer, ready to train, whose run has what only a recipe knows."""
    from transformers.trainer_callback import PrinterCallback

    from polyphony.trainer.checkpoints import whole_checkpoints
    from polyphony.trainer.run.alarm_command import AlarmCommand
    from polyphony.trainer.run.progress import ProgressLine
    from polyphony.trainer.run.tracking import WandbTracker

    folder = RunFolder(out)
    build = build_sft if recipe.algorithm == "sft" else build_trainer
    trainer = build(recipe, folder.checkpoints, engine=engine, run=folder)
    run, is_main = trainer.run, trainer.accelerator.is_main_process
    assert run is not None
    trainer.remove_callback(PrinterCallback)
    if (known := trainer.curriculum.known) and not whole_checkpoints(folder.checkpoints):
        say(f"pool.from: {known} of {trainer.data.n_train} training prompts are known")
    run.imports_from, run.recipe, run.changed = looked_in(), recipe.as_yaml(), changed or {}
    wandb = recipe.tracking.wandb
    if wandb is not None and is_main:
        run.tracker = WandbTracker(
            wandb, name=trainer.args.run_name or recipe.name, folder=out, config=recipe.model_dump()
        )
    if is_main and recipe.alarms.command:
        run.alarm_command = AlarmCommand(recipe.alarms.command, timeout_s=recipe.alarms.limit_s)
    if is_main:
        run.progress = ProgressLine(recipe.name, trainer.plan.steps, domains=trainer.data.names)
    for what in _slow_or_lossy(trainer) if is_main else ():
        say(what)
    return trainer


def _slow_or_lossy(trainer: DomainGRPOTrainer | DomainSFTTrainer) -> list[str]:
    """Return what works, but not as well as it could."""
    import torch

    found = []
    if not trainer.policy.trainer.use_vllm:
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
