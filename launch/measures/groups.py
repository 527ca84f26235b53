"""Rows measured a group at a time, each group in a process of its own: one that hangs or dies takes no other along.

`python -m polyphony.launch.measures.groups GROUP POLICY FOLDER PAIRS STEPS`, which `measure` starts, writes a line a row
into the folder. What needs torch is imported inside functions.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from polyphony.launch.cluster.local import PYTHON, leave_nothing
from polyphony.launch.measures import Effort
from polyphony.launch.measures.result import Result, Timing, failed, paired, read_result

GROUPS = {
    "ours": ("engine", "sync", "weight check", "step", "peak memory"),
    "resume": ("resume",),
    "colocate": ("colocate step", "colocate sync", "colocate peak memory"),
    "worker": ("worker sync",),
    "nodes": ("two-node sync",),
}
"""What each group measures, in the table's order."""

MOST_SAID = 20
"""Lines of what a process said that are shown where a row of its failed."""


def measure(group: str, policy: Path, folder: Path, *, effort: Effort, limit_s: float | None = None) -> list[Result]:
    """Return a group's rows over a policy, measured by a process that has `limit_s` seconds."""
    words = [*PYTHON, "-m", __name__, group, str(policy), str(folder), str(effort.pairs), str(effort.steps)]
    return rows_of(words, GROUPS[group], folder, limit_s=limit_s)


def rows_of(words: Sequence[str], names: Sequence[str], folder: Path, *, limit_s: float | None) -> list[Result]:
    """Return the rows of these names that a command writes; one that it leaves out gets the reason for its value."""
    folder.mkdir(parents=True)
    said = folder / "said.txt"
    with said.open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            leave_nothing(process.pid)
            process.wait()
    written = _written(folder)
    lines = said.read_text(errors="replace").splitlines()
    why = RuntimeError(_why(code, lines, limit_s))
    rows = [written.get(name) or failed(name, why) for name in names]
    if any(row.error for row in rows):
        print("\n".join(lines[-MOST_SAID:]), file=sys.stderr)
    return rows


def _why(code: int | None, lines: Sequence[str], limit_s: float | None) -> str:
    if code is None:
        return f"not measured within {limit_s:.0f} s"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"its process ended by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}: {last}"


def compared(pairs: Sequence[Mapping[str, Result]]) -> list[Result]:
    """Return ours beside stock TRL with its own engine, from pairs of both groups' rows, by name."""
    steps, syncs = (
        [(_timing(rows[name]), _timing(rows[f"colocate {name}"])) for rows in pairs] for name in ("step", "sync")
    )
    last, against = pairs[-1], "TRL's colocate"
    tokens = f"ours {last['step'].note}; {last['colocate step'].note}"
    peaks = [max(rows[name].value for rows in pairs) for name in ("peak memory", "colocate peak memory")]
    return [
        paired(f"step, {against}", "s", steps, note=tokens),
        paired(f"sync, {against}", "s", syncs),
        Result(
            name=f"peak memory, {against}", value=peaks[0], unit="GiB", baseline=peaks[1], ratio=peaks[0] / peaks[1]
        ),
    ]


def _timing(row: Result) -> Timing:
    return Timing(row.value, row.cpu or float("nan"))


def _rows(folder: Path) -> Path:
    return folder / "rows"


def _written(folder: Path) -> dict[str, Result]:
    lines = _rows(folder).read_text().splitlines() if _rows(folder).exists() else []
    return {row.name: row for row in map(read_result, map(json.loads, lines))}


def write(rows: Iterable[tuple[str, Callable[[], Result]]], folder: Path) -> None:
    """Measure rows one after the other and write each down; one that fails is a row that says so."""
    with _rows(folder).open("a") as file:
        for name, row in rows:
            try:
                measured = row()
            except Exception as error:  # whatever it is, the others are measured all the same
                traceback.print_exc()
                measured = failed(name, error)
            file.write(json.dumps(asdict(measured)) + "\n")
            file.flush()


def main(arguments: Sequence[str]) -> None:
    """Measure one group, with the environment variables that the command has set."""
    from polyphony.launch.measures import resume, spine, workers

    group, policy, folder, pairs, steps = arguments
    scratch, effort = Path(folder), Effort(pairs=int(pairs), steps=int(steps))
    rows: dict[str, Iterable[tuple[str, Callable[[], Result]]]] = {
        "ours": spine.ours(Path(policy), scratch, effort=effort),
        "colocate": spine.colocate(Path(policy), scratch, effort=effort),
        "resume": resume.rows(Path(policy), scratch),
        "worker": workers.beside(Path(policy), scratch),
        "nodes": workers.elsewhere(Path(policy), scratch),
    }
    write(rows[group], scratch)


if __name__ == "__main__":
    main(sys.argv[1:])
