"""Rows as they are stored: files (packed too), folders, globs, lists of them, `save_to_disk`, the hub, generators.

What a row means, and which id it has, is `polyphony.trainer.data`. Errors name the file, the line and what was expected.
"""

from __future__ import annotations

import inspect
import io
import json
import pkgutil
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from polyphony.curricula.declarations import near, nearest
from polyphony.trainer.environments.calls import make_environment

Rows = Sequence[Mapping[str, Any]]

KEYS = ("path", "name", "split", "revision", "limit")
"""Of a source that is a mapping, unless it has a generator or an environment."""
OF_ENVIRONMENT = ("environment", "count", "seed")
"""Of one that has an environment."""
MANY_ENTRIES = 20_000
"""More files and folders than a data set has: somebody named the root of a disk."""
MANY_FILES = 1000
"""How many of a folder's files are looked at for one that was meant."""

READABLE = (".jsonl", ".json", ".parquet")
"""Files of rows; the first two also packed, as `.jsonl.gz` or `.jsonl.zst`."""
PACKED = {".gz": "gzip", ".zst": "zstd"}
NAMED_SPLIT = re.compile(
    r"(?<![a-z])(?:(train)(?:ing)?|(valid)(?:ation)?|(val)|(dev)|(test)(?:ing)?|(eval)(?:uation)?)(?![a-z])"
)
"""What files of a folder are called whose rows are one split; as the hub has it."""
SPLIT_OF = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePart:
    """The rows of one file, in memory or in Arrow."""

    path: Path
    rows: Rows
    lines: Sequence[int] = ()
    """Of each row; none where a file has no lines."""


class FileRows(Sequence[Mapping[str, Any]]):
    """Rows of one or several files, in order; each is known by its file and line.

    Example: `FileRows([FilePart(path=Path("a.jsonl"), rows=[{"prompt": "1"}], lines=[1])]).place(0) == "a.jsonl:1"`
    """

    def __init__(self, parts: Sequence[FilePart], *, most: int | None = None) -> None:
        self.parts = parts
        self.with_nulls = any(hasattr(part.rows, "features") for part in parts)
        """Whether a row may have as null what only others have."""
        self._ends = list(accumulate(len(part.rows) for part in parts))
        self._size = self._ends[-1] if most is None else min(most, self._ends[-1])

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return islice((row for part in self.parts for row in part.rows), self._size)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._size:
            raise IndexError(i)
        part, i = self._found(i)
        return part.rows[i]

    def place(self, i: int) -> str:
        """Return the file of a row, with its line if it has one."""
        part, i = self._found(i)
        return f"{part.path}:{part.lines[i]}" if part.lines else str(part.path)

    @property
    def of_files(self) -> str:
        """The files in words, the first three."""
        return " in " + ", ".join(str(part.path) for part in self.parts[:3])

    def head(self, most: int) -> FileRows:
        """Return the first rows."""
        return FileRows(self.parts, most=most)

    def _found(self, i: int) -> tuple[FilePart, int]:
        place = bisect_right(self._ends, i)
        return self.parts[place], i - (self._ends[place - 1] if place else 0)


def load_rows(source: Any, *, where: str, folder: Path | None = None) -> Rows:
    """Read a data source.

    `source` is rows already (a list or a `datasets.Dataset`), a path (`.jsonl`, `.json`, `.parquet`, the first two also as
    `.gz` or `.zst`; a folder, what `save_to_disk` wrote, a glob; relative to `folder`) or a list of paths, `hf://org/name`,
    `{path, name, split, revision, limit}`, `{generator: "pkg.module:function", **arguments}`, or `{environment: "pkg.module:
    Class", count, seed}`: what its class method `rows(count, seed)` returns.
    Raises ValueError naming `where` for a missing file, a malformed line (with its number) or an unknown form.
    """
    if isinstance(source, Mapping):
        return _load_mapping(dict(source), where=where, folder=folder)
    if not _is_path(source):
        return _with_length(source, where=where, of=f"{type(source).__name__} {source!r:.60}")
    return _load_path(source, split="train", hub={}, where=where, folder=folder)


