"""What a run leaves: every name in its folder, its ledgers appended line by line and cut on resume, and how it ended.

No other file knows these names. Imports no torch: the folder is claimed, read and reported without it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from polyphony.curricula.decision_log import wholes
from polyphony.curricula.files import replace_file, replacing
from polyphony.curricula.transfer.matrix import TransferMatrix, copy_document

LEDGERS = ("metrics", "decisions", "refills", "samples", "alarms", "evaluations", "transfer")
"""The line-by-line files; each line has the `step` it belongs to."""
STATE_FILE = "polyphony.json"
"""Written last into a checkpoint; a folder without it was cut off while being saved."""
BEST_FILE = "best.json"
"""Beside the checkpoints: which one is best."""
MAY_CHANGE = ("name", "checkpoint", "faults", "guardrails", "rollouts.max_grader_failures")
"""Settings with other values of which a run from Python may go on: what it practised and measured was not made by them."""
POOL_FILE = "pool.npz"
"""What is known of the training prompts: in a run's folder, in its checkpoints, and in the folder of a screen."""


class Interrupted(SystemExit):
    """A signal ended the run after its checkpoint was saved: no error; uncaught, the process ends as signals end one."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.step = step

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name}: checkpoint at step {self.step} saved"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run. Its ledgers are appended a line at a time; its whole files are for `replace_file`.

    Example: `RunFolder(Path("runs/demo")).read("metrics")[-1]["step"]`
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; a run from Python has `settings`."""
        return self.path / "recipe.yaml"

    @property
    def settings(self) -> Path:
        """What a run from Python was made with, under a recipe's keys; under `script` those that only its script knows."""
        return self.path / "settings.json"

    @property
    def provenance(self) -> Path:
        """Versions, hashes, and under `imports_from` the folders where modules of the user's were found."""
        return self.path / "provenance.json"

    @property
    def transfer(self) -> Path:
        """Per-item scores of every evaluation, that of a probe is named alike; of a run, as of its last checkpoint: the
        ledger `transfer` is ahead of it, see `read_transfer`."""
        return self.path / "transfer.json"

    @property
    def base(self) -> Path:
        """What the base model said to some held-out prompts."""
        return self.path / "base.json"

    @property
    def predicted(self) -> Path:
        """After each planned stage, what was expected and what came."""
        return self.path / "predicted.json"

    @property
    def prompts(self) -> Path:
        """Ids of the training rows by domain, which the decisions name by their places."""
        return self.path / "prompts.json"

    @property
    def pool(self) -> Path:
        return self.path / POOL_FILE

    @property
    def end(self) -> Path:
        """How the run ended; absent while it runs, and after an interruption or a failure: then it can go on."""
        return self.path / "end.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained policy, for `from_pretrained`."""
        return self.path / "final"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def replay(self, scheduler: str) -> Path:
        """Return the page that lays another scheduler's mixtures beside the run's."""
        return self.path / f"replay-{''.join(c if c.isalnum() else '-' for c in scheduler)}.html"

    @property
    def logs(self) -> Path:
        """Where a batch system writes to, before the run begins already."""
        return self.path / "logs"

    @property
    def wandb(self) -> Path:
        """Where W&B keeps its own files."""
        return self.path / "wandb"

    @property
    def dashboard(self) -> Path:
        """The specification of the run's W&B dashboard; beside it, with another suffix, its URL."""
        return self.path / "dashboard.json"

    @property
    def screened(self) -> Path:
        """The summary of a screen, whose ledgers are `answers` and `impossible`."""
        return self.path / "screen.json"

    def ledger(self, name: str) -> Path:
        """Return the line-by-line file of that name."""
        return self.path / f"{name}.jsonl"

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        written = (self.transfer, *map(self.ledger, LEDGERS), *self.checkpoints.glob(f"*/{STATE_FILE}"))
        return any(path.exists() for path in written)

    @property
    def is_free(self) -> bool:
        """Whether there is nothing but what a batch system writes and, of a trainer that never trained, empty folders."""
        return not any(path.is_file() for path in self.path.rglob("*") if self.logs not in path.parents)

    def refuse_other(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError unless the folder is free, or of a run from Python with these `settings`: it can go on."""
        if not self.settings.is_file():
            if not self.is_free:
                what = (
                    "holds the run of a recipe: --resume goes on with it;" if self.recipe.is_file() else "is not empty;"
                )
                raise ValueError(f"run folder {self.path} {what} choose another")
            return
        then, now = flat(json.loads(self.settings.read_text())), flat(settings)
        for key in sorted(then | now) if self.holds_run else ():
            if then.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
                raise ValueError(
                    f"run folder {self.path} holds a run with {key}={then.get(key)!r}, now it is {now.get(key)!r}: "
                    "go on with what it was made with, or choose another"
                )

    def append(self, name: str, *entries: Mapping[str, Any]) -> None:
        """Add lines to a ledger; they are in the system's hands when this returns, so a kill loses nothing."""
        lines = _lines(entries)
        with self.ledger(name).open("a", encoding="utf-8") as file:
            file.write(lines)

    def begin(self, name: str, *entries: Mapping[str, Any]) -> None:
        """Write a ledger anew."""
        replace_file(self.ledger(name), _lines(entries))

    def read(
        self, name: str, broken: list[int] | None = None, cut: Callable[[bytes], bytes] = bytes
    ) -> list[dict[str, Any]]:
        """Return a ledger's lines, as `read_lines` does; none where the file is absent."""
        path = self.ledger(name)
        return read_lines(path, broken, cut) if path.exists() else []

    def decisions(self, broken: list[int] | None = None) -> list[dict[str, Any]]:
        """Return a whole line a draw, as `decision_log.decision_line` made it; `broken` as for `read_lines`."""
        ids = json.loads(self.prompts.read_text(encoding="utf-8")) if self.prompts.is_file() else {}
        return wholes(self.read("decisions", broken), ids)

    def save_transfer(self) -> None:
        """Bring `transfer` up to its ledger, where there is one."""
        if _holds_lines(self.ledger("transfer")):
            with self.ledger("transfer").open("rb") as ledger, replacing(self.transfer, "wb") as out:
                copy_document(ledger, out)

    def record_end(self, how: Literal["finished", "stopped"], *, why: str, step: int) -> None:
        """Say that the run is over, after which step, and why."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        replace_file(self.end, json.dumps({"how": how, "why": why, "step": step, "at": at}))

    @property
    def has_ended(self) -> bool:
        """Whether the run is over; one that was interrupted or killed is not, nor is one that has been taken up again."""
        return self.end.is_file()

    def cut(self, step: int) -> Path | None:
        """Take all lines after `step` out of the ledgers and keep them as `attempt-<n>`; return that folder, if any."""
        tails = {}
        for name in LEDGERS:
            path = self.ledger(name)
            text = path.read_bytes() if path.exists() else b""
            lines = zip(whole_lines(text), self.read(name), strict=True)
            kept = [line for line, entry in lines if entry["step"] <= step]
            head = b"".join(line + b"\n" for line in kept)
            if head != text:
                tails[name] = (head, text[len(head) :] if text.startswith(head) else text)
        if not tails:
            return None
        attempt = RunFolder(self._new_attempt())
        for name, (head, tail) in tails.items():
            replace_file(attempt.ledger(name), tail)
            replace_file(self.ledger(name), head)
        if self.transfer.exists() and not _holds_lines(self.ledger("transfer")):
            # of a version that kept no ledger of it, or of rows that are all gone
            replace_file(attempt.transfer, self.transfer.read_text(encoding="utf-8"))
        return attempt.path

    def _new_attempt(self) -> Path:
        n = max((int(path.name.removeprefix("attempt-")) for path in self.path.glob("attempt-*")), default=0)
        attempt = self.path / f"attempt-{n + 1}"
        attempt.mkdir()
        return attempt


def flat(document: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their key paths.

    Example: `flat({"grpo": {"seed": 1}}) == {"grpo.seed": 1}`
    """
    found = {}
    for key, value in document.items():
        place = f"{before}{key}"
        found |= flat(value, f"{place}.") if isinstance(value, Mapping) and value else {place: value}
    return found


def read_transfer(path: Path) -> TransferMatrix:
    """Return what a transfer file says; of a run that goes on, what its ledger says. Nothing is written.

    Raises FileNotFoundError, and ValueError that names the file where it is not valid.
    """
    folder = RunFolder(path.parent)
    ledger = folder.ledger("transfer")
    if path.name != folder.transfer.name or not _holds_lines(ledger) or not _is_newer(ledger, path):
        return TransferMatrix.load(path)
    try:
        return TransferMatrix.from_lines(read_lines(ledger))
    except ValueError as error:
        raise ValueError(str(error) if str(ledger) in str(error) else f"{ledger}: {error}") from error


def holds_transfer(path: Path) -> bool:
    """Whether `read_transfer` finds anything."""
    folder = RunFolder(path.parent)
    return path.is_file() or (path.name == folder.transfer.name and _holds_lines(folder.ledger("transfer")))


def _holds_lines(ledger: Path) -> bool:
    return ledger.is_file() and ledger.stat().st_size > 0


def _is_newer(path: Path, than: Path) -> bool:
    return not than.exists() or path.stat().st_mtime_ns > than.stat().st_mtime_ns


def read_lines(
    path: Path, broken: list[int] | None = None, cut: Callable[[bytes], bytes] = bytes
) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; a last line that was cut off while being written is left out.

    Only "\\n" ends a line: what else Unicode calls a line's end may stand in a text. Any other line that is no object raises
    ValueError, unless its number, counted from 1, may go into `broken`; then the cut-off line's does too. `cut` takes out of
    a line what need not be read.
    """
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            entry = _object(cut(line), errors="strict" if broken is None else "replace")
            if entry is not None:
                found.append(entry)
            elif broken is not None:
                broken.append(number)
            elif line.endswith(b"\n"):
                raise ValueError(f"{path}: line {number} is no JSON object")
    return found


def _lines(entries: Iterable[Mapping[str, Any]]) -> str:
    compact = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return "".join(json.dumps(entry, **compact) + "\n" for entry in entries)


def whole_lines(text: bytes) -> list[bytes]:
    """Return the lines of a ledger's bytes as they are, without one that was cut off at the end."""
    lines = [line for line in text.split(b"\n") if line.strip()]
    return lines if not lines or _object(lines[-1], errors="strict") is not None else lines[:-1]


def _object(line: bytes, *, errors: str) -> dict[str, Any] | None:
    """Return the object of a line; None for anything else."""
    try:
        entry = json.loads(line.decode(errors=errors))
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
