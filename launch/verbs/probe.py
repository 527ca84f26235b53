"""`polyphony probe`: train on each domain alone for a little while and see what that does to all the others.

K short runs and one joint run of the same total, each from the same starting weights, for every seed. The file grows by one
row a run, so a probe that is killed goes on at the next run.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.trainer_callback import PrinterCallback

from polyphony.curricula.files import replace_file
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.halves import on_half
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.build import build_trainer, check_probe, grpo_config, load_data
from polyphony.launch.recipe import Recipe, RecipeError, load_recipe
from polyphony.launch.sections import CurriculumSection
from polyphony.rewards.registry import find_reward, version_of
from polyphony.trainer.engine.engine import Engine
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.run import say
from polyphony.trainer.run.callbacks import CheckWeights
from polyphony.trainer.run.folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One short run from the start: on one domain, or on all of them; `trained` empty measures the start itself."""

    trained: tuple[str, ...]
    steps: int
    seed: int

    @property
    def label(self) -> str:
        if not self.trained:
            return "start"
        return self.trained[0] if len(self.trained) == 1 else "joint"


def probe(recipe: Recipe, out: Path, *, engine: Engine | None = None) -> Engine | None:
    """Run what the file in `out` does not hold yet; return the engine, so that a run of the same model can use it."""
    names = [name for name, section in recipe.domains.items() if section.train is not None]
    if len(names) < 2:
        raise RecipeError(f"a probe compares domains: at least 2 need `train` rows, got {names}")
    check_probe(recipe)
    is_new = claim_probe(recipe, out)
    try:
        with RunFolder(out).locked(say=say):
            return Probe(recipe, out, engine).run(plan_arms(recipe, names))
    except RecipeError:
        if is_new and not RunFolder(out).transfer.exists():
            shutil.rmtree(out)  # nothing was measured: the corrected recipe finds the name free
        raise


class Probe:
    """The runs of one probe, one after the other, through one engine."""

    def __init__(self, recipe: Recipe, out: Path, engine: Engine | None) -> None:
        self.recipe = recipe
        self.out = out
        self.engine = engine
        self.is_checked = False
        """Whether the engine was shown to follow the weights; if it did not, every transfer would be nil."""
        self.file = RunFolder(out).transfer
        self.matrix = TransferMatrix.load(self.file) if self.file.exists() else None

    def run(self, arms: list[Arm]) -> Engine | None:
        """Make every run that the file does not hold; each adds one row."""
        rows = self.matrix.rows if self.matrix is not None else ()
        held = {(row.trained, row.seed) for row in rows}
        arms = [arm for arm in arms if (arm.trained, arm.seed) not in held]
        if arms:
            say(f"probe: {len(arms)} runs, {cost(self.recipe, arms, items=self._heldout_items())}")
        begun, done, total = time.monotonic(), 0, sum(arm.steps for arm in arms)
        for arm in arms:
            row = self._measure(arm)
            done += arm.steps
            left = f"  ({(time.monotonic() - begun) / done * (total - done):.0f} s left)" if 0 < done < total else ""
            say(f"probe: seed {arm.seed}, {arm.label}: {_scores(row)}{left}")
        shutil.rmtree(self.out / "scratch", ignore_errors=True)  # where the runs' trainers would have saved
        return self.engine

    def _heldout_items(self) -> int:
        data = load_data(self.recipe, grpo_config(self.recipe, self.out / "scratch"))
        return sum(len(table) for table in data.heldout.values())

    def _measure(self, arm: Arm) -> Evaluation:
        """Train one run from the start, evaluate it, and add its row to the file; return what is published of it."""
        trainer = self._train(arm, self._start(arm.seed))
        result = trainer.evaluator.run()
        result.check_failures(most=self.recipe.rollouts.max_grader_failures)
        row = result.as_evaluation(
            trained=arm.trained, step=arm.steps, seed=arm.seed, exposure=dict(trainer.curriculum.drawn), probe=True
        )
        if self.matrix is not None and self.matrix.unsplit:  # begun by a version that kept no entropy item by item
            row = replace(row, entropy_items={}, kl_items={})
        self.matrix = self._first(row, result.items) if self.matrix is None else self.matrix.with_row(row)
        self.matrix.save(self.file)
        return on_half(row, result.items, "report")

    def _train(self, arm: Arm, model: str) -> DomainGRPOTrainer:
        gc.collect()  # the optimizer of the run before
        trainer = build_trainer(restricted(self.recipe, arm, model), self.out / "scratch", engine=self.engine)
        trainer.remove_callback(PrinterCallback)
        self.engine = trainer.policy.engine
        if arm.steps and not self.is_checked:
            trainer.add_callback(CheckWeights(trainer.policy.check))
            self.is_checked = True
        if arm.steps:
            trainer.train()
        return trainer

    def _start(self, seed: int) -> str:
        """Return where a seed's runs start; the jointly warmed policy is made once a seed and kept beside the file."""
        start = self.recipe.probe.start
        if start == "base":
            return self.recipe.model
        if not start.startswith("joint:"):
            return start
        folder = self.out / f"start-{seed}"
        if not folder.is_dir():
            names = tuple(name for name, section in self.recipe.domains.items() if section.train is not None)
            trainer = self._train(
                Arm(trained=names, steps=int(start.removeprefix("joint:")), seed=seed), self.recipe.model
            )
            from polyphony.trainer.checkpoints import save_final  # slow to import

            with tempfile.TemporaryDirectory(dir=self.out) as scratch:
                save_final(trainer.policy, Path(scratch) / "weights")
                (Path(scratch) / "weights").rename(folder)
        return str(folder)

    def _first(self, row: Evaluation, items: Mapping[str, tuple[str, ...]]) -> TransferMatrix:
        domains = self.recipe.domains
        return TransferMatrix(
            domains=tuple(domains),
            kinds={name: section.kind for name, section in domains.items()},
            rows=(row,),
            items=dict(items),
            watch_only=tuple(name for name, section in domains.items() if section.train is None),
            provenance={
                "probe": self.recipe.model_dump(by_alias=True)["probe"],
                "model": self.recipe.model,
                "graders": {name: version_of(find_reward(section.reward)) for name, section in domains.items()},
            },
        )