def check_source(source: Any, *, where: str) -> None:
    """Raise ValueError where a source is in no known form, or names a file of this machine that is not there."""
    if isinstance(source, Mapping):
        _check_mapping(source, where=where)
    path = source.get("path") if isinstance(source, Mapping) else source
    for one in path if isinstance(path, list) and _is_path(path) else [path]:
        if isinstance(one, str) and not one.startswith("hf://") and not Path(one).exists() and not _matches(Path(one)):
            raise ValueError(f"{where}: file {one} does not exist{_named_like(Path(one))}")


def _named_like(path: Path) -> str:
    beside = [other.name for other in islice(path.parent.iterdir(), MANY_FILES)] if path.parent.is_dir() else []
    return f"; {meant}" if (meant := near(path.name, [name for name in beside if _kind(Path(name))])) else ""


def _is_path(source: Any) -> bool:
    is_list = isinstance(source, (list, tuple)) and len(source) > 0
    return isinstance(source, (str, Path)) or (is_list and all(isinstance(one, (str, Path)) for one in source))


def _load_mapping(source: dict[str, Any], *, where: str, folder: Path | None) -> Rows:
    _check_mapping(source, where=where)
    if "generator" in source:
        return _generated(source, where=where)
    if "environment" in source:
        return _of_environment(source, where=where)
    path, limit = source["path"], source.get("limit")
    hub = {key: source[key] for key in ("name", "revision") if source.get(key) is not None}
    rows = _load_path(path, split=source.get("split") or "train", hub=hub, where=where, folder=folder)
    return rows if limit is None else _head(rows, limit)


def _check_mapping(source: Mapping[Any, Any], *, where: str) -> None:
    if "generator" in source:
        if not isinstance(source["generator"], str) or not all(isinstance(key, str) for key in source):
            raise ValueError(f"{where}: expected generator: pkg.module:function and its arguments, got {source!r:.200}")
        return
    known = OF_ENVIRONMENT if "environment" in source else KEYS
    if odd := [key for key in source if key not in known]:
        more = () if known is OF_ENVIRONMENT else ("generator", "environment")
        raise ValueError(f"{where}: unknown key {odd[0]!r:.200}; {nearest(str(odd[0]), (*known, *more))}")
    if known is OF_ENVIRONMENT:
        for key, least in (("count", 1), ("seed", 0)):
            number = source.get(key, 0)
            if type(number) is not int or number < least:
                raise ValueError(f"{where}: {key} must be a whole number of at least {least}, got {number!r:.200}")
        return
    if not _is_path(path := source.get("path")) or not str(path).strip():
        raise ValueError(
            f"{where}: expected `path` (with `split`, `limit`), `generator` or `environment`, got {sorted(source)}; a hub "
            "set also takes `name`, its config, and `revision`"
        )
    for key in ("name", "split", "revision"):
        if not isinstance(source.get(key), str | None):
            raise ValueError(f"{where}: {key} must be text, got {source[key]!r:.200}")
    limit = source.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"{where}: limit must be a whole number of at least 1, got {limit!r:.200}")


