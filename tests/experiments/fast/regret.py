"""What a plan's recommendation gains in drawn worlds: every option is trained and measured, the plan knows its probes.

    python -m tests.experiments.fast.regret --out FOLDER --key KEY --worlds 6 --tokens 75000 --minutes 60

In each world, drawn by KEY and its number: probes of every domain alone with their joint run, groups, merges and a pupil,
of two seeds, a quarter as long, scored on the half that decides; the plan of that file; then mixing, the planned order, its
groups, merges of experts by both methods and a pupil of experts, each trained for so many rollout tokens in all, its experts
among them, and scored on the published half. Mixing is trained once more with what a plan has cost on top: the tokens of all
probes and of their evaluations. No coefficient is searched, as no plan recommends one. Prints, world by world, each option's
mean score over trained domains and the recommended one; then the regret of the recommended option, and of mixing with the
plan's tokens, against the best option measured, with 95 % t-intervals over worlds.

With `--long 10 20` nothing but the plan is measured, in longer runs: ten and twenty times as many tokens, of which its
probes take their part, trained in the way that the plan recommends, against always mixing on all of them.

Results are lines in FOLDER/regret.jsonl, one a world and option; what is there is not run again. Of numbers that go with
worlds that were looked at while this was written nothing may be claimed: choose a fresh KEY.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from polyphony.curricula.records import Evaluation, mean
from polyphony.curricula.schedulers.fixed import Joint
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.options import PUPIL, groups
from polyphony.curricula.transfer.planner import Plan, Solver, make_plan
from polyphony.trainer.merging.methods import merge_tensor
from polyphony.trainer.merging.settings import MergeSettings
from polyphony.trainer.run import say
from tests.experiments.fast.decoder import Decoder
from tests.experiments.fast.exam import Exam
from tests.experiments.fast.experts import Pupil, restricted
from tests.experiments.fast.loop import LabPolicy, LabRun, Learner, Weights, base, load_world
from tests.experiments.fast.worlds import make_world
from tests.experiments.trials import over_seeds

RATE, SEEDS, PROBE = 2e-4, (11, 12), 0.25
"""Learning rate and seeds of probes, and the length of one relative to an expert that is trained in earnest."""
METHODS = ("linear", "ties")
OPTIONS = ("sequence", "groups", *METHODS, "distil")
DECIDING, PUBLISHED = 200, 600
FINAL_SEED = 101
FILE = "regret.jsonl"


@dataclass(kw_only=True)
class RegretWorld:
    """One drawn world, trained in every way.

    Example: `RegretWorld(key="a/0", tokens=75_000).probe(Path("a.part.json")).rows`
    """

    key: str
    tokens: int
    spent: float = 0.0
    """Rollout tokens of the last thing trained."""
    matrix: TransferMatrix | None = None
    _experts: dict[tuple[float, int], tuple[dict[str, Weights], float]] = field(default_factory=dict)

    @cached_property
    def data(self):
        """The world's rows."""
        return load_world(make_world("drawn", {"key": self.key}))

    @cached_property
    def exam(self) -> Exam:
        """Its held-out items."""
        return Exam(self.data, deciding=DECIDING, published=PUBLISHED)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.data.train)

    # --- ways to one model --------------------------------------------------------------------------------------------

    def staged(self, stages: Sequence[Sequence[str]], tokens: float, seed: int, *, spent: float = 0.0) -> Weights:
        """Train stage after stage with one optimizer, each for its share of the tokens, of which `spent` are gone."""
        learner, size = Learner(base()[0], rate=RATE), sum(map(len, stages))
        bound, begun = 0.0, spent
        for stage in stages:
            run = LabRun(data=restricted(self.data, tuple(stage)), scheduler=Joint(), rate=RATE, draws=1, seed=seed)
            run.learner = learner
            run.policy.load(learner.weights)
            bound += tokens * len(stage) / size
            while spent + run.tokens.rollout < bound:  # what a stage had too many of, the next has less
                run.advance()
            spent += run.tokens.rollout
        self.spent = spent - begun
        return learner.weights

    def experts(self, tokens: float, seed: int) -> dict[str, Weights]:
        """Train one a domain, each from the start, for an equal part of the tokens."""
        if (known := self._experts.get((tokens, seed))) is None:
            found, spent = {}, 0.0
            for n, name in enumerate(self.names, 1):
                found[name] = self.staged([[name]], tokens * n / len(self.names), seed, spent=spent)
                spent += self.spent
            known = self._experts[tokens, seed] = found, spent
        self.spent = known[1]
        return known[0]

    def merged(self, experts: Mapping[str, Weights], method: str) -> Weights:
        """Merge experts tensor by tensor as `polyphony merge` does."""
        start, settings = base()[0], MergeSettings(method=method)  # type: ignore[arg-type]
        return {
            name: merge_tensor([weights[name].clone() for weights in experts.values()], zero, settings)
            for name, zero in start.items()
        }

    def pupil(self, experts: Mapping[str, Weights], tokens: float, seed: int) -> Weights:
        """Distil experts into one model."""
        config = base()[1]
        teachers = {name: Decoder(weights, config) for name, weights in experts.items()}
        run = Pupil(data=self.data, scheduler=Joint(), rate=RATE, draws=1, seed=seed, teachers=teachers)
        while run.tokens.rollout < tokens:
            run.advance()
        self.spent = run.tokens.rollout
        return run.learner.weights

    # --- probes and options -------------------------------------------------------------------------------------------

    def probe(self, kept: Path) -> TransferMatrix:
        """Return all rows of a probe with every arm; those of each seed are kept in a file until all are there."""
        whole = PROBE * self.tokens
        self.matrix = TransferMatrix.load(kept) if kept.exists() else None
        done = {row.seed for row in self.matrix.rows} if self.matrix else set()
        for seed in (seed for seed in SEEDS if seed not in done):
            self._add(base()[0], (), seed, tokens=0)
            experts = self.experts(whole, seed)
            for name, weights in experts.items():
                self._add(weights, (name,), seed, tokens=self.spent / len(experts))
            self._add(self.staged([self.names], whole, seed), self.names, seed)
            for method in METHODS:
                merged = self.merged(experts, method)
                self._add(merged, self.names, seed, {"kind": "merge", "method": method}, tokens=0)
            self._add(self.pupil(experts, PUPIL * whole, seed), self.names, seed, {"kind": "distil"})
            assert self.matrix is not None
            self.matrix.save(kept)
        assert self.matrix is not None
        stages = _stages(self.matrix)
        if 1 < len(stages) < len(self.names):
            for seed in SEEDS:
                how = {"kind": "groups", "stages": stages}
                self._add(self.staged(stages, whole, seed), self.names, seed, how)
        return self.matrix

    def _add(
        self, weights: Weights, trained: tuple[str, ...], seed: int, arm: Mapping[str, Any] | None = None, **given: Any
    ) -> None:
        marks = self.exam.decide(self.policy(weights), seed=seed)
        row = Evaluation(
            trained=trained,
            step=(len(trained) if not arm else len(self.names)),
            seed=seed,
            scores=marks.scores,
            entropy=marks.entropy,
            probe=True,
            arm=arm or {},
            tokens=round(given.get("tokens", self.spent)) + marks.tokens,
        )
        if self.matrix is not None:
            self.matrix = self.matrix.with_row(row)
            return
        domains = self.data.domains
        self.matrix = TransferMatrix(
            domains=self.data.names,
            kinds={d.name: d.kind for d in domains},
            rows=(row,),
            watch_only=tuple(d.name for d in domains if d.is_watch_only),
        )

    def policy(self, weights: Weights) -> LabPolicy:
        """Return what answers with these weights."""
        policy = LabPolicy(self.data)
        policy.load(weights)
        return policy

    def train(self, what: str, plan: Plan, probes: int) -> Weights | None:
        """Train an option for all tokens, its experts included; None where it is another one under a second name."""
        how = next((dict(o.how) for o in plan.options if o.kind == what), {})
        tokens, seed = self.tokens, FINAL_SEED
        if what in ("mix", "mix_charged"):
            return self.staged([self.names], tokens + (probes if what == "mix_charged" else 0), seed)
        if what in ("sequence", "groups"):
            stages = how.get("stages")
            return self.staged(stages, tokens, seed) if stages else None
        share = 1 / (1 + PUPIL) if what == "distil" else 1.0
        experts = self.experts(share * tokens, seed)
        if what in METHODS:
            return self.merged(experts, what)
        spent = self.spent
        weights = self.pupil(experts, tokens - spent, seed)
        self.spent += spent
        return weights

    def mixed(self, points: Sequence[float]) -> dict[float, Mapping[str, float]]:
        """Mix on and on; return the published scores by domain at each of the rollout tokens in `points`."""
        run = LabRun(data=self.data, scheduler=Joint(), rate=RATE, draws=1, seed=FINAL_SEED)
        found = {}
        for point in sorted(points):
            while run.tokens.rollout < point:
                run.advance()
            found[point] = self.published(run.learner.weights)
        return found

    def published(self, weights: Weights) -> dict[str, float]:
        """Return the mean published score of each domain."""
        return {name: mean(values) for name, values in self.exam.publish(self.policy(weights)).scores.items()}

    def value(self, scores: Mapping[str, float]) -> float:
        """Return the mean over the trained domains."""
        return mean([scores[name] for name in self.names])


