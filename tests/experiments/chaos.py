"""`python -m tests.experiments.chaos FOLDER [--kills 40]`: kill workers and trainer at random, compare with a quiet run.

The kills are shared out evenly over the arms. Processes get SIGKILL some seconds after a sign of life, and what ended is
resumed, until the arm has its kills. Each run that ends is then laid beside one that was left alone. What is promised:

- `trainer` (only the trainer is killed; pool and adaptive curriculum): the run is the quiet one bit for bit, prompts,
  metrics, ledgers and final weights. Each worker samples what it would have; all that decides is in the checkpoint.
- `worker` (only rollout workers; fixed mixture, no pool): the prompt stream and mixtures are the quiet one's. Metrics and
  weights are its up to rounding: a lost worker's groups are sampled, with their own seeds, beside others than before, and a
  batch's make-up shows in the last digits of a log-probability.
- `moments` (the trainer, in one process with its engine, while a checkpoint is written, the best one is marked, or the final
  weights are written; pool and adaptive curriculum): as `trainer`.
- `lora`, `lora-bfloat16` (the trainer, adapters alone being trained, vLLM in its process, in either type): as `trainer`.
- `ahead-trainer`, `ahead-worker`, `ahead-both`: those three with `rollouts.ahead: 2`, promised the same.
- `both` (pool and adaptive curriculum): such digits may turn a reward, hence a decision, so that only the run's own books
  have to agree: no group lost, none counted twice, each prompt seen by the pool as often as it was drawn.

A run that was left alone is made once for each recipe. Call it again to go on: every kill is on record as soon as it was
made. Last comes a table: of each arm its kills, how many of its runs differ in what, and seconds, the quiet run's apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import psutil

from polyphony.trainer.run.folder import BEST_FILE, STATE_FILE, RunFolder
from tests.experiments.accounts import Comparison, compare

RECIPE = Path(__file__).resolve().parents[2] / "launch" / "recipes" / "debug.yaml"
GROUP_SIZE = 8
FIELDS = [field.name for field in fields(Comparison)]
LIMIT_S = 600.0
"""A run that takes no step for so long is stuck: the very thing that is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way to disturb a run, and what has to be equal afterwards."""

    victims: tuple[str, ...]
    changes: tuple[str, ...]
    """What it changes in the debug recipe."""
    promised: tuple[str, ...]
    """Fields of a `Comparison`."""


ADAPTIVE = ("curriculum.scheduler=adaptive", "pool={}")
LORA = (*ADAPTIVE, "rollouts={}", "lora={r: 4, target_modules: [q_proj, v_proj]}", "grpo.learning_rate=2e-3")
ARMS = {
    "trainer": Variant(victims=("trainer",), changes=ADAPTIVE, promised=("accounted", "prompts", "metrics", "weights")),
    "worker": Variant(victims=("worker",), changes=(), promised=("accounted", "prompts")),
    "moments": Variant(
        victims=("saving", "marking", "ending"),
        changes=(*ADAPTIVE, "rollouts={engine: transformers}"),
        promised=("accounted", "prompts", "metrics", "weights"),
    ),
    "lora": Variant(victims=("trainer",), changes=LORA, promised=("accounted", "prompts", "metrics", "weights")),
    "lora-bfloat16": Variant(
        victims=("trainer",),
        changes=(*LORA, "grpo.model_init_kwargs={dtype: bfloat16}"),
        promised=("accounted", "prompts", "metrics", "weights"),
    ),
    "both": Variant(victims=("worker", "worker", "trainer"), changes=ADAPTIVE, promised=("accounted",)),
}
AHEAD = ("trainer", "worker", "both")
ARMS |= {f"ahead-{name}": replace(ARMS[name], changes=(*ARMS[name].changes, "rollouts.ahead=2")) for name in AHEAD}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One process that was ended."""

    victim: str
    after_step: int
    """Last step that the run had logged by then."""


def _is_saving(folder: RunFolder, since_ns: int) -> bool:
    found = (path for path in folder.checkpoints.glob("checkpoint-*") if not (path / STATE_FILE).exists())
    return any(path.stat().st_mtime_ns > since_ns for path in found)


def _is_marking(folder: RunFolder, since_ns: int) -> bool:
    newest = max((path.stat().st_mtime_ns for path in folder.checkpoints.glob(f"*/{STATE_FILE}")), default=0)
    mark = folder.checkpoints / BEST_FILE
    return newest > max(since_ns, mark.stat().st_mtime_ns if mark.exists() else 0)


