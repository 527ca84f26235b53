"""What a probe's kept weights are good for beyond themselves: merged, as teachers, and compared.

Kept are the weights that each domain alone ended with, of every seed (`probe.keep`): experts of one origin, so that a merge
of them is measured without any training.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from polyphony.curricula.files import replace_file
from polyphony.curricula.records import mean
from polyphony.curricula.transfer.checks import SHARED
from polyphony.launch.recipe import Recipe
from polyphony.launch.verbs.arms import Arm
from polyphony.trainer.checkpoints import save_final
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.merging.merge import merge
from polyphony.trainer.merging.settings import MergeSettings
from polyphony.trainer.merging.shared import shared_parameters
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.provenance import provenance
from polyphony.trainer.teachers.settings import TeacherSettings


def keep_weights(trainer: DomainGRPOTrainer, arm: Arm, folder: Path, *, start: str, of: str) -> None:
    """Save what a run ended with, whole or not at all: the adapter where one was trained on the recipe's model `of`, else
    the policy, an adapter merged into it.

    Beside it stands what it was: the domain, steps, seed and learning rate, what it started from, and a run's provenance.
    """
    about = {"trained": list(arm.trained), "steps": arm.steps, "seed": arm.seed, "start": start}
    about |= {"learning_rate": trainer.args.learning_rate}
    about |= provenance(model=start, tables=trainer.data.tables, rewards=trainer.scorer.rewards)
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        save_final(trainer.policy, Path(scratch) / "weights")
        adapter = Path(scratch) / "weights" / "adapter"
        kept = adapter if adapter.is_dir() and start == of else adapter.parent
        replace_file(RunFolder(kept).provenance, json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)  # of a probe that was killed before it noted the run
        kept.rename(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptExperts:
    """The experts in a probe's folder.

    Example: `KeptExperts(out=Path("runs/mine-probe"), domains=("math", "code")).of(1)`
    """

    out: Path
    domains: tuple[str, ...]

    def folder(self, domain: str, seed: int) -> Path:
        """Return where the weights of one are, once they are."""
        return self.out / "kept" / f"{domain}-{seed}"

    def of(self, seed: int) -> dict[str, str]:
        """Return the folders of those that there are, by domain."""
        return {name: str(path) for name in self.domains if (path := self.folder(name, seed)).is_dir()}

    def refused(self, method: str) -> str:
        """Return why the experts cannot be merged so; empty where they can."""
        try:
            MergeSettings(method=method).check(len(self.domains), has_base=True)  # type: ignore[arg-type]
        except ValueError as error:
            return str(error)
        return "" if find_spec("mergekit") else "for it needs mergekit: pip install 'polyphony-rl[merge]'"

    @contextmanager
    def merged(self, method: str, *, seed: int, start: str) -> Iterator[str]:
        """Make the folder of a merge, for as long as it is looked at: it can be made again from what is kept."""
        with tempfile.TemporaryDirectory(dir=self.out) as scratch:
            settings = MergeSettings(method=method)  # type: ignore[arg-type]  # the recipe has checked it
            yield str(merge(list(self.of(seed).values()), Path(scratch) / "merged", settings=settings, base=start))

    def shared(self, starts: Mapping[int, str]) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return what each two have in common, the mean over seeds, as the transfer file has it; `starts` by seed."""
        found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        for seed, start in starts.items():
            experts = self.of(seed)
            for pair in shared_parameters(experts, start) if len(experts) > 1 else ():
                told = tuple(getattr(pair, name) for name in SHARED)
                found.setdefault((pair.first, pair.second), []).append(told)
        table: dict[str, dict[str, dict[str, float | None]]] = {}
        for (first, second), told in found.items():
            means = [mean([value for value in values if not math.isnan(value)]) for values in zip(*told, strict=True)]
            table.setdefault(first, {})[second] = {
                name: None if math.isnan(value) else value for name, value in zip(SHARED, means, strict=True)
            }
        return table


def taught(recipe: Recipe, experts: Mapping[str, str]) -> Recipe:
    """Return the recipe of a pupil that learns each domain from its expert."""
    domains = {name: replace(s, teacher=name if name in experts else None) for name, s in recipe.domains.items()}
    teachers = {name: TeacherSettings(model=folder) for name, folder in experts.items()}
    return recipe.model_copy(update={"algorithm": "distil", "teachers": teachers, "domains": domains})