def _stages(matrix: TransferMatrix) -> list[list[str]]:
    solver = Solver(matrix)
    return [list(stage) for stage in groups(solver.effects, solver.order())]


class RegretFile:
    """Lines of results.

    Example: `RegretFile(Path("regret.jsonl")).get("a/0", "mix")`
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = [json.loads(line) for line in file.open()] if file.exists() else []

    def get(self, world: str, what: str) -> dict[str, Any] | None:
        """Return the row of a world and option; None before it was run."""
        return next((row for row in self.rows if (row["world"], row["what"]) == (world, what)), None)

    def made(self, world: str, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row, made and written down where it is not there."""
        if (found := self.get(world, what)) is not None:
            return found
        began = time.process_time()
        row = {"world": world, "what": what, **make(), "seconds": round(time.process_time() - began)}
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say(f"{world} {what}: {row.get('value')} ({row['seconds']} s)")
        return row


def run_world(world: RegretWorld, file: RegretFile, out: Path, *, until: float, long: Sequence[int] = ()) -> bool:
    """Run what the file does not hold of a world; return whether all of it is there."""
    if (
        long
        and (known := file.get(world.key, "plan"))
        and file.get(world.key, "long")
        and known["recommended"] == "mix"
    ):
        return True
    saved = out / f"{world.key.replace('/', '-')}.json"
    if not saved.exists():
        kept = saved.with_suffix(".part.json")
        world.probe(kept).save(saved)
        kept.unlink()
    matrix = TransferMatrix.load(saved)
    probes = sum(row.tokens or 0 for row in matrix.rows)
    plan = make_plan(matrix)
    best = plan.options[0]
    mine = {"recommended": best.how.get("method", best.kind), "probes": probes}
    mine |= {"options": [option.as_json() for option in plan.options]}
    file.made(world.key, "plan", lambda: mine)
    if long:
        return _run_long(world, file, plan, probes, long, until=until)

    def measured(what: str) -> dict[str, Any]:
        weights = world.train(what, plan, probes)
        if weights is None:
            return {"value": None, "tokens": 0}
        scores = world.published(weights)
        return {"value": world.value(scores), "scores": scores, "tokens": world.spent}

    for what in ("mix", "mix_charged", *OPTIONS):
        if time.monotonic() > until:
            return False
        file.made(world.key, what, lambda what=what: measured(what))
    return True


