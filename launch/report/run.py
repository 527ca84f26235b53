"""A run folder, read as it is: whole, cut off in the middle, still being written or with files missing.

What cannot be read is left out and named in `LoadedRun.missing`; only a folder without any file of a run is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML, YAMLError

from polyphony.curricula.files import unsealed
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.report.signals import with_signals
from polyphony.trainer.run.folder import RunFolder, holds_transfer, read_transfer
from polyphony.trainer.run.json_lines import read_object, uncollected


class Series(NamedTuple):
    """One metric over the run: optimizer steps [T] and values [T], rising in step."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRun:
    """What one run folder holds.

    Example: `read_run("runs/four-domains").metrics["reward"].values[-1]`
    """

    name: str
    path: Path
    recipe: Mapping[str, Any]
    """Of a run from Python its settings, which have a recipe's keys."""
    recipe_text: str
    recipe_name: str
    """Of the file that they are in."""
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Series]
    transfer: TransferMatrix | None
    """Over the `report` half of the held-out items: what may be published."""
    item_ids: Mapping[str, Sequence[str]]
    """Ids of all held-out items by domain; empty where the file names none."""
    decisions: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    alarms: Sequence[Mapping[str, Any]]
    """Those on record, and what a version before theirs would have been told; each with what may help."""
    evaluations: Sequence[Mapping[str, Any]]
    """Per evaluation, every statistic of every domain with its interval."""
    predicted: Sequence[Mapping[str, Any]]
    best: Mapping[str, Any]
    """The checkpoint noted as best and the score of its worst trained domain; empty where none is."""
    is_finished: bool
    is_left: bool | None
    """Whether the process that wrote it has ended; None where this machine cannot see it."""
    at: str
    """When it ended, or wrote its newest metrics: date and time of day, UTC; empty where unknown."""
    missing: tuple[str, ...]
    """One clause for each file or part that is not there or not whole."""

    @property
    def title(self) -> str:
        """The recipe's name, the folder's where that is another, and when."""
        named = str(self.setting("name") or self.name)
        return f"{named}{'' if named == self.name else f' in {self.name}'}{f', {self.at}' if self.at else ''}"

    @property
    def domains(self) -> tuple[str, ...]:
        """Names in the recipe's order; without a recipe those of the transfer file, then those that were logged."""
        listed = tuple(as_mapping(self.recipe.get("domains"))) or (self.transfer.domains if self.transfer else ())
        if listed:
            return tuple(str(name) for name in listed)
        logged = [key.split("/", 1)[1].rpartition("/")[0] for key in self.metrics if key.startswith("domain/")]
        return tuple(dict.fromkeys(logged))

    @property
    def watch_only(self) -> tuple[str, ...]:
        """Domains without training rows; without a recipe, those the transfer file names."""
        domains = as_mapping(self.recipe.get("domains"))
        if not domains:
            return self.transfer.watch_only if self.transfer else ()
        return tuple(str(name) for name, fields in domains.items() if not as_mapping(fields).get("train"))

    @property
    def scheduler(self) -> str:
        """The scheduler's name as the recipe has it; empty where unknown."""
        named = self.setting("curriculum", "scheduler")
        return str(named.get("name", "") if isinstance(named, Mapping) else named or "")

    @property
    def steps(self) -> int:
        """Optimizer steps seen so far."""
        seen = [int(series.steps[-1]) for series in self.metrics.values()]
        return max(seen + [row.step for row in self.moments], default=0)

    @property
    def planned_steps(self) -> int | None:
        """`grpo.max_steps`; None where the recipe counts epochs instead."""
        planned = self.setting("grpo", "max_steps")
        return planned if isinstance(planned, int) and planned > 0 else None

    @property
    def moments(self) -> tuple:
        """The run's evaluations in order of step, the baseline first; empty before the first one."""
        if self.transfer is None:
            return ()
        return next(iter(self.transfer.runs()), self.transfer.baselines(probe=False)[:1])

    def setting(self, *keys: str) -> Any:
        """Return a value of the recipe by its key path; None where it is not set."""
        value: Any = self.recipe
        for key in keys:
            value = as_mapping(value).get(key)
        return value


