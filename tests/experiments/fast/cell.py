"""One cell of a study: an arm in a world at a rate with a seed, run from the start to a row of results.

`probe` is the cell that measures transfer in a world at a rate, for the arms that plan by it: each domain alone, and the
start, as `polyphony probe` does without its joint run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from polyphony.curricula.declarations import as_settings
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import Evaluation, mean
from polyphony.curricula.schedulers import Scheduler, as_scheduler
from polyphony.curricula.schedulers.fixed import Joint
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.domains import DomainData
from tests.experiments.fast.exam import Course, Exam
from tests.experiments.fast.experts import Experts, Pupil, learn_by_heart, restricted
from tests.experiments.fast.loop import GROUP, PROMPTS, LabPolicy, LabRun, Tokens, load_world
from tests.experiments.fast.worlds import World, make_world

PROBE = "probe"
"""The arm that is none, and in an arm's settings what stands for the transfer file of its world and rate."""
SHOWN = 100
"""Published items of a domain that are scored on the way, and in comparisons of what was reached when."""
ENTROPIES = 60
"""Published items of a domain that are sampled for their entropy at the start and at the end."""
PROBED = 200
"""Items of a domain that decide in a probe; at most half of its held-out ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyCell:
    """What is run, in full: nothing else of a study changes its row.

    Example: `StudyCell(world="even", arm="joint", settings={"scheduler": "joint"}, rate=2e-4, seed=1)`
    """

    world: str
    arm: str
    settings: Mapping[str, Any]
    """Of the arm: the scheduler with its settings; `entropy`, `pool`, `decay`, `ahead` are the run's. `tokens`: of rollouts,
    after which it ends. `experts: distil` or `sft` is an arm of `experts.py`, `first` the share of its tokens that they
    get."""
    rate: float
    seed: int
    world_settings: Mapping[str, Any] | None = None
    draws: int = 160
    every: int = 20
    """Draws between evaluations."""
    share: float = 0.2
    """Completions of all evaluations that decide, relative to those that are trained on."""
    published: int = 600
    """Most published items of a domain."""

    @property
    def id(self) -> str:
        """Its name in a file of results."""
        return f"{self.world}/{self.arm}/{self.rate:g}/{self.seed}/{self.every}"

    @property
    def deciding(self) -> int:
        """Items of each domain that decide: what the share has room for, at one completion each."""
        evaluations = -(-self.draws // self.every)
        domains = len(make_world(self.world, self.world_settings))
        return max(2, int(self.share * self.draws * PROMPTS * GROUP / evaluations / domains))

    def probe_file(self, out: Path) -> Path:
        """Return where the transfer file of its world and rate is."""
        return out / "probes" / f"{self.world}-{self.rate:g}.json"


@lru_cache(maxsize=8)
def _exam(world: World, deciding: int, published: int) -> Exam:
    return Exam(load_world(world), deciding=deciding, published=published)


def run_cell(cell: StudyCell, out: Path) -> dict[str, Any]:
    """Run a cell and return its row; `out` has the transfer files."""
    began, wall = time.process_time(), time.monotonic()
    world = make_world(cell.world, cell.world_settings)
    row = _probe(cell, world, out) if cell.arm == PROBE else _run(cell, world, out)
    spent = {"seconds": round(time.process_time() - began, 1), "wall": round(time.monotonic() - wall, 1)}
    of_cell = {name: value for name, value in asdict(cell).items() if name != "world_settings"}
    return {"id": cell.id, **of_cell, **row, **spent}


def _run(cell: StudyCell, world: World, out: Path) -> dict[str, Any]:
    data, exam = load_world(world), _exam(world, cell.deciding, cell.published)
    start = exam.entropy(LabPolicy(data), most=ENTROPIES).entropy
    policy, row = _taught(cell, data) if "experts" in cell.settings else _course(cell, data, exam, out)
    marks = exam.publish(policy)
    end = exam.entropy(policy, most=ENTROPIES).entropy
    return {
        "trained": list(data.train),
        "scores": {name: round(mean(values), 5) for name, values in marks.scores.items()},
        "shown": {name: round(mean(values[:SHOWN]), 5) for name, values in marks.scores.items()},
        "entropy": {name: round(nats / start[name], 4) for name, nats in end.items() if start[name]},
        **row,
    }


def _course(cell: StudyCell, data: DomainData, exam: Exam, out: Path) -> tuple[LabPolicy, dict[str, Any]]:
    settings = dict(cell.settings)
    decay, pool, tokens, ahead = (settings.pop(key, None) for key in ("decay", "pool", "tokens", "ahead"))
    scheduler = make_scheduler(settings, data, cell.probe_file(out))
    run = LabRun(
        data=data,
        scheduler=scheduler,
        rate=cell.rate,
        draws=cell.draws,
        seed=cell.seed,
        decay=decay or 0.0,
        ahead=ahead or 0,
        pool=None if pool is None else as_settings(PoolSettings, pool),
    )
    course = Course(run=run, exam=exam, every=cell.every, shown=SHOWN, tokens=tokens or math.inf)
    course.finish()
    looks = [
        [look.draws, look.rollout_tokens, {n: round(s, 4) for n, s in look.scores.items()}] for look in course.looks
    ]
    return run.policy, {"drawn": dict(run.curriculum.drawn), "tokens": asdict(run.tokens), "looks": looks}


def _taught(cell: StudyCell, data: DomainData) -> tuple[LabPolicy, dict[str, Any]]:
    """Train experts and then one model by them, for so many rollout tokens in all."""
    how, budget = cell.settings["experts"], int(cell.settings["tokens"])
    experts = Experts.trained(data, rate=cell.rate, seed=cell.seed, tokens=int(cell.settings["first"] * budget))
    left, drawn = budget - experts.spent, dict.fromkeys(data.train, 0)
    if how == "sft":
        answers, spent = experts.answers(data, seed=cell.seed, tokens=left)
        policy = LabPolicy(data)
        policy.load(learn_by_heart(answers, rate=cell.rate, seed=cell.seed, steps=cell.draws // 2))
        drawn = {name: len(of) for name, of in answers.items()}
    else:
        teachers = {name: run.policy.decoder for name, run in experts.runs.items()}
        pupil = Pupil(data=data, scheduler=Joint(), rate=cell.rate, draws=cell.draws, seed=cell.seed, teachers=teachers)
        while pupil.tokens.rollout < left:
            pupil.advance()
        policy, spent, drawn = pupil.policy, pupil.tokens.rollout, dict(pupil.curriculum.drawn)
    tokens = asdict(Tokens(rollout=experts.spent + spent))
    return policy, {"drawn": drawn, "tokens": tokens | {"experts": experts.spent}, "looks": []}


RULES = {
    ("adaptive", "own"): "tests.experiments.fast.rules:OldAdaptive",
    ("polyphony.curricula.schedulers.adaptive:Adaptive", "own"): "tests.experiments.fast.rules:Patient",
    ("need", "own"): "tests.experiments.fast.rules:OwnCeiling",
    ("need", "one"): "tests.experiments.fast.rules:Wanting",
}
"""What a study calls a scheduler and the ceiling of its scores, and what it is called since; `product`: the one there is."""


def make_scheduler(settings: Mapping[str, Any], data: DomainData, probe_file: Path) -> Scheduler:
    """Return an arm's scheduler; `transfer: probe` is the file, `order: reversed` open-ended first, all backwards."""
    given = dict(settings)
    rule = given["scheduler"], given.pop("ceiling", "own")
    given["scheduler"] = RULES.get(rule, rule[0])
    entropy = as_settings(EntropySettings, given.pop("entropy", None))
    if given.get("transfer") == PROBE:
        given["transfer"] = TransferMatrix.load(probe_file)
    if given.get("order") == "reversed":
        trained = [d for d in data.domains if not d.is_watch_only]
        given["order"] = tuple(d.name for d in sorted(trained, key=lambda d: d.kind == "open_ended"))[::-1]
    return as_scheduler(given, entropy=entropy, domains=data.names)


