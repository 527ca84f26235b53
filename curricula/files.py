"""Files that are whole or as they were: a killed process leaves the previous version in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path` and rename it into place: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, whole or not at all."""
    with replacing(path, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)
