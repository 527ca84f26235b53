"""Valid replies of an endpoint by what was asked, in a SQLite file that ranks share."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def kept(cache: str, key: str) -> str | None:
    """Return the reply to a question of this key, None where there is none."""
    row = _with_cache(cache, "SELECT reply FROM replies WHERE key = ?", (key,))
    return row[0] if row and isinstance(row[0], str) else None


def keep(cache: str, key: str, reply: str) -> None:
    """Write a reply down under its question's key."""
    _with_cache(cache, "INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))


def _with_cache(cache: str, statement: str, values: tuple[str, ...]) -> Any:
    """Return the first row that a statement finds; one that is damaged is set aside, and a new one begun."""
    for _ in range(2):
        try:
            with contextlib.closing(sqlite3.connect(cache, timeout=30.0)) as database, database:  # ranks share the file
                database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
                return database.execute(statement, values).fetchone()
        except sqlite3.OperationalError as error:  # locked, full, not to be written: the judge is asked all the same
            logger.warning("judge: cache %s: %s", cache, error)
            return None
        except sqlite3.DatabaseError as error:
            aside = f"{cache}.damaged-{time.time_ns()}"
            logger.warning("judge: cache %s is damaged (%s); set aside as %s", cache, error, aside)
            for part in ("", "-journal", "-wal"):
                with contextlib.suppress(FileNotFoundError):  # another rank was first
                    Path(cache + part).replace(aside + part)
    return None
