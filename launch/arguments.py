"""Which verbs and arguments the command `polyphony` has; what they do is in `launch.cli`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand after options too, where argparse by itself no longer looks for them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(r.startswith("-") or "=" not in r for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polyphony", description="RL post-training of one language model over many domains."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _add_train,
        _add_eval,
        _add_report,
        _add_dashboard,
        _add_probe,
        _add_screen,
        _add_plan,
        _add_demo,
        _add_doctor,
        _add_launch,
        _add_score,
    ):
        add(verbs)
    return parser


def _verb(verbs: argparse._SubParsersAction, name: str, text: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=text, description=text, epilog=f"example: polyphony {example}")


def _recipe(verb: argparse.ArgumentParser, text: str = "the recipe, YAML", *, nargs: str | None = None) -> None:
    verb.add_argument("recipe", nargs=nargs, help=text)
    verb.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the recipe")


def _run_folder(verb: argparse.ArgumentParser, dry_run: str) -> None:
    verb.add_argument("--out", type=Path, help="run folder (default: runs/<name>)")
    verb.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder")
    verb.add_argument("--dry-run", action="store_true", help=dry_run)


def _json(verb: argparse.ArgumentParser, text: str = "print one JSON object") -> None:
    verb.add_argument("--json", action="store_true", help=text)


def _add_train(verbs: argparse._SubParsersAction) -> None:
    train = _verb(verbs, "train", "train a recipe", "train recipe.yaml grpo.max_steps=200")
    _recipe(train, nargs="?")
    _run_folder(train, "check and print the resolved recipe, then stop")


def _add_eval(verbs: argparse._SubParsersAction) -> None:
    text = "score a model on a recipe's held-out sets, or compare two on the same items"
    evaluate = _verb(verbs, "eval", text, "eval runs/a runs/b r.yaml")
    evaluate.add_argument(
        "names",
        nargs="+",
        metavar="MODEL [MODEL] [RECIPE] [key.path=value ..]",
        help="one or two models (folder, run folder or hub name), the recipe (default: the run folder's), overrides",
    )
    evaluate.set_defaults(overrides=[])
    _json(evaluate)


def _add_report(verbs: argparse._SubParsersAction) -> None:
    report = _verb(verbs, "report", "write the HTML report of one or more runs", "report runs/demo")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="file to write (default: report.html in the first run)")
    _json(report, "print the summary numbers instead")


def _add_dashboard(verbs: argparse._SubParsersAction) -> None:
    dashboard = _verb(verbs, "dashboard", "create or update a run's W&B dashboard", "dashboard runs/demo")
    dashboard.add_argument("folder", type=Path, metavar="RUN")


def _add_probe(verbs: argparse._SubParsersAction) -> None:
    probe = _verb(verbs, "probe", "measure what training on each domain does to the others", "probe recipe.yaml")
    _recipe(probe, "the recipe, YAML; its section `probe` says how long and from where")
    probe.add_argument("--out", type=Path, help="folder (default: runs/<name>-probe); an unfinished one goes on")


def _add_screen(verbs: argparse._SubParsersAction) -> None:
    screen = _verb(verbs, "screen", "say which training prompts the model can learn from", "screen recipe.yaml")
    _recipe(screen, "the recipe, YAML; its section `pool` says what is too hard")
    screen.add_argument("--out", type=Path, help="folder (default: runs/<name>-screen); an unfinished one goes on")
    screen.add_argument("--visits", type=int, default=12, help="most groups for a prompt that never succeeds")
    _json(screen)


def _add_plan(verbs: argparse._SubParsersAction) -> None:
    plan = _verb(verbs, "plan", "say in which order to train, or to mix", "plan runs/x-probe/transfer.json")
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
    plan.set_defaults(overrides=[])
    _json(plan)


def _add_demo(verbs: argparse._SubParsersAction) -> None:
    demo = _verb(verbs, "demo", "probe four small domains, train on them, open the books", "demo")
    demo.add_argument("--out", type=Path, help="run folder (default: runs/demo, or the next that is free)")


def _add_doctor(verbs: argparse._SubParsersAction) -> None:
    _json(_verb(verbs, "doctor", "say whether this machine can train, and what will be slow", "doctor"))


def _add_launch(verbs: argparse._SubParsersAction) -> None:
    launch = _verb(verbs, "launch", "train on this machine's GPUs, on Slurm or on Ray", "launch slurm r.yaml")
    launch.add_argument("where", choices=["local", "slurm", "ray"], help="the recipe's section `cluster` says how")
    _recipe(launch, nargs="?")
    _run_folder(launch, "print exactly what will run, then stop")
    launch.add_argument("--address", default="127.0.0.1:8265", help="ray: host:port of the cluster's dashboard")
    launch.add_argument("--gpus-per-node", type=int, help="slurm, ray: default as many as this machine has")
    launch.add_argument("--machines", type=int, default=1, help="local: machines in the group")
    launch.add_argument("--machine-rank", type=int, default=0, help="local: this machine's number, from 0")
    launch.add_argument("--main-address", default="127.0.0.1", help="local: host of machine 0")


def _add_score(verbs: argparse._SubParsersAction) -> None:
    score = _verb(verbs, "score", "run a reward over a file of completions", "score rows.jsonl --reward exact")
    score.add_argument("rows", type=Path, help="JSONL with prompt, completion, answer and what else the reward reads")
    score.add_argument("--reward", required=True, help="registry name, import path, or JSON {name: .., ..}")
    _json(score, 'print {"rewards": [..]}')
