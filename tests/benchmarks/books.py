"""The books of a long run: what an evaluation costs late in it, how large ledgers grow, how fast they are read."""

from __future__ import annotations

import gc
import hashlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.files import replace_file
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import Domain, Group, Prompt
from polyphony.curricula.schedulers import build_scheduler
from polyphony.launch.measures.result import Result, Target, Timing, repeated, timed
from polyphony.launch.report.report import write_report
from polyphony.launch.verbs.plan import replay_run
from polyphony.trainer.checkpoints import load_ledgers, save_ledgers
from polyphony.trainer.evaluation.answers import Answer
from polyphony.trainer.evaluation.result import HeldoutResult
from polyphony.trainer.run.folder import STATE_FILE, RunFolder
from polyphony.trainer.run.recorder import Recorder
from polyphony.trainer.settings import EvaluationSettings

MB = 2**20
BATCH = 512
"""Prompts a draw of a hundred domains: five of each."""
SAMPLES = EvaluationSettings().samples
RECIPE = """\
name: books
model: launch/lab/policy
algorithm: grpo
domains:
{domains}
curriculum: {{scheduler: {scheduler}}}
grpo: {{max_steps: {steps}, seed: 0}}
"""
"""Of a run that was never trained: its data files need not exist."""


def bench_books(*, short: bool = False) -> list[Result]:
    """Measure evaluations late in a run, a million prompts in a hundred domains, and a hundred thousand draws."""
    gc.collect()
    # what the imports left, a million objects, is not looked through in the middle of a measurement; it stays frozen, for
    # among it may be an engine that another in this process has replaced: vLLM's would end that one when it is collected
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        found = _evaluations(Path(folder), *((2, 40, 5) if short else (20, 500, 100)))
        found += _prompts(Path(folder), *((4, 400, 10) if short else (100, 1_000_000, 200)))
        for scheduler in ("joint", "adaptive"):
            found += _draws(Path(folder), scheduler, *((2, 40) if short else (20, 100_000)))
    return found


def _within(name: str, unit: str, values: list[float] | list[Timing], limit: float, note: str = "") -> Result:
    """Hold a value to its limit; of time, the processor's, which others on the machine disturb least."""
    held = [value.cpu if isinstance(value, Timing) else value for value in values]
    return repeated(name, unit, held, target=Target(relation="<=", limit=limit), note=note)


# --- evaluations ------------------------------------------------------------------------------------------------------


def _evaluations(folder: Path, domains: int, items: int, evaluations: int) -> list[Result]:
    """Compare an evaluation with its row, its checkpoint and the restore of that checkpoint, early and late."""
    first = [_book(folder / f"warm-{n}", domains, items, [1])[0] for n in range(4)][1:]
    late = _book(folder / "late", domains, items, range(evaluations, evaluations + 3))
    last = folder / "late" / f"checkpoint-{evaluations + 2}" / STATE_FILE
    ratio = statistics.median(t.cpu for t in late) / statistics.median(t.cpu for t in first)
    note = f"processor time of number {evaluations} over the first; row, checkpoint and restore"
    return [
        repeated("books_evaluation_1", "s", first),
        repeated(f"books_evaluation_{evaluations}", "s", late),
        _within("books_evaluation_growth", "x", [ratio], 1.2, note),
        _within("books_state_file", "MB", [last.stat().st_size / MB], 1),
    ]


def _book(folder: Path, domains: int, items: int, measured: list[int] | range) -> list[Timing]:
    """Return what the `measured` evaluations of a run took, counted from 1."""
    ours = _recorder(folder, domains)
    rng = np.random.default_rng(0)
    found = []
    for n in range(1, max(measured) + 1):
        if n > 1:
            ours.curriculum.draw(64)
        result = _result(ours.curriculum.names, items, rng, samples=SAMPLES if n in measured else 1)
        if n in measured:
            found.append(timed(lambda n=n, result=result: _book_one(ours, n, result)))
        else:
            ours.record_heldout(n, result)
    return found


def _book_one(ours: Recorder, n: int, result: HeldoutResult) -> None:
    """Write an evaluation down, save a checkpoint, and restore another run from it."""
    ours.record_heldout(n, result)
    checkpoint = ours.folder.path / f"checkpoint-{n}"
    checkpoint.mkdir()
    ours.save()
    save_ledgers(checkpoint, ours.curriculum)
    again = _recorder(ours.folder.path, len(ours.domains))
    again.restore(n)
    load_ledgers(checkpoint, again.curriculum)
    assert len(again.curriculum.evaluations) == n


def _recorder(folder: Path, domains: int, *, prompts: int = 64) -> Recorder:
    folder.mkdir(exist_ok=True)
    names = [f"domain{k}" for k in range(domains)]
    trained = tuple(Domain(name=name, kind="structured", train=[0]) for name in names)
    ids = {name: [_content_hash(f"{name}/{n}") for n in range(prompts)] for name in names}
    curriculum = Curriculum(domains=trained, prompts=ids, scheduler=build_scheduler("joint"), total_draws=1000)
    return Recorder(folder=RunFolder(folder), domains=trained, curriculum=curriculum, seed=0)


def _result(names: tuple[str, ...], items: int, rng: np.random.Generator, *, samples: int = 1) -> HeldoutResult:
    """Return an evaluation with entropies, confidences and the distance to the base model of 64 items a domain."""
    ids = {name: tuple(_content_hash(f"{name}/heldout/{n}") for n in range(items)) for name in names}
    scores = {name: (rng.random((items, samples)) < 0.5).astype(float).tolist() for name in names}
    nats = {name: [(float(v), 50) for v in rng.gamma(4.0, 8.0, items)] for name in names}
    kl = {name: dict(zip(ids[name][:64], nats[name], strict=False)) for name in names}
    return HeldoutResult(
        items=ids,
        samples={name: tuple(map(tuple, scores[name])) for name in names},
        entropy={name: sum(v for v, _ in nats[name]) / (50 * items) for name in names},
        item_entropy={name: tuple(nats[name]) for name in names},
        answers={name: tuple(tuple(_answer(s, rng) for s in row) for row in scores[name]) for name in names},
        base_kl=kl,
    )