def _run_long(
    world: RegretWorld, file: RegretFile, plan: Plan, probes: int, long: Sequence[int], *, until: float
) -> bool:
    """Mix for `long` times the tokens, and, where the plan recommends another way, train in that for what it leaves."""
    if time.monotonic() > until:
        return False
    tokens, best = world.tokens, plan.options[0]
    points = {f"{what}_{n}": n * tokens - less for n in long for what, less in (("mix", 0), ("mix_less", probes))}

    def mixed() -> dict[str, Any]:
        found = world.mixed([*points.values()])
        scores = {what: found[point] for what, point in points.items()}
        return {"values": {what: world.value(of) for what, of in scores.items()}, "scores": scores}

    file.made(world.key, "long", mixed)
    for n in long if best.kind != "mix" else ():
        other = RegretWorld(key=world.key, tokens=n * tokens - probes)

        def recommended(other: RegretWorld = other) -> dict[str, Any]:
            weights = other.train(best.how.get("method", best.kind), plan, probes)
            assert weights is not None
            return {"value": other.value(other.published(weights)), "tokens": other.spent}

        file.made(world.key, f"recommended_{n}", recommended)
    return True


def long_report(file: RegretFile, keys: Sequence[str], long: Sequence[int]) -> str:
    """Return, a length, each world's plan against always mixing, and the mean difference."""
    lines = []
    for n in long:
        gaps, told = [], []
        for key in keys:
            plan, mixed = file.get(key, "plan"), file.get(key, "long")
            if plan is None or mixed is None:
                continue
            other = file.get(key, f"recommended_{n}")
            mine = mixed["values"][f"mix_less_{n}"] if plan["recommended"] == "mix" else (other or {}).get("value")
            if mine is not None:
                gaps.append(mine - mixed["values"][f"mix_{n}"])
                told.append(f"{plan['recommended']} {mine:.3f} for {mixed['values'][f'mix_{n}']:.3f}")
        if gaps:
            low, mid, high = over_seeds(gaps)
            lines += [
                f"{n} times: {'; '.join(told)}",
                f"plan, charged, minus always mixing: {mid:+.4f} ({low:+.4f} to {high:+.4f})",
            ]
    return "\n".join(lines)


