"""Speed and size of the curriculum against their limits: a million prompts in twenty domains."""

from __future__ import annotations

import hashlib

import numpy as np
import psutil

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.records import Domain, Evaluation, Group, Prompt
from polyphony.curricula.schedulers import build_scheduler
from polyphony.launch.measures.result import Result, Target, Timing, repeated, timed

DOMAINS, PROMPTS, BATCH, DRAWS = 20, 1_000_000, 128, 200


def bench_curricula(*, short: bool = False) -> list[Result]:
    """Measure draw + observe a prompt under three schedulers, and memory."""
    prompts, draws = (PROMPTS // 100, 20) if short else (PROMPTS, DRAWS)
    before = psutil.Process().memory_info().rss
    names = [f"domain{k}" for k in range(DOMAINS)]
    ids = {name: [_content_hash(f"{name}/{n}") for n in range(prompts // DOMAINS)] for name in names}
    found = []
    for scheduler in ("joint", "adaptive", "sec"):
        curriculum = _curriculum(ids, scheduler, draws)
        found.append(_within(f"draw_observe_{scheduler}", "us/prompt", _pace(curriculum, draws), limit=50))
        if scheduler == "joint":
            grown = (psutil.Process().memory_info().rss - before) / 2**20
            found.append(_within("million_prompts_memory", "MB", grown, limit=300))
    return found


def _within(name: str, unit: str, value: float | Timing, *, limit: float) -> Result:
    return repeated(name, unit, [value], target=Target(relation="<=", limit=limit))


def _content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _curriculum(ids: dict[str, list[str]], scheduler: str, draws: int) -> Curriculum:
    domains = [Domain(name=name, kind="structured", train=[0]) for name in ids]
    return Curriculum(domains=domains, prompts=ids, scheduler=build_scheduler(scheduler), total_draws=draws)


def _pace(curriculum: Curriculum, draws: int) -> Timing:
    """Return microseconds a prompt of drawing and observing, an evaluation of 200 items a domain every 20 draws."""
    rng = np.random.default_rng(0)
    clock, cpu = 0.0, 0.0
    for draw in range(draws):
        if draw % 20 == 0:
            solved = rng.random((DOMAINS, 200)) < 0.3 + 0.2 * draw / draws
            scores = {name: tuple(row.astype(float)) for name, row in zip(curriculum.names, solved, strict=True)}
            exposure = dict(curriculum.drawn)
            curriculum.record(Evaluation(trained=curriculum.names, step=draw, seed=0, scores=scores, exposure=exposure))
        rewards = (rng.random((BATCH, 8)) < 0.5).astype(float).tolist()
        refs: list[Prompt] = []
        drawing = timed(lambda refs=refs: refs.extend(curriculum.draw(BATCH)))
        groups = [
            Group(
                prompt_id=ref.id,
                domain=ref.domain,
                draw=draw,
                rewards=tuple(r),
                lengths=(9,) * 8,
                truncated=(False,) * 8,
            )
            for ref, r in zip(refs, rewards, strict=True)
        ]
        observing = timed(lambda groups=groups: curriculum.observe(groups, dict.fromkeys(curriculum.names, 0.7)))
        clock, cpu = clock + drawing.clock + observing.clock, cpu + drawing.cpu + observing.cpu
    return Timing(clock, cpu).scaled(1e6 / draws / BATCH)


BENCHMARKS = {"curricula": bench_curricula}
