"""What each verb of the command does with its arguments.

A verb is a module that is imported only when it is called: `--help` costs nothing, and bad input is told before torch comes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyphony.launch.recipe import Recipe

USAGE_ERROR = 2


def one_line(error: BaseException | str) -> str:
    """Return what is said, in a line of its own."""
    return " ".join(str(error).split())


def _recipe_to_train(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe of `train` or `launch`: given, or that of the folder to go on with. Raises RecipeError."""
    from polyphony.launch.recipe import RecipeError, claimed_recipe, load_recipe

    if arguments.resume:
        if arguments.out:
            raise RecipeError("--resume goes on in its own folder; leave --out away")
        if arguments.recipe and "=" in arguments.recipe:  # the first override stands in the recipe's place
            arguments.overrides, arguments.recipe = [arguments.recipe, *arguments.overrides], None
        saved = claimed_recipe(arguments.resume)
        return load_recipe(arguments.recipe or saved, arguments.overrides)
    if not arguments.recipe:
        raise RecipeError("give a recipe, or --resume RUN")
    return load_recipe(arguments.recipe, arguments.overrides)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _check_before(arguments)
    from polyphony.launch.train import shown_prompts, train
    from polyphony.trainer.run.folder import Interrupted, RunFolder

    recipe = _recipe_to_train(arguments)
    if arguments.show_prompts is not None:
        print(shown_prompts(recipe, arguments.show_prompts))
        return 0
    out = arguments.resume or arguments.out or Path("runs") / recipe.name
    try:
        train(recipe, out, resume=arguments.resume is not None)
    except Interrupted as stopped:
        _close(out)
        print(f"polyphony train: {stopped}; go on with --resume {out}", file=sys.stderr)
        return 128 + stopped.number
    folder = RunFolder(out)
    if folder.predicted.is_file():
        from polyphony.launch.verbs.tables import predicted_table

        print(predicted_table(json.loads(folder.predicted.read_text())))
    _close(out)
    return 0


def _close(out: Path) -> None:
    """Print how a run ended, and where its report lies; on the first rank."""
    if os.environ.get("RANK", "0") != "0":
        return
    from polyphony.launch.report.closing import closing
    from polyphony.launch.report.numbers import find
    from polyphony.launch.report.run import read_run
    from polyphony.trainer.run.folder import RunFolder

    print(f"{closing(find(read_run(out)))}\nreport: {RunFolder(out).report}", flush=True)


def _check_before(arguments: argparse.Namespace) -> int:
    """Say all that is wrong, each as soon as it is found; print the recipe where nothing is."""
    from polyphony.launch.preflight import preflight
    from polyphony.launch.recipe import RecipeError
    from polyphony.launch.train import check_free
    from polyphony.trainer.run.folder import RunFolder

    run = RunFolder(arguments.resume) if arguments.resume else None
    recipe, problems = None, ()
    try:
        recipe = _recipe_to_train(arguments)
    except RecipeError as error:
        recipe, problems = error.rest, error.problems
        if recipe is None:
            raise
    is_wrong = False
    for line in preflight(recipe, problems=problems, offline=arguments.offline, run=run):
        print(f"polyphony train: {one_line(line)}", file=sys.stderr)
        is_wrong = True
    if is_wrong:
        return USAGE_ERROR
    try:
        check_free(RunFolder(arguments.out or Path("runs") / recipe.name), resume=run is not None)
    except RecipeError as error:  # said alone: the recipe is right
        print(one_line(error), file=sys.stderr)
    print(recipe.as_yaml(), end="")
    return 0


def _init(arguments: argparse.Namespace) -> None:
    from polyphony.launch.verbs.init import MODEL, init

    asked = {"reward": arguments.reward, "prompt": arguments.prompt, "answer": arguments.answer}
    print(init(arguments.files, arguments.out, model=arguments.model or MODEL, **asked))


def _eval(arguments: argparse.Namespace) -> None:
    from polyphony.launch.verbs.evaluate import evaluate, parse, results_as_json, results_table

    question = parse(arguments.names, arguments.overrides)
    results = evaluate(question)
    print(json.dumps(results_as_json(question, results)) if arguments.json else results_table(question, results))


