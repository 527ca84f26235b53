"""What a run leaves: every name in its folder, its ledgers appended line by line and cut on resume, and how it ended.

No other file knows these names. Imports no torch: the folder is claimed, read and reported without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from polyphony.curricula.files import replace_file

LEDGERS = ("metrics", "decisions", "refills", "samples", "alarms", "evaluations")
"""The line-by-line files; each line has the `step` it belongs to."""
STATE_FILE = "polyphony.json"
"""Written last into a checkpoint; a folder without it was cut off while being saved."""
BEST_FILE = "best.json"
"""Beside the checkpoints: which one is best."""
POOL_FILE = "pool.npz"
"""What is known of the training prompts: in a run's folder, in its checkpoints, and in the folder of a screen."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run. Every whole file is replaced atomically, every ledger is appended a line at a time.

    Example: `RunFolder(Path("runs/demo")).read("metrics")[-1]["step"]`
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; none in a run from Python."""
        return self.path / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        """Versions, hashes, and under `imports_from` the folders where modules of the user's were found."""
        return self.path / "provenance.json"

    @property
    def transfer(self) -> Path:
        """Per-item scores of every evaluation; that of a probe is named alike."""
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

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Add one line to a ledger; it is in the system's hands when this returns, so a kill loses nothing."""
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
        with self.ledger(name).open("a", encoding="utf-8") as file:
            file.write(line)

    def read(self, name: str, broken: list[int] | None = None) -> list[dict[str, Any]]:
        """Return a ledger's lines, as `read_lines` does; none where the file is absent."""
        path = self.ledger(name)
        return read_lines(path, broken) if path.exists() else []

    def write(self, path: Path, text: str) -> None:
        """Replace one of the folder's files atomically."""
        replace_file(path, text)

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
            kept = [entry for entry in self.read(name) if entry["step"] <= step]
            head = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept).encode()
            if head != text:
                tails[name] = (head, text[len(head) :] if text.startswith(head) else text)
        if not tails:
            return None
        attempt = RunFolder(self._new_attempt())
        for name, (head, tail) in tails.items():
            replace_file(attempt.ledger(name), tail)
            replace_file(self.ledger(name), head)
        if self.transfer.exists():
            replace_file(attempt.transfer, self.transfer.read_text(encoding="utf-8"))
        return attempt.path

    def _new_attempt(self) -> Path:
        n = max((int(path.name.removeprefix("attempt-")) for path in self.path.glob("attempt-*")), default=0)
        attempt = self.path / f"attempt-{n + 1}"
        attempt.mkdir()
        return attempt


def read_lines(path: Path, broken: list[int] | None = None) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; a last line that was cut off while being written is left out.

    Only "\\n" ends a line: what else Unicode calls a line's end may stand in a text. Any other line that is no object raises
    ValueError, unless its number, counted from 1, may go into `broken`; then the cut-off line's does too.
    """
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = _object(line, errors="strict" if broken is None else "replace")
        if entry is not None:
            found.append(entry)
        elif broken is not None:
            broken.append(number)
        elif number < len(lines):
            raise ValueError(f"{path}: line {number} is no JSON object")
    return found


def _object(line: bytes, *, errors: str) -> dict[str, Any] | None:
    """Return the object of a line; None for anything else."""
    try:
        entry = json.loads(line.decode(errors=errors))
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