def _generated(source: dict[str, Any], *, where: str) -> Rows:
    name = str(source.pop("generator"))
    try:
        generator = pkgutil.resolve_name(name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(f"{where}: generator {name!r} cannot be imported: {error}") from error
    return _returned(generator, source, where=where, of=f"generator {name!r}")


def _of_environment(source: Mapping[str, Any], *, where: str) -> Rows:
    spec = source["environment"]
    try:
        make = getattr(make_environment(spec), "rows", None)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    # a class method: other public methods are its tools
    if not inspect.isclass(getattr(make, "__self__", None)):
        raise ValueError(f"{where}: environment {spec!r:.60} makes no rows: it has no class method rows(count, seed)")
    asked = {"count": source["count"], "seed": source.get("seed", 0)}
    return _returned(make, asked, where=where, of=f"environment {spec!r:.60}: rows")


def _returned(make: Any, given: Mapping[str, Any], *, where: str, of: str) -> Rows:
    try:
        rows = make(**given)
        rows = list(rows) if isinstance(rows, Iterable) and not hasattr(rows, "__getitem__") else rows
    except TypeError as error:
        raise ValueError(f"{where}: {of}: {error}") from error
    except Exception as error:  # a user's may raise anything
        raise ValueError(f"{where}: {of} raised {type(error).__name__}: {error}") from error
    return _with_length(rows, where=where, of=of)


def _head(rows: Rows, limit: int) -> Rows:
    if isinstance(rows, FileRows):
        return rows.head(limit)
    return rows[:limit] if isinstance(rows, list) else rows.select(range(min(limit, len(rows))))  # type: ignore[attr-defined]


def _with_length(rows: Any, *, where: str, of: str) -> Rows:
    if isinstance(rows, (str, Mapping)) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        got = f"{of}, which returned {rows!r:.60}" if of.startswith(("generator", "environment")) else of
        raise ValueError(f"{where}: expected rows, a path, hf://org/name or a generator, got {got}")
    return rows


def _load_path(source: Any, *, split: str, hub: Mapping[str, str], where: str, folder: Path | None) -> Rows:
    """Rows of a path or of a list of paths: those of the hub and of `save_to_disk` are whole sets, the others files."""
    paths = [str(one) for one in source] if isinstance(source, (list, tuple)) else [str(source)]
    if not hub and not any(path.startswith("hf://") for path in paths):
        found = [path for text in paths for path in _files((folder or Path()) / text, split=split, where=where)]
        if not any(path.is_dir() for path in found):
            return FileRows([_read(path, where=where) for path in found])
        paths = [str(path) for path in found]
    if len(paths) > 1:
        raise ValueError(f"{where}: a list is of files, and {paths[0]} is among others a whole data set: name one")
    if paths[0].startswith("hf://"):
        return _load_hub(paths[0], split=split, where=where, **hub)
    if hub:
        raise ValueError(f"{where}: {', '.join(hub)} is for hf:// sources, got {paths[0]}")
    return _load_saved(Path(paths[0]), split=split, where=where)


def _load_hub(text: str, *, split: str, where: str, **hub: str) -> Rows:
    import datasets  # slow to import
    from datasets.exceptions import DatasetsError  # slow to import

    if text == "hf://":
        raise ValueError(f"{where}: expected hf://org/name, got {text!r}")
    try:
        return datasets.load_dataset(text.removeprefix("hf://"), split=split, **hub)  # type: ignore[return-value]
    except (OSError, ValueError, DatasetsError) as error:
        hint = "; say which: {path: .., name: ..}" if "Config name is missing" in str(error) else ""
        raise ValueError(f"{where}: {text} (split {split!r}) cannot be loaded: {error}{hint}") from error


def _load_saved(path: Path, *, split: str, where: str) -> Rows:
    import datasets  # slow to import

    try:
        found: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {path}: not readable as save_to_disk wrote it: {error}") from error
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise ValueError(f"{where}: {path} has no split {split!r}; its splits are {', '.join(found)}")
    return found[split]


def _files(path: Path, *, split: str, where: str) -> list[Path]:
    """The files of a path, of a glob, or of one split of a folder; the folder itself if `save_to_disk` wrote it."""
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return [path]
        return _of_split(path, split=split, where=where)
    if split != "train":
        raise ValueError(f"{where}: split {split!r} is for hf:// sources and folders; {path} is one file")
    if path.exists():
        return [path]
    if found := _matches(path):
        return found
    check_source(str(path), where=where)
    return []


def _matches(path: Path) -> list[Path]:
    """The files that a glob names; none for a path that is no glob."""
    magic = [i for i, part in enumerate(path.parts) if set(part) & set("*?[")]
    if not magic:
        return []
    start, pattern = Path(*path.parts[: magic[0]]), str(Path(*path.parts[magic[0] :]))
    return sorted(found for found in start.glob(pattern) if found.is_file())


def _of_split(folder: Path, *, split: str, where: str) -> list[Path]:
    """The files of a folder that hold a split, by their names; all for `train` where no name tells of one."""
    known = sorted(path for path in _inside(folder, where) if _kind(path) and not path.name.startswith("."))
    if lost := [path for path in known if not path.is_file()]:
        raise ValueError(f"{where}: {lost[0]} is no file, or a link that leads nowhere")
    by_split: dict[str, list[Path]] = {}
    for path in known:
        named = NAMED_SPLIT.search(str(path.relative_to(folder)).lower())
        name = next(filter(None, named.groups())) if named else None
        by_split.setdefault(SPLIT_OF.get(name, name) if name else "train", []).append(path)
    if split not in by_split:
        has = f"its splits are {', '.join(sorted(by_split))}" if by_split else f"known files are {', '.join(READABLE)}"
        raise ValueError(f"{where}: folder {folder} has no rows of split {split!r}; {has}")
    return by_split[split]


def _inside(folder: Path, where: str) -> list[Path]:
    try:
        found = list(islice(folder.rglob("*"), MANY_ENTRIES + 1))
    except OSError as error:  # a folder that may not be read, or goes away meanwhile
        raise ValueError(f"{where}: folder {folder} cannot be read: {error}") from error
    if len(found) > MANY_ENTRIES:
        raise ValueError(f"{where}: folder {folder} has more than {MANY_ENTRIES:,} files in it: name one of rows only")
    return found


def _kind(path: Path) -> str | None:
    """The suffix that tells how a file is read, None for one that is not."""
    suffix = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    return suffix if suffix in READABLE and (suffix != ".parquet" or path.suffix == suffix) else None


def _read(path: Path, *, where: str) -> FilePart:
    kind = _kind(path)
    if kind is None:
        raise ValueError(
            f"{where}: cannot read {path.name!r}; known: .jsonl, .json (one object a line, or one list; also .gz, .zst), "
            ".parquet, hf://"
        )
    if kind == ".parquet":
        return FilePart(path=path, rows=_read_parquet(path))
    content = _opened(path)
    if kind == ".json" and content.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        content.seek(0)
        return FilePart(path=path, rows=_parsed(content.read(), str(path), lambda error: f"{path}:{error.lineno}"))
    content.seek(0)
    try:
        rows = list(_read_jsonl(content, path))
    except ValueError:
        if kind == ".json":
            _refuse_object(content.getvalue(), path)
        raise
    return FilePart(path=path, rows=[row for _, row in rows], lines=[number for number, _ in rows])


def _refuse_object(text: bytes, path: Path) -> None:
    """Raise ValueError for a file that is one object, over several lines: rows may be under a key of it."""
    try:
        found = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return
    keys = f" with the keys {', '.join(map(repr, list(found)[:5]))}" if isinstance(found, dict) else ""
    raise ValueError(f"{path}: is one {type(found).__name__}{keys}: expected a list of rows, or one object a line")


def _opened(path: Path) -> Any:
    if path.suffix not in PACKED:
        return io.BytesIO(path.read_bytes())
    import pyarrow  # slow to import

    try:
        with pyarrow.input_stream(str(path), compression=PACKED[path.suffix]) as packed:
            return io.BytesIO(packed.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as {PACKED[path.suffix]}: {error}") from error


def _read_parquet(path: Path) -> Rows:
    import datasets  # slow to import
    import pyarrow.parquet
    from datasets.exceptions import DatasetsError  # slow to import

    try:
        size = pyarrow.parquet.read_metadata(path).num_rows
        return datasets.Dataset.from_parquet(str(path)) if size else []  # type: ignore[return-value]
    except (pyarrow.ArrowException, DatasetsError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path}: not a readable Parquet file: {cause}") from error


def _read_jsonl(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        row = _parsed(line, place, lambda error, place=place: place)
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, got {type(row).__name__}")
        yield number, row


def _parsed(text: bytes, place: str, place_of: Callable[[json.JSONDecodeError], str]) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8: byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place_of(error)}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{place}: nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"{place}: {error}") from error
