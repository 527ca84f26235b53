"""`polyphony train`: a recipe becomes a run folder.

What needs torch is imported inside functions: the folder is claimed, or refused, before.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from polyphony.curricula.records import Completion, Domain, Prompt
from polyphony.launch.build import build_trainer, grpo_config, load_data, missing_names, remarks
from polyphony.launch.import_paths import looked_in
from polyphony.launch.recipe import Recipe, RecipeError, claimed_recipe, load_recipe
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from polyphony.trainer.domains import DomainData
    from polyphony.trainer.engine.engine import Engine
    from polyphony.trainer.grpo import DomainGRPOTrainer


def train(recipe: Recipe, out: Path, *, resume: bool = False, engine: Engine | None = None) -> Engine | None:
    """Run a recipe into the folder `out`; return the engine, so that a next run of the same model can use it.

    With `resume`, go on from the newest complete checkpoint in `out`, or from the start if there is none. Raises Interrupted
    where a signal ended it.
    """
    folder = RunFolder(out)
    with claimed(recipe, out, resume=resume) as changed:
        trainer = start(recipe, out, engine=engine, changed=changed)
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            for line in _judged(trainer) if trainer.accelerator.is_main_process else ():
                say(line)
        if trainer.accelerator.is_main_process:
            from polyphony.launch.report.report import write_report

            write_report([out], folder.report)
    return trainer.policy.engine


OF_ROWS = ("max_completion_length", "model_init_kwargs", "trust_remote_code")
"""Fields of TRL's that say how rows are read."""


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
            lines += [str(data.tokenizer.decode(list(prompt.ids), skip_special_tokens=False))]
            lines += [f"--- its answer: {prompt.columns['answer']!r:.200}"]
    return "\n".join(lines)


def _judged(trainer: DomainGRPOTrainer) -> list[str]:
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
    _check_free(folder, resume=resume)
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
    _check_free(folder, resume=resume)
    if resume:
        changed_keys(recipe, folder)
        return out
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder.claim(recipe.as_yaml())
    except OSError as error:
        raise RecipeError(f"run folder {out} cannot be written: {error.strerror}") from error
    return out


def _check_free(folder: RunFolder, *, resume: bool) -> None:
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
) -> DomainGRPOTrainer:
    """Return a recipe's trainer, ready to train, whose run has what only a recipe knows."""
    from transformers.trainer_callback import PrinterCallback

    from polyphony.trainer.checkpoints import whole_checkpoints
    from polyphony.trainer.run.progress import ProgressLine
    from polyphony.trainer.run.tracking import WandbTracker

    folder = RunFolder(out)
    trainer = build_trainer(recipe, folder.checkpoints, engine=engine, run=folder)
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
    if is_main:
        run.progress = ProgressLine(recipe.name, trainer.plan.steps, domains=trainer.data.names)
    for what in _slow_or_lossy(trainer) if is_main else ():
        say(what)
    return trainer


def preflight(recipe: Recipe, *, problems: Sequence[str] = (), offline: bool = False) -> Iterator[str]:
    """Yield what is wrong with a run of a recipe, cheap things first: names and files, TRL's arguments, rows, rewards.

    `problems` were found when the recipe was read. Says in the end how large the run will be, and what was hardly meant so.
    With `offline` no judge is asked. Weights are not loaded.
    """
    missing = missing_names(recipe)
    named = [*problems, *(line for lines in missing.values() for line in lines)]
    yield from named
    args, wrong = _arguments(recipe)
    yield from wrong
    whole = {name: domain for name, domain in recipe.domains.items() if not missing.get(name)}
    data, rows, refused = _rows(recipe.model_copy(update={"domains": whole}), args)
    yield from refused
    ungraded = [line for name, row in rows.items() for line in _tried(recipe.domains[name], row, offline=offline)]
    yield from ungraded
    if data is not None and not (named or wrong or ungraded):
        for line in [*remarks(recipe, args), *sizes(recipe, args, data)]:
            say(line)


