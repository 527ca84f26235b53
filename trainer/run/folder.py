"""What a run leaves: recipe, metrics, decisions, samples, transfer rows. Appended line by line, cut on resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyphony.curricula.files import replace_file

LEDGERS = ("metrics", "decisions", "refills", "samples", "alarms", "evaluations")
"""The line-by-line files; each line has the `step` it belongs to."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run. Every whole file is replaced atomically, every ledger is appended a line at a time."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def transfer(self) -> Path:
        return self.path / "transfer.json"

    @property
    def base(self) -> Path:
        """What the base model said to some held-out prompts."""
        return self.path / "base.json"

    def ledger(self, name: str) -> Path:
        return self.path / f"{name}.jsonl"

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Add one line to a ledger; it is in the system's hands when this returns, so a kill loses nothing."""
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
        with self.ledger(name).open("a", encoding="utf-8") as file:
            file.write(line)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Return a ledger's whole lines; a last line that was cut off while being written is left out."""
        path = self.ledger(name)
        return _whole_lines(path.read_text(encoding="utf-8")) if path.exists() else []

    def write(self, name: str, text: str) -> None:
        """Replace a whole file atomically."""
        replace_file(self.path / name, text)

    def cut(self, step: int) -> Path | None:
        """Take all lines after `step` out of the ledgers and keep them as `attempt-<n>`; return that folder, if any."""
        tails = {}
        for name in LEDGERS:
            path = self.ledger(name)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            kept = [entry for entry in _whole_lines(text) if entry["step"] <= step]
            head = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept)
            if head != text:
                tails[name] = (head, text[len(head) :] if text.startswith(head) else text)
        if not tails:
            return None
        attempt = self._new_attempt()
        for name, (head, tail) in tails.items():
            replace_file(attempt / f"{name}.jsonl", tail)
            replace_file(self.ledger(name), head)
        if self.transfer.exists():
            replace_file(attempt / self.transfer.name, self.transfer.read_text(encoding="utf-8"))
        return attempt

    def _new_attempt(self) -> Path:
        n = max((int(path.name.removeprefix("attempt-")) for path in self.path.glob("attempt-*")), default=0)
        attempt = self.path / f"attempt-{n + 1}"
        attempt.mkdir()
        return attempt


def _whole_lines(text: str) -> list[dict[str, Any]]:
    lines = text.split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
