"""`make simulate`: rollout workers by a model (`fleet.py`), held against real ones, and what would limit many more of them.

The model's numbers are fitted to one worker of the lab's policy, and to one that sleeps. It then says how long a draw takes
of two real workers, and of up to 64 that sleep in the place of sampling, behind the real engine and pool; beside it stands
what they took. Beyond that it is the model alone. Real workers are counted by their processor time, which is what they would
take on a machine that nothing else is at: the draw ends with the worker that had most to do.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from polyphony.launch.cli import set_environment
from polyphony.launch.measures.result import tree_cpu_s
from polyphony.launch.recipe import load_recipe
from tests.experiments import fleet
from tests.experiments.fleet import (
    Draw,
    Fleet,
    Lengths,
    Sleeping,
    Speed,
    Talk,
    Trainer,
    Wanted,
    bounds,
    converse,
    course,
    foreseen,
    measures,
)

SLEEPING = (1, 2, 8, 16, 32, 64)
OTHERS = ((2, 8, 8), (2, 64, 8), (2, 560, 1), (8, 64, 8), (8, 560, 1), (64, 64, 8), (64, 512, 8))
"""Workers, groups and their size: draws and evaluations."""
SIMULATED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LONG_ENOUGH_S = 0.4
"""Processor time is counted in hundredths."""
COPIES = 8
GROUPS = 64
"""Of a draw of the lab's."""
LONGER = 8
AHEAD = (0, 1, 2)
LONG, LONG_GROUPS, EVEN_AT = Lengths(log_mean=6.0, between=0.6, within=0.5, max_tokens=2048), 512, 8
"""Completions of 403 tokens in the median, and a trainer that 8 workers keep busy."""


# --- one worker, and what it says of two ------------------------------------------------------------------------------


class Real:
    """The lab's policy behind two workers on Ray, of one thread each."""

    def __init__(self, folder: Path) -> None:
        from polyphony.launch.build import build_trainer
        from polyphony.launch.measures.rollouts import requests_of
        from tests.benchmarks.commands import RECIPES

        changes = ["rollouts={engine: ray, workers: 2}", "tracking.wandb=null", "grpo.max_steps=6"]
        self.trainer: Any = build_trainer(load_recipe(RECIPES / "demo.yaml", changes), folder)
        self.engine: Any = self.trainer.policy.engine
        self.trainer.policy.sync()
        self.requests = requests_of(self.trainer)
        self.workers = self.engine.pool.workers
        self._cpu = [psutil.Process(_process(worker)) for worker in self.workers]
        self._seeds = random.Random(1)

    def sample(self, n_groups: int, copies: int, *, workers: int) -> tuple[list[Wanted], list[float], float]:
        """Sample so many groups with seeds of their own; return what it was, processor seconds a worker, and seconds."""
        first = self._seeds.randrange(GROUPS)
        places = [((first + n) % GROUPS) * COPIES + k for n in range(n_groups) for k in range(copies)]
        asked = [replace(self.requests[place], seed=self._seeds.getrandbits(31)) for place in places]
        self.engine.pool.workers = self.workers[:workers]
        before, began = self._busy(), time.perf_counter()
        found = self.engine.complete(asked)
        spent = time.perf_counter() - began
        self.engine.pool.workers = self.workers
        lengths = [len(completion.ids) for completion in found]
        seen = [
            Wanted(prompt_ids=tuple(r.prompt_ids), max_tokens=r.max_tokens, length=n)
            for r, n in zip(asked, lengths, strict=True)
        ]
        return seen, [b - a for a, b in zip(before, self._busy(), strict=True)], spent

    def _busy(self) -> list[float]:
        return [(t := process.cpu_times()).user + t.system for process in self._cpu]

    def trainer_times(self) -> Trainer:
        """Return what syncs and updates take, of the processor time of the trainer's process."""
        spent = []
        for _ in range(7):
            began = time.process_time()
            self.trainer.policy.sync()
            spent.append(time.process_time() - began)
        began = time.process_time()
        with redirect_stdout(io.StringIO()):  # what it says of each step
            self.trainer.train()
        steps = self.trainer.state.global_step
        sync_s = statistics.median(spent)
        update_s = (time.process_time() - began) / steps - sync_s
        return Trainer(sync_s=sync_s, update_s=update_s / self.trainer.args.per_device_train_batch_size)


def _process(worker: Any) -> int:
    import ray

    return ray.get(worker.ready)[1]


def fit(seen: Sequence[tuple[Sequence[Sequence[Wanted]], float]], *, slots: int) -> tuple[Speed, float]:
    """Return the speed that explains best, by relative error, what shares took together, and the median of that error."""
    rows = np.array([sum(np.array(measures(share, slots)) for share in shares) / spent for shares, spent in seen])
    factors = _least_squares(rows, np.ones(len(rows)))
    names = ("call_s", "step_s", "token_s", "prompt_token_s")
    speed = Speed(**dict(zip(names, factors, strict=True)), slots=slots)
    return speed, float(np.median(abs(rows @ factors - 1)))


