"""The command `polyphony`: its verbs, their arguments, and what each hands on.

A verb is a module that is imported only when it is called: `--help` costs nothing, and bad input is told before torch comes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polyphony.launch.import_paths import look_in_working_directory

if TYPE_CHECKING:
    from polyphony.launch.recipe import Recipe


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand after options too, where argparse by itself no longer looks for them."""
    parser = _parser()
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--version"]:
        from importlib import metadata  # slow to import, as is what follows

        parser.exit(message=f"polyphony {metadata.version('polyphony-rl')}\n")
    if words and words[0].partition("=")[0] == "--print-completion":
        print(completion(parser, [*words[0].split("=", 1)[1:], *words[1:]]))
        parser.exit()
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        from polyphony.curricula.declarations import nearest

        parser.error(f"no verb {words[0]!r}; {nearest(words[0], VERBS)}")
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(r.startswith("-") or "=" not in r for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def completion(parser: argparse.ArgumentParser, shells: Sequence[str]) -> str:
    """Return what a shell reads to complete verbs and options; ends with exit code 2 and a line where it cannot be made."""
    if len(shells) != 1 or shells[0] not in SHELLS:
        parser.exit(USAGE_ERROR, f"polyphony --print-completion: expected one of {', '.join(SHELLS)}\n")
    try:
        import shtab  # an extra
    except ImportError:
        fix = "pip install 'polyphony-rl[completion]', or pip install shtab"
        parser.exit(USAGE_ERROR, f"polyphony --print-completion: needs shtab: {fix}\n")
    return shtab.complete(parser, shell=shells[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polyphony", description="RL post-training of one language model over many domains."
    )
    parser.add_argument("--version", action="store_true", help="print it, and stop")
    parser.add_argument(
        "--print-completion", choices=SHELLS, help="print what your shell reads to complete verbs and options, and stop"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        shown = {"help": verb.text, "description": verb.text, "formatter_class": argparse.RawDescriptionHelpFormatter}
        examples = "\n".join(f"  polyphony {example}" for example in verb.examples)
        verb.add(verbs.add_parser(name, epilog=f"examples:\n{examples}", **shown))
    return parser


def _recipe(verb: argparse.ArgumentParser, text: str = "the recipe, YAML", *, nargs: str | None = None) -> None:
    verb.add_argument("recipe", nargs=nargs, help=text)
    verb.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the recipe")


def _run_folder(verb: argparse.ArgumentParser, dry_run: str) -> None:
    verb.add_argument("--out", type=Path, help="run folder (default: runs/<name>)")
    verb.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder")
    verb.add_argument("--dry-run", action="store_true", help=dry_run)


def _json(verb: argparse.ArgumentParser, text: str = "print one JSON object") -> None:
    verb.add_argument("--json", action="store_true", help=text)


def _add_train(train: argparse.ArgumentParser) -> None:
    _recipe(train, nargs="?")
    _run_folder(train, "check all that a run will meet but for weights, print the resolved recipe, then stop")
    train.add_argument("--offline", action="store_true", help="with --dry-run: ask no judge")
    train.add_argument(
        "--show-prompts",
        type=int,
        metavar="N",
        help="print N rows of each domain as the policy will read them, then stop",
    )


def _add_init(init: argparse.ArgumentParser) -> None:
    init.add_argument(
        "--from",
        dest="files",
        nargs="+",
        required=True,
        type=Path,
        metavar="ROWS",
        help="files of 40 rows and more, a domain each: JSON, CSV or Parquet",
    )
    init.add_argument("--out", type=Path, help="file to write (default: <first file>.yaml, here)")
    init.add_argument("--model", help="a name on the hub, or a folder (default: Qwen/Qwen3-0.6B)")
    init.add_argument("--prompt", metavar="COLUMN", help="where prompts stand, if no usual name says it")
    init.add_argument("--answer", metavar="COLUMN", help="where references stand, likewise; in files that have it")
    init.add_argument("--reward", help="for all files, not guessed: a name, an import path, or JSON")


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "names",
        nargs="+",
        metavar="MODEL [MODEL] [RECIPE] [key.path=value ..]",
        help="one or two models (folder, run folder or hub name), the recipe (default: the run folder's), overrides",
    )
    evaluate.set_defaults(overrides=[])
    _json(evaluate)


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument(
        "--out", type=Path, help="file to write (default: in the first run, report.html, of several report-with-B.html)"
    )
    report.add_argument("--open", action="store_true", help="show it in a browser")
    _json(report, "print the summary numbers instead")


def _add_watch(watch: argparse.ArgumentParser) -> None:
    watch.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    watch.add_argument("--once", action="store_true", help="print one picture and stop, as outside a terminal")


def _add_dashboard(dashboard: argparse.ArgumentParser) -> None:
    dashboard.add_argument("folder", type=Path, metavar="RUN")
    dashboard.add_argument(
        "--out", type=Path, help="file to write, its address beside it (default: ./RUN-dashboard.json)"
    )


def _add_probe(probe: argparse.ArgumentParser) -> None:
    _recipe(probe, "the recipe, YAML; its section `probe` says how long and from where")
    probe.add_argument("--out", type=Path, help="folder (default: runs/<name>-probe); an unfinished one goes on")
    probe.add_argument(
        "--budget",
        type=int,
        metavar="N",
        help="probe N domains at most, chosen one after the other, fewer where the plan no longer changes (default: all); "
        "by a part of them no plan recommends more than mixing",
    )


def _add_screen(screen: argparse.ArgumentParser) -> None:
    _recipe(screen, "the recipe, YAML; its section `pool` says what is too hard")
    screen.add_argument("--out", type=Path, help="folder (default: runs/<name>-screen); an unfinished one goes on")
    screen.add_argument("--visits", type=int, default=12, help="most groups for a prompt that never succeeds")
    _json(screen)


def _add_sample(sample: argparse.ArgumentParser) -> None:
    _recipe(sample, "the recipe, YAML; its section `rft` says what is accepted")
    sample.add_argument(
        "--teachers",
        action="append",
        default=[],
        metavar="DOMAIN=TEACHER",
        help="who answers for a domain: a name among the recipe's teachers, a checkpoint, adapter or run folder, a hub "
        "name, or self; may be repeated (default: domains.<name>.teacher)",
    )
    sample.add_argument("--per-prompt", type=int, default=4, metavar="K", help="answers to each prompt")
    sample.add_argument("--out", type=Path, help="folder (default: runs/<name>-sample); an unfinished one goes on")
    _json(sample)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("transfer", type=Path, nargs="?", help="transfer.json of a probe")
    plan.add_argument(
        "--replay",
        type=Path,
        metavar="RUN",
        help="replay a saved run's evidence instead (from these probes, if a transfer.json is given)",
    )
    plan.add_argument(
        "--scheduler", help="with --replay: registry name or import path; curriculum.key=value may follow"
    )
    plan.add_argument("--out", type=Path, help="with --replay: page to write (default: ./RUN-replay-NAME.html)")
    plan.set_defaults(overrides=[])
    _json(plan)


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--out", type=Path, help="run folder (default: runs/demo, or the next that is free)")
    demo.add_argument(
        "--compare", action="store_true", help="train once more, at a learning rate that is too high, beside the first"
    )


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument(
        "--gpu", action="store_true", help="measure the spine on this node's cards, for ten minutes at most, as a table"
    )
    _json(doctor)


def _add_launch(launch: argparse.ArgumentParser) -> None:
    launch.add_argument("where", choices=["local", "slurm", "ray"], help="the recipe's section `cluster` says how")
    _recipe(launch, nargs="?")
    _run_folder(launch, "print exactly what will run, then stop")
    launch.add_argument("--address", default="127.0.0.1:8265", help="ray: host:port of the cluster's dashboard")
    launch.add_argument("--gpus-per-node", type=int, help="slurm: default what each node says; ray: as many as here")
    launch.add_argument("--machines", type=int, default=1, help="local: machines in the group")
    launch.add_argument("--machine-rank", type=int, default=0, help="local: this machine's number, from 0")
    launch.add_argument("--main-address", default="127.0.0.1", help="local: host of machine 0")


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("rows", type=Path, help="JSONL with prompt, completion, answer and what else the reward reads")
    score.add_argument("--reward", required=True, help="registry name, import path, or JSON {name: .., ..}")
    _json(score, 'print {"rewards": [..], "logged": {..}}')


def _add_merge(merge: argparse.ArgumentParser) -> None:
    merge.add_argument(
        "experts", nargs="+", metavar="EXPERT", help="a checkpoint, an adapter, a run folder or a name on the hub"
    )
    merge.add_argument("--base", metavar="MODEL", help="what the experts were trained from")
    merge.add_argument(
        "--method",
        default="ties",
        help="linear, task_arithmetic, ties, dare_linear, dare_ties, slerp, interpolate or cpi (default: ties)",
    )
    merge.add_argument(
        "--weight", nargs="+", type=float, default=[], metavar="W", help="one for all experts, or one for each"
    )
    merge.add_argument("--density", type=float, metavar="D", help="share of each difference that is kept")
    merge.add_argument(
        "--search", action="store_true", help="choose the weights by the deciding half of the recipe's held-out sets"
    )
    merge.add_argument("--recipe", help="with --search: the recipe; key.path=value may follow")
    merge.add_argument(
        "--share", type=float, default=0.1, help="with --search: most tokens, as a share of a probe's (default: 0.1)"
    )
    _json(merge, "with --search: print one JSON object")
    merge.set_defaults(overrides=[])
    merge.add_argument("--out", type=Path, required=True, help="new folder, for `eval`, `train` and from_pretrained")


USAGE_ERROR = 2
SHELLS = ("bash", "zsh", "tcsh")
"""Shells that completion is printed for."""


TRACEBACK = "POLYPHONY_TRACEBACK"
"""Environment variable: if set, errors are raised with their traceback instead of told in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, 1 for a failed check, 2 for bad input (one line on standard error)."""
    arguments = parse(argv)
    set_environment()
    try:
        look_in_working_directory()  # where a user's graders may be
        return VERBS[arguments.verb].run(arguments) or 0
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError) as error:  # OSError: a full disk, a file that was taken away
        if os.environ.get(TRACEBACK):
            raise
        is_input = isinstance(error, ValueError)
        for line in getattr(error, "problems", [error]):
            print(f"polyphony {arguments.verb}: {'' if is_input else 'stopped: '}{_one_line(line)}", file=sys.stderr)
        return USAGE_ERROR if is_input else 1
    except KeyboardInterrupt:
        print(f"polyphony {arguments.verb}: interrupted", file=sys.stderr)
        return 130


def set_environment() -> None:
    """Choose what the libraries read at import. Two OpenMP threads on a busy small machine are slower than one."""
    drivers = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA, of AMD
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and not any(Path(driver).exists() for driver in drivers):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed finds by itself, with a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):  # of the libraries below; a person cannot act on them
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", category=SyntaxWarning, module=".*site-packages")
    warnings.formatwarning = _warning_line


