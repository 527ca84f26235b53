"""The spine on this machine's GPU: `python -m tests.benchmarks.run gpu` prints what step, token and sync cost.

Two policies, the lab's and a random one of 0.5 B parameters, each in processes of two kinds, by turns (`measures.groups`).
Without a GPU the lab's policy alone is measured, on the CPU: that the benchmark runs is all that it shows. Nothing was
measured on a GPU so far.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from polyphony.launch.measures import LAB, Effort
from polyphony.launch.measures.groups import compared, measure
from polyphony.launch.measures.result import Result

PROCESSES = 2
"""Of each kind, in turns."""
EFFORT = Effort(pairs=3, steps=6)


def bench_gpu() -> list[Result]:
    """Measure every policy by both arms."""
    with tempfile.TemporaryDirectory() as scratch:
        return [
            row for name, policy in _policies(Path(scratch)).items() for row in _measured(name, policy, Path(scratch))
        ]


def _measured(name: str, policy: Path, scratch: Path) -> list[Result]:
    rows: list[Result] = []
    pairs = []
    for n in range(PROCESSES):
        both = [
            row
            for group in ("ours", "colocate")
            for row in measure(group, policy, scratch / f"{name}-{group}-{n}", effort=EFFORT)
        ]
        pairs.append({row.name: row for row in both})
        rows = rows or [row for row in both if not row.name.startswith("colocate") or row.error]
    if not any(row.error for pair in pairs for row in pair.values()):
        rows += compared(pairs)
    return [replace(row, name=f"{name} {row.name}") for row in rows]


def _policies(scratch: Path) -> dict[str, Path]:
    import torch

    if not torch.cuda.is_available():
        return {"lab": LAB}
    from polyphony.launch.measures.spine import random_policy

    return {"lab": LAB, "0.5B": random_policy(scratch / "half-billion")}


BENCHMARKS = {"gpu": bench_gpu}