def _answer(score: float, rng: np.random.Generator) -> Answer:
    return Answer(score=score, vote=str(score), confidence=rng.random(), is_valid=True, style="bare")


def _content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- prompts ----------------------------------------------------------------------------------------------------------


def _prompts(folder: Path, domains: int, prompts: int, draws: int) -> list[Result]:
    """Measure drawing and observing with a pool, and the checkpoint of what is known of every prompt."""
    names = [f"domain{k}" for k in range(domains)]
    curriculum = Curriculum(
        domains=[Domain(name=name, kind="structured", train=[0]) for name in names],
        prompts={name: [_content_hash(f"{name}/{n}") for n in range(prompts // domains)] for name in names},
        scheduler=build_scheduler("joint"),
        total_draws=draws,
        pool=PoolSettings(),
    )
    spent = [_drawn(curriculum, draw, size=BATCH) for draw in range(draws)]
    pace = Timing(sum(t.clock for t in spent), sum(t.cpu for t in spent)).scaled(1e6 / draws / BATCH)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    saved = [timed(lambda: save_ledgers(checkpoint, curriculum)) for _ in range(3)]
    size = sum(path.stat().st_size for path in checkpoint.iterdir()) / MB
    return [
        _within("books_draw_observe", "us/prompt", [pace], 20, note=f"{prompts} prompts in {domains} domains, a pool"),
        _within("books_checkpoint", "s", saved, 2),
        _within("books_checkpoint_size", "MB", [size], 100),
    ]


def _drawn(curriculum: Curriculum, draw: int, *, size: int, listen: Callable[[], object] | None = None) -> Timing:
    """Draw and observe `size` prompts of eight completions each; return the time that these two took."""
    rng = np.random.default_rng(draw)
    refs: list[Prompt] = []
    drawing = timed(lambda: refs.extend(curriculum.draw(size)))
    if listen is not None:
        listen()
    rewards = (rng.random((size, 8)) < rng.random((size, 1))).astype(float).tolist()
    plain = {"lengths": (9,) * 8, "truncated": (False,) * 8}
    groups = [
        Group(prompt_id=ref.id, domain=ref.domain, draw=draw, rewards=tuple(r), **plain)
        for ref, r in zip(refs, rewards, strict=True)
    ]
    entropy = dict(zip(curriculum.names, rng.random(len(curriculum.names)).tolist(), strict=True))
    observing = timed(lambda: curriculum.observe(groups, entropy))
    return Timing(drawing.clock + observing.clock, drawing.cpu + observing.cpu)


# --- draws ------------------------------------------------------------------------------------------------------------


def _draws(folder: Path, scheduler: str, domains: int, draws: int) -> list[Result]:
    """Measure the decisions of a long run: their size, reading them, a replay, and the report."""
    run = folder / scheduler
    ran = _write_draws(run, scheduler, domains, draws)
    ledger = RunFolder(run).ledger("decisions")
    reading = [timed(lambda: RunFolder(run).decisions()) for _ in range(3)]
    replayed = replay_run(run, scheduler=scheduler)
    assert [r.replayed for r in replayed] == ran, "a replay of the scheduler that ran is what ran"
    reporting = timed(lambda: write_report([run], RunFolder(run).report))
    name = f"books_decisions_{scheduler}"
    return [
        _within(f"{name}_size", "MB", [ledger.stat().st_size / MB * 100_000 / draws], 200, note="for 100,000 draws"),
        _within(f"{name}_read", "s", reading, 10),
        _within(f"{name}_report", "s", [reporting], 20, note=f"metrics of {2 * domains + 1} keys a draw beside them"),
    ]


def _write_draws(run: Path, scheduler: str, domains: int, draws: int) -> list[tuple[float, ...]]:
    """Write a run of many draws of 64 prompts; return the mixtures that it drew."""
    ours = _recorder(run, domains, prompts=1000)
    ours.curriculum.scheduler = build_scheduler(scheduler)
    ours.curriculum.total_draws = draws
    names, rng, ran = ours.curriculum.names, np.random.default_rng(1), []
    replace_file(RunFolder(run).recipe, _recipe(names, scheduler, draws))
    for draw in range(draws):
        if draw % max(1, draws // 5) == 0:
            ours.record_heldout(draw, _result(names, 20, rng))
        _drawn(ours.curriculum, draw, size=64, listen=lambda draw=draw: _record(ours, draw + 1))
        assert ours.curriculum.decision is not None
        ran.append(ours.curriculum.decision.mixture)
        seen = {f"domain/{name}/{key}": float(rng.random()) for name in names for key in ("reward", "entropy")}
        ours.folder.append("metrics", {"step": draw + 1, "reward": float(rng.random()), **seen})
    ours.save()
    return ran


def _record(ours: Recorder, step: int) -> None:
    assert ours.curriculum.begun is not None
    ours.record_draw(step, ours.curriculum.begun)


def _recipe(names: tuple[str, ...], scheduler: str, steps: int) -> str:
    lines = [f"  {n}: {{kind: structured, train: {n}.jsonl, heldout: {n}_test.jsonl, reward: exact}}" for n in names]
    return RECIPE.format(domains="\n".join(lines), scheduler=scheduler, steps=steps)


BENCHMARKS = {"books": bench_books}