def _arguments(recipe: Recipe) -> tuple[GRPOConfig, list[str]]:
    """Return TRL's arguments, or stand-ins by which rows can be read, and why."""
    with tempfile.TemporaryDirectory() as output:
        try:
            return grpo_config(recipe, Path(output)), []
        except RecipeError as error:
            said = {name: v for name, v in recipe.grpo.items() if name in OF_ROWS}
            return grpo_config(recipe.model_copy(update={"grpo": said}), Path(output)), [str(error)]


def _rows(recipe: Recipe, args: GRPOConfig) -> tuple[DomainData | None, dict[str, Prompt], list[str]]:
    """Return the rows, None where any are refused; of each domain that is not, one; and every refusal."""
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    refused: list[str] = []
    with bar:
        bar.add_task("rows are read and tokenized", total=None)
        if any(not domain.is_watch_only for domain in recipe.domains.values()):
            try:
                data = load_data(recipe, args)
                return data, {name: next(iter(table)) for name, table in data.heldout.items()}, []
            except RecipeError as error:
                refused.append(str(error))
        rows = {}
        for name, domain in recipe.domains.items():  # each by itself, so that one says nothing about the others
            read = replace(domain, train=domain.heldout if domain.is_watch_only else domain.train)
            alone = {"domains": {name: read}, "data": replace(recipe.data, overlap="keep")}
            try:
                with warnings.catch_warnings(action="ignore"):
                    data = load_data(recipe.model_copy(update=alone), args)
                rows[name] = next(iter(data.heldout[name]))
            except RecipeError as error:
                refused.append(str(error))
    return None, rows, list(dict.fromkeys(refused))


def _tried(domain: Domain, row: Prompt, *, offline: bool) -> list[str]:
    """Call a domain's reward on one row, with the reference as the completion; return what is wrong with it."""
    from polyphony.trainer.scoring import Scorer

    where = f"domains.{domain.name}.reward"
    try:
        scorer = Scorer([domain])
    except ValueError as error:
        return [str(error)]
    reward = scorer.rewards[domain.name]
    if offline and any(hasattr(part, "endpoint") for part in (reward, *getattr(reward, "rewards", {}).values())):
        return []
    scorer.rewards[domain.name] = _asked_once(reward)
    text = row.columns.get("answer")
    try:
        score = scorer.tried(Completion(ids=(), prompt=row, text=text if isinstance(text, str) else "no answer"))
    except Exception as error:  # a user's may raise anything
        return [f"{where}: on row {row.id!r} it raised {type(error).__name__}: {error}"]
    if score is None:
        say(f"{where}: no verdict on row {row.id!r}")
    return []


def _asked_once(reward: Any) -> Any:
    """Return a judge that gives up at once where nobody answers; any other reward as it is."""
    if isinstance(client := getattr(reward, "client", None), Mapping) and is_dataclass(reward):
        return replace(reward, client={**client, "patience_s": PATIENCE_S})  # type: ignore[type-var]
    return reward


PATIENCE_S = 3.0
"""How long a judge that nobody hears from is asked before a run."""


def sizes(recipe: Recipe, args: GRPOConfig, data: DomainData) -> list[str]:
    """Return how large a run will be, a line each; and that evaluation is most of it, where it is."""
    from polyphony.trainer.slots import plan_draws

    plan, evaluation = plan_draws(args, data.n_train), recipe.eval
    trained = plan.draws * plan.prompts_per_draw * (args.num_generations or 1)
    tokens = trained * max(data.limits[name] for name in data.train)
    times = (1 + math.ceil(plan.steps / evaluation.every)) * (evaluation.samples + evaluation.greedy)
    items = sum(map(len, data.heldout.values()))
    read = times * sum(len(table) * data.limits[name] for name, table in data.heldout.items())
    share = read / (read + tokens)
    counts = (f"{name} {len(data.train.get(name, ()))} + {len(data.heldout[name])}" for name in data.names)
    found = [
        f"rows, training + held-out: {', '.join(counts)}",
        f"training: {plan.steps:,} steps, {plan.draws:,} draws of {plan.prompts_per_draw:,} prompts, {trained:,} "
        f"completions, at most {tokens:,} tokens",
        f"evaluation: {times * items:,} completions, at most {read:,} tokens, {share:.0%} of all",
    ]
    if share > 0.5:
        found.append("more is sampled for evaluation than for training: raise eval.every, or limit held-out rows")
    return found


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
