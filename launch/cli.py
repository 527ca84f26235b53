"""The command `polyphony`: one verb a module, imported only when it is called."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.launch.arguments import parse
from polyphony.launch.import_paths import look_in

if TYPE_CHECKING:
    from polyphony.launch.config import Recipe

USAGE_ERROR = 2

TRACEBACK = "POLYPHONY_TRACEBACK"
"""Environment variable: if set, errors are raised with their traceback instead of told in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, 1 for a failed check, 2 for bad input (one line on standard error)."""
    arguments = parse(argv)
    set_environment()
    try:
        look_in(Path.cwd())  # where a user's graders may be, and an installed command does not look
        return VERBS[arguments.verb](arguments) or 0
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError) as error:  # OSError: a full disk, a file that was taken away
        if os.environ.get(TRACEBACK):
            raise
        is_input = isinstance(error, ValueError)
        print(f"polyphony {arguments.verb}: {'' if is_input else 'stopped: '}{_one_line(error)}", file=sys.stderr)
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
    warnings.formatwarning = _warning_line


def _warning_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """Return one line: where in the code a warning was given tells its reader nothing."""
    return f"{'warning' if category is UserWarning else category.__name__}: {_one_line(message)}\n"


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())


def _recipe_to_train(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe of `train` or `launch`: given, or that of the folder to go on with. Raises RecipeError."""
    from polyphony.launch.config import RecipeError, load_recipe
    from polyphony.launch.train import RECIPE_FILE

    if arguments.resume:
        if arguments.out:
            raise RecipeError("--resume goes on in its own folder; leave --out away")
        if not (arguments.resume / RECIPE_FILE).is_file():
            raise RecipeError(f"--resume {arguments.resume}: no run there ({RECIPE_FILE} is missing)")
    elif not arguments.recipe:
        raise RecipeError("give a recipe, or --resume RUN")
    return load_recipe(arguments.recipe or arguments.resume / RECIPE_FILE, arguments.overrides)


def _train(arguments: argparse.Namespace) -> int:
    from polyphony.launch.build import check_names
    from polyphony.launch.train import Interrupted, train

    recipe = _recipe_to_train(arguments)
    if arguments.dry_run:
        check_names(recipe)
        print(recipe.as_yaml(), end="")
        return 0
    out = arguments.resume or arguments.out or Path("runs") / recipe.name
    try:
        train(recipe, out, resume=arguments.resume is not None)
    except Interrupted as stopped:
        print(f"polyphony train: {stopped}; go on with --resume {out}", file=sys.stderr)
        return 128 + stopped.number
    if (out / "predicted.json").is_file():
        from polyphony.launch.tables import predicted_table

        print(predicted_table(json.loads((out / "predicted.json").read_text())))
    if os.environ.get("RANK", "0") == "0":
        print(out / "report.html")
    return 0


def _eval(arguments: argparse.Namespace) -> None:
    from polyphony.launch.evaluate import evaluate, parse

    evaluate(parse(arguments.names, arguments.overrides), as_json=arguments.json)


def _report(arguments: argparse.Namespace) -> None:
    from polyphony.launch.report import report

    report(arguments.runs, out=arguments.out, as_json=arguments.json)


def _dashboard(arguments: argparse.Namespace) -> None:
    from polyphony.launch.dashboard import dashboard

    dashboard(arguments.folder)


def _probe(arguments: argparse.Namespace) -> None:
    from polyphony.launch.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from polyphony.curricula.transfer import TransferMatrix
    from polyphony.launch.probe import TRANSFER_FILE, probe
    from polyphony.launch.tables import transfer_table
    from polyphony.trainer.report import write_report

    out = arguments.out or Path("runs") / f"{recipe.name}-probe"
    probe(recipe, out)
    print(transfer_table(TransferMatrix.load(out / TRANSFER_FILE).on("report")))
    print(f"{out / TRANSFER_FILE}\n{write_report([out], out / 'report.html')}")


def _screen(arguments: argparse.Namespace) -> None:
    from polyphony.launch.config import RecipeError, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.visits < 1:
        raise RecipeError(f"--visits must be at least 1, got {arguments.visits}")
    from polyphony.launch.screen import IMPOSSIBLE_FILE, POOL_FILE, screen, screen_table

    out = arguments.out or Path("runs") / f"{recipe.name}-screen"
    summary = screen(recipe, out, most_visits=arguments.visits)
    print(json.dumps(summary) if arguments.json else screen_table(summary))
    if not arguments.json:
        print(f"{out / POOL_FILE}\n{out / IMPOSSIBLE_FILE}")


def _plan(arguments: argparse.Namespace) -> None:
    from polyphony.launch.config import RecipeError
    from polyphony.launch.plan import plan, replay_run

    overrides = arguments.overrides
    if arguments.transfer and "=" in arguments.transfer.name:  # without a file the first override stands in its place
        overrides, arguments.transfer = [str(arguments.transfer), *overrides], None
    if overrides and not arguments.replay:
        raise RecipeError(f"{overrides[0]}: settings of a scheduler go with --replay RUN --scheduler NAME")
    if arguments.replay:
        if not arguments.scheduler:
            raise RecipeError("--replay needs --scheduler NAME")
        replay_run(
            arguments.replay,
            scheduler=arguments.scheduler,
            transfer=arguments.transfer,
            overrides=overrides,
            as_json=arguments.json,
        )
    elif arguments.scheduler:
        raise RecipeError("--scheduler goes with --replay RUN; a plan alone has no scheduler")
    elif arguments.transfer:
        plan(arguments.transfer, as_json=arguments.json)
    else:
        raise RecipeError("give a transfer.json, or --replay RUN --scheduler NAME")


def _demo(arguments: argparse.Namespace) -> None:
    from polyphony.launch.demo import demo

    demo(arguments.out)


def _doctor(arguments: argparse.Namespace) -> int:
    from polyphony.launch.doctor import doctor

    return doctor(as_json=arguments.json)


def _launch(arguments: argparse.Namespace) -> int:
    from polyphony.launch import launch
    from polyphony.launch.local import Machine

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
    from polyphony.launch.score import score

    score(arguments.rows, reward=arguments.reward, as_json=arguments.json)


VERBS = {
    "train": _train,
    "eval": _eval,
    "report": _report,
    "dashboard": _dashboard,
    "probe": _probe,
    "screen": _screen,
    "plan": _plan,
    "demo": _demo,
    "doctor": _doctor,
    "launch": _launch,
    "score": _score,
}


if __name__ == "__main__":
    sys.exit(main())