def _report(arguments: argparse.Namespace) -> None:
    from polyphony.launch.report.report import names_of, summarise, write_report
    from polyphony.trainer.run.folder import RunFolder

    names = names_of(arguments.runs)
    if arguments.json:
        summaries = dict(zip(names, map(summarise, arguments.runs), strict=True))
        print(json.dumps(next(iter(summaries.values())) if len(names) == 1 else summaries, allow_nan=False))
        return
    own, others = RunFolder(arguments.runs[0]).report, [name.replace("/", "-") for name in names[1:]]
    path = arguments.out or own.with_stem("-".join([own.stem, *(["with", *others] if others else [])]))
    try:
        print(write_report(arguments.runs, path))
    except OSError as error:
        raise ValueError(f"report {path} cannot be written: {error.strerror}") from error
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())


def _watch(arguments: argparse.Namespace) -> None:
    from polyphony.launch.verbs.watch import watch

    watch(arguments.runs, once=arguments.once)


def _dashboard(arguments: argparse.Namespace) -> None:
    from polyphony.launch.verbs.dashboard import send, specification_of, specify, way_to_send

    run = arguments.folder
    out = arguments.out or specification_of(run)
    workspace, layout, missing = specify(run, out)
    print(f"{layout}\n{out}")
    print(send(workspace, out) if missing is None else way_to_send(run, missing))


def _probe(arguments: argparse.Namespace) -> None:
    from polyphony.launch.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from polyphony.curricula.transfer.matrix import TransferMatrix
    from polyphony.launch.report.report import write_report
    from polyphony.launch.verbs.probe import probe
    from polyphony.launch.verbs.tables import transfer_table
    from polyphony.trainer.run.folder import RunFolder

    folder = RunFolder(arguments.out or Path("runs") / f"{recipe.name}-probe")
    probe(recipe, folder.path, budget=arguments.budget)
    print(transfer_table(TransferMatrix.load(folder.transfer).on("report")))
    print(f"{folder.transfer}\n{write_report([folder.path], folder.report)}")


def _screen(arguments: argparse.Namespace) -> None:
    from polyphony.launch.recipe import RecipeError, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.visits < 1:
        raise RecipeError(f"--visits must be at least 1, got {arguments.visits}")
    from polyphony.launch.verbs.screen import IMPOSSIBLE, screen, screen_table
    from polyphony.trainer.run.folder import RunFolder

    folder = RunFolder(arguments.out or Path("runs") / f"{recipe.name}-screen")
    summary = screen(recipe, folder.path, most_visits=arguments.visits)
    print(json.dumps(summary) if arguments.json else screen_table(summary))
    if not arguments.json:
        print(f"{folder.pool}\n{folder.ledger(IMPOSSIBLE)}")


def _sample(arguments: argparse.Namespace) -> None:
    from polyphony.launch.recipe import RecipeError, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.per_prompt < 1:
        raise RecipeError(f"--per-prompt must be at least 1, got {arguments.per_prompt}")
    from polyphony.launch.verbs.sample import sample, sample_table
    from polyphony.trainer.run.folder import RunFolder

    folder = RunFolder(arguments.out or Path("runs") / f"{recipe.name}-sample")
    summary = sample(recipe, folder.path, per_prompt=arguments.per_prompt, teachers=arguments.teachers)
    print(json.dumps(summary) if arguments.json else f"{sample_table(summary)}\n{folder.rows}")


def _merge(arguments: argparse.Namespace) -> None:
    from polyphony.launch.recipe import RecipeError, load_recipe
    from polyphony.trainer.merging.settings import MergeSettings

    given = {"method": arguments.method, "weights": tuple(arguments.weight), "density": arguments.density}
    settings = MergeSettings(**given)
    settings.check(len(arguments.experts), has_base=arguments.base is not None)
    if arguments.search != (arguments.recipe is not None):
        raise RecipeError("--search and --recipe go together: what is sought is scored on the recipe's held-out sets")
    recipe = load_recipe(arguments.recipe, arguments.overrides) if arguments.recipe else None
    from polyphony.launch.verbs.merge import Merging, search

    merging = Merging.of(arguments.experts, base=arguments.base, settings=settings)
    if recipe is None:
        print(merging.into(arguments.out))
        return
    found = search(merging, recipe, arguments.out, share=arguments.share)
    print(json.dumps(found.as_json()) if arguments.json else f"{found}\n{arguments.out}")


