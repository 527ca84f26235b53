"""`polyphony train --dry-run`: all that a run will meet but for weights, everything wrong at once, cheap things first.

In order: names, values and files without torch (`polyphony.launch.recipe`, `build.missing_names`); TRL's arguments; every
row, read and tokenized; rewards, called on one row each; the first draw's decision. At last what the run will cost.

What needs torch is imported inside functions: what is wrong with names and files is said before it comes.
"""

from __future__ import annotations

import inspect
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.records import Completion, Domain, Prompt
from polyphony.launch.build import (
    OF_ROWS,
    build_scheduler,
    grpo_config,
    load_data,
    missing_names,
    tokenizer_of,
)
from polyphony.launch.build_sft import load_answers
from polyphony.launch.cluster.local import check_heads
from polyphony.launch.mistakes import UNSAID
from polyphony.launch.recipe import Recipe, RecipeError, refusals
from polyphony.launch.remarks import remarks
from polyphony.launch.train import changed_keys
from polyphony.trainer.data import PromptTable
from polyphony.trainer.rows import load_rows
from polyphony.trainer.run import say
from polyphony.trainer.run.changes import check_length, from_now_on
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import read_object
from polyphony.trainer.sft.settings import answers_file

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from polyphony.trainer.domains import DomainData
    from polyphony.trainer.slots import DrawPlan


def preflight(
    recipe: Recipe, *, problems: Sequence[str] = (), offline: bool = False, run: RunFolder | None = None
) -> Iterator[str]:
    """Yield what is wrong with a run of a recipe, cheap things first: names and files, TRL's arguments, rows, rewards.

    `problems` were found when the recipe was read; `run` is one that shall go on with it. Says in the end how large the run
    will be, what was hardly meant so, and what changes. With `offline` no judge is asked. Weights are not loaded.
    """
    missing = missing_names(recipe)
    named = [*problems, *(line for lines in missing.values() for line in lines)]
    named += refusals(changed_keys, recipe, run) if run else []
    yield from named
    args, wrong = _arguments(recipe)
    yield from wrong
    whole = {name: domain for name, domain in recipe.domains.items() if not missing.get(name)}
    data, rows, refused = _rows(recipe.model_copy(update={"domains": whole}), args)
    yield from refused
    ungraded = [line for name, row in rows.items() for line in _tried(recipe.domains[name], row, offline=offline)]
    yield from ungraded
    unplanned = []
    if data is not None and not (named or wrong):
        unplanned = [*_untaught(recipe, data, run, offline=offline), *_unplanned(recipe, args, data)]
        unplanned += _unfit(run, args, data)
    yield from unplanned
    if data is not None and not (named or wrong or ungraded or unplanned):
        for line in [*remarks(recipe, args), *_unheard(data), *sizes(recipe, args, data), *_changes(recipe, run)]:
            say(line)


def _unfit(run: RunFolder | None, args: GRPOConfig, data: DomainData) -> list[str]:
    """Return why a run cannot go on: its rows or its model are others, or it would be over before where it is."""
    from polyphony.trainer.run.provenance import refuse_other_data

    if run is None:
        return []
    known = read_object(run.provenance) if run.provenance.is_file() else {}
    model = known.get("model", {}).get("name")
    return [
        *refusals(lambda: refuse_other_data(known, data.tables, model=model)),
        *refusals(lambda: check_length(_plan(args, data).steps, reached=_reached(run))),
    ]


def _plan(args: GRPOConfig, data: DomainData) -> DrawPlan:
    """Return the plan of a run on training prompts, or on answers that are learned from."""
    from polyphony.trainer.sft.passes import plan_passes
    from polyphony.trainer.slots import plan_draws

    answers = sum(map(len, data.answers.values()))
    return plan_passes(args, answers) if answers else plan_draws(args, data.n_train)


def _unheard(data: DomainData) -> list[str]:
    """Return what the chat template is told and does not ask for, a line each."""
    template, how = data.tokenizer.chat_template or "", data.tokenizer.apply_chat_template
    known = {*inspect.signature(how).parameters}
    return [
        f"domains.{domain.name}.chat_template_kwargs: the chat template has no {key!r}"
        for domain in data.domains
        for key in domain.chat_template_kwargs
        if key not in known and key not in str(template)
    ]


