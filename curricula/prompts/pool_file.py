"""The pools of a run as one file: numpy columns, written whole or not at all."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyphony.curricula.files import replacing

VERSION = 1
_COLUMNS = ("successes", "failures", "visits", "due")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What is known of N prompts."""

    ids: Sequence[str]
    successes: np.ndarray
    """[N] float32, discounted."""
    failures: np.ndarray
    """[N] float32, discounted."""
    visits: np.ndarray
    """[N] int32: groups with at least one graded completion."""
    due: np.ndarray
    """[N] int32: the draw from which on a waiting prompt may be tried again."""
    clock: int
    """Draws made when this was taken."""

    @classmethod
    def empty(cls, ids: Sequence[str]) -> Columns:
        n = len(ids)
        counts, whole = np.zeros((2, n), dtype=np.float32), np.zeros((2, n), dtype=np.int32)
        return cls(ids=ids, successes=counts[0], failures=counts[1], visits=whole[0], due=whole[1], clock=0)


class PoolFileError(ValueError):
    """A file that is no pool, or a broken one; the message names it."""


def save_pools(path: Path, pools: Mapping[str, Columns]) -> None:
    """Replace `path` atomically by the columns of every domain; 1,000,000 prompts take about half a second."""
    arrays = {f"{k}.{name}": getattr(c, name) for k, c in enumerate(pools.values()) for name in _COLUMNS}
    for k, columns in enumerate(pools.values()):
        arrays[f"{k}.ids"] = np.frombuffer(json.dumps(list(columns.ids), ensure_ascii=False).encode(), dtype=np.uint8)
    about = {"version": VERSION, "domains": list(pools), "clocks": [c.clock for c in pools.values()]}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with replacing(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_pools(path: Path) -> dict[str, Columns]:
    """Return the columns of every domain. Raises PoolFileError for a file that is none of ours or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["version"] != VERSION:
                raise PoolFileError(f"pool file {path}: version {about['version']} is not the {VERSION} read here")
            return {name: _columns(arrays, k, about["clocks"][k]) for k, name in enumerate(about["domains"])}
    except PoolFileError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PoolFileError(f"pool file {path} cannot be read: {error}") from error


def move_aside(path: Path) -> Path:
    """Rename a file that is not to be used, and not to be lost; return its new name."""
    n = 1
    while (aside := path.with_name(f"{path.name}.aside-{n}")).exists():
        n += 1
    path.rename(aside)
    return aside


def _columns(arrays: Mapping[str, np.ndarray], k: int, clock: int) -> Columns:
    ids = json.loads(arrays[f"{k}.ids"].tobytes())
    found = {name: arrays[f"{k}.{name}"] for name in _COLUMNS}
    if any(len(column) != len(ids) for column in found.values()):
        raise ValueError("its columns differ in length")
    return Columns(ids=ids, clock=clock, **found)


def own_pool(path: Path, prompts: Any, *, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the pool at `path`, None where there is none; one that is damaged, or of other prompts, is moved aside.

    `prompts` are the ids of each domain; `say` is told what was moved.
    """
    if not path.exists():
        return None
    try:
        saved = load_pools(path)
        if any(not set(saved[name].ids).isdisjoint(ids) for name, ids in prompts.items() if name in saved):
            return saved
        why = f"pool file {path} is of another data set: it knows none of these prompts"
    except PoolFileError as error:
        why = str(error)
    say(f"{why}; moved to {move_aside(path)}")
    return None
