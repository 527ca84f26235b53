"""Rollouts ahead: draws are generated while earlier ones are trained on, and a run is the same whatever the clock says.

With `rollouts.ahead: n`, draw d is chosen by what was known after draw d - n - 1 and generated whole with the weights of
then: one draw at a time, weights move only between two of them. All that a draw depends on is kept for it when it is chosen
(`Draws.apart`); what it changes is taken in when it is trained on. Whoever else needs the engine waits until all draws that
were begun have landed: evaluations, so that they see the weights of their step, and checkpoints, which keep what has landed.
So no episode is open in one. Where weights go back, what was sampled is dropped and its prompts are asked again.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from polyphony.curricula.curriculum import ExhaustedError
from polyphony.curricula.decision_log import Choice
from polyphony.curricula.files import replacing
from polyphony.curricula.records import Completion, Prompt, Rollout
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer import ranks
from polyphony.trainer.domains import DomainData
from polyphony.trainer.draws import Draws
from polyphony.trainer.metrics import key
from polyphony.trainer.run.folder import ahead_file
from polyphony.trainer.run.json_lines import read_object

ROLLOUT = TypeAdapter(Rollout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Landed:
    """What came of a draw that was generated ahead."""

    rollout: Rollout
    weights: int
    """Optimizer steps of the weights that it was sampled with."""
    refills: list[dict[str, Any]]
    """What is written of each."""
    logged: dict[tuple[str, str], tuple[float, int]]
    """What rewards logged, as `metrics.Logged` sums it."""
    told: dict[str, list[Any]]
    """What rewards said of each row, by column."""

    def as_row(self) -> dict[str, Any]:
        """Return it for a checkpoint; JSON-able. Prompts are named; of episodes, which extend theirs, what was said too."""
        rows = {place: replace(c, prompt=_named(c)) for place, c in self.rollout.rows.items()}
        rollout = ROLLOUT.dump_python(replace(self.rollout, rows=rows))
        logged = [[*place, *sums] for place, sums in self.logged.items()]
        told = {"weights": self.weights, "refills": self.refills, "logged": logged, "told": self.told}
        return {"rollout": rollout, **told}

    @classmethod
    def from_row(cls, row: dict[str, Any], data: DomainData) -> Landed:
        """Restore `as_row`, with the rows of the run's data."""
        rollout = ROLLOUT.validate_python(row["rollout"])
        rows = {place: replace(c, prompt=_filled(c.prompt, data)) for place, c in rollout.rows.items()}
        logged = {(domain, name): (total, n) for domain, name, total, n in row["logged"]}
        return cls(**{**row, "rollout": replace(rollout, rows=rows), "logged": logged})


def _named(completion: Completion) -> Prompt:
    prompt = completion.prompt
    return replace(prompt, columns={}) if completion.episode else Prompt(domain=prompt.domain, id=prompt.id)


def _filled(prompt: Prompt, data: DomainData) -> Prompt:
    table = data.rows_of(prompt.domain)
    if prompt.id not in table.ids:
        raise ValueError(
            f"domain {prompt.domain!r}: row {prompt.id!r} of a draw that was generated ahead is no training row any more: "
            "give it back, or choose another folder"
        )
    (whole,) = data.tokenized([table[prompt.id]])
    return replace(prompt, columns=whole.columns) if prompt.ids else whole


def _plain(value: Any) -> Any:
    return value.item() if getattr(value, "ndim", None) == 0 else str(value)


class DroppedError(Exception):
    """Nobody waits for this draw any more: raised in the thread that samples it, at its next use of the engine."""