def _changes(recipe: Recipe, run: RunFolder | None) -> list[str]:
    """Return what will be another setting from where a run goes on."""
    return from_now_on(changed_keys(recipe, run), step=_reached(run)) if run else []


def _reached(run: RunFolder) -> int:
    from polyphony.trainer.checkpoints import checkpoint_step, whole_checkpoints

    return max(map(checkpoint_step, whole_checkpoints(run.checkpoints)), default=0)


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
    from polyphony.trainer.script_shape import quantized_by
    from polyphony.trainer.sft.rows import tables_of

    if recipe.model == UNSAID:
        return None, {}, _unread(recipe)
    try:
        tokenizer_of(recipe)
    except RecipeError as error:
        return None, {}, [str(error), *_unread(recipe)]
    if quantized := quantized_by(recipe.model, None, args):
        why = "a run merges its weights into final/, which quantized ones cannot be: name a model that is not quantized"
        return None, {}, [f"{quantized.removesuffix(',')}: {why}", *_unread(recipe)]
    refused: list[str] = []
    with _bar() as told:
        if any(not domain.is_watch_only for domain in recipe.domains.values()):
            try:
                data = load_data(recipe, args, told=told)
                if recipe.algorithm == "sft" and not refusals(answers_file, str(recipe.sft.answers)):  # said already
                    data = replace(data, answers=tables_of(load_answers(recipe, data)))
                return data, {name: next(iter(table)) for name, table in data.heldout.items()}, []
            except RecipeError as error:
                refused.append(str(error))
        rows = {}
        for name, domain in recipe.domains.items():  # each by itself, so that one says nothing about the others
            read = replace(domain, train=domain.heldout if domain.is_watch_only else domain.train)
            alone = {"domains": {name: read}, "data": replace(recipe.data, overlap="keep")}
            try:
                with warnings.catch_warnings(action="ignore"):
                    data = load_data(recipe.model_copy(update=alone), args, told=told)
                rows[name] = next(iter(data.heldout[name]))
            except RecipeError as error:
                refused.append(str(error))
    return None, rows, list(dict.fromkeys(refused))


def _unread(recipe: Recipe) -> list[str]:
    """Return what is wrong with rows where no model says how they are tokenized."""
    refused = []
    for name, domain in recipe.domains.items():
        for split in ("train", "heldout"):
            if (source := getattr(domain, split)) is not None:
                where = f"domains.{name}.{split}"
                try:
                    PromptTable(load_rows(source, where=where), domain=domain, where=where, is_chat=True)
                except ValueError as error:
                    refused.append(str(error))
    return refused


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show on a terminal how many rows are read and tokenized, of how many where that is known."""
    columns = (TextColumn("rows {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("read", total=None)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)


def _unplanned(recipe: Recipe, args: GRPOConfig, data: DomainData) -> list[str]:
    """Return why a run could not make its first draw, or not keep to its settings: what is found out without weights."""
    from polyphony.trainer.dead_rows import may_drop_dead
    from polyphony.trainer.run.outset import Cadence

    plan, ours = _plan(args, data), recipe.of_trainer
    has_bonus = bool(ours.entropy.held("coefficient", data.names) or args.entropy_coef)
    prompts = {name: table.ids for name, table in data.train.items()}
    checks: Sequence[Callable[[], Any]] = (
        lambda: check_heads(recipe),
        lambda: _schedule(args, plan.steps),
        lambda: Cadence.of(args, plan, ours),
        lambda: may_drop_dead(ours.update.drop_dead, args, has_entropy_bonus=has_bonus, has_aux_loss=False),
        lambda: Curriculum(  # asks the scheduler once
            domains=data.domains,
            prompts=prompts,
            scheduler=build_scheduler(recipe),
            total_draws=plan.draws,
            seed=args.seed,
            pool=recipe.pool,
        ),
    )
    return [line for check in checks for line in refusals(check)]


def _untaught(recipe: Recipe, data: DomainData, run: RunFolder | None, *, offline: bool) -> list[str]:
    """Return why a teacher could not teach, or would be another than the run that goes on began with; asks endpoints."""
    from polyphony.trainer.run.origins import refuse_other_teachers
    from polyphony.trainer.teachers.lesson import Lesson

    if recipe.algorithm != "distil":
        return []
    asked = {name: _asked_once(teacher) for name, teacher in recipe.teachers.items()}

    def look() -> None:
        lesson = Lesson.of(asked, data, model=recipe.model, offline=offline, trusts_code=recipe.trusts_code)
        if run is not None and run.provenance.is_file():
            refuse_other_teachers(read_object(run.provenance), lesson.origins)

    return refusals(look)


def _schedule(args: GRPOConfig, steps: int) -> None:
    """Make the optimizer's class and the learning-rate curve. Raises ValueError where training would begin with an error."""
    import torch
    from transformers import Trainer
    from transformers.optimization import get_scheduler

    try:
        if not any(name in args.optim for name in ("galore", "apollo", "lomo")):  # which ask for the model
            Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        curve: Any = args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, curve)
    except Exception as error:  # of several libraries
        optim, curve = (getattr(name, "value", name) for name in (args.optim, args.lr_scheduler_type))
        raise ValueError(f"grpo.optim={optim}, grpo.lr_scheduler_type={curve}: {error}") from error


