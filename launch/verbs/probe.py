"""`polyphony probe`: train on each domain alone for a little while and see what that does to all the others.

K short runs and one joint run of the same total, each from the same starting weights, for every seed; and, where asked for,
K with shuffled rewards, and those of one seed at other learning rates. The file grows by one row a run, so a probe that is
killed goes on at the next run.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback

from polyphony.curricula.files import replace_file
from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.budget import next_domain, probed
from polyphony.curricula.transfer.halves import on_half
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.options import groups
from polyphony.curricula.transfer.planner import Solver
from polyphony.curricula.transfer.settled import is_settled
from polyphony.launch.build import build_trainer, check_probe, grpo_config, load_data
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.launch.verbs.arms import Arm, cost, other_rates, plan_arms, restricted
from polyphony.launch.verbs.claim import claim_probe
from polyphony.launch.verbs.experts import KeptExperts, keep_weights, taught
from polyphony.launch.verbs.rates import harm, proposal
from polyphony.rewards.registry import find_reward, version_of
from polyphony.trainer.checkpoints import save_final
from polyphony.trainer.engine.engine import Engine
from polyphony.trainer.evaluation.base_kl import BaseReference
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.trained import CheckWeights


def probe(recipe: Recipe, out: Path, *, engine: Engine | None = None, budget: int | None = None) -> Engine | None:
    """Run what the file in `out` does not hold yet; return the engine, so that a run of the same model can use it.

    With a `budget` at most so many domains are probed, chosen one after the other.
    """
    if recipe.algorithm in ("distil", "sft"):
        raise RecipeError(
            f"algorithm: {recipe.algorithm}: a probe trains each domain by its own reward; it needs algorithm grpo or rft"
        )
    names = [name for name, section in recipe.domains.items() if section.train is not None]
    if len(names) < 2:
        raise RecipeError(f"a probe compares domains: at least 2 need `train` rows, got {names}")
    if budget is not None and budget < 2:
        raise RecipeError(f"--budget: a probe compares domains, at least 2, got {budget}")
    check_probe(recipe)
    is_new = claim_probe(recipe, out)
    try:
        with RunFolder(out).locked(say=say):
            return Probe(recipe, out, engine).run(plan_arms(recipe, names), budget=budget)
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
        trained = tuple(name for name, section in recipe.domains.items() if section.train is not None)
        self.experts = KeptExperts(out=out, domains=trained)

    def _file(self, rate: float | None) -> Path:
        return RunFolder(self.out if rate is None else self.out / f"rate-{rate:g}").transfer

    def run(self, arms: list[Arm], *, budget: int | None = None) -> Engine | None:
        """Make every run that the files do not hold; each adds one row. With a budget, see `_chosen`."""
        if budget is None:
            self._all(arms)
        else:
            self._chosen(arms, budget)
        self._compare()
        shutil.rmtree(self.out / "scratch", ignore_errors=True)  # where the runs' trainers would have saved
        self._judge()
        return self.engine

    def _chosen(self, arms: list[Arm], budget: int) -> None:
        """Probe so many domains, the one that promises most next, until the plan no longer changes; where that are all, the
        other arms follow."""
        self._all([arm for arm in arms if not arm.trained])
        while left := set(self.experts.domains) - set(done := probed(self.matrices[None])):
            if len(done) >= budget or is_settled(self.matrices[None]):
                why = f"{len(done)} domains were probed" if len(done) >= budget else "the plan no longer changes"
                say(f"probe: {why}; {', '.join(sorted(left))} are left out, without --budget they follow")
                noted = {**self.matrices[None].provenance, "budget": budget}
                self.matrices[None] = replace(self.matrices[None], provenance=noted)
                self.matrices[None].save(self._file(None))
                return
            name = next_domain(self.matrices[None])
            say(f"probe: {name} is next")
            self._all([arm for arm in arms if arm.trained == (name,) and arm.rate is None])
            self._compare()
        self._all(arms)

    def _all(self, arms: list[Arm]) -> None:
        arms = [arm for arm in arms if arm.key not in self._held()]
        if arms:
            say(f"probe: {len(arms)} runs, {cost(self.recipe, arms, items=self._heldout_items())}")
        begun, done, total = time.monotonic(), 0, sum(arm.steps for arm in arms)
        for arm in arms:
            if arm.kind and (why := self._not_to_be_had(arm)):
                say(f"probe: seed {arm.seed}, {arm.label}: not measured, {why}")
                continue
            row = self._measure(arm)
            done += arm.steps
            left = f"  ({(time.monotonic() - begun) / done * (total - done):.0f} s left)" if 0 < done < total else ""
            say(f"probe: seed {arm.seed}, {arm.label}: {_scores(row)}{left}")

    def _held(self) -> set[tuple[Any, ...]]:
        """Return the keys of the arms that the files hold."""
        found = [(rate, row) for rate, matrix in self.matrices.items() for row in matrix.rows]
        return {
            (rate, r.trained, r.seed, r.placebo, r.arm.get("kind", ""), r.arm.get("method", "")) for rate, r in found
        }

    def _not_to_be_had(self, arm: Arm) -> str:
        """Return why an arm that builds on the probes cannot be; empty where it can."""
        if arm.kind in ("merge", "distil"):
            if missing := sorted(set(self.experts.domains) - set(self.experts.of(arm.seed))):
                return f"for no weights of {', '.join(missing)} were kept (probe.keep)"
            return self.experts.refused(arm.method) if arm.kind == "merge" else ""
        if missing := sorted(set(self.experts.domains) - set(probed(self.matrices[None]))):
            return f"for {', '.join(missing)} were not probed"
        size = len(self._stages(arm))
        if arm.kind == "groups" and size in (1, len(self.experts.domains)):
            return "for no two domains conflict: it would be mixing" if size == 1 else "for it would be the sequence"
        return ""

    def _stages(self, arm: Arm) -> list[list[str]]:
        """Return what an arm trains on one after the other: by the plan of the file, for all seeds alike."""
        held = [row.arm["stages"] for row in self.matrices[None].arms if row.arm["kind"] == arm.kind]
        if held:
            return held[0]
        solver = Solver(self.matrices[None].on("steer"))
        order = solver.order()
        stages = groups(solver.effects, order) if arm.kind == "groups" else [[name] for name in order]
        return [list(stage) for stage in stages]

    def _compare(self) -> None:
        """Note who shares parameters with whom, where weights were kept."""
        matrix = self.matrices.get(None)
        if self.recipe.probe.keep is None or matrix is None:
            return
        seeds = sorted({row.seed for row in matrix.probes})
        told = {a for a, of in matrix.shared.items() for a in (a, *of)}
        if set(probed(matrix)) <= told or len(self.experts.of(seeds[0]) if seeds else ()) < 2:
            return
        shared = self.experts.shared({seed: self._start(seed) for seed in seeds})
        self.matrices[None] = replace(matrix, shared=shared)
        self.matrices[None].save(self._file(None))

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
        if arm.kind == "merge":
            with self.experts.merged(arm.method, seed=arm.seed, start=start) as folder:
                return self._note(arm, start, self._train(arm, folder), {"kind": arm.kind, "method": arm.method})
        stages = self._stages(arm) if arm.kind in ("sequence", "groups") else []
        how = {"stages": stages} if stages else {"steps": arm.steps}
        trainer = self._train(arm, start, stages=stages)
        return self._note(arm, start, trainer, {"kind": arm.kind, **how} if arm.kind else {})

    def _note(self, arm: Arm, start: str, trainer: DomainGRPOTrainer, how: dict[str, Any]) -> Evaluation:
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
        row = replace(row, arm=how, tokens=trainer.draws.tokens if arm.trained else None)
        if self.recipe.probe.keep and len(arm.trained) == 1 and not arm.is_placebo and arm.rate is None:
            kept = self.experts.folder(arm.trained[0], arm.seed)
            keep_weights(trainer, arm, kept, start=start, of=self.recipe.model)
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

    def _train(self, arm: Arm, model: str, *, stages: Sequence[Sequence[str]] = ()) -> DomainGRPOTrainer:
        gc.collect()  # the optimizer of the run before
        recipe = restricted(self.recipe, arm, model, stages=stages)
        if arm.kind == "distil":
            recipe = taught(recipe, self.experts.of(arm.seed))
        trainer = build_trainer(recipe, self.out / "scratch", engine=self.engine)
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


def _scores(row: Evaluation) -> str:
    return "  ".join(f"{name} {row.mean_score(name):.3f}" for name in row.scores)