class DrawThread(threading.Thread):
    """Generates one draw after the other."""

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(name="rollouts ahead", daemon=True)
        self._device = device
        self.jobs: queue.SimpleQueue[tuple[Future[Landed], Callable[[], Landed]] | None] = queue.SimpleQueue()
        self.is_closed = False
        self._group = group

    def run(self) -> None:
        """Do the jobs until there is None; what one raises is raised where its draw is trained on."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with ranks.apart(self._group):
            while job := self.jobs.get():
                future, generate = job
                try:
                    if self.is_closed:
                        raise DroppedError
                    future.set_result(generate())
                except BaseException as error:
                    future.set_exception(error)


class Ahead:
    """The draws of a run that are generated ahead, in a thread; collective over ranks.

    Example: `Ahead(draws, 1).roll_out(64).rows`
    """

    def __init__(self, draws: Draws, n: int) -> None:
        self._draws, self._n, self._policy, self._curriculum = draws, n, draws.policy, draws.curriculum
        self._curriculum.look_ahead(n)
        self._group = ranks.own_group()
        self._landing: dict[int, Future[Landed]] = {}
        """By their number, the draws that were begun; those of the curriculum's `aloft` that are not here have to be."""
        self._begun: set[int] = set()
        """Those of this process: others were in a checkpoint."""
        self._line: DrawThread | None = None
        self._before: DrawThread | None = None
        """The one that was closed, which may still be at a draw that nobody waits for."""
        self._end: ExhaustedError | None = None
        self._since = {"behind": 0.0, "wait_s": 0.0, "dropped": 0.0}
        self._taken = 0

    # --- who may use the engine ---------------------------------------------------------------------------------------

    def is_asking(self) -> bool:
        """Return whether the caller is a draw that is generated ahead. Raises DroppedError where it is one no more."""
        line = threading.current_thread()
        if isinstance(line, DrawThread) and line.is_closed:
            raise DroppedError
        return isinstance(line, DrawThread)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all draws that were begun have landed; return whether that came in time."""
        return not wait(self._landing.values(), timeout_s).not_done

    def close(self, timeout_s: float | None = None) -> None:
        """Drop what is in flight, and wait until none uses the engine; further draws may be begun afterwards."""
        if self._line is not None:
            self._line.is_closed = self._group is None  # ranks would not hear of it at one moment
            self._line.jobs.put(None)
            self.wait(timeout_s)
        self._before, self._line, self._landing = self._line, None, {}
        self._policy.trainer._last_loaded_step = -1

    # --- draws --------------------------------------------------------------------------------------------------------

    def roll_out(self, n_rows: int) -> Rollout:
        """Return the next draw, with this rank's `n_rows` rows, and begin another. Raises what generating it raised."""
        if not self._curriculum.aloft:
            if self._end is not None:
                raise self._end
            self._draws.choose(n_rows, unseen=0)
        self._begin_all(n_rows)
        landed = self._next()
        self._take_in(landed)
        self._go_on(n_rows)
        return landed.rollout

    def drop(self) -> None:
        """Forget what has landed, and have its prompts asked again: the weights are no longer those it was sampled with."""
        self.wait()
        self._since["dropped"] += len(self._landing)
        self._landing.clear()

    def flush(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        means = {
            name: total if name == "dropped" else total / max(1, self._taken) for name, total in self._since.items()
        }
        self._since, self._taken = dict.fromkeys(self._since, 0.0), 0
        return {key("rollout", name): value for name, value in means.items()}

    def _go_on(self, n_rows: int) -> None:
        """Begin as many draws as may be in flight; where prompts are exhausted, what is in flight is trained on first."""
        curriculum = self._curriculum
        while len(curriculum.aloft) < self._n and curriculum.draws < curriculum.total_draws and self._end is None:
            try:
                self._draws.choose(n_rows, unseen=len(curriculum.aloft) + 1)
            except ExhaustedError as error:
                self._end = error
            self._begin_all(n_rows)

    def _begin_all(self, n_rows: int) -> None:
        for choice in self._curriculum.aloft:
            if choice.draw not in self._landing:
                self._landing[choice.draw] = self._begin(choice, n_rows)

    def _begin(self, choice: Choice, n_rows: int) -> Future[Landed]:
        """Have a draw generated with the present weights, after those that were begun before it."""
        load = None
        if self._line is None and self._before is not None:
            self._before.join()
        if self._begun & self._landing.keys():  # not whether they have landed: that would be the clock's word
            assert self._policy.engine is not None
            load = self._policy.engine.snapshot()
            self._policy.trainer._last_loaded_step = -1
        else:
            self._policy.sync_if_older()
        self._begun.add(choice.draw)
        draws, step = self._draws.apart(choice), self._policy.trainer.state.global_step
        future: Future[Landed] = Future()
        if self._line is None:
            self._line = DrawThread(self._group, self._policy.trainer.accelerator.device)
            self._line.start()
        self._line.jobs.put((future, lambda: _landed(draws, choice, n_rows, load=load, weights=step)))
        return future

    def _next(self) -> Landed:
        """Wait for the oldest draw. One whose graders are gone is asked again by the run that goes on."""
        began, draw = time.perf_counter(), self._curriculum.aloft[0].draw
        try:
            landed = self._landing[draw].result()
            self._draws.take(landed.rollout)
        except GraderGoneError:
            del self._landing[draw]
            raise
        del self._landing[draw]
        self._since["wait_s"] += time.perf_counter() - began
        return landed

    def _take_in(self, landed: Landed) -> None:
        """Have the run know of a draw what it would know had it been generated just now."""
        draws, rows = self._draws, list(landed.rollout.rows.values())
        draws.begin()
        if draws.recorder is not None and self._policy.rank == 0:
            for refill in landed.refills:
                draws.recorder.record_refill(self._policy.next_step, refill)
        draws.scorer.logged.join(landed.logged)
        if draws.scorer.extra is not None:
            for column, values in landed.told.items():
                draws.scorer.extra.add("", column, rows, values)
        self._since["behind"] += self._policy.trainer.state.global_step - landed.weights
        self._taken += 1

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Write what has landed of this rank's, once it has; what failed is asked again by whoever goes on."""
        self.wait()
        mine = {draw for draw, future in self._landing.items() if future.exception() is None}
        kept = set.intersection(*ranks.gather_object([mine]))
        landed = {str(draw): self._landing[draw].result().as_row() for draw in sorted(kept)}
        with replacing(checkpoint / ahead_file(self._policy.rank)) as file:
            json.dump({"world_size": self._policy.world_size, "draws": landed}, file, default=str)

    def load(self, checkpoint: Path) -> None:
        """Go on with what a checkpoint keeps; where ranks are others now, or it kept nothing, prompts are asked again."""
        self._landing = {}
        path = checkpoint / ahead_file(self._policy.rank)
        saved = read_object(path) if path.is_file() else {}
        fits = saved.get("world_size") == self._policy.world_size
        kept = set.intersection(*ranks.gather_object([set(saved["draws"]) if fits else set()]))
        for draw in sorted(kept, key=int):
            self._landing[int(draw)] = future = Future()
            future.set_result(Landed.from_row(saved["draws"][draw], self._draws.data))


def _landed(draws: Draws, choice: Choice, n_rows: int, *, load: Callable[[], None] | None, weights: int) -> Landed:
    """Generate a draw, with weights that are loaded first or are there already."""
    if load is not None:
        load()
    rollout = draws.make(choice, n_rows)
    rows = {  # instances of environments are for the rewards, which have seen them
        place: replace(c, episode=replace(c.episode, environment=None)) if c.episode else c
        for place, c in rollout.rows.items()
    }
    extra, refills = draws.scorer.extra, draws.kept or []
    told = extra.flush(list(rollout.rows.values())) if extra is not None else {}
    told = json.loads(json.dumps(told, default=_plain))  # as a checkpoint has it, saved or not
    return Landed(
        rollout=replace(rollout, rows=rows),
        weights=weights,
        refills=refills,
        logged=draws.scorer.logged.sums,
        told=told,
    )
