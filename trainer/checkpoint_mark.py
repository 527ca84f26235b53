"""The mark by which a checkpoint is whole: written last, with what the run remembers and a digest of every file.

A folder that is being saved holds `UNFINISHED_FILE`, which becomes the mark by being renamed: so one that was cut off, which
may go, is told from one that was whole and has lost its mark, which may not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from polyphony.curricula.files import replace_file, sealed
from polyphony.trainer.run.folder import STATE_FILE, UNFINISHED_FILE
from polyphony.trainer.run.json_lines import read_object

VERSION = 2
"""Of `STATE_FILE`; version 1 had no digests."""


def begin_mark(checkpoint: Path) -> None:
    """Say that a checkpoint is being saved, and may be deleted until it is marked as whole."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    if not (checkpoint / STATE_FILE).is_file():
        (checkpoint / UNFINISHED_FILE).touch()


def is_unfinished(checkpoint: Path) -> bool:
    """Whether a checkpoint was cut off while being saved: it never had its mark."""
    if (checkpoint / STATE_FILE).is_file():
        return False
    return (checkpoint / UNFINISHED_FILE).is_file() or not any(checkpoint.iterdir())


def write_mark(checkpoint: Path, **remembered: Any) -> None:
    """Mark a checkpoint as whole. All its files are on the disk, and their digests taken, before the mark is."""
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    files = [path for path in found if path not in (checkpoint / STATE_FILE, checkpoint / UNFINISHED_FILE)]
    names = [str(path.relative_to(checkpoint)) for path in files]
    document = {"version": VERSION, "files": dict(zip(names, digests(files, flush=True), strict=True)), **remembered}
    for folder in {path.parent for path in files}:
        _flush(folder)
    replace_file(checkpoint / UNFINISHED_FILE, sealed(json.dumps(document)))
    (checkpoint / UNFINISHED_FILE).replace(checkpoint / STATE_FILE)
    _flush(checkpoint)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; one whose deletion is cut off is unfinished."""
    if (checkpoint / STATE_FILE).is_file():
        (checkpoint / STATE_FILE).replace(checkpoint / UNFINISHED_FILE)
    for path in checkpoint.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED_FILE:
            path.unlink()
    shutil.rmtree(checkpoint)


def digests(paths: Iterable[Path], *, flush: bool = False) -> list[str]:
    """Return the sha256 of files, four at a time; with `flush` they are on the disk when this returns.

    No digest is cheaper: sha256 takes 1,540 MB a second of processor time where a processor has instructions for it, blake2b
    850 (AMD EPYC, a file of 2 GB that has just been written). So 16 GB of weights and optimizer are 10 s of one processor. A
    checkpoint is read once when it is saved and once when it is gone on from, or gone back to; older ones never.
    """

    def of(path: Path) -> str:
        with path.open("rb") as file:
            if flush:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(of, paths))


def _flush(folder: Path) -> None:
    """Have the disk know which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_mark(checkpoint: Path) -> dict[str, Any]:
    """Return what marks a checkpoint as whole. Raises ValueError that names it where it is missing or damaged."""
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"checkpoint {checkpoint} has no {STATE_FILE}: it was not saved to the end, or not by Polyphony"
        )
    document = read_object(path)
    version = document.get("version", 1)
    known = {1: {"curriculum"}, VERSION: {"files", "ledgers", "curriculum"}}
    if version not in known:
        raise ValueError(f"{path}: version {version!r} is not read here, only {', '.join(map(str, known))}")
    if set(document) - {"version"} != known[version]:
        raise ValueError(f"{path}: expected {', '.join(sorted(known[version]))}, got {', '.join(sorted(document))}")
    return document


def damage(checkpoint: Path) -> str:
    """Return what of a checkpoint is not as it was saved; empty where all is."""
    if not (checkpoint / STATE_FILE).is_file():
        return f"{STATE_FILE} is missing"
    try:
        known = read_mark(checkpoint).get("files")
    except ValueError as error:
        return str(error)
    if known is None:
        return _lack(checkpoint)
    for name in known:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    now = digests([checkpoint / name for name in known])
    changed = [name for name, digest in zip(known, now, strict=True) if digest != known[name]]
    return f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} damaged" if changed else ""


def _lack(checkpoint: Path) -> str:
    """Return what is missing of a checkpoint without digests, that Transformers would go on without."""
    sharded = any(checkpoint.glob("global_step*"))  # by DeepSpeed, which knows its files itself
    needed = ("trainer_state.json", "scheduler.pt", "rng_state*.pth", *(() if sharded else ("optimizer*",)))
    return next((f"{name} is missing" for name in needed if not any(checkpoint.glob(name))), "")
