"""The command `polyphony` and its verbs: `verbs/options.py` has their arguments, `verbs/calls.py` what each hands on."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyphony.launch.import_paths import look_in_working_directory
from polyphony.launch.verbs.calls import CALLS, USAGE_ERROR, one_line
from polyphony.launch.verbs.options import ARGUMENTS

SHELLS = ("bash", "zsh", "tcsh")
"""Shells that completion is printed for."""
TRACEBACK = "POLYPHONY_TRACEBACK"
"""Environment variable: if set, errors are raised with their traceback instead of told in one line."""


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
            print(f"polyphony {arguments.verb}: {'' if is_input else 'stopped: '}{one_line(line)}", file=sys.stderr)
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
    return f"{'warning' if category is UserWarning else category.__name__}: {one_line(message)}\n"


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
        ARGUMENTS["init"],
        CALLS["init"],
    ),
    "train": Verb(
        "train a recipe",
        ("train recipe.yaml grpo.max_steps=200", "train --resume runs/mine"),
        ARGUMENTS["train"],
        CALLS["train"],
    ),
    "eval": Verb(
        "score a model on a recipe's held-out sets, or compare two on the same items",
        ("eval runs/a runs/b r.yaml", "eval Qwen/Qwen3-0.6B recipe.yaml eval.samples=8 --json"),
        ARGUMENTS["eval"],
        CALLS["eval"],
    ),
    "report": Verb(
        "write the HTML report of one or more runs",
        ("report runs/demo", "report runs/a runs/b --out a-and-b.html"),
        ARGUMENTS["report"],
        CALLS["report"],
    ),
    "watch": Verb(
        "show runs in this terminal while they train",
        ("watch runs/demo", "watch runs/a runs/b --once"),
        ARGUMENTS["watch"],
        CALLS["watch"],
    ),
    "dashboard": Verb(
        "create or update a run's W&B dashboard",
        ("dashboard runs/demo", "dashboard runs/demo --out page.json"),
        ARGUMENTS["dashboard"],
        CALLS["dashboard"],
    ),
    "probe": Verb(
        "measure what training on each domain does to the others",
        ("probe recipe.yaml", "probe recipe.yaml --budget 3 probe.steps=20"),
        ARGUMENTS["probe"],
        CALLS["probe"],
    ),
    "screen": Verb(
        "say which training prompts the model can learn from",
        ("screen recipe.yaml", "screen recipe.yaml --visits 4 --json"),
        ARGUMENTS["screen"],
        CALLS["screen"],
    ),
    "sample": Verb(
        "have experts answer the training prompts; what is right becomes rows for algorithm: sft",
        (
            "sample recipe.yaml --teachers math=runs/math-expert --per-prompt 4",
            "sample recipe.yaml --teachers math=self --out runs/answers",
        ),
        ARGUMENTS["sample"],
        CALLS["sample"],
    ),
    "merge": Verb(
        "merge experts of one base into one model",
        (
            "merge runs/math runs/code --base Qwen/Qwen3-0.6B --method ties --out runs/merged",
            "merge runs/math runs/code --base Qwen/Qwen3-0.6B --search --recipe recipe.yaml --out runs/merged",
        ),
        ARGUMENTS["merge"],
        CALLS["merge"],
    ),
    "plan": Verb(
        "say in which order to train, or to mix",
        ("plan runs/x-probe/transfer.json", "plan --replay runs/mine --scheduler sec curriculum.step_size=0.3"),
        ARGUMENTS["plan"],
        CALLS["plan"],
    ),
    "demo": Verb(
        "probe four small domains, train on them, open the books",
        ("demo", "demo --compare --out runs/demo-2"),
        ARGUMENTS["demo"],
        CALLS["demo"],
    ),
    "doctor": Verb(
        "say whether this machine can train, and what will be slow",
        ("doctor", "doctor --gpu --json"),
        ARGUMENTS["doctor"],
        CALLS["doctor"],
    ),
    "launch": Verb(
        "train on this machine's GPUs, on Slurm or on Ray",
        ("launch slurm recipe.yaml", "launch local recipe.yaml --dry-run"),
        ARGUMENTS["launch"],
        CALLS["launch"],
    ),
    "score": Verb(
        "run a reward over a file of completions",
        (
            "score rows.jsonl --reward exact",
            """score rows.jsonl --reward '{"name": "format", "pattern": "[0-9]+"}' --json""",
        ),
        ARGUMENTS["score"],
        CALLS["score"],
    ),
}


if __name__ == "__main__":
    sys.exit(main())
