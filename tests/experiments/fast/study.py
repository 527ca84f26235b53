"""Worlds x arms x rates x seeds on all cores: `python -m tests.experiments.fast.study studies/default.yaml --out FOLDER`.

A study file is registered before its seeds are run. Its parts follow each other, each from the results of those before:

    tuning    every arm in the tuning worlds at every rate, a few seeds; then arms that build on the better of two others
    edges     for arms whose best rate is at an edge, one rate further out
    final     the best arms, joint, and the best published one if it is none of them, each at its best rate, fresh seeds
    extras    the candidate and joint with a pool and a falling rate; the candidate with rarer evaluations

Results are lines in FOLDER/results.jsonl, one a cell; what is there is not run again. A drawn world's key is the hash of
the commit that last changed the study file, unless `--key` says another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.trainer.run import say
from tests.experiments.fast.cell import PROBE, StudyCell, run_cell
from tests.experiments.fast.tables import PUBLISHED, Row, best_rates, ranking, report, tuning_report
from tests.experiments.fast.worlds import WORLDS, make_world

PARTS = ("tuning", "edges", "final", "extras")
RESULTS = "results.jsonl"
GUESS_S = 0.025
"""Processor seconds of a draw and a domain, evaluations included, before any was measured."""


@settings
class Tuning:
    """Where each arm finds its rate, and which arms go on."""

    worlds: tuple[str, ...]
    rates: tuple[float, ...]
    further: tuple[float, float]
    """Below the lowest rate and above the highest, for arms whose best is there."""
    seeds: tuple[int, ...]


@settings
class Final:
    """What is reported."""

    best: int = Field(default=4, ge=1)
    """Arms that go on, beside joint."""
    seeds: tuple[int, ...]
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run under which the candidate and joint are run once more."""
    rarer: int = Field(default=80, ge=1)
    """Draws between evaluations in the candidate's row with rarer ones, in the tuning worlds."""