def claim_probe(recipe: Recipe, out: Path) -> bool:
    """Make the probe's folder and return True, or check that what it holds is of the same recipe."""
    folder = RunFolder(out)
    saved = folder.recipe
    if saved.is_file():
        if load_recipe(saved) != recipe:
            raise RecipeError(f"{out} holds a probe of another recipe; choose another --out")
        return False
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"folder {out} is not empty and holds no probe; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(saved, recipe.as_yaml())
    except OSError as error:
        raise RecipeError(f"folder {out} cannot be written: {error.strerror}") from error
    return True


def plan_arms(recipe: Recipe, names: list[str]) -> list[Arm]:
    """Return every run of the probe: per seed the start, each domain alone, and all domains for the same total."""
    base_seed = int(recipe.grpo.get("seed", 42))
    arms = []
    for seed in range(base_seed, base_seed + recipe.probe.seeds):
        arms.append(Arm(trained=(), steps=0, seed=seed))
        arms.extend(Arm(trained=(name,), steps=recipe.probe.steps, seed=seed) for name in names)
        if recipe.probe.joint_arm:
            arms.append(Arm(trained=tuple(names), steps=recipe.probe.steps * len(names), seed=seed))
    return arms


def cost(recipe: Recipe, arms: list[Arm], *, items: int) -> str:
    """Return an upper bound of what the runs will generate, in words; `items` are held out, in all domains together."""
    grpo = recipe.grpo
    batch = int(grpo.get("per_device_train_batch_size", 8)) * int(grpo.get("gradient_accumulation_steps", 1))
    lengths = [domain.max_completion_length or 0 for domain in recipe.domains.values()]
    length = max(int(grpo.get("max_completion_length", 256)), *lengths)
    steps = sum(arm.steps for arm in arms)
    if recipe.probe.start.startswith("joint:"):
        steps += int(recipe.probe.start.removeprefix("joint:")) * len({arm.seed for arm in arms})
    trained = steps * max(batch, int(grpo.get("generation_batch_size") or batch)) * length
    samples = recipe.eval.samples + int(recipe.eval.greedy)
    evaluated = len(arms) * items * samples * length
    return (
        f"{steps} optimizer steps and {len(arms)} evaluations: "
        f"at most {trained / 1e6:.2g} million rollout tokens to train on, "
        f"and {evaluated / 1e6:.2g} million to evaluate {items} held-out items, {samples} times each"
    )


def restricted(recipe: Recipe, arm: Arm, model: str) -> Recipe:
    """Return the recipe of one run: the other domains are only watched; shares are equal, whatever the scheduler.

    Entropy is not controlled, and no prompt is known from before: what training does by itself is what a probe measures.
    """
    domains = {
        name: section if name in arm.trained or not arm.trained else replace(section, train=None)
        for name, section in recipe.domains.items()
    }
    grpo = {**recipe.grpo, "max_steps": max(arm.steps, 1), "seed": arm.seed, "save_strategy": "no"}
    pool = recipe.pool and replace(recipe.pool, start=None)
    plain = {"curriculum": CurriculumSection(scheduler="joint"), "entropy": EntropySettings(), "pool": pool}
    return recipe.model_copy(update={"domains": domains, "model": model, "grpo": grpo, **plain})


def _scores(row: Evaluation) -> str:
    return "  ".join(f"{name} {row.mean_score(name):.3f}" for name in row.scores)