def _is_ending(folder: RunFolder, since_ns: int) -> bool:
    return folder.final.exists() and not folder.has_ended


MOMENTS: dict[str, Callable[[RunFolder, int], bool]] = {
    "saving": _is_saving,
    "marking": _is_marking,
    "ending": _is_ending,
}
"""When the trainer is killed, for victims that are moments of it; what is older than the process, in ns, is no moment."""


def overrides(arm: Variant, steps: int, workers: int) -> list[str]:
    """Return what a chaos run changes in the debug recipe."""
    pool = f"rollouts={{engine: ray, workers: {workers}, timeout_s: 120}}"
    often = [f"grpo.max_steps={steps}", "eval.every=10", "checkpoint.every=1", "tracking.wandb=null"]
    return [pool, *often, f"grpo.num_generations={GROUP_SIZE}", *arm.changes]


def command(run: Path, changes: Sequence[str]) -> list[str]:
    """Return the command that starts a run, or goes on with it."""
    words = [sys.executable, "-P", "-m", "polyphony.launch.cli", "train"]
    if RunFolder(run).recipe.exists():
        return [*words, "--resume", str(run)]
    return [*words, str(RECIPE), *changes, "--out", str(run)]


def last_step(run: Path) -> int:
    """Return the last step in the run's metrics; -1 before the first line."""
    lines = RunFolder(run).read("metrics")
    return lines[-1]["step"] if lines else -1


def disturb(
    run: Path, changes: Sequence[str], victims: Sequence[str], *, kills: int, rng: random.Random, delay_s: float
) -> Iterator[Kill]:
    """Bring a run to its end through at most `kills` kills of such processes; yield each once it was made."""
    done = 0
    while not RunFolder(run).has_ended:
        shutil.rmtree(RunFolder(run).final, ignore_errors=True)  # half of it says nothing of when it is written next
        with (run.parent / f"{run.name}.log").open("a") as log:
            trainer = subprocess.Popen(command(run, changes), stdout=log, stderr=log, start_new_session=True)
            try:
                if victims and victims[0] in MOMENTS and done < kills:
                    for kill in _kill_at(rng.choice(victims), trainer, run, rng):
                        done += 1
                        yield kill
                while _is_moving(trainer, run):
                    if done == kills or victims[0] in MOMENTS or not _wait(trainer, rng.uniform(0, delay_s)):
                        continue
                    victim = rng.choice(victims)
                    if _kill(trainer, victim, rng):
                        done += 1
                        yield Kill(victim=victim, after_step=last_step(run))
            finally:
                _end(trainer)
        if trainer.returncode not in (0, -9):
            raise RuntimeError(f"{run.name} ended with exit code {trainer.returncode}, see {run.parent / run.name}.log")


def _kill_at(moment: str, trainer: subprocess.Popen, run: Path, rng: random.Random) -> list[Kill]:
    """Kill the trainer once it is where it should be; nothing where it ends before."""
    begun_ns = time.time_ns()
    while trainer.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # renamed while one looks
            if MOMENTS[moment](RunFolder(run), begun_ns):
                time.sleep(rng.uniform(0, 0.02))
                if trainer.poll() is None:
                    trainer.kill()
                    trainer.wait()
                    return [Kill(victim=moment, after_step=last_step(run))]
        time.sleep(0.001)
    return []


def _is_moving(trainer: subprocess.Popen, run: Path) -> bool:
    """Wait for the next step; False once the process has ended. Raises RuntimeError for one that is stuck."""
    before, deadline = last_step(run), time.monotonic() + LIMIT_S
    while last_step(run) == before:
        if trainer.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise RuntimeError(f"{run.name} took no step for {LIMIT_S:g} s after step {before}")
        time.sleep(0.05)
    return True


def _wait(trainer: subprocess.Popen, seconds: float) -> bool:
    """Sleep; False if the process ended meanwhile."""
    time.sleep(seconds)
    return trainer.poll() is None


def _kill(trainer: subprocess.Popen, victim: str, rng: random.Random) -> bool:
    """Send SIGKILL to the trainer or to one of its workers; False if there is none at the moment."""
    if victim == "trainer":
        trainer.kill()
        trainer.wait()
        return True
    below = psutil.Process(trainer.pid).children(recursive=True)
    workers = [p for p in below if _is_worker(p)]
    if workers:
        rng.choice(workers).kill()
    return bool(workers)


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it ended meanwhile
        return process.name().startswith("ray::") and "RolloutWorker" in " ".join(process.cmdline())
    return False


