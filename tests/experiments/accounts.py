"""Two runs laid side by side, and one run's books against each other: what the chaos run compares.

A run keeps its books twice. `decisions.jsonl` and `refills.jsonl` say which prompts were asked for; `metrics.jsonl` says how
many completions of each domain came back, and `pool.npz` how often each prompt was seen. In a sound run they agree.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyphony.curricula.prompts.pool_file import load_pools
from polyphony.trainer.checkpoints import whole_checkpoints
from polyphony.trainer.run.folder import STATE_FILE, RunFolder

TIMED = ("step_time", "tokens_per_s", "runtime", "per_second", "train_loss", "faults/", "wait_s")
"""Metrics that tell the time or count the very faults; `train_loss` is of the steps of the last process alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A disturbed run beside the quiet one; every field is true where nothing differs."""

    accounted: bool
    """The run's own books agree: no group was lost, none counted twice."""
    prompts: bool
    """The same prompts in the same order, drawn by the same mixtures."""
    metrics: bool
    """Metrics, and what the last checkpoint remembers, bit for bit."""
    weights: bool
    """Final weights, bit for bit."""


def compare(quiet: Path, run: Path, *, group_size: int) -> Comparison:
    """Lay a disturbed run beside the quiet one of the same recipe."""
    return Comparison(
        accounted=not errors(run, group_size=group_size),
        prompts=_stream(quiet) == _stream(run),
        metrics=_numbers(quiet) == _numbers(run),
        weights=_weights(quiet) == _weights(run),
    )


def errors(run: Path, *, group_size: int) -> list[str]:
    """Return where the books of a finished run disagree, one line each; empty for a sound run.

    Each draw is decided once, in order; in each step as many completions came back as were asked for, groups that a
    refill replaced included; and the pool, where there is one, has seen each prompt as often as it was asked for.
    """
    decisions, refills = RunFolder(run).decisions(), RunFolder(run).read("refills")
    found = []
    if [line["draw"] for line in decisions] != list(range(len(decisions))):
        found.append(f"draws are not 0 to {len(decisions) - 1}, each once and in order")
    groups: Counter[int] = Counter()
    for line in [*decisions, *refills]:
        groups[line["step"]] += len(line["prompts"])
    for step, came in _completions(run).items():
        if came != group_size * groups[step]:
            found.append(f"step {step}: {group_size} x {groups[step]} completions were asked for, {came} counted")
    if missing := groups.keys() - _completions(run).keys():
        found.append(f"steps {sorted(missing)} were drawn and have no metrics")
    return found + _unseen(run, Counter(prompt for line in [*decisions, *refills] for prompt in line["prompts"]))


def _completions(run: Path) -> dict[int, int]:
    """Return the completions counted in each step that was taken."""
    steps = [line for line in RunFolder(run).read("metrics") if "loss" in line]
    return {
        line["step"]: sum(int(v) for k, v in line.items() if k.startswith("domain/") and k.endswith("/n"))
        for line in steps
    }


def _unseen(run: Path, asked: Counter[str]) -> list[str]:
    if not (path := RunFolder(run).pool).exists():
        return []
    found = []
    for name, columns in load_pools(path).items():
        for prompt, visits in zip(columns.ids, columns.visits.tolist(), strict=True):
            if visits != asked[prompt]:
                found.append(f"{name} {prompt}: asked for {asked[prompt]} times, seen {visits} times")
    return found


def _stream(run: Path) -> list[Any]:
    """Return what was drawn and by which mixture, without the evidence: its floats carry the rounding of a batch."""
    drawn: list[Any] = [
        (line["step"], line["draw"], line["mixture"], line["prompts"]) for line in RunFolder(run).decisions()
    ]
    return drawn + [(line["step"], line["round"], line["prompts"]) for line in RunFolder(run).read("refills")]


def _numbers(run: Path) -> list[Any]:
    folder = RunFolder(run)
    newest = whole_checkpoints(folder.checkpoints)[-1]
    metrics = [
        {k: v for k, v in line.items() if not any(timed in k for timed in TIMED)}
        for line in RunFolder(run).read("metrics")
    ]
    return [metrics, json.loads((newest / STATE_FILE).read_text())["curriculum"]]


def _weights(run: Path) -> str:
    return hashlib.sha256((RunFolder(run).final / "model.safetensors").read_bytes()).hexdigest()
