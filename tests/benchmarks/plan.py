"""The planner against its limits: what `polyphony plan` takes as domains grow, and how near a search comes to the best."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from polyphony.curricula.transfer.orders import Objective, best_orders, search_orders
from polyphony.launch.measures.result import Result, Target, repeated
from tests.benchmarks.commands import measure
from tests.experiments.decisions import OWN, World, random

SIZES = (12, 16, 24, 40)
SECONDS_A_DOMAIN = 0.3
ITEMS, SPREAD = 200, 0.05
"""Held-out items of a domain; standard deviation of an entry of T."""
PROBLEMS, PROBLEM_SIZE = 50, 12
LARGEST_GAP = 0.002


def bench_plan(*, short: bool = False) -> list[Result]:
    """Time the command for probes of two seeds, a joint run and 1,000 resamples; compare the search with exact search."""
    sizes, problems, size = ((3,), 2, 6) if short else (SIZES, PROBLEMS, PROBLEM_SIZE)
    return [*(_seconds(each) for each in sizes), *_gaps(problems, size)]


def _seconds(size: int) -> Result:
    """Return the processor time of the command, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "transfer.json"
        rng = np.random.default_rng(size)
        world = World(size=size, items=ITEMS, joint=OWN / 2)
        matrix = world.matrix(rng, OWN * np.eye(size) + SPREAD * random(rng, size))
        ids = {name: tuple(f"{name}/{n}" for n in range(ITEMS)) for name in matrix.domains}
        replace(matrix, items=ids).save(file)
        seconds = measure(["plan", str(file), "--json"]).seconds
    target = Target(relation="<=", limit=round(SECONDS_A_DOMAIN * size, 1))
    note = f"the clock: {seconds.clock:.1f} s"
    return repeated(f"plan, {size} domains", "s of processor time", [seconds.cpu], target=target, note=note)


def _gaps(problems: int, size: int) -> list[Result]:
    """Return by how much less the searched orders of random problems gain, in the mean score: the largest gap."""
    rng = np.random.default_rng(0)
    objective = Objective(after=SPREAD * np.stack([random(rng, size) for _ in range(problems)]))
    best = objective.value(best_orders(objective))
    alone = [search_orders(replace(objective, after=after[None]))[0] for after in objective.after]
    found = {"alone": np.array(alone), "among 1,000": search_orders(_filled(objective))[:problems]}
    results = []
    for how, orders in found.items():
        gaps = (best - objective.value(orders)) / size
        note = (
            f"{problems} problems, mean gap {gaps.mean():.5f} of {best.mean() / size:.3f}, {(gaps < 1e-9).sum()} exact"
        )
        target = Target(relation="<=", limit=LARGEST_GAP) if how == "alone" else None
        results.append(repeated(f"search {how}", "of score", [float(gaps.max())], target=target, note=note))
    return results


def _filled(objective: Objective) -> Objective:
    """Return the problems again and again, 1,000 of them: so many share what is searched for one."""
    return replace(objective, after=np.resize(objective.after, (1000, *objective.after.shape[1:])))


BENCHMARKS = {"plan": bench_plan}
