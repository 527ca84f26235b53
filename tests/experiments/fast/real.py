"""A cell of the fast lab by the real trainer, beside the lab's: `python -m tests.experiments.fast.real uneven --out FOLDER`.

The same world, scheduler, rate, draws and seeds, with vLLM, TRL and a run folder (or with the lab's engine under TRL:
`--engine tests.experiments.fast.engine:LabEngine`). Prints the published scores of both, seed by seed. Finished runs stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from polyphony.curricula.records import mean
from polyphony.curricula.transfer.halves import on_half
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.run.folder import RunFolder
from tests.experiments.fast.cell import StudyCell, run_cell
from tests.experiments.fast.loop import GROUP, LONGEST, POLICY, PROMPTS
from tests.experiments.fast.worlds import as_recipe
from tests.experiments.trials import Trials, over_seeds


def recipe_of(cell: StudyCell, *, engine: str, heldout: int) -> dict[str, Any]:
    """Return a cell as a recipe; evaluations as often, with one sample an item."""
    return {
        "name": cell.world,
        "model": str(POLICY),
        "domains": as_recipe(cell.world, cell.world_settings, heldout=heldout),
        "curriculum": dict(cell.settings),
        "eval": {"every": cell.every, "samples": 1, "kl_items": 0},
        "checkpoint": {"every": cell.draws, "keep": 1},
        "rollouts": {"engine": engine},
        "grpo": {
            "learning_rate": cell.rate,
            "lr_scheduler_type": "constant",
            "max_steps": cell.draws,
            "per_device_train_batch_size": PROMPTS * GROUP,
            "num_generations": GROUP,
            "max_completion_length": LONGEST,
            "bf16": False,
            "gradient_checkpointing": False,
        },
    }


def final_scores(folder: Path) -> dict[str, float]:
    """Return the published score of each domain at a finished run's last evaluation."""
    matrix = TransferMatrix.load(RunFolder(folder).transfer)
    last = on_half(matrix.rows[-1], matrix.items or {}, "report")
    return {name: last.mean_score(name) for name in last.scores}


def compare(cells: Mapping[str, Sequence[StudyCell]], out: Path, *, engine: str, heldout: int) -> list[str]:
    """Run the cells of each arm both ways; return a line a run and the mean difference of each arm."""
    lines = []
    for arm, of_arm in cells.items():
        apart: list[float] = []
        file = out / f"{arm}.yaml"
        file.write_text(yaml.safe_dump(recipe_of(of_arm[0], engine=engine, heldout=heldout), sort_keys=False))
        trials = Trials(recipe=file, arms={arm: ()}, out=out)
        for cell in of_arm:
            theirs, row = final_scores(trials.run(arm, cell.seed)), run_cell(cell, out)
            trained = row["trained"]
            ours = [mean([scores[name] for name in trained]) for scores in (row["scores"], theirs)]
            apart.append(ours[0] - ours[1])
            each = "  ".join(f"{name} {row['scores'][name]:.3f} {theirs[name]:.3f}" for name in theirs)
            lines.append(f"{arm} seed {cell.seed}: average {ours[0]:.3f} {ours[1]:.3f}; {each}")
            print(lines[-1], flush=True)
        found = over_seeds(apart)
        lines.append(f"{arm}: lab minus real {found.mid:+.3f} ({found.low:+.3f} to {found.high:+.3f})")
    return lines


def main() -> None:
    """Read the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world")
    parser.add_argument("--arms", default='{"joint": {"scheduler": "joint"}}', help="JSON: settings by name")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--draws", type=int, default=160)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--key", help="of a drawn world")
    parser.add_argument("--heldout", type=int, default=400, help="most held-out items of a domain in the real run")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cells = {
        arm: [
            StudyCell(
                world=given.world,
                arm=arm,
                settings=settings,
                rate=given.rate,
                seed=seed,
                draws=given.draws,
                every=given.every,
                world_settings={"key": given.key} if given.key else None,
            )
            for seed in given.seeds
        ]
        for arm, settings in json.loads(given.arms).items()
    }
    print("\n".join(compare(cells, given.out, engine=given.engine, heldout=given.heldout)[-len(cells) :]))


if __name__ == "__main__":
    main()
