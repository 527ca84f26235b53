"""`polyphony probe`: train on each domain alone for a little while and see what that does to all the others.

K short runs and one joint run of the same total, each from the same starting weights, for every seed; and, where asked for,
K with shuffled rewards, and those of one seed at other learning rates. The file grows by one row a run, so a probe that is
killed goes on at the next run.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers.trainer_callback import PrinterCallback

from polyphony.curricula.files import replace_file
from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.halves import on_half
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.build import build_trainer, check_probe, grpo_config, load_data
from polyphony.launch.recipe import Recipe, RecipeError, load_recipe
from polyphony.launch.verbs.arms import Arm, cost, other_rates, plan_arms, restricted
from polyphony.launch.verbs.rates import harm, proposal
from polyphony.rewards.registry import find_reward, version_of
from polyphony.trainer.checkpoints import save_final
from polyphony.trainer.engine.engine import Engine
from polyphony.trainer.evaluation.base_kl import BaseReference
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.run import say
from polyphony.trainer.run.callbacks import CheckWeights
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.provenance import provenance


def probe(recipe: Recipe, out: Path, *, engine: Engine | None = None) -> Engine | None:
    """Run what the file in `out` does not hold yet; return the engine, so that a run of the same model can use it."""
    if recipe.algorithm in ("distil", "sft"):
        raise RecipeError(
            f"algorithm: {recipe.algorithm}: a probe trains each domain by its own reward; it needs algorithm grpo or rft"
        )
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
        files = {rate: self._file(rate) for rate in (None, *other_rates(recipe))}
        self.matrices = {rate: TransferMatrix.load(file) for rate, file in files.items() if file.exists()}
        """By learning rate; None for the recipe's."""

    def _file(self, rate: float | None) -> Path:
        return RunFolder(self.out if rate is None else self.out / f"rate-{rate:g}").transfer

    def run(self, arms: list[Arm]) -> Engine | None:
        """Make every run that the files do not hold; each adds one row."""
        held = {(rate, r.trained, r.seed, r.placebo) for rate, matrix in self.matrices.items() for r in matrix.rows}
        arms = [arm for arm in arms if (arm.rate, arm.trained, arm.seed, arm.is_placebo) not in held]
        if arms:
            say(f"probe: {len(arms)} runs, {cost(self.recipe, arms, items=self._heldout_items())}")
        begun, done, total = time.monotonic(), 0, sum(arm.steps for arm in arms)
        for arm in arms:
            row = self._measure(arm)
            done += arm.steps
            left = f"  ({(time.monotonic() - begun) / done * (total - done):.0f} s left)" if 0 < done < total else ""
            say(f"probe: seed {arm.seed}, {arm.label}: {_scores(row)}{left}")
        shutil.rmtree(self.out / "scratch", ignore_errors=True)  # where the runs' trainers would have saved
        self._judge()
        return self.engine

    def _judge(self) -> None:
        """Say, and note in each file, what speaks against its learning rate."""
        own = grpo_config(self.recipe, self.out / "scratch").learning_rate
        harms = {}
        for rate, matrix in self.matrices.items():
            shown = own if rate is None else rate
            harms[shown] = found = harm(matrix)
            for line in found:
                say(f"probe: learning rate {shown:g} is too high: {line}")
            noted = {**matrix.provenance, "learning_rate": shown, "harm": found}
            if noted != matrix.provenance:
                self.matrices[rate] = replace(matrix, provenance=noted)
                self.matrices[rate].save(self._file(rate))
        if len(harms) > 1:
            say(f"probe: {proposal(harms)}")

    def _heldout_items(self) -> int:
        data = load_data(self.recipe, grpo_config(self.recipe, self.out / "scratch"))
        return sum(len(table) for table in data.heldout.values())

    def _measure(self, arm: Arm) -> Evaluation:
        """Train one run from the start, evaluate it, and add its row to the file; return what is published of it."""
        start = self._start(arm.seed)
        trainer = self._train(arm, start)
        before = self.out / f"base-{arm.seed}.json"
        if arm.trained and before.exists():  # older versions kept none
            trainer.evaluator.base = BaseReference.from_json(before.read_text())
        result = trainer.evaluator.run()
        if not arm.trained:
            replace_file(before, trainer.evaluator.remember_base().to_json())
        result.check_failures(most=self.recipe.rollouts.max_grader_failures)
        row = result.as_evaluation(
            trained=arm.trained,
            step=arm.steps,
            seed=arm.seed,
            exposure=dict(trainer.curriculum.drawn),
            probe=True,
            placebo=arm.is_placebo,
        )
        if self.recipe.probe.keep and len(arm.trained) == 1 and not arm.is_placebo and arm.rate is None:
            keep_weights(
                trainer, arm, self.out / "kept" / f"{arm.trained[0]}-{arm.seed}", start=start, of=self.recipe.model
            )
        matrix = self.matrices.get(arm.rate) or self._begun(arm)
        if matrix is not None and matrix.unsplit:  # begun by a version that kept no entropy item by item
            row = replace(row, entropy_items={}, kl_items={})
        matrix = self._first(row, result.items) if matrix is None else matrix.with_row(row)
        matrix.save(self._file(arm.rate))
        self.matrices[arm.rate] = matrix
        return on_half(row, result.items, "report")

    def _begun(self, arm: Arm) -> TransferMatrix | None:
        """Return the matrix of another learning rate before its first run: the start, which is the same."""
        if arm.rate is None:
            return None
        whole = self.matrices[None]
        return replace(whole, rows=tuple(row for row in whole.rows if not row.trained and row.seed == arm.seed))

    def _train(self, arm: Arm, model: str) -> DomainGRPOTrainer:
        gc.collect()  # the optimizer of the run before
        trainer = build_trainer(restricted(self.recipe, arm, model), self.out / "scratch", engine=self.engine)
        trainer.remove_callback(PrinterCallback)
        trainer.draws.is_placebo = arm.is_placebo
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
                "graders": {
                    name: version_of(find_reward(section.reward))
                    for name, section in domains.items()
                    if section.reward is not None
                },
            },
        )


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


def _scores(row: Evaluation) -> str:
    return "  ".join(f"{name} {row.mean_score(name):.3f}" for name in row.scores)