def report(file: RegretFile, keys: Sequence[str]) -> str:
    """Return the table over the worlds that are through."""
    lines, regrets, mixed, plain = [], [], [], []
    for key in keys:
        rows = {what: file.get(key, what) for what in ("plan", "mix", "mix_charged", *OPTIONS)}
        if any(row is None for row in rows.values()):
            continue
        values = {
            what: row["value"] for what, row in rows.items() if row and what != "plan" and row["value"] is not None
        }
        chosen = (rows["plan"] or {})["recommended"]
        best = max(value for what, value in values.items() if what != "mix_charged")
        regrets.append(best - values[chosen])
        mixed.append(best - values["mix_charged"])
        plain.append(best - values["mix"])
        told = "  ".join(f"{what} {value:.3f}" for what, value in values.items())
        lines.append(f"{key}: {told}; recommended {chosen}, regret {regrets[-1]:.3f}, mixing's {mixed[-1]:.3f}")
    if regrets:
        pairs = [a - b for a, b in zip(regrets, mixed, strict=True)]
        told = {
            "recommended": regrets,
            "always mix": mixed,
            "difference": pairs,
            "mix without the plan's tokens": plain,
        }
        for name, found in told.items():
            low, mid, high = over_seeds(found)
            lines.append(f"regret {name}: {mid:+.4f} ({low:+.4f} to {high:+.4f}) over {len(found)} worlds")
    return "\n".join(lines)


def _through(world: RegretWorld, *, out: Path, until: float, long: Sequence[int]) -> bool:
    return time.monotonic() < until and run_world(world, RegretFile(out / FILE), out, until=until, long=long)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments, run as far as the time goes, print; 1 where something is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--key", required=True, help="decides the worlds")
    parser.add_argument("--worlds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=75_000, help="rollout tokens of every option")
    parser.add_argument("--long", type=int, nargs="*", default=(), help="lengths of runs that probes are small beside")
    parser.add_argument("--jobs", type=int, default=2, help="worlds at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * arguments.minutes
    keys = [f"{arguments.key}/{n}" for n in range(arguments.worlds)]
    worlds = [RegretWorld(key=key, tokens=arguments.tokens) for key in keys]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        done = list(pool.map(partial(_through, out=arguments.out, until=until, long=arguments.long), worlds))
    file = RegretFile(arguments.out / FILE)
    print(long_report(file, keys, arguments.long) if arguments.long else report(file, keys))
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
