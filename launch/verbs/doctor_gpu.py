"""`polyphony doctor --gpu`: the spine on this node's cards and over two nodes, as a table to attach to a report of a fault.

What needs torch is imported inside functions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from polyphony.launch.measures import LAB, Effort
from polyphony.launch.measures.groups import GROUPS, compared, measure
from polyphony.launch.measures.result import Result, untried
from polyphony.launch.recipe import RecipeError
from polyphony.trainer.run import say

SHARES = {"ours": 0.35, "resume": 0.13, "colocate": 0.18, "worker": 0.17, "nodes": 0.17}
"""Of the time for all groups, what each may take at most; those that cannot be run leave theirs to the others."""
TOTAL_S = 540.0
"""For all groups: ten minutes with what comes before the first, a policy of a gigabyte."""
EFFORT = Effort(pairs=1, steps=3)


def check_card() -> None:
    """Raise RecipeError where PyTorch sees no card."""
    import torch

    if not torch.cuda.is_available():
        raise RecipeError("--gpu measures on a card, and PyTorch sees none here; `polyphony doctor` alone says why")


def measured() -> Iterator[Result]:
    """Yield every row as soon as it is measured, with a random policy of half a billion parameters; the lab's resumes."""
    from polyphony.launch.measures.spine import random_policy

    with tempfile.TemporaryDirectory() as scratch:
        policy = random_policy(Path(scratch) / "half-billion")
        yield from rows({**dict.fromkeys(GROUPS, policy), "resume": LAB}, Path(scratch), impossible=impossible())


def impossible() -> dict[str, str]:
    """Return the groups that cannot be measured here, and why."""
    import torch

    found = {}
    if torch.cuda.device_count() < 2:
        found["worker"] = "one card: a worker needs one of its own beside the trainer's"
    if "RAY_ADDRESS" not in os.environ:
        found["nodes"] = "one node: start Ray on two (`ray start`) and set RAY_ADDRESS=host:port"
    return found


def rows(policies: Mapping[str, Path], scratch: Path, *, impossible: Mapping[str, str]) -> Iterator[Result]:
    """Yield the rows of all groups over their policies; ours are then laid beside those of stock TRL's own engine."""
    limit_s = TOTAL_S / sum(share for group, share in SHARES.items() if group not in impossible)
    known: dict[str, Result] = {}
    for group, names in GROUPS.items():
        if group in impossible:
            yield from (untried(name, impossible[group]) for name in names)
            continue
        say(f"measuring: {', '.join(names)}")
        found = measure(group, policies[group], scratch / group, effort=EFFORT, limit_s=SHARES[group] * limit_s)
        known |= {row.name: row for row in found}
        if group == "colocate" and not any(known[name].error for name in (*GROUPS["ours"], *names)):
            found = compared([known])
        yield from found