def read_run(path: str | Path) -> LoadedRun:
    """Read a run folder. Raises ValueError naming it where it holds no file of a run."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    folder = RunFolder(path)
    known = (folder.recipe, folder.settings, folder.ledger("metrics"), folder.transfer, folder.ledger("decisions"))
    if not any(file.is_file() for file in known):
        names = ", ".join(file.name for file in known)
        raise ValueError(f"{path} is no run folder: expected at least one of {names} in it")
    with uncollected():
        return _read(folder)


def _read(folder: RunFolder) -> LoadedRun:
    path = folder.path
    missing: list[str] = []
    of_script = folder.settings.is_file() and not folder.recipe.is_file()
    recipe_text, recipe = _read_recipe(folder.settings if of_script else folder.recipe, missing)
    transfer = _read_transfer(folder.transfer, missing)
    lines = _read_lines(folder, "metrics", missing, gives="training curves")
    provenance = as_mapping(_read_json(folder.provenance, missing))
    read_decisions = _read_optional if recipe.get("algorithm") == "sft" else _read_lines  # by which nothing is drawn
    return LoadedRun(
        name=path.resolve().name,
        path=path,
        recipe=recipe,
        recipe_text=recipe_text,
        recipe_name=(folder.settings if of_script else folder.recipe).name,
        provenance=provenance,
        metrics=_columns(lines),
        transfer=transfer.on("report") if transfer else None,
        item_ids=(transfer.items if transfer else None) or {},
        decisions=read_decisions(folder, "decisions", missing, gives="mixture with its reasons"),
        samples=_read_lines(folder, "samples", missing, gives="sample completions"),
        alarms=with_signals(
            _read_optional(folder, "alarms", missing, gives="alarms"), metrics=lines, recipe=recipe, transfer=transfer
        ),
        evaluations=_read_optional(folder, "evaluations", missing, gives="intervals beyond the score"),
        predicted=_read_predicted(folder.predicted, missing),
        best=as_mapping(_read_json(folder.best, missing)) if folder.best.is_file() else {},
        is_finished=folder.has_ended or ("end" not in provenance and folder.final.is_dir()),  # of older versions
        is_left=folder.is_left,
        at=_when(folder)[:16],
        missing=tuple(missing),
    )


def run_before(run: LoadedRun) -> LoadedRun | None:
    """Return the newest earlier run of the same name among the folders beside this one; None where there is none."""
    named, when = run.setting("name"), _when(RunFolder(run.path))
    earlier = []
    for path in run.path.resolve().parent.iterdir() if named and run.at else ():
        folder = RunFolder(path)
        if not path.is_dir() or path == run.path.resolve() or not folder.recipe.is_file():
            continue
        if (at := _when(folder)) and at < when and _read_recipe(folder.recipe, [])[1].get("name") == named:
            earlier.append((at, path))
    return read_run(max(earlier)[1]) if earlier else None


def _when(folder: RunFolder) -> str:
    """Return when a run ended, or else when its metrics were last written, to the second."""
    ended, metrics = _read_json(folder.end, []), folder.ledger("metrics")
    if at := str(as_mapping(ended).get("at", "")):
        return at[:19].replace("T", " ")
    if not metrics.is_file():
        return ""
    return datetime.fromtimestamp(metrics.stat().st_mtime, UTC).isoformat(sep=" ", timespec="seconds")[:19]


def stage_spans(run: LoadedRun) -> list[tuple[float, float, str]]:
    """Return (first step, step after the last, domain) of the stages that the scheduler's decisions name."""
    named = [(float(row["step"]), row.get("stage")) for row in run.decisions if "step" in row]
    spans = []
    for stage, rows in groupby(named, key=lambda pair: pair[1]):
        steps = [step for step, _ in rows]
        if stage is not None:
            spans.append((steps[0], steps[-1] + 1, stage))
    return spans


