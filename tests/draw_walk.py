"""Count how one draw walks through our files: `python -m tests.draw_walk [RECIPE] [key.path=value ..]`.

Watched is the second of three steps with a run folder (`polyphony.launch.train.start`), without evaluation and checkpoint;
the first one also imports. The *draw* goes from the choice of its prompts to the batch that TRL returns, the length of
`DomainGRPOTrainer._generate_and_score_completions`; the *step* goes on to the next draw: the update, what is written down.

A file is ours by its real path, under one of the four packages. It counts as *entered* if one of its functions is called
meanwhile, bodies of modules that are imported then left out; it is entered once more (a *switch*) with each call of a
function of ours whose nearest caller of ours lies in another file, or that has none; a generator that is resumed is called
again. What is not ours may stand between the two, and the way back is not counted. Left out on purpose: other threads and
other processes.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import polyphony.curricula
import polyphony.launch
import polyphony.rewards
import polyphony.trainer
from tests.conftest import RECIPES

PACKAGES = (polyphony.trainer, polyphony.rewards, polyphony.curricula, polyphony.launch)
FOLDERS = {package.__name__.rpartition(".")[2]: Path(str(package.__file__)).resolve().parent for package in PACKAGES}
"""The four packages by name, wherever they lie."""

DRAW = "_generate_and_score_completions"
"""Method of the trainer that is one draw."""


@dataclass(kw_only=True, slots=True)
class Walk:
    """What was called: the function that `sys.setprofile` takes, and its counts by file.

    Example: `walk = Walk(); sys.setprofile(walk)`
    """

    calls: Counter[str] = field(default_factory=Counter)
    switches: Counter[str] = field(default_factory=Counter)
    """Calls into a file from another of our files."""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Note a call of a function of ours; every other event is let pass."""
        if event != "call" or (file := called(frame)) is None:
            return
        self.calls[file] += 1
        if file != caller(frame):
            self.switches[file] += 1

    def table(self) -> str:
        """Return the counts as a Markdown table, most switches first."""
        rows = [f"| {file} | {calls} | {self.switches[file]} |" for file, calls in self._sorted()]
        total = f"| **{len(self.calls)} files** | {self.calls.total()} | {self.switches.total()} |"
        return "\n".join(["| file | calls | switches into it |", "|---|---|---|", *rows, total])

    def _sorted(self) -> list[tuple[str, int]]:
        return sorted(self.calls.items(), key=lambda item: (-self.switches[item[0]], item[0]))


def called(frame: FrameType) -> str | None:
    """Return the file of ours in which the frame's function stands; None for others' and for a module being imported."""
    return None if frame.f_code.co_name == "<module>" else ours(frame.f_code.co_filename)


def caller(frame: FrameType) -> str | None:
    """Return the nearest file of ours below a frame; None where all are of others."""
    below = frame.f_back
    while below is not None:
        if (file := called(below)) is not None:
            return file
        below = below.f_back
    return None


@cache
def ours(filename: str) -> str | None:
    """Return a file's path in the house, `trainer/grpo.py`; None for a file of others."""
    path = Path(filename).resolve()
    for name, folder in FOLDERS.items():
        if path.is_relative_to(folder):
            return f"{name}/{path.relative_to(folder).as_posix()}"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """Walks of a run, each list in the order of its draws."""

    draws: list[Walk] = field(default_factory=list)
    steps: list[Walk] = field(default_factory=list)
    """Each with its draw; the last one goes to the end of training."""


@contextmanager
def watched(trainer: Any) -> Iterator[Watched]:
    """Watch every draw of a trainer, and all until the next."""
    draw: Callable[..., Any] = getattr(trainer, DRAW)
    walks = Watched()

    def draw_and_count(*args: Any, **kwargs: Any) -> Any:
        step = Walk()
        walks.steps.append(step)
        sys.setprofile(step)
        batch = draw(*args, **kwargs)
        walks.draws.append(Walk(calls=step.calls.copy(), switches=step.switches.copy()))
        return batch

    setattr(trainer, DRAW, draw_and_count)
    try:
        yield walks
    finally:
        sys.setprofile(None)
        delattr(trainer, DRAW)


def walks_of(recipe: Path, overrides: Sequence[str] = (), *, out: Path, engine: Any = None) -> tuple[Walk, Walk]:
    """Train three steps of a recipe into the folder `out`; return the walks of the second draw and of its step."""
    from polyphony.launch.recipe import load_recipe
    from polyphony.launch.train import start

    short = ["tracking.wandb=null", "grpo.max_steps=3", "eval.every=100", "checkpoint.every=100"]
    trainer = start(load_recipe(recipe, [*short, *overrides]), out, engine=engine)
    with watched(trainer) as walks:
        trainer.train()
    return walks.draws[1], walks.steps[1]


def main(argv: Sequence[str]) -> None:
    """Print both tables of a recipe, by default of the debug recipe."""
    recipes = [argument for argument in argv if "=" not in argument] or [str(RECIPES / "debug.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        draw, step = walks_of(Path(recipes[0]), [argument for argument in argv if "=" in argument], out=Path(folder))
    print(f"One draw:\n\n{draw.table()}\n\nThe step it serves, draw included:\n\n{step.table()}")


if __name__ == "__main__":
    main(sys.argv[1:])