def _warning_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """Return one line: where in the code a warning was given tells its reader nothing."""
    return f"{'warning' if category is UserWarning else category.__name__}: {_one_line(message)}\n"


def _one_line(error: BaseException | str) -> str:
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
        print(f"polyphony train: {_one_line(line)}", file=sys.stderr)
        is_wrong = True
    if is_wrong:
        return USAGE_ERROR
    try:
        check_free(RunFolder(arguments.out or Path("runs") / recipe.name), resume=run is not None)
    except RecipeError as error:  # said alone: the recipe is right
        print(_one_line(error), file=sys.stderr)
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


class Verb(NamedTuple):
    """One verb of the command."""

    text: str
    """What it does, for `--help`."""
    examples: Sequence[str]
    add: Callable[[argparse.ArgumentParser], None]
    """Adds its arguments."""
    run: Callable[[argparse.Namespace], int | None]
    """Runs it; returns the exit code, None for 0."""


VERBS = {
    "init": Verb(
        "write a recipe for rows that you have",
        (
            "init --from sums.jsonl facts.jsonl --out mine.yaml",
            "init --from essays.jsonl --reward judge --model Qwen/Qwen3-0.6B --out essays.yaml",
        ),
        _add_init,
        _init,
    ),
    "train": Verb(
        "train a recipe", ("train recipe.yaml grpo.max_steps=200", "train --resume runs/mine"), _add_train, _train
    ),
    "eval": Verb(
        "score a model on a recipe's held-out sets, or compare two on the same items",
        ("eval runs/a runs/b r.yaml", "eval Qwen/Qwen3-0.6B recipe.yaml eval.samples=8 --json"),
        _add_eval,
        _eval,
    ),
    "report": Verb(
        "write the HTML report of one or more runs",
        ("report runs/demo", "report runs/a runs/b --out a-and-b.html"),
        _add_report,
        _report,
    ),
    "watch": Verb(
        "show runs in this terminal while they train",
        ("watch runs/demo", "watch runs/a runs/b --once"),
        _add_watch,
        _watch,
    ),
    "dashboard": Verb(
        "create or update a run's W&B dashboard",
        ("dashboard runs/demo", "dashboard runs/demo --out page.json"),
        _add_dashboard,
        _dashboard,
    ),
    "probe": Verb(
        "measure what training on each domain does to the others",
        ("probe recipe.yaml", "probe recipe.yaml --budget 3 probe.steps=20"),
        _add_probe,
        _probe,
    ),
    "screen": Verb(
        "say which training prompts the model can learn from",
        ("screen recipe.yaml", "screen recipe.yaml --visits 4 --json"),
        _add_screen,
        _screen,
    ),
    "sample": Verb(
        "have experts answer the training prompts; what is right becomes rows for algorithm: sft",
        (
            "sample recipe.yaml --teachers math=runs/math-expert --per-prompt 4",
            "sample recipe.yaml --teachers math=self --out runs/answers",
        ),
        _add_sample,
        _sample,
    ),
    "merge": Verb(
        "merge experts of one base into one model",
        (
            "merge runs/math runs/code --base Qwen/Qwen3-0.6B --method ties --out runs/merged",
            "merge runs/math runs/code --base Qwen/Qwen3-0.6B --search --recipe recipe.yaml --out runs/merged",
        ),
        _add_merge,
        _merge,
    ),
    "plan": Verb(
        "say in which order to train, or to mix",
        ("plan runs/x-probe/transfer.json", "plan --replay runs/mine --scheduler sec curriculum.step_size=0.3"),
        _add_plan,
        _plan,
    ),
    "demo": Verb(
        "probe four small domains, train on them, open the books",
        ("demo", "demo --compare --out runs/demo-2"),
        _add_demo,
        _demo,
    ),
    "doctor": Verb(
        "say whether this machine can train, and what will be slow",
        ("doctor", "doctor --gpu --json"),
        _add_doctor,
        _doctor,
    ),
    "launch": Verb(
        "train on this machine's GPUs, on Slurm or on Ray",
        ("launch slurm recipe.yaml", "launch local recipe.yaml --dry-run"),
        _add_launch,
        _launch,
    ),
    "score": Verb(
        "run a reward over a file of completions",
        (
            "score rows.jsonl --reward exact",
            """score rows.jsonl --reward '{"name": "format", "pattern": "[0-9]+"}' --json""",
        ),
        _add_score,
        _score,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