@settings
class Study:
    """A study file.

    Example: `Study.load(Path("studies/default.yaml"), key="0f3a..")`
    """

    name: str
    draws: int = Field(ge=1)
    every: int = Field(ge=1)
    share: float = Field(gt=0, le=0.25)
    """Completions of evaluations relative to those that are trained on."""
    worlds: Mapping[str, Any]
    arms: Mapping[str, Any]
    """Settings of a scheduler; `better_of: [a, b]` builds on the one of two that ranks higher in tuning."""
    probe: Mapping[str, Any]
    tuning: Tuning
    final: Final
    rates: Mapping[str, float] = field(default_factory=dict)
    """Of arms that were tuned in a study before, by rank there, the candidate first: then nothing is tuned."""
    key: str = ""
    """What decides drawn worlds."""
    digest: str = ""

    @classmethod
    def load(cls, path: Path, *, key: str | None = None) -> Study:
        """Read a study. Raises ValueError for unknown worlds, and where a drawn world has no commit to be drawn from."""
        text = path.read_text()
        key = key if key is not None else _commit_of(path)
        digest = hashlib.sha256(f"{text}/{key}".encode()).hexdigest()[:12]
        study = cls(**yaml.safe_load(text), key=key, digest=digest)
        if strange := sorted({*study.rates} - {*study.arms}):
            raise ValueError(f"{path}: rates of {strange}, which are no arms; its arms: {', '.join(study.arms)}")
        if strange := sorted({*study.worlds, *study.tuning.worlds} - set(WORLDS)):
            raise ValueError(f"{path}: unknown worlds {strange}; known: {', '.join(WORLDS)}")
        if not key and "drawn" in study.worlds:
            raise ValueError(f"{path}: a drawn world needs a commit of the study file, or --key")
        return study

    def world_settings(self, world: str) -> dict[str, Any]:
        """Return the settings of a world, the key of a drawn one among them."""
        given = dict(self.worlds[world] or {})
        return given | ({"key": self.key} if world == "drawn" else {})

    def cell(self, world: str, arm: str, rate: float, seed: int, given: Mapping[str, Any]) -> StudyCell:
        """Return one cell with the study's own numbers."""
        return StudyCell(
            world=world,
            arm=arm,
            settings=given,
            rate=rate,
            seed=seed,
            world_settings=self.world_settings(world),
            draws=self.draws,
            every=self.every,
            share=self.share,
        )

    # --- parts --------------------------------------------------------------------------------------------------------

    def cells(self, part: str, rows: Sequence[Row]) -> list[StudyCell]:
        """Return the cells of a part. Raises ValueError where the results of an earlier one do not say yet what they are."""
        parts = {"tuning": self._tuning, "edges": self._edges, "final": self._final, "extras": self._extras}
        there = {row["id"] for row in rows}
        for earlier in PARTS[: min(2, PARTS.index(part))]:  # what the final part finds decides nothing
            missing = [cell for cell in parts[earlier](rows) if cell.id not in there]
            if missing or not all(self._is_tuned(arm, rows) for arm in self.arms):
                raise ValueError(f"{part}: what belongs to it is known after {earlier}, of which cells are left")
        return parts[part](rows)

    def outlook(self, rows: Sequence[Row]) -> dict[str, list[StudyCell]]:
        """Return cells like those of each part, to say how long they will take: joint stands for arms that are not known."""
        found: dict[str, list[StudyCell]] = {}
        arms, rate, seeds = {name: dict(given or {}) for name, given in self.arms.items()}, 0.0, self.final.seeds
        every = [self.cell(world, "joint", rate, seed, arms["joint"]) for world in self.worlds for seed in seeds]
        rare = [cell for cell in every if cell.world in self.tuning.worlds]
        found["tuning"] = [
            self.cell(world, arm, rate, seed, given)
            for arm, given in arms.items()
            for world in self.tuning.worlds
            for rate in self.tuning.rates
            for seed in self.tuning.seeds
        ]
        found["edges"] = found["tuning"][:: 2 * len(self.tuning.rates)]
        found["final"] = every * (self.final.best + 2)
        found["extras"] = every * 2 + rare
        for part in PARTS[1:]:  # what is still to be built on others is in the first already
            try:
                found[part] = self.cells(part, rows)
            except ValueError:
                break
        there = {row["id"] for row in rows}
        return {part: [cell for cell in cells if cell.id not in there] for part, cells in found.items()}

    def settings_of(self, arm: str, rows: Sequence[Row]) -> dict[str, Any] | None:
        """Return an arm's settings; None where it builds on others that are not through yet."""
        given = dict(self.arms[arm])
        pair = given.pop("better_of", None)
        if pair is None:
            return given
        if not all(self._is_tuned(other, rows) for other in pair):
            return None
        own = [
            row for row in rows if row["arm"] in pair and row["rate"] in self.tuning.rates
        ]  # as it was when it began
        own = [row for row in own if row["seed"] in self.tuning.seeds]
        ranks = ranking(own, self.tuning.worlds, best_rates(own, self._grid))
        return {**self.arms[min(pair, key=lambda name: ranks[name])], **given}

    @property
    def _grid(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        return self.tuning.worlds, self.tuning.seeds

    def _is_tuned(self, arm: str, rows: Sequence[Row]) -> bool:
        if self.rates:
            return True
        needed = len(self.tuning.worlds) * len(self.tuning.rates) * len(self.tuning.seeds)
        of_arm = [
            r for r in rows if r["arm"] == arm and r["seed"] in self.tuning.seeds and r["rate"] in self.tuning.rates
        ]
        return len(of_arm) >= needed

    def _tuning(self, rows: Sequence[Row]) -> list[StudyCell]:
        return [
            self.cell(world, arm, rate, seed, given)
            for arm in ([] if self.rates else self.arms)
            if (given := self.settings_of(arm, rows)) is not None
            for world in self.tuning.worlds
            for rate in self.tuning.rates
            for seed in self.tuning.seeds
        ]

    def _edges(self, rows: Sequence[Row]) -> list[StudyCell]:
        rates, cells = self.tuning.rates, []
        own = [row for row in rows if row["rate"] in rates]  # a further rate must not undo its own reason
        for arm, best in best_rates(own, self._grid).items():
            further = {min(rates): min(self.tuning.further), max(rates): max(self.tuning.further)}.get(best)
            given = self.settings_of(arm, rows)
            if further is not None and given is not None:
                cells += [self.cell(w, arm, further, s, given) for w in self.tuning.worlds for s in self.tuning.seeds]
        return cells

    def chosen(self, rows: Sequence[Row]) -> tuple[list[str], dict[str, float]]:
        """Return the arms of the final part, the candidate first, and the rate of each."""
        if self.rates:
            return list(self.rates), dict(self.rates)
        tuned = [row for row in rows if row["seed"] in self.tuning.seeds]
        rates = best_rates(tuned, self._grid)
        ranks = ranking(tuned, self.tuning.worlds, rates)
        order = sorted((name for name in ranks if name != "joint"), key=lambda name: ranks[name])
        published = next((name for name in order if name in PUBLISHED), None)
        best = order[: self.final.best]
        return [*best, *([published] if published and published not in best else []), "joint"], rates

    def _final(self, rows: Sequence[Row]) -> list[StudyCell]:
        arms, rates = self.chosen(rows)
        return [
            self.cell(world, arm, rates[arm], seed, self.settings_of(arm, rows) or {})
            for arm in arms
            for world in self.worlds
            for seed in self.final.seeds
        ]

    def _extras(self, rows: Sequence[Row]) -> list[StudyCell]:
        arms, rates = self.chosen(rows)
        cells = []
        for arm in (arms[0], "joint") if self.final.extras else ():
            given = {**(self.settings_of(arm, rows) or {}), **self.final.extras}
            for world in self.worlds:
                cells += [self.cell(world, f"{arm}+", rates[arm], seed, given) for seed in self.final.seeds]
        given = self.settings_of(arms[0], rows) or {}
        for world in self.tuning.worlds:
            rare = [self.cell(world, arms[0], rates[arms[0]], seed, given) for seed in self.final.seeds]
            # as many items as at the usual pace: a quarter of the tokens
            cells += [
                replace(c, every=self.final.rarer, share=self.share * self.every / self.final.rarer) for c in rare
            ]
        return cells

    def probes(self, cells: Sequence[StudyCell]) -> list[StudyCell]:
        """Return the probes that these cells plan by, each once."""
        wanted = {(c.world, c.rate) for c in cells if c.settings.get("transfer") == PROBE}
        first = min(self.tuning.seeds)
        return [self.cell(world, PROBE, rate, first, self.probe) for world, rate in sorted(wanted)]


def _commit_of(path: Path) -> str:
    command = ["git", "-C", str(path.resolve().parent), "log", "-1", "--format=%H", "--", path.name]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


class Results:
    """The lines of a results file.

    Example: `Results(folder, study).missing(cells)`
    """

    def __init__(self, out: Path, study: Study) -> None:
        """Read what is there. Raises ValueError where it is of another study."""
        self.file, self.study = out / RESULTS, study
        self.rows: list[Row] = [json.loads(line) for line in self.file.open()] if self.file.exists() else []
        if strange := {row["study"] for row in self.rows} - {study.digest}:
            raise ValueError(f"{self.file} is of another study or key: {sorted(strange)}, not {study.digest}")

    @property
    def runs(self) -> list[Row]:
        """The rows of arms, without probes."""
        return [row for row in self.rows if row["arm"] != PROBE]

    def missing(self, cells: Sequence[StudyCell]) -> list[StudyCell]:
        """Return the cells that have no row yet."""
        there = {row["id"] for row in self.rows}
        return [cell for cell in cells if cell.id not in there]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, and know that it is on the disk."""
        whole = {"study": self.study.digest, **row}
        self.rows.append(whole)
        with self.file.open("a") as file:
            file.write(json.dumps(whole) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def seconds(self, cells: Sequence[StudyCell]) -> float:
        """Return how long cells will take on one process that has a core, from those like them that were run."""
        known: dict[str, list[float]] = {}
        for row in self.rows:
            known.setdefault(row["world"] + "/" * (row["arm"] == PROBE), []).append(row["seconds"])
        total = 0.0
        for cell in cells:
            like = known.get(cell.world + "/" * (cell.arm == PROBE))
            domains = len(make_world(cell.world, cell.world_settings))
            draws = cell.draws if cell.arm != PROBE else domains * cell.settings["steps"] * cell.settings["seeds"]
            total += sum(like) / len(like) if like else GUESS_S * draws * (5 + domains / 2)
        return total


def run(cells: Sequence[StudyCell], results: Results, out: Path, *, jobs: int, until: float) -> bool:
    """Run cells on so many processes until all are done or the time has come; return whether all are done."""
    waiting = results.missing(cells)
    if not waiting:
        return True
    seconds = results.seconds(waiting)
    say(f"{len(waiting)} of {len(cells)} cells to run, about {seconds / jobs / 60:.0f} min on {jobs} processes")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process loads torch
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running: set[Future] = set()
        while running or (waiting and time.monotonic() < until):
            while waiting and len(running) < jobs and time.monotonic() < until:
                running.add(pool.submit(run_cell, waiting.pop(0), out))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                row = future.result()
                results.add(row)
                say(f"{row['id']}: {row['seconds']:.0f} s; {len(waiting) + len(running)} left")
    return not waiting


def run_part(study: Study, part: str, results: Results, out: Path, *, jobs: int, until: float) -> bool:
    """Run a part to its end: what it adds may decide what else belongs to it."""
    while cells := results.missing(study.cells(part, results.runs)):
        probes = study.probes(cells)
        if not (run(probes, results, out, jobs=jobs, until=until) and run(cells, results, out, jobs=jobs, until=until)):
            return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study's parts in their order, as far as the time goes, and print its tables; 1 where cells are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--key", help="decides drawn worlds; default: the commit that last changed the study file")
    parser.add_argument("--dry", action="store_true", help="say the time, run nothing")
    arguments = parser.parse_args(argv)
    study = Study.load(arguments.study, key=arguments.key)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out, study)
    say(f"study {study.name} {study.digest}, drawn worlds by {study.key or 'no key'}")
    until = time.monotonic() + 60 * arguments.minutes
    outlook = study.outlook(results.runs)
    for part in arguments.parts:
        hours = results.seconds([*results.missing(study.probes(outlook[part])), *outlook[part]]) / 3600
        say(f"{part}: about {len(outlook[part])} cells are left, {hours:.1f} h of one core")
    for part in () if arguments.dry else arguments.parts:
        if not run_part(study, part, results, arguments.out, jobs=arguments.jobs, until=until):
            return 1
    if results.runs and not study.rates:
        print(tuning_report(results.runs, study.tuning.worlds, study.tuning.seeds))
    if any(row["seed"] in study.final.seeds for row in results.runs):
        arms, rates = study.chosen(results.runs)
        reported = [row for row in results.rows if row["seed"] in study.final.seeds or row["arm"] == PROBE]
        print(report(reported, arms=arms, rates=rates, tuning=study.tuning.worlds, every=study.every))
    return 0


if __name__ == "__main__":
    sys.exit(main())
