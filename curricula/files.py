"""Files that are whole or as they were: a killed process leaves the previous version in place.

A sealed JSON object has its own sha256 as its last key, so that any byte that changes later is seen.
"""

from __future__ import annotations

import hashlib
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


_SEAL, _END = b',"sha256":"', b'"}'
_SEAL_BYTES = len(_SEAL) + 64 + len(_END)


def sealed(document: str) -> str:
    """Return the text of a JSON object that is not empty with its sha256 as its last key."""
    return document[:-1] + seal_of(hashlib.sha256(document.encode())).decode()


def seal_of(digest: hashlib._Hash) -> bytes:
    """Return what stands in the stead of the last brace of an object with that sha256."""
    return _SEAL + digest.hexdigest().encode() + _END


def unsealed(document: bytes) -> bytes:
    """Return what `sealed` was given; a document without a seal, of older versions, as it is.

    Raises ValueError where a byte is not what it was.
    """
    text = document.rstrip()
    head, seal = text[:-_SEAL_BYTES], text[-_SEAL_BYTES:]
    if not (seal.startswith(_SEAL) and seal.endswith(_END)):
        return document
    whole = head + b"}"
    if seal_of(hashlib.sha256(whole)) != seal:
        raise ValueError("damaged: it does not have the sha256 that it was written with")
    return whole