def _end(trainer: subprocess.Popen) -> None:
    """Leave nothing of a run behind: Ray's own processes end by themselves some time after their driver."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trainer.pid, 9)
    trainer.wait()


def quiet_run(folder: Path, arm: Variant, changes: Sequence[str]) -> Path:
    """Return an undisturbed run of an arm's recipe, which arms with the same recipe share."""
    name = next(name for name, other in ARMS.items() if other.changes == arm.changes)
    run = folder / f"quiet-{name}"
    began = time.monotonic()
    for _ in disturb(run, changes, (), kills=0, rng=random.Random(0), delay_s=0):
        pass
    _note(run, seconds=time.monotonic() - began)
    return run


def _note(run: Path, **line: object) -> None:
    """Put something on a run's record: a kill, or seconds that were spent on it."""
    with run.with_suffix(".kills").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _noted(run: Path) -> tuple[list[Kill], float]:
    """Return a run's kills, and the seconds it took."""
    record = run.with_suffix(".kills")
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return [Kill(**line) for line in lines if "victim" in line], sum(line.get("seconds", 0.0) for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Go on until there were enough kills; print what differs. Exit code 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.experiments.chaos", description="Kill workers and trainer at random."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--delay", type=float, default=4.0, help="longest wait in seconds between a step and a kill")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    table = [f"{'arm':<14}{'runs':>5}{'kills':>6}" + "".join(f"{name:>11}" for name in FIELDS) + "  seconds  quiet"]
    broken = 0
    for name, arm in ((name, ARMS[name]) for name in arguments.arms):
        changes = overrides(arm, arguments.steps, arguments.workers)
        quiet = quiet_run(folder, arm, changes)
        share, found, seconds = arguments.kills // len(arguments.arms), [], 0.0
        made = 0
        while made < share:
            run = folder / f"{name}-{len(found)}"
            _bring_to_end(run, arm, changes, kills=share - made, arguments=arguments)
            kills, took = _noted(run)
            if not kills:
                raise RuntimeError(f"{run.name} ended before anything was killed; ask for more --steps")
            made, seconds = made + len(kills), seconds + took
            found.append(compare(quiet, run, group_size=GROUP_SIZE))
            broken += _report(run, found[-1], arm, kills)
        differ = [sum(not getattr(one, field) for one in found) for field in FIELDS]
        cells = (f"{n}{' ' if field in arm.promised else '*'}" for n, field in zip(differ, FIELDS, strict=True))
        row = f"{name:<14}{len(found):>5}{made:>6}" + "".join(f"{cell:>11}" for cell in cells)
        table.append(f"{row}{seconds:>9.0f}{_noted(quiet)[1]:>7.0f}")
    print("\nruns that differ from the quiet one (* not promised to be equal)", *table, sep="\n", flush=True)
    return int(broken > 0)


def _bring_to_end(
    run: Path, arm: Variant, changes: Sequence[str], *, kills: int, arguments: argparse.Namespace
) -> None:
    """Go on with a run until it has ended; its kills, those on record counted, are at most so many."""
    if RunFolder(run).has_ended:
        return
    left, began = kills - len(_noted(run)[0]), time.monotonic()
    rng = random.Random(f"{arguments.seed}/{run.name}/{last_step(run)}")
    for kill in disturb(run, changes, arm.victims, kills=left, rng=rng, delay_s=arguments.delay):
        _note(run, **asdict(kill))
    _note(run, seconds=time.monotonic() - began)


def _report(run: Path, found: Comparison, arm: Variant, kills: Sequence[Kill]) -> bool:
    """Print how a run compares; return whether it broke a promise."""
    counts = ", ".join(f"{n} of the {victim}" for victim, n in Counter(kill.victim for kill in kills).items())
    words = [
        f"{k} {'equal' if v else 'DIFFER'}{'' if k in arm.promised else ' (not promised)'}"
        for k, v in asdict(found).items()
    ]
    print(f"{run.name}: {len(kills)} kills ({counts}); {', '.join(words)}", flush=True)
    return not all(getattr(found, name) for name in arm.promised)


if __name__ == "__main__":
    sys.exit(main())