def _least_squares(rows: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Return factors of at least 0 each: a column that would want less takes no part."""
    used = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, used], wanted, rcond=None)[0]
        if (found >= 0).all():
            return [float(found[used.index(n)]) if n in used else 0.0 for n in range(rows.shape[1])]
        del used[int(found.argmin())]


def real(*, repeats: int) -> tuple[Speed, Lengths, Trainer]:
    """Fit one worker, print what two should take and did; return what was fitted."""
    with tempfile.TemporaryDirectory() as folder:
        of = Real(Path(folder))
        of.sample(GROUPS, COPIES, workers=2)  # warms both
        speed, lengths = one_worker(of, repeats=repeats)
        prompt = round(statistics.fmean(len(r.prompt_ids) for r in of.requests))
        print(
            "\n| real workers, 64 groups of 8 | predicted | took (processor) | error | took (clock) |\n|---|---|---|---|---|"
        )
        took: dict[int, tuple[float, float, float]] = {}
        for workers in (1, 2):
            model = Fleet(workers=workers, speed=speed)
            draws = [
                model.draw(lengths.draw(GROUPS, COPIES, prompt, rng), rng) for rng in map(random.Random, range(20))
            ]
            ours = statistics.median(draw.seconds for draw in draws)
            runs = [of.sample(GROUPS, COPIES, workers=workers)[1:] for _ in range(max(3, 5 * repeats))]
            busy, slowest = (statistics.median(how(b) for b, _ in runs) for how in (sum, max))
            took[workers] = busy, slowest, statistics.median(clock for _, clock in runs)
            said = f"{ours:.2f} s | {slowest:.2f} s | {ours / slowest - 1:+.0%} | {took[workers][2]:.2f} s"
            print(f"| {workers} | {said} |", flush=True)
        (alone, one, _), (both, slowest, _) = took[1], took[2]
        print(f"two over one: {one / slowest:.2f} by processor time, {took[1][2] / took[2][2]:.2f} by the clock;")
        print(
            f"of 2: {both / 2 / slowest:.2f} by how even the shares are, {alone / both:.2f} one's time in all over two's"
        )
        times = of.trainer_times()
        print(f"trainer: a sync {times.sync_s * 1e3:.0f} ms, an update {times.update_s * 1e3:.1f} ms a completion")
        of.engine.close()
    return speed, lengths, times


def one_worker(of: Real, *, repeats: int) -> tuple[Speed, Lengths]:
    """Return what one worker takes, and the lengths that it sampled."""
    seen: list[tuple[list[Sequence[Wanted]], float]] = []
    for n_groups, copies in [(1, 1), (1, 8), (4, 1), (4, 8), (16, 1), (16, 2), (16, 8), (32, 4), (64, 1), (64, 8)]:
        for _ in range(repeats):
            shares, spent = [], 0.0
            while spent < LONG_ENOUGH_S:
                asked, busy, _ = of.sample(n_groups, copies, workers=1)
                shares.append(asked)
                spent += busy[0]
            seen.append((shares, spent))
    speed, error = fit(seen, slots=-(-of.engine.max_num_seqs // 2))
    lengths = Lengths.of(
        [one for shares, _ in seen for asked in shares for one in asked if len(asked) == GROUPS * COPIES]
    )
    print(f"one worker: {_said(speed)}; error of the fit {error:.0%}, median of {len(seen)} kinds of shares")
    spread_out = f"deviation {lengths.between:.2f} between groups and {lengths.within:.2f} within"
    print(f"lengths: logarithm {lengths.log_mean:.2f}, {spread_out}, at most {lengths.max_tokens} tokens")
    return speed, lengths


def _said(speed: Speed) -> str:
    call, step, token, prompt = (1e3 * factor for factor in speed.factors)
    return f"{call:.1f} ms a call, {step:.2f} a step, {token:.3f} a token, {prompt:.3f} a token of a prompt"


# --- workers that sleep -----------------------------------------------------------------------------------------------


@contextmanager
def asleep(workers: int, speed: Speed) -> Iterator[Any]:
    """Have the Ray engine over its pool of so many workers that sleep, on a cluster of its own."""
    import ray
    from accelerate import Accelerator
    from ray import cloudpickle

    from polyphony.launch.cluster.ray_engine import RayEngine
    from polyphony.launch.cluster.ray_workers import WorkerPool
    from polyphony.launch.sections import RolloutsSection
    from polyphony.trainer.engine.engine import EngineFaults

    class Pool(WorkerPool):
        worker_class = Sleeping

    class Asleep(RayEngine):
        def __init__(self) -> None:  # no policy, so nothing of TRL's
            self.rollouts = RolloutsSection(engine="ray", workers=workers)
            self.accelerator, self.faults, self.sampling = Accelerator(cpu=True), EngineFaults(), None  # type: ignore
            self.pool = Pool.start(speed, self.rollouts)  # type: ignore[arg-type]

        def sync_weights(self) -> None:
            self.version += 1
            self.pool.load(self.version, ())  # type: ignore[union-attr]

    cloudpickle.register_pickle_by_value(fleet)  # workers have no folder of tests
    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    engine = Asleep()
    try:
        engine.sync_weights()
        yield engine
    finally:
        engine.close()
        ray.shutdown()


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """What the process that deals out is at, in seconds."""

    send_s: float
    """For a request; for the completion that comes back the same."""
    hear_s: float
    """For a call of a worker that goes on with turns, and has nothing to do; while it hears of one it hears of no other. Of
    all processes of such a call, over this machine's cores, where that is more: workers that sleep share them."""
    way_s: float
    """What else there is to such a call: it and its answer are under way."""

    @classmethod
    def seen(cls) -> Dealing:
        """Return what it takes with one worker that does not sleep."""
        with asleep(1, Speed(call_s=0.0, step_s=1e-9, token_s=0.0, prompt_token_s=0.0)) as engine:
            asked = Lengths(log_mean=2.0, between=0.3, within=0.5, max_tokens=32).draw(
                512, COPIES, 20, random.Random(1)
            )
            spent = [_clock(lambda: engine.complete(asked)) for _ in range(6)]
            heard = [_clocks(lambda: engine.converse(Talk([[1] * 100], max_tokens=32))) for _ in range(4)]
        clock, own, everyone = (statistics.median(seconds) / 100 for seconds in zip(*heard[1:], strict=True))
        hear = max(own, everyone / psutil.cpu_count())
        return cls(send_s=statistics.median(spent[1:]) / len(asked) / 2, hear_s=hear, way_s=max(0.0, clock - hear))


def _clock(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _clocks(work: Callable[[], object]) -> tuple[float, float, float]:
    """Return seconds by the clock, and the processor's in this thread and in all processes below this one."""
    own, everyone = time.thread_time(), tree_cpu_s()
    return _clock(work), time.thread_time() - own, tree_cpu_s() - everyone


def sleeping(counts: Sequence[int], speed: Speed, lengths: Lengths, dealing: Dealing) -> None:
    """Print what workers that sleep should take and did."""
    lengths = replace(lengths, log_mean=lengths.log_mean + math.log(LONGER), max_tokens=LONGER * lengths.max_tokens)
    print(f"\ncompletions {LONGER} times as long as the lab's, so that a draw takes seconds")
    print("\n| workers that sleep | what | predicted | took | error | workers busy |\n|---|---|---|---|---|---|")
    for workers in counts:
        of = Fleet(workers=workers, speed=speed, send_s=dealing.send_s)
        with asleep(workers, speed) as engine:
            engine.complete(lengths.draw(workers, 1, 20, random.Random(0)))  # warms all
            for n_groups in dict.fromkeys((GROUPS, 16 * workers)):
                _line(
                    workers,
                    f"{n_groups} groups of {COPIES}",
                    [_draw(engine, of, lengths, n_groups, s) for s in range(5)],
                )
            talks = [_converse(engine, of, dealing, seed) for seed in range(3)]
            _line(workers, f"{8 * workers} episodes of 4 turns", talks)


def _draw(engine: Any, of: Fleet, lengths: Lengths, n_groups: int, seed: int) -> tuple[float, float, float]:
    """Return what a draw should take, what it took, and the seconds that a worker was at it."""
    asked = lengths.draw(n_groups, COPIES, 20, random.Random(seed))
    draw = of.draw(asked, random.Random(seed))
    return draw.seconds, _clock(lambda: engine.complete(asked)), draw.busy / of.workers


def _converse(engine: Any, of: Fleet, dealing: Dealing, seed: int) -> tuple[float, float, float]:
    """Return the same of episodes."""
    from polyphony.launch.cluster.ray_turns import Routes, moment_s

    rng = random.Random(seed)
    episodes = [[round(rng.lognormvariate(4.0, 0.6)) for _ in range(4)] for _ in range(8 * of.workers)]
    talk = partial(Talk, episodes, max_tokens=512)
    ways = {"hear_s": dealing.hear_s, "way_s": dealing.way_s, "moment_s": moment_s(of.workers)}
    seconds, busy = converse(talk(), of, **ways, routes=Routes())
    return seconds, _clock(lambda: engine.converse(talk())), busy / of.workers


def _line(workers: int, what: str, seen: Sequence[tuple[float, float, float]]) -> None:
    ours, theirs, busy = (statistics.median(column) for column in zip(*seen, strict=True))
    print(
        f"| {workers} | {what} | {ours:.2f} s | {theirs:.2f} s | {ours / theirs - 1:+.0%} | {busy / theirs:.0%} |",
        flush=True,
    )


# --- beyond what is here ----------------------------------------------------------------------------------------------


def beyond(of: Fleet, lengths: Lengths, trainer: Trainer, groups: int, *, draws: int = 20) -> None:
    """Print for more and more workers what a draw takes, how busy workers and trainer are, and what limits."""
    print(
        "\n| workers | rollouts | s a draw, ahead 0; 1; 2 | workers busy | trainer busy | behind | limit | of rollouts |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for workers in SIMULATED:
        rng = random.Random(workers)
        many = replace(of, workers=workers)
        made = [many.draw(lengths.draw(groups, COPIES, 20, rng), rng) for _ in range(draws)]
        runs = [course(made, trainer, ahead=ahead) for ahead in AHEAD]
        busy = statistics.fmean(draw.busy for draw in made) / workers
        update = groups * COPIES * trainer.update_s
        rollouts = statistics.fmean(draw.seconds for draw in made)
        least = bounds(made, trainer, many)
        cells = [f"{rollouts:.2f} s", "; ".join(f"{run.period:.2f}" for run in runs)]
        cells += ["; ".join(f"{spent / run.period:.0%}" for run in runs) for spent in (busy, update)]
        cells += ["; ".join(str(run.stale[-1]) for run in runs), "update" if update > rollouts else "rollouts"]
        print(f"| {workers} | {' | '.join(cells)} | {max(list(least)[1:], key=least.__getitem__)} |")


def _even_at(of: Fleet, lengths: Lengths) -> float:
    """Return seconds a completion of an update that takes as long as the rollouts of these workers."""
    rng = random.Random(1)
    return of.draw(lengths.draw(LONG_GROUPS, COPIES, 20, rng), rng).seconds / LONG_GROUPS / COPIES


def better(speed: Speed, lengths: Lengths, *, seeds: int = 40) -> None:
    """Print what other ways to deal out would take: lengths known before, or groups not yet begun taken by who is free."""
    print(
        "\n| workers | groups | of | today's | lengths known | taken by who is free | the same, a tenth twice as slow |"
    )
    print("|---|---|---|---|---|---|---|")
    for workers, groups, copies in OTHERS:
        draws = [lengths.draw(groups, copies, 20, random.Random(seed)) for seed in range(seeds)]
        even, uneven = (Fleet(workers=workers, speed=speed, slow_share=share, slow_by=2.0) for share in (0.0, 0.1))

        def took(way: Callable[..., Draw], draws: Sequence[Sequence[Wanted]] = draws) -> float:
            return statistics.fmean(way(asked, random.Random(n)).seconds for n, asked in enumerate(draws))

        today = took(even.draw)
        known = took(lambda asked, rng, of=even: of.draw(asked, rng, foreseen)) / today
        slow = took(uneven.steal) / took(uneven.draw)
        print(
            f"| {workers} | {groups} | {copies} | {today:.2f} s | {known:.2f} x | {took(even.steal) / today:.2f} x "
            f"| {slow:.2f} x |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, hold the model against what runs here, and print what it says of more."""
    parser = argparse.ArgumentParser(prog="simulate", description=__doc__)
    parser.add_argument("--sleeping", type=int, nargs="*", default=SLEEPING, metavar="N", help="workers that sleep")
    parser.add_argument("--repeats", type=int, default=2, help="of every measurement of real workers")
    arguments = parser.parse_args(argv)
    set_environment()
    speed, lengths, trainer = real(repeats=arguments.repeats)
    dealing = Dealing.seen()
    print(
        f"\ndealing out: {dealing.send_s * 1e6:.0f} us a request; a call that finds nothing: {dealing.hear_s * 1e3:.1f} ms "
        f"heard, {dealing.way_s * 1e3:.1f} ms under way"
    )
    sleeping(arguments.sleeping, speed, lengths, dealing)
    of = Fleet(workers=1, speed=speed, send_s=dealing.send_s)
    print(f"\nthe lab: {GROUPS} groups of {COPIES}, its trainer")
    beyond(of, lengths, trainer, GROUPS)
    alike = replace(trainer, update_s=_even_at(replace(of, workers=EVEN_AT), LONG))
    print(
        f"\n{LONG_GROUPS} groups of {COPIES}, up to {LONG.max_tokens} tokens, updates as long as the rollouts of {EVEN_AT}"
    )
    beyond(of, LONG, alike, LONG_GROUPS)
    better(speed, lengths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
