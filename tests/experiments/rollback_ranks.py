"""`python -m tests.experiments.rollback_ranks FOLDER [--strategy zero2]`: a recipe whose guardrail takes two ranks back.

Two trainer ranks on CPU (gloo) run the debug recipe with steps so large that the watched domain is gone at the second look.
What is promised: the run goes back to its first checkpoint on both ranks, through the engine's own loader, says so where a
single process does, and goes on to its last step; the checkpoint saved at the rollback has the first one's weights.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import train
from polyphony.trainer.run.folder import RunFolder, read_transfer
from polyphony.trainer.run.json_lines import read_object
from tests.conftest import RECIPES
from tests.forks import forked_ranks
from tests.ranks import leave_shared_memory_alone
from tests.test_training_group import told_to_ranks

CHANGES = [
    "tracking.wandb=null",
    "rollouts={engine: transformers}",
    "guardrails={safety: {max_drop: 0.0, action: rollback}}",
    "grpo.learning_rate=0.05",
    "grpo.lr_scheduler_type=constant_with_warmup",
    "grpo.warmup_steps=2",  # the first step moves nothing
    "grpo.per_device_train_batch_size=8",
    "grpo.max_steps=3",
    "eval={every: 1, samples: 2, kl_items: 0}",
    "domains.safety.heldout.size=64",
    "domains.arithmetic.heldout.size=4",
    "domains.stories.heldout.size=4",
]


def be_a_rank(run: Path) -> None:
    """Train the recipe as one of the ranks."""
    leave_shared_memory_alone()
    train(load_recipe(RECIPES / "debug.yaml", CHANGES), run)


def broken(run: Path) -> list[str]:
    """Return which promises a run did not keep."""
    folder = RunFolder(run)
    back = [alarm for alarm in folder.read("alarms") if alarm["message"].endswith("rolled back to checkpoint-1")]
    if not back:
        return [f"no alarm tells of a rollback: {folder.read('alarms')}"]
    step = back[0]["step"]
    first, saved = (load_file(folder.checkpoints / f"checkpoint-{n}" / "model.safetensors") for n in (1, step))
    notes = [note for line in folder.decisions() if line["step"] == step + 1 for note in line["evidence"]["notes"]]
    marked = [row.step for row in read_transfer(folder.transfer).rows if row.rolled_back]
    promises = {
        "the checkpoint of the rollback has the first one's weights": all(
            torch.equal(first[n], saved[n]) for n in first
        ),
        "the scheduler is told": any(note.startswith("rolled back to checkpoint-1: safety lost") for note in notes),
        "the row after the rollback is marked": marked[:1] == [step + 1],
        "the run ended with its last step": folder.has_ended and read_object(folder.end)["how"] == "finished",
    }
    return [what for what, is_kept in promises.items() if not is_kept]


def main(argv: Sequence[str] | None = None) -> int:
    """Run once, print what was not kept; exit code 1 where anything was not."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.experiments.rollback_ranks", description="Roll two ranks back."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", choices=["ddp", "zero2", "zero3"], default="zero2")
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    told, began = told_to_ranks(arguments.strategy, folder), time.monotonic()
    ranks = forked_ranks(be_a_rank, folder / "run", log=folder / "log", **told)
    codes = [rank.wait(900) for rank in ranks]
    if any(codes):
        print(f"exit codes {codes}: {ranks[codes.index(max(codes))].said[-3000:]}")
        return 1
    found = broken(folder / "run")
    print("\n".join(found) if found else "two ranks were rolled back as one", f"({time.monotonic() - began:.0f} s)")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
