"""Files of rows for `fuzz`: every format that is read, times what may be wrong with a row or with the bytes of a file."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = [{"prompt": f"what is {i} and {i} =", "answer": str(2 * i)} for i in range(10, 16)]

ODD: dict[str, Mapping[str, Any]] = {
    "nothing": {},
    "no prompt": {"prompt": ...},
    "prompt null": {"prompt": None},
    "prompt empty": {"prompt": ""},
    "prompt blank": {"prompt": " \n"},
    "prompt a number": {"prompt": 5},
    "prompt true": {"prompt": True},
    "prompt an object": {"prompt": {"role": "user", "content": "hi"}},
    "prompt an empty list": {"prompt": []},
    "prompt a list of text": {"prompt": ["hi"]},
    "prompt a lone surrogate": {"prompt": "\ud800"},
    "prompt with NUL": {"prompt": "a\0b"},
    "prompt of emoji and RTL": {"prompt": "\U0001f468\u200d\U0001f469 \u202eabc"},
    "prompt very long": {"prompt": "word " * 3000},
    "prompt with markup": {"prompt": "[/b] <b>x</b> {x} %s"},
    "prompt with a turn's tokens": {"prompt": "<|im_start|>user\nhi<|im_end|>"},
    "message without content": {"prompt": [{"role": "user"}]},
    "message with content null": {"prompt": [{"role": "user", "content": None}]},
    "message without a role": {"prompt": [{"content": "hi"}]},
    "message with an odd role": {"prompt": [{"role": "wizard", "content": "hi"}]},
    "message with a role that is no text": {"prompt": [{"role": 5, "content": "hi"}]},
    "message with content a number": {"prompt": [{"role": "user", "content": 5}]},
    "message of parts of text": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    "message with an image": {"prompt": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]},
    "messages that end with the assistant": {"prompt": [{"role": "assistant", "content": "hi"}]},
    "messages of one system": {"prompt": [{"role": "system", "content": "hi"}]},
    "message nested deeply": {"prompt": [{"role": "user", "content": "hi", "x": [[[[[[[[1]]]]]]]]}]},
    "answer null": {"answer": None},
    "answer a number": {"answer": 4},
    "answer huge": {"answer": 10**18},
    "answer a list": {"answer": ["4", "5"]},
    "answer an empty list": {"answer": []},
    "answer an object": {"answer": {"value": "4"}},
    "answer empty": {"answer": ""},
    "answer true": {"answer": True},
    "no answer": {"answer": ...},
    "no answer but a solution": {"answer": ..., "solution": "4"},
    "id a number": {"id": 3},
    "id an object": {"id": {"a": "b"}},
    "id empty": {"id": ""},
    "id twice": {"id": "same"},
    "id with a surrogate": {"id": "\ud800"},
    "a column called prompts": {"prompts": "x"},
    "a column called log_metric": {"log_metric": 1},
    "a column called domain": {"domain": "other"},
    "a column with an odd name": {"a b/c\n": 1},
    "tools text": {"tools": "no JSON"},
    "tools a number": {"tools": 5},
    "tools of numbers": {"tools": [1]},
    "tools without a name": {"tools": [{"x": "y"}]},
    "tools as JSON": {"tools": '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'},
}
"""What is put into one row, or (`id twice`) into all; `...` takes a key out."""

BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty file": lambda content, rng: b"",
    "blank file": lambda content, rng: b"\n \n",
    "cut": lambda content, rng: content[: rng.randrange(1, len(content))],
    "byte flipped": lambda content, rng: _flipped(content, rng.randrange(len(content)), rng),
    "first byte flipped": lambda content, rng: _flipped(content, 0, rng),
    "BOM": lambda content, rng: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content, rng: content.decode(errors="replace").encode("utf-16"),
    "CRLF": lambda content, rng: content.replace(b"\n", b"\r\n"),
    "CR only": lambda content, rng: content.replace(b"\n", b"\r"),
    "NUL at the end": lambda content, rng: content + b"\0",
    "twice": lambda content, rng: content + content,
    "text before": lambda content, rng: b"# rows\n" + content,
    "nested deeply": lambda content, rng: b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "a number of 5000 digits": lambda content, rng: b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}",
    "NaN and Infinity": lambda content, rng: b'{"prompt": "1", "answer": NaN}\n{"prompt": "2", "answer": Infinity}\n',
    "a row that is a list": lambda content, rng: content + b'\n["a"]\n',
    "a row that is null": lambda content, rng: content + b"\nnull\n",
    "a key twice": lambda content, rng: (
        b'{"prompt": "1", "prompt": "2", "answer": "3"}\n{"prompt": "4", "answer": "5"}'
    ),
    "a web page": lambda content, rng: b"<!DOCTYPE html><html>404</html>",
    "a Git LFS pointer": lambda content, rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


def _flipped(content: bytes, at: int, rng: random.Random) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in {k: 0 for row in rows for k in row}}), sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, tuple[str, Callable[[list[dict]], bytes]]] = {
    "jsonl": ("rows.jsonl", _lines),
    "json list": ("rows.json", lambda rows: json.dumps(rows).encode()),
    "json lines": ("rows.json", _lines),
    "jsonl.gz": ("rows.jsonl.gz", lambda rows: gzip.compress(_lines(rows), mtime=0)),
    "jsonl.zst": ("rows.jsonl.zst", lambda rows: pa.compress(_lines(rows), codec="zstd", asbytes=True)),
    "parquet": ("rows.parquet", _parquet),
    "csv": ("rows.csv", lambda rows: b"prompt,answer\n1,2\n"),
    "no suffix": ("rows", _lines),
}
PLACES = ("file", "folder", "glob", "list", "link")


def row_files(folder: Path, n: int, *, rng: random.Random) -> Iterator[tuple[str, str, Any]]:
    """Write `n` sources of rows, one at a time in the place of the last; yield the damage, the form and the source."""
    todo = [(damage, form) for form in FILES for damage in (*ODD, *BYTES)]
    todo += [(damage, "save_to_disk") for damage in ("nothing", "cut", "no prompt", "answer null")]
    made = 0
    while made < n:
        damage, form = rng.choice(todo)
        place = folder / "rows"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            source = _saved(place, damage) if form == "save_to_disk" else _written(place, damage, form, rng)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError, ValueError):
            continue  # a format that cannot hold it
        made += 1
        yield damage, form, source


def _rows(damage: str) -> list[dict[str, Any]]:
    rows = [dict(row) for row in GOOD]
    for row in rows if damage == "id twice" else rows[2:3]:
        row |= ODD.get(damage, {})
    return [{key: value for key, value in row.items() if value is not ...} for row in rows]


def _written(place: Path, damage: str, form: str, rng: random.Random) -> Any:
    name, write = FILES[form]
    content = write(_rows(damage))
    if damage in BYTES:
        content = BYTES[damage](content, rng)
    where = rng.choice(PLACES)
    if where == "folder":
        (place / "deep").mkdir()
        (place / "deep" / name).write_bytes(content)
        return "rows"
    (place / name).write_bytes(content)
    if where == "link":
        (place / f"link-{name}").symlink_to(name)
        return f"rows/link-{name}"
    return {"file": f"rows/{name}", "glob": f"rows/*{Path(name).suffix}", "list": [f"rows/{name}"]}[where]


def _saved(place: Path, damage: str) -> str:
    from datasets import Dataset  # reads HF_HUB_OFFLINE when it is imported

    Dataset.from_list(_rows(damage)).save_to_disk(str(place / "saved"))
    if damage == "cut":
        arrow = next((place / "saved").glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:100])
    return "rows/saved"
