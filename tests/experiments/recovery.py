"""`python -m tests.experiments.recovery OUT [--part planted] [--part stages] [--seeds 8]`: what recoveries win and cost.

planted: the lab's policy is trained on two domains; in the tenth step noise is added to its weights. Arms: without a
recovery (the guardrail warns), distilled from the domain's own best checkpoint, refreshed by its reward. Counted: in how
many seeds the interval of the loss held zero again before the draws were spent.

stages: three domains, one after the other, whose guardrails warn, distil or refresh. Draws of recoveries are taken from the
last stage: every arm has as many steps. Shown are the mean and the lowest domain's held-out score (report half) at the end,
every seed, and what an arm has more than `without` with its 95 % interval over seeds.

A run that is finished is kept: more seeds are added by the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from polyphony.curricula.records import mean
from polyphony.curricula.transfer.halves import on_half
from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import claim_folder, start
from polyphony.trainer.run.folder import RunFolder, read_transfer
from tests.conftest import POLICY
from tests.experiments.trials import over_seeds
from tests.taught import GRPO, lab

ARMS: dict[str, dict[str, Any]] = {
    "without": {"action": "warn"},
    "distil": {"action": "recover", "by": "distil"},
    "refresh": {"action": "recover", "by": "refresh"},
}
PARTS: dict[str, dict[str, Any]] = {
    "planted": {
        "domains": ("safety", "strings"),
        "guarded": ("safety",),
        "curriculum": {"scheduler": "joint"},
        "limits": {"draws": 12, "times": 1},
        "steps": 30,
        "rate": 5e-4,
    },
    "stages": {
        "domains": ("safety", "strings", "arithmetic"),
        "guarded": ("safety", "strings"),
        "curriculum": {"scheduler": "sequential", "order": ["safety", "strings", "arithmetic"]},
        "limits": {"draws": 8, "times": 2},
        "steps": 75,
        "rate": 1e-3,
    },
}
DAMAGED, SIZE = 10, 0.25
"""In which step noise is added to the weights, and how much: in standard deviations of each matrix."""
HELD = 96


class Damage(TrainerCallback):
    """Adds noise to the weights in one step."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == DAMAGED - 1:
            generator = torch.Generator().manual_seed(self.seed)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * (parameter.dim() > 1)
                parameter.data += SIZE * parameter.data.std() * noise


def recipe(part: Mapping[str, Any], arm: str, seed: int) -> dict[str, Any]:
    """Return the recipe of one run."""
    grpo = {"max_steps": part["steps"], "learning_rate": part["rate"], "lr_scheduler_type": "constant_with_warmup"}
    grpo |= {"warmup_steps": 2, "seed": seed, "num_generations": 8, "per_device_train_batch_size": 96}
    limits = part["limits"] if ARMS[arm]["action"] == "recover" else {}
    return {
        "name": f"{arm}-{seed}",
        "model": str(POLICY),
        "data": {"overlap": "keep"},
        "domains": {
            name: {
                "kind": "structured",
                "reward": "exact",
                "train": lab(name, "train", 128),
                "heldout": lab(name, "heldout", HELD),
            }
            for name in part["domains"]
        },
        "curriculum": part["curriculum"],
        "grpo": GRPO | grpo,
        "rollouts": {"engine": "transformers"},
        "eval": {"every": 5, "samples": 2, "kl_items": 0, "shown": 0},
        "checkpoint": {"keep": 1},
        "guardrails": {name: {"max_drop": 0.02} | ARMS[arm] | limits for name in part["guarded"]},
        "tracking": {"wandb": None},
    }


def run(out: Path, name: str, arm: str, seed: int) -> RunFolder:
    """Return the folder of a finished run."""
    folder = RunFolder(out / name / f"{arm}-{seed}")
    if folder.has_ended:
        return folder
    shutil.rmtree(folder.path, ignore_errors=True)  # of a run that was killed
    file = out / name / f"{arm}-{seed}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(recipe(PARTS[name], arm, seed)))
    loaded = load_recipe(file)
    claim_folder(loaded, folder.path, resume=False)
    trainer = start(loaded, folder.path)
    if name == "planted":
        trainer.add_callback(Damage(seed))
    trainer.train()
    return folder


def ends(folder: RunFolder) -> list[str]:
    """Return how each recovery ended, in words."""
    return [f"step {line['step']}: {line['message']}" for line in folder.read("alarms") if line["kind"] == "recovery"]


def scores(folder: RunFolder) -> dict[str, float]:
    """Return every domain's held-out score at the end, on the half that decides nothing."""
    matrix = read_transfer(folder.transfer)
    assert matrix.items is not None
    last = on_half(matrix.rows[-1], matrix.items, "report")
    return {name: last.mean_score(name) for name in last.scores}


def show(name: str, found: Mapping[str, Mapping[int, RunFolder]]) -> None:
    """Print the table of one part."""
    print(f"## {name}: {PARTS[name]['steps']} steps, rate {PARTS[name]['rate']:g}")
    reached = {arm: {seed: scores(folder) for seed, folder in runs.items()} for arm, runs in found.items()}
    for arm, runs in found.items():
        back = 0
        for seed, folder in runs.items():
            told, end = ends(folder), reached[arm][seed]
            back += any(" is back after " in line for line in told)
            print(f"{arm} seed {seed}: " + ", ".join(f"{domain} {score:.3f}" for domain, score in end.items()))
            print(*(f"    {line}" for line in told), sep="\n") if told else None
        if arm != "without":
            print(f"{arm}: regained in {back} of {len(runs)} seeds")
    for arm in [arm for arm in reached if arm != "without"]:
        for what, of in {"mean": lambda s: mean(list(s.values())), "lowest": lambda s: min(s.values())}.items():
            print(f"{arm} - without, {what}: {_more(reached[arm], reached['without'], of)}")


def _more(arm: Mapping[int, Any], other: Mapping[int, Any], of: Any) -> str:
    more = over_seeds([of(arm[seed]) - of(other[seed]) for seed in arm])
    return f"{more.mid:+.3f}" + (f" ({more.low:+.3f} to {more.high:+.3f})" if math.isfinite(more.low) else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=8)
    asked = parser.parse_args(arguments)
    for name in asked.part or PARTS:
        seeds = range(1, asked.seeds + 1)
        runs = {(arm, seed): run(asked.out, name, arm, seed) for seed in seeds for arm in ARMS}
        show(name, {arm: {seed: runs[arm, seed] for seed in seeds} for arm in ARMS})


if __name__ == "__main__":
    main()