def _tried(domain: Domain, row: Prompt, *, offline: bool) -> list[str]:
    """Call a domain's reward on one row, with the reference as the completion; return what is wrong with it."""
    from polyphony.trainer.scoring import Scorer, raised

    where = f"domains.{domain.name}.reward"
    if domain.reward is None:  # its environments reward, and nobody has acted
        return []
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
        what, line = raised(error)
        return [f"{where}: on row {row.id!r} it raised {what}{f' ({line})' if line else ''}"]
    if score is None:
        say(f"{where}: no verdict on row {row.id!r}")
    return []


def _asked_once(reward: Any) -> Any:
    """Return a judge, or a teacher behind an endpoint, that gives up at once where nobody answers; all else as it is."""
    client, has_endpoint = getattr(reward, "client", None), getattr(reward, "endpoint", None) is not None
    if has_endpoint and isinstance(client, Mapping) and is_dataclass(reward):
        return replace(reward, client={**client, "patience_s": PATIENCE_S})  # type: ignore[type-var]
    return reward


PATIENCE_S = 3.0
"""How long a judge that nobody hears from is asked before a run."""


def sizes(recipe: Recipe, args: GRPOConfig, data: DomainData) -> list[str]:
    """Return how large a run will be, a line each; and that evaluation is most of it, where it is."""
    from polyphony.trainer.sft.passes import learned

    plan, evaluation, n_rows = _plan(args, data), recipe.eval, sum(map(len, data.answers.values()))
    trained = plan.draws * plan.prompts_per_draw * (args.num_generations or 1)
    if data.answers:
        trained = learned(args, plan.steps, n_rows)
    tokens = trained * max(data.limits[name] for name in data.train)
    times = (1 + math.ceil(plan.steps / evaluation.every)) * (evaluation.samples + evaluation.greedy)
    items = sum(map(len, data.heldout.values()))
    read = times * sum(len(table) * data.limits[name] for name, table in data.heldout.items())
    share = read / (read + tokens)
    counts = (f"{name} {len(data.train.get(name, ()))} + {len(data.heldout[name])}" for name in data.names)
    what = (
        f"{plan.draws:,} draws of {plan.prompts_per_draw:,} prompts, {trained:,} completions, at most {tokens:,} tokens"
    )
    if data.answers:
        what = f"{trained:,} of {n_rows:,} answers, {trained / n_rows:.2g} passes"
    found = [
        f"rows, training + held-out: {', '.join(counts)}",
        f"training: {plan.steps:,} steps, {what}",
        f"evaluation: {times * items:,} completions, at most {read:,} tokens, {share:.0%} of all",
    ]
    if share > 0.5 and not data.answers:
        found.append("more is sampled for evaluation than for training: raise eval.every, or limit held-out rows")
    return found
