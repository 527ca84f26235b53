"""Each signal in a real run that it was planted in, and none in healthy ones.

    python -m tests.experiments.signals --out runs/signals [--planted all_dead alike] [--seeds 1 2 3]

Planted runs are the debug recipe with one thing wrong; healthy ones are its seeds, for as many steps. Prints, for each
planted signal, the step at which it rings beside the last one at which it has to, and what else rings there; for each seed
what rings at all. A finished run is not made again. Fails where a planted signal comes too late, or a healthy run rings.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from polyphony.rewards.answers import completion_text
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.signals import SIGNALS
from tests.experiments.trials import Trials

RECIPE = Path(__file__).resolve().parents[2] / "launch" / "recipes" / "debug.yaml"
PLAIN = ("tracking.wandb=null", "checkpoint.every=6", "eval.every=6", "grpo.max_steps=24")
LARGE = ("domains.safety.heldout.size=128", "domains.arithmetic.heldout.size=128")


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """What is wrong in a run, and by which step its signal has to ring."""

    changes: tuple[str, ...]
    until: int


def nothing(**columns: object) -> list[float]:
    """Give every completion the same reward."""
    return [0.0] * len(columns["completions"])  # type: ignore[arg-type]


def brief(completions: list, **columns: object) -> list[float]:
    """Pay for saying nothing: a reward that every answer can be bent to, and is soon the same for all."""
    return [1 / (1 + len(completion_text(completion))) for completion in completions]


def paid_by(reward: str) -> tuple[str, ...]:
    """Return the changes that have both domains paid by a reward of this file."""
    rewards = (f"domains.{name}.reward=tests.experiments.signals:{reward}" for name in ("arithmetic", "stories"))
    return (*rewards, "domains.stories.diversity=null")


PLANTED = {
    "all_dead": Planted(changes=paid_by("nothing"), until=8),
    "one_prompt": Planted(
        changes=("grpo.per_device_train_batch_size=8", "grpo.gradient_accumulation_steps=1"),
        until=1,
    ),
    "alike": Planted(changes=(*paid_by("brief"), "grpo.learning_rate=5e-3", "grpo.max_steps=48"), until=48),
    "truncation": Planted(changes=("domains.stories.max_completion_length=6",), until=12),
    "gradient_clipped": Planted(changes=("grpo.max_grad_norm=0.01",), until=12),
    "kl_step": Planted(changes=("grpo.learning_rate=2e-2", "eval.every=3", "checkpoint.every=3"), until=6),
    "below_start": Planted(changes=("grpo.learning_rate=2e-2", "eval.every=3", "checkpoint.every=3", *LARGE), until=12),
    "best_long_ago": Planted(
        changes=(
            "grpo.learning_rate=2e-2",
            "grpo.lr_scheduler_type=constant_with_warmup",
            "grpo.warmup_steps=48",
            "eval.every=2",
            "checkpoint.every=2",
            *LARGE,
        ),
        until=24,
    ),
    "collapse": Planted(changes=(*paid_by("brief"), "grpo.learning_rate=5e-3"), until=16),
    "explosion": Planted(changes=("grpo.learning_rate=5e-2", "eval.every=3", "checkpoint.every=3"), until=24),
}


def rung(folder: Path) -> list[tuple[int, str]]:
    """Return step and title of a run's alarms, oldest first."""
    lines = RunFolder(folder).read("alarms")
    return [(line["step"], f"{line['kind']} {line['domain']}".strip()) for line in lines]


def main() -> int:
    """Read the arguments, run what is missing, print; return 1 where something is amiss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--planted", nargs="*", choices=SIGNALS, default=list(PLANTED))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(1, 11)), help="of healthy runs")
    arguments = parser.parse_args()
    arms = {name: planted.changes for name, planted in PLANTED.items()} | {"healthy": ()}
    trials = Trials(recipe=RECIPE, arms=arms, out=arguments.out, overrides=PLAIN)
    amiss = 0
    for kind in arguments.planted:
        found, until = rung(trials.run(kind, 1)), PLANTED[kind].until
        at = min((step for step, title in found if title.split()[0] == kind), default=None)
        others = ", ".join(f"{title} {step}" for step, title in found if title.split()[0] != kind)
        amiss += at is None or at > until
        print(f"{kind:17} step {at!s:5} of at most {until:3}; beside it: {others or 'nothing'}", flush=True)
    for seed in arguments.seeds:
        found = rung(trials.run("healthy", seed))
        amiss += bool(found)
        print(f"healthy, seed {seed}: {', '.join(f'{title} {step}' for step, title in found) or 'silent'}", flush=True)
    return int(bool(amiss))


if __name__ == "__main__":
    sys.exit(main())
