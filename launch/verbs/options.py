"""The arguments of the command's verbs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_recipe(verb: argparse.ArgumentParser, text: str = "the recipe, YAML", *, nargs: str | None = None) -> None:
    """Add the recipe and the overrides of its keys."""
    verb.add_argument("recipe", nargs=nargs, help=text)
    verb.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the recipe")


def _run_folder(verb: argparse.ArgumentParser, dry_run: str) -> None:
    verb.add_argument("--out", type=Path, help="run folder (default: runs/<name>)")
    verb.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder")
    verb.add_argument("--dry-run", action="store_true", help=dry_run)


def _json(verb: argparse.ArgumentParser, text: str = "print one JSON object") -> None:
    verb.add_argument("--json", action="store_true", help=text)


def _train(train: argparse.ArgumentParser) -> None:
    add_recipe(train, nargs="?")
    _run_folder(train, "check all that a run will meet but for weights, print the resolved recipe, then stop")
    train.add_argument("--offline", action="store_true", help="with --dry-run: ask no judge")
    train.add_argument(
        "--show-prompts",
        type=int,
        metavar="N",
        help="print N rows of each domain as the policy will read them, then stop",
    )


def _init(init: argparse.ArgumentParser) -> None:
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


def _eval(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "names",
        nargs="+",
        metavar="MODEL [MODEL] [RECIPE] [key.path=value ..]",
        help="one or two models (folder, run folder or hub name), the recipe (default: the run folder's), overrides",
    )
    evaluate.set_defaults(overrides=[])
    _json(evaluate)


def _report(report: argparse.ArgumentParser) -> None:
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument(
        "--out", type=Path, help="file to write (default: in the first run, report.html, of several report-with-B.html)"
    )
    report.add_argument("--open", action="store_true", help="show it in a browser")
    _json(report, "print the summary numbers instead")


def _watch(watch: argparse.ArgumentParser) -> None:
    watch.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    watch.add_argument("--once", action="store_true", help="print one picture and stop, as outside a terminal")


def _dashboard(dashboard: argparse.ArgumentParser) -> None:
    dashboard.add_argument("folder", type=Path, metavar="RUN")
    dashboard.add_argument(
        "--out", type=Path, help="file to write, its address beside it (default: ./RUN-dashboard.json)"
    )


def _probe(probe: argparse.ArgumentParser) -> None:
    add_recipe(probe, "the recipe, YAML; its section `probe` says how long and from where")
    probe.add_argument("--out", type=Path, help="folder (default: runs/<name>-probe); an unfinished one goes on")
    probe.add_argument(
        "--budget",
        type=int,
        metavar="N",
        help="probe N domains at most, chosen one after the other, fewer where the plan no longer changes (default: all); "
        "by a part of them no plan recommends more than mixing",
    )


def _screen(screen: argparse.ArgumentParser) -> None:
    add_recipe(screen, "the recipe, YAML; its section `pool` says what is too hard")
    screen.add_argument("--out", type=Path, help="folder (default: runs/<name>-screen); an unfinished one goes on")
    screen.add_argument("--visits", type=int, default=12, help="most groups for a prompt that never succeeds")
    _json(screen)


def _sample(sample: argparse.ArgumentParser) -> None:
    add_recipe(sample, "the recipe, YAML; its section `rft` says what is accepted")
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


def _plan(plan: argparse.ArgumentParser) -> None:
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


def _demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--out", type=Path, help="run folder (default: runs/demo, or the next that is free)")
    demo.add_argument(
        "--compare", action="store_true", help="train once more, at a learning rate that is too high, beside the first"
    )


def _doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument(
        "--gpu", action="store_true", help="measure the spine on this node's cards, for ten minutes at most, as a table"
    )
    _json(doctor)


def _launch(launch: argparse.ArgumentParser) -> None:
    launch.add_argument("where", choices=["local", "slurm", "ray"], help="the recipe's section `cluster` says how")
    add_recipe(launch, nargs="?")
    _run_folder(launch, "print exactly what will run, then stop")
    launch.add_argument("--address", default="127.0.0.1:8265", help="ray: host:port of the cluster's dashboard")
    launch.add_argument("--gpus-per-node", type=int, help="slurm: default what each node says; ray: as many as here")
    launch.add_argument("--machines", type=int, default=1, help="local: machines in the group")
    launch.add_argument("--machine-rank", type=int, default=0, help="local: this machine's number, from 0")
    launch.add_argument("--main-address", default="127.0.0.1", help="local: host of machine 0")


def _score(score: argparse.ArgumentParser) -> None:
    score.add_argument("rows", type=Path, help="JSONL with prompt, completion, answer and what else the reward reads")
    score.add_argument("--reward", required=True, help="registry name, import path, or JSON {name: .., ..}")
    _json(score, 'print {"rewards": [..], "logged": {..}}')


def _merge(merge: argparse.ArgumentParser) -> None:
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


ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
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
"""By verb what adds its arguments."""
