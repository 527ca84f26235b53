"""`python -m launch.lab.chaos FOLDER [--kills 30]`: kill workers and trainer at random, and compare with a quiet run.

One run is left alone; others lose a rollout worker (two times in three) or the trainer itself to SIGKILL, a few seconds
after every sign of life, and are resumed, until there have been enough kills. Each run that ends is then laid beside the
quiet one: prompt stream, mixtures, numbers, ledgers of the last checkpoint, final weights. Call it again to go on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "debug.yaml"
LIMIT_S = 600.0
"""A run that takes no step for so long is stuck: the very thing that is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One process that was ended."""

    run: str
    victim: str
    after_step: int
    """Last step that the run had logged by then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A disturbed run beside the quiet one; every field is true where nothing differs."""

    prompts: bool
    every_prompt_once: bool
    """Each draw's groups were counted once: per log, completions of all domains are those of one draw."""
    metrics: bool
    ledgers: bool
    weights: bool


def overrides(steps: int, workers: int) -> list[str]:
    """Return what a chaos run changes in the debug recipe."""
    pool = f"rollouts={{engine: ray, workers: {workers}, timeout_s: 120}}"
    return [pool, f"grpo.max_steps={steps}", f"eval.every={steps}", "checkpoint.every=1", "tracking.wandb=null"]


def command(run: Path, changes: Sequence[str]) -> list[str]:
    """Return the command that starts a run, or goes on with it."""
    words = [sys.executable, "-m", "launch.cli", "train"]
    if (run / "recipe.yaml").exists():
        return [*words, "--resume", str(run)]
    return [*words, str(RECIPE), *changes, "--out", str(run)]


def last_step(run: Path) -> int:
    """Return the last step in the run's metrics; -1 before the first line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else -1


def disturb(run: Path, changes: Sequence[str], *, kills: int, rng: random.Random, delay_s: float) -> list[Kill]:
    """Bring a run to its end through at most `kills` kills; return them."""
    done: list[Kill] = []
    while not (run / "report.html").exists():
        with (run.parent / f"{run.name}.log").open("a") as log:
            trainer = subprocess.Popen(command(run, changes), stdout=log, stderr=log, start_new_session=True)
            try:
                while _is_moving(trainer, run):
                    if len(done) == kills or not _wait(trainer, rng.uniform(0, delay_s)):
                        continue
                    victim = "worker" if rng.random() < 2 / 3 else "trainer"
                    if _kill(trainer, victim):
                        done.append(Kill(run=run.name, victim=victim, after_step=last_step(run)))
            finally:
                _end(trainer)
        if trainer.returncode not in (0, -9):
            raise RuntimeError(f"{run.name} ended with exit code {trainer.returncode}, see {run.parent / run.name}.log")
    return done


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


def _kill(trainer: subprocess.Popen, victim: str) -> bool:
    """Send SIGKILL to the trainer or to one of its workers; False if there is none at the moment."""
    if victim == "trainer":
        trainer.kill()
        trainer.wait()
        return True
    for process in psutil.Process(trainer.pid).children(recursive=True):
        if process.name().startswith("ray::") and "RolloutWorker" in " ".join(process.cmdline()):
            process.kill()
            return True
    return False


def _end(trainer: subprocess.Popen) -> None:
    """Leave nothing of a run behind: Ray's own processes end by themselves some time after their driver."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trainer.pid, 9)
    trainer.wait()


def compare(quiet: Path, run: Path) -> Comparison:
    """Lay a disturbed run beside the quiet one."""
    same = {name: _told(quiet, name) == _told(run, name) for name in ("decisions", "metrics")}
    sizes = {_drawn(line) for line in _told(run, "metrics") if _drawn(line)}
    return Comparison(
        prompts=same["decisions"],
        every_prompt_once=len(sizes) == 1
        and sizes == {_drawn(line) for line in _told(quiet, "metrics") if _drawn(line)},
        metrics=same["metrics"],
        ledgers=_ledgers(quiet) == _ledgers(run),
        weights=_digest(quiet / "final" / "model.safetensors") == _digest(run / "final" / "model.safetensors"),
    )


def _told(run: Path, ledger: str) -> list[dict[str, Any]]:
    """Return a ledger's lines without what tells the time or counts the very faults."""
    timed = ("step_time", "tokens_per_s", "runtime", "per_second", "train_loss", "faults/")
    lines = [json.loads(line) for line in (run / f"{ledger}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines]


def _drawn(line: dict[str, Any]) -> float:
    return sum(v for k, v in line.items() if k.startswith("domain/") and k.endswith("/n"))


def _ledgers(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "polyphony.json").read_text())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Go on until there were enough kills; print what differs. Exit code 1 if prompts were lost, doubled or changed."""
    parser = argparse.ArgumentParser(prog="python -m launch.lab.chaos", description=(__doc__ or "").splitlines()[2])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--delay", type=float, default=4.0, help="longest wait in seconds between a step and a kill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    changes = overrides(arguments.steps, arguments.workers)
    disturb(folder / "quiet", changes, kills=0, rng=random.Random(0), delay_s=0)
    record, killed, lines = folder / "chaos.jsonl", 0, []
    if record.exists():
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        killed = sum(len(line["kills"]) for line in lines)
    while killed < arguments.kills:
        name = f"run-{len(lines)}"
        rng = random.Random(f"{arguments.seed}/{name}/{last_step(folder / name)}")
        kills = disturb(folder / name, changes, kills=arguments.kills - killed, rng=rng, delay_s=arguments.delay)
        killed += len(kills)
        line = {"run": name, "kills": [asdict(k) for k in kills], **asdict(compare(folder / "quiet", folder / name))}
        lines.append(line)
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
    for line in lines:
        victims = [kill["victim"] for kill in line["kills"]]
        counts = ", ".join(f"{victims.count(v)} of the {v}" for v in ("worker", "trainer"))
        print(f"{line['run']}: {len(victims)} kills ({counts}); " + _verdict(line))
    return int(not all(line["prompts"] and line["every_prompt_once"] for line in lines))


def _verdict(line: dict[str, Any]) -> str:
    names = list(Comparison.__dataclass_fields__)
    return ", ".join(f"{name} {'equal' if line[name] else 'DIFFER'}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