def _read_recipe(path: Path, missing: list[str]) -> tuple[str, Mapping[str, Any]]:
    if not path.is_file():
        missing.append(f"{path.name} is absent: domain kinds, the entropy band and the plan of the run are unknown")
        return "", {}
    text = path.read_text(errors="replace")
    try:
        RunFolder(path.parent).check_recipe() if path.name == RunFolder(path.parent).recipe.name else read_object(path)
    except ValueError as error:
        missing.append(f"{path.name} is read as it is: {str(error).removeprefix(f'{path}: ')}")
    try:
        return text, as_mapping(YAML(typ="safe", pure=True).load(text))
    except YAMLError as error:
        missing.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:120]}")
        return text, {}


def _read_transfer(path: Path, missing: list[str]) -> TransferMatrix | None:
    if not holds_transfer(path):
        missing.append(f"{path.name} is absent: no evaluation yet, so no held-out scores and no transfer")
        return None
    try:
        return read_transfer(path)
    except ValueError as error:
        missing.append(f"{path.name} cannot be used: {str(error).removeprefix(f'{path}: ')[:160]}")
        return None


def _read_predicted(path: Path, missing: list[str]) -> list[Mapping[str, Any]]:
    if not path.exists():
        return []
    found = _read_json(path, missing)
    return [stage for stage in found if isinstance(stage, Mapping)] if isinstance(found, list) else []


def _read_json(path: Path, missing: list[str]) -> Any:
    if not path.is_file():
        missing.append(f"{path.name} is absent")
        return None
    try:
        return json.loads(unsealed(path.read_bytes()))
    except ValueError as error:
        missing.append(f"{path.name} {'is ' + str(error) if 'sha256' in str(error) else 'is not whole JSON'}")
        return None


def _read_lines(folder: RunFolder, ledger: str, missing: list[str], *, gives: str) -> list[dict[str, Any]]:
    """Return the lines of a ledger; those that are not whole objects are counted in `missing`."""
    path = folder.ledger(ledger)
    if not path.is_file():
        missing.append(f"{path.name} is absent: no {gives}")
        return []
    broken: list[int] = []
    try:
        rows = folder.choices(broken) if ledger == "decisions" else folder.read(ledger, broken)
    except ValueError as error:
        missing.append(f"{path.name} cannot be used: {str(error).removeprefix(f'{folder.path}/')}")
        return []
    if broken == [len(rows) + 1]:
        missing.append(f"{path.name}: its last line is cut off")
    elif broken:
        missing.append(f"{path.name}: {len(broken)} unreadable lines were left out, the first is line {broken[0]}")
    if not rows:
        missing.append(f"{path.name} is empty: no {gives}")
    return rows


def _read_optional(folder: RunFolder, ledger: str, missing: list[str], *, gives: str) -> list[dict[str, Any]]:
    """Read a ledger that a run may well not have."""
    return _read_lines(folder, ledger, missing, gives=gives) if folder.ledger(ledger).exists() else []


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Turn logs into one series a key; where a step was logged twice, the later value stands."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(rows):
        step = row.get("step")
        if isinstance(step, (int, float)):
            alike.setdefault(tuple(row), []).append(place)
    parts: dict[str, list[np.ndarray]] = {}
    for keys, places in alike.items():  # most lines have the same keys: their columns are taken out whole
        columns = dict(zip(keys, zip(*(rows[place].values() for place in places), strict=True), strict=True))
        steps = np.array(columns.pop("step"), dtype=float)
        for key, column in columns.items():
            known = _numbers(column)
            kept = np.isfinite(known)
            if kept.any():
                parts.setdefault(key, []).append(np.stack([steps, known, np.array(places, dtype=float)])[:, kept])
    return {key: _series(np.concatenate(found, axis=1)) for key, found in parts.items()}


def _numbers(column: Sequence[Any]) -> np.ndarray:
    """Return what was logged under one key; NaN for what is no number."""
    if not {*map(type, column)} <= {int, float, bool}:
        column = [value if isinstance(value, (int, float)) else math.nan for value in column]
    return np.array(column, dtype=float)


def _series(points: np.ndarray) -> Series:
    """Return a series from its steps, its values and the places at which they were logged, [3, T]."""
    steps, values, _ = points[:, np.lexsort((points[2], points[0]))]
    last = np.append(steps[1:] != steps[:-1], True)
    return Series(steps[last], values[last])


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return what a file should have as a mapping; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}