def _probe(cell: StudyCell, world: World, out: Path) -> dict[str, Any]:
    data, exam = load_world(world), _exam(world, PROBED, 2)
    names = tuple(data.train)
    steps, seeds = int(cell.settings["steps"]), int(cell.settings["seeds"])
    rows, tokens = [], 0
    for seed in range(cell.seed, cell.seed + seeds):
        for trained in [(), *((name,) for name in names)]:
            arm = trained or names  # without training, all are there
            run = LabRun(data=restricted(data, arm), scheduler=Joint(), rate=cell.rate, draws=max(1, steps), seed=seed)
            for _ in range(steps if trained else 0):
                run.advance()
            marks = exam.decide(run.policy, seed=seed)
            tokens += run.tokens.rollout + marks.tokens
            rows.append(
                Evaluation(
                    trained=trained,
                    step=steps if trained else 0,
                    seed=seed,
                    scores=marks.scores,
                    entropy=marks.entropy,
                    exposure=dict(run.curriculum.drawn) if trained else {},
                    probe=True,
                )
            )
    matrix = TransferMatrix(
        domains=data.names,
        kinds={d.name: d.kind for d in data.domains},
        rows=tuple(rows),
        watch_only=tuple(d.name for d in data.domains if d.is_watch_only),
    )
    file = cell.probe_file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    matrix.save(file)
    return {"tokens": {"probe": tokens}}