def _plan(arguments: argparse.Namespace) -> None:
    from polyphony.launch.recipe import RecipeError
    from polyphony.launch.verbs.plan import plan
    from polyphony.launch.verbs.tables import options_table

    if arguments.transfer and "=" in arguments.transfer.name:  # without a file the first override stands in its place
        arguments.overrides, arguments.transfer = [str(arguments.transfer), *arguments.overrides], None
    if arguments.overrides and not arguments.replay:
        raise RecipeError(f"{arguments.overrides[0]}: settings of a scheduler go with --replay RUN --scheduler NAME")
    if arguments.replay:
        return _replay(arguments)
    if arguments.scheduler:
        raise RecipeError("--scheduler goes with --replay RUN; a plan alone has no scheduler")
    if not arguments.transfer:
        raise RecipeError("give a transfer.json, or --replay RUN --scheduler NAME")
    made = plan(arguments.transfer)
    print(json.dumps(made.as_json(), allow_nan=False) if arguments.json else made.explain())
    if made.options and not arguments.json:
        print(f"\n{options_table(made.options)}")
    for note in made.notes if arguments.json else ():
        print(note, file=sys.stderr)
    return None


def _replay(arguments: argparse.Namespace) -> None:
    from polyphony.launch.recipe import RecipeError
    from polyphony.launch.verbs.plan import drawn, page_of, replay_as_json, replay_run, replay_table

    run, scheduler = arguments.replay, arguments.scheduler
    if not scheduler:
        raise RecipeError("--replay needs --scheduler NAME")
    replayed = replay_run(run, scheduler=scheduler, transfer=arguments.transfer, overrides=arguments.overrides)
    if arguments.json:
        print(json.dumps(replay_as_json(replayed)))
        return
    print(replay_table(replayed, scheduler=scheduler))
    print(drawn(run, replayed, scheduler=scheduler, out=arguments.out or page_of(run, scheduler)))


def _demo(arguments: argparse.Namespace) -> None:
    from polyphony.launch.verbs.demo import demo, demo_tables

    print(demo_tables(demo(arguments.out, compare=arguments.compare)))


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.gpu:
        return _doctor_gpu(arguments)
    from polyphony.launch.verbs.doctor import doctor

    findings = []
    for finding in doctor():
        findings.append(finding)
        if not arguments.json:
            print(finding)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    return int(any(finding.verdict == "broken" for finding in findings))


def _doctor_gpu(arguments: argparse.Namespace) -> int:
    from polyphony.launch.measures.result import table
    from polyphony.launch.verbs.doctor import machine
    from polyphony.launch.verbs.doctor_gpu import check_card, measured

    check_card()
    rows, findings = list(measured()), list(machine())  # the latter takes the card, which may be another's alone
    if arguments.json:
        told = {"machine": [asdict(finding) for finding in findings], "rows": [row.as_dict() for row in rows]}
        print(json.dumps(told))
    else:
        print("\n".join([*map(str, findings), "", table(rows)]))
    return int(any(row.error for row in rows))


def _launch(arguments: argparse.Namespace) -> int:
    from polyphony.launch.cluster import launch
    from polyphony.launch.cluster.local import Machine

    recipe = _recipe_to_train(arguments)
    out = (arguments.resume or arguments.out or Path("runs") / recipe.name).resolve()
    words = ["--resume", str(out)] if arguments.resume else [arguments.recipe, *arguments.overrides]
    run = launch.Job(
        recipe=recipe, words=words, out=out, is_dry=arguments.dry_run, resumes=arguments.resume is not None
    )
    if arguments.where == "slurm":
        return launch.slurm(run, gpus_per_node=arguments.gpus_per_node)
    if arguments.where == "ray":
        return launch.ray(run, address=arguments.address, gpus_per_node=arguments.gpus_per_node)
    machine = Machine(rank=arguments.machine_rank, of=arguments.machines, main_address=arguments.main_address)
    return launch.local(run, machine)


def _score(arguments: argparse.Namespace) -> None:
    from polyphony.launch.verbs.score import score_rows, score_table

    scored = score_rows(arguments.rows, reward=arguments.reward)
    print(json.dumps(asdict(scored)) if arguments.json else score_table(scored))


CALLS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "init": _init,
    "train": _train,
    "eval": _eval,
    "report": _report,
    "watch": _watch,
    "dashboard": _dashboard,
    "probe": _probe,
    "screen": _screen,
    "sample": _sample,
    "merge": _merge,
    "plan": _plan,
    "demo": _demo,
    "doctor": _doctor,
    "launch": _launch,
    "score": _score,
}
"""By verb what runs it and returns the exit code, None for 0."""
