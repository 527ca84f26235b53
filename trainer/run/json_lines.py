"""JSON as a run keeps it: ledgers of a line an object, read past one that was cut off, and whole objects with a seal."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from polyphony.curricula.files import replace_file, sealed, unsealed


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, its seal checked where it has one. Raises ValueError that names the file."""
    try:
        document = json.loads(unsealed(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected an object, got {document!r:.60}")
    return document


def write_object(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal."""
    replace_file(path, sealed(json.dumps(document, indent=1, ensure_ascii=False)))


@contextmanager
def uncollected() -> Iterator[None]:
    """Let the collector of cycles rest while many objects are made that all stay: it would look through them over and
    over, which doubles the time of a long run's ledger. Afterwards it is as it was."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_lines(
    path: Path, broken: list[int] | None = None, cut: Callable[[bytes], bytes] = bytes
) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; a last line that was cut off while being written is left out.

    Only "\\n" ends a line: what else Unicode calls a line's end may stand in a text. Any other line that is no object raises
    ValueError, unless its number, counted from 1, may go into `broken`; then the cut-off line's does too. `cut` takes out of
    a line what need not be read.
    """
    with uncollected():
        return list(each_line(path, broken, cut))


def each_line(
    path: Path, broken: list[int] | None = None, cut: Callable[[bytes], bytes] = bytes
) -> Iterator[dict[str, Any]]:
    """Yield what `read_lines` returns."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            entry, why = None, "is no JSON object"
            try:
                entry = _object(cut(line), errors="strict" if broken is None else "replace")
            except ValueError as error:
                why = f"is {error}"
            if entry is not None:
                yield entry
            elif broken is not None:
                broken.append(number)
            elif line.endswith(b"\n"):
                raise ValueError(f"{path}: line {number} {why}")


def as_lines(entries: Iterable[Mapping[str, Any]], *, is_sealed: bool) -> str:
    """Return the text of a ledger's lines; with seals, each has its digest."""
    compact = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    lines = (json.dumps(entry, **compact) for entry in entries)
    return "".join((sealed(line) if is_sealed else line) + "\n" for line in lines)


def whole_lines(text: bytes) -> list[bytes]:
    """Return the lines of a ledger's bytes as they are, without one that was cut off at the end."""
    lines = [line for line in text.split(b"\n") if line.strip()]
    return lines if not lines or _object(lines[-1], errors="strict") is not None else lines[:-1]


def _object(line: bytes, *, errors: str) -> dict[str, Any] | None:
    """Return the object of a line; None for anything else."""
    try:
        entry = _parsed(line, errors)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _parsed(line: bytes, errors: str) -> Any:
    """Return what `json.loads` does, in a third of its time; what the faster one refuses is for it to judge."""
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line.decode(errors=errors))
