"""Rows become prompts: read files, folders, hub datasets or a generator; give every row an id, a domain and messages.

Nothing here tokenises or trains. Errors name the file, the line and what was expected.
"""

from __future__ import annotations

import hashlib
import io
import json
import pkgutil
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from polyphony.curricula.records import Domain, Prompt
from polyphony.rewards.registry import HOOKS

Rows = Sequence[Mapping[str, Any]]

LIKE_AN_ANSWER = ("solution", "target", "label", "output", "response", "expected", "reference", "gold", "final_answer")
"""What others call a reference."""

READABLE = (".jsonl", ".json", ".parquet")
"""Files of rows; the first two also packed, as `.jsonl.gz` or `.jsonl.zst`."""
PACKED = {".gz": "gzip", ".zst": "zstd"}
NAMED_SPLIT = re.compile(
    r"(?<![a-z])(?:(train)(?:ing)?|(valid)(?:ation)?|(val)|(dev)|(test)(?:ing)?|(eval)(?:uation)?)(?![a-z])"
)
"""What files of a folder are called whose rows are one split; as the hub has it."""
SPLIT_OF = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}

CALLED_WITH = ("prompts", "completions", "completion_ids", *HOOKS)
"""What a reward is called with beside the columns, as TRL does."""


class PromptTable:
    """The prompts of one split of one domain, by id; rows stay where they are (in memory or in Arrow).

    Example: `PromptTable([{"prompt": "1+1=", "answer": "2"}], domain=domain, where="domains.math.train", is_chat=True)`
    """

    def __init__(self, rows: Rows, *, domain: Domain, where: str, is_chat: bool) -> None:
        if len(rows) == 0:
            raise ValueError(f"{where}: no rows{rows.of_files if isinstance(rows, FileRows) else ''}")
        if domain.system_prompt and not is_chat:
            raise ValueError(f"domain {domain.name!r}: system_prompt needs a tokenizer with a chat template")
        self.rows = rows
        self.domain = domain
        self.where = where
        self.is_chat = is_chat
        self.repeated = 0
        """Rows left out because an identical one without an `id` of its own came before."""
        self.left_out: list[str] = []
        """Ids of rows whose reference the domain's reward cannot read, and of those that are too long."""
        self._with_nulls = (
            rows.with_nulls if isinstance(rows, FileRows) else hasattr(rows, "features")
        )  # Arrow's: what one row has, the others have as null
        self._position: dict[str, int] = {}
        for i, row in enumerate(rows):
            try:
                self._add(i, row)
            except ValueError as error:
                raise ValueError(f"{error}{self._place(i)}") from error
        self.ids = list(self._position)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[i] for i in self.ids)

    def __getitem__(self, prompt_id: str) -> Prompt:
        row = self.rows[self._position[prompt_id]]
        prompt = _as_written(row["prompt"], with_nulls=self._with_nulls)
        return Prompt(
            id=prompt_id,
            domain=self.domain.name,
            prompt=_as_prompt(prompt, self.domain, is_chat=self.is_chat),
            columns=_columns(row),
            tools=_tools(row, with_nulls=self._with_nulls),
        )

    def row_of(self, prompt_id: str) -> str:
        """Return where a prompt stands, in words."""
        return f"{self.where}: row {self._position[prompt_id] + 1}{self._place(self._position[prompt_id])}"

    def _place(self, i: int) -> str:
        return f" ({self.rows.place(i)})" if isinstance(self.rows, FileRows) else ""

    def text_of(self, prompt_id: str) -> str | None:
        """Return a prompt that is text in its row; None for a conversation."""
        prompt = self.rows[self._position[prompt_id]]["prompt"]
        return prompt if isinstance(prompt, str) else None

    def said(self, prompt_id: str) -> tuple[str, str]:
        """Return what the user says in a row, and all that stands in it; without the domain's own system prompt."""
        prompt = _as_written(self.rows[self._position[prompt_id]]["prompt"], with_nulls=self._with_nulls)
        if isinstance(prompt, str):
            return prompt, prompt
        user = "\n".join(m["content"] for m in prompt if m["role"] == "user")
        return user, "\n".join(m["content"] for m in prompt)

    def tell_repeats(self) -> None:
        """Warn with the number of rows that were left out because one before says the same."""
        if self.repeated:
            of = len(self) + self.repeated
            what = "repeat one before them in prompt and answer (and have no `id`)"
            warnings.warn(f"{self.where}: {self.repeated} of {of} rows {what}; left out", stacklevel=3)

    def leave_out_unreadable(self, reward: Any, *, most: float) -> None:
        """Leave out the rows whose reference the reward says it cannot read (`unreadable(**columns)`: why, or None), and
        name those that it grades with a reservation (`remark(**columns)`).

        Warns with their number and the first three. Raises ValueError, naming these, where they are more than the share
        `most` of the rows.
        """
        if reasons := self._said(getattr(reward, "unreadable", None)):
            reasons = {i: why + self._unread(i) for i, why in reasons.items()}
            message = f"{self._named(reasons)} have a reference that the reward cannot read ({self.shown(reasons)})"
            if len(reasons) > most * len(self):
                raise ValueError(f"{message}; data.max_unreadable allows a share of {most:g}")
            self._leave_out(reasons, message)
        if remarks := self._said(getattr(reward, "remark", None)):
            warnings.warn(f"{self._named(remarks)} are kept with a reservation ({self.shown(remarks)})", stacklevel=2)

    def leave_out(self, reasons: Mapping[str, str], what: str) -> None:
        """Leave out rows, by id with the reason of each; `what` they do. Raises ValueError where none would stay."""
        message = f"{self._named(reasons)} {what} ({self.shown(reasons)})"
        if len(reasons) == len(self):
            raise ValueError(f"{message}: nothing is left")
        self._leave_out(reasons, message)

    def _leave_out(self, reasons: Mapping[str, str], message: str) -> None:
        warnings.warn(f"{message}; left out", stacklevel=3)
        self.left_out = sorted({*self.left_out, *reasons})
        self.drop(set(reasons))

    def _unread(self, prompt_id: str) -> str:
        """Where a row has no reference: the column that looks like one."""
        row = self.rows[self._position[prompt_id]]
        like = [name for name in LIKE_AN_ANSWER if row.get(name) is not None] if _answer(row) is None else []
        return f"; there is no `answer`, did you mean `{like[0]}`?" if like else ""

    def _said(self, ask: Callable[..., str | None] | None) -> dict[str, str]:
        return {prompt.id: why for prompt in self if (why := ask(**prompt.columns)) is not None} if ask else {}

    def _named(self, reasons: Mapping[str, str]) -> str:
        return f"{self.where}: {len(reasons)} of {len(self)} rows"

    def shown(self, reasons: Mapping[str, str]) -> str:
        """Return the first three of rows, by id with the reason of each, in words."""
        return "; ".join(f"row {self._position[i] + 1}: {why}" for i, why in islice(reasons.items(), 3))

    def drop(self, ids: set[str]) -> None:
        """Leave these prompts out from now on."""
        self._position = {i: p for i, p in self._position.items() if i not in ids}
        self.ids = list(self._position)

    def _add(self, i: int, row: Mapping[str, Any]) -> None:
        if not isinstance(row, Mapping):
            raise ValueError(f"{self.where}: row {i + 1}: expected an object, got {row!r:.60}")
        if "prompt" not in row:
            raise ValueError(f"{self.where}: row {i + 1} has no `prompt`; its columns are {sorted(row)}")
        if taken := [name for name in CALLED_WITH if name in row]:
            raise ValueError(
                f"{self.where}: row {i + 1}: column {taken[0]!r} needs another name: a reward is called with one of its own"
            )
        if not row["prompt"]:
            raise ValueError(f"{self.where}: row {i + 1} has an empty `prompt`")
        try:
            prompt = _as_written(row["prompt"], with_nulls=self._with_nulls)
            tools = _tools(row, with_nulls=self._with_nulls)
        except ValueError as error:
            raise ValueError(f"{self.where}: row {i + 1}: {error}") from error
        if not self.is_chat and not isinstance(prompt, str):
            raise ValueError(f"{self.where}: row {i + 1} is a conversation, but the tokenizer has no chat template")
        if self.domain.system_prompt and not self.domain.as_chat and isinstance(prompt, str):
            raise ValueError(
                f"{self.where}: row {i + 1} is text: as_chat: false and a system_prompt exclude each other"
            )
        self._is_text = isinstance(prompt, str) if i == 0 else self._is_text
        if not self.domain.as_chat and isinstance(prompt, str) != self._is_text:
            raise ValueError(
                f"{self.where}: row {i + 1}: under as_chat: false all rows are text, or all are conversations"
            )
        given = row.get("id")
        prompt_id = self._checked_id(i, {**row, "prompt": prompt, "tools": tools})
        if prompt_id not in self._position:
            self._position[prompt_id] = i
        elif given is None:
            self.repeated += 1
        else:
            first = self._position[prompt_id] + 1
            raise ValueError(f"{self.where}: id {prompt_id!r} stands in row {first} and again in row {i + 1}")

    def _checked_id(self, i: int, row: Mapping[str, Any]) -> str:
        given = row.get("id")
        try:
            known = content_id(row)
            str(given).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.where}: row {i + 1}: half a character (a lone surrogate) in its text") from error
        except RecursionError as error:
            raise ValueError(f"{self.where}: row {i + 1} is nested too deeply") from error
        return known if given is None else str(given)


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


def content_id(row: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the row's prompt, answer and tools: the same on every machine and after every restart."""
    said = [row["prompt"], _answer(row), *([tools] if (tools := row.get("tools")) else [])]
    content = json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_rows(source: Any, *, where: str, folder: Path | None = None) -> Rows:
    """Read a data source.

    `source` is rows already (a list or a `datasets.Dataset`), a path (`.jsonl`, `.json`, `.parquet`, the first two also as
    `.gz` or `.zst`; a folder, what `save_to_disk` wrote, a glob; relative to `folder`) or a list of paths, `hf://org/name`,
    `{path, name, split, revision, limit}`, or `{generator: "pkg.module:function", **arguments}`.
    Raises ValueError naming `where` for a missing file, a malformed line (with its number) or an unknown form.
    """
    if isinstance(source, Mapping):
        return _load_mapping(dict(source), where=where, folder=folder)
    if not _is_path(source):
        return _with_length(source, where=where, of=f"{type(source).__name__} {source!r:.60}")
    return _load_path(source, split="train", hub={}, where=where, folder=folder)


def check_source(source: Any, *, where: str) -> None:
    """Raise ValueError where a source names a file of this machine that is not there."""
    path = source.get("path") if isinstance(source, Mapping) else source
    for one in path if isinstance(path, list) and _is_path(path) else [path]:
        if isinstance(one, str) and not one.startswith("hf://") and not Path(one).exists() and not _matches(Path(one)):
            raise ValueError(f"{where}: file {one} does not exist")


def _is_path(source: Any) -> bool:
    is_list = isinstance(source, (list, tuple)) and len(source) > 0
    return isinstance(source, (str, Path)) or (is_list and all(isinstance(one, (str, Path)) for one in source))


def _load_mapping(source: dict[str, Any], *, where: str, folder: Path | None) -> Rows:
    if "generator" in source:
        return _generated(source, where=where)
    unknown = set(source) - {"path", "name", "split", "revision", "limit"}
    if "path" not in source or unknown or not _is_path(source["path"]):
        raise ValueError(
            f"{where}: expected `path` (with `split`, `limit`) or `generator`, got {sorted(source)}; a hub set also takes "
            "`name`, its config, and `revision`"
        )
    path, limit = source["path"], source.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"{where}: limit must be a whole number of at least 1, got {limit!r}")
    hub = {key: source[key] for key in ("name", "revision") if source.get(key) is not None}
    rows = _load_path(path, split=source.get("split", "train"), hub=hub, where=where, folder=folder)
    return rows if limit is None else _head(rows, limit)


def _generated(source: dict[str, Any], *, where: str) -> Rows:
    name = str(source.pop("generator"))
    try:
        generator = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: generator {name!r} cannot be imported: {error}") from error
    try:
        rows = generator(**source)
        rows = list(rows) if isinstance(rows, Iterable) and not hasattr(rows, "__getitem__") else rows
    except TypeError as error:
        raise ValueError(f"{where}: generator {name!r}: {error}") from error
    except Exception as error:  # a user's may raise anything
        raise ValueError(f"{where}: generator {name!r} raised {type(error).__name__}: {error}") from error
    return _with_length(rows, where=where, of=f"generator {name!r}")


def _head(rows: Rows, limit: int) -> Rows:
    if isinstance(rows, FileRows):
        return rows.head(limit)
    return rows[:limit] if isinstance(rows, list) else rows.select(range(min(limit, len(rows))))  # type: ignore[attr-defined]


def _with_length(rows: Any, *, where: str, of: str) -> Rows:
    if isinstance(rows, (str, Mapping)) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(f"{where}: expected rows, a path, hf://org/name or a generator, got {of}")
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
    known = sorted(path for path in folder.rglob("*") if _kind(path) and not path.name.startswith("."))
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
    rows = list(_read_jsonl(content, path))
    return FilePart(path=path, rows=[row for _, row in rows], lines=[number for number, _ in rows])


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


def _as_written(prompt: Any, *, with_nulls: bool) -> str | list[dict[str, Any]]:
    """The prompt as its writer meant it: keys that are null left out of messages, content as text.

    A file format that gives every row the keys of all (`with_nulls`) has nulls at any depth. Raises ValueError.
    """
    if isinstance(prompt, str):
        return prompt
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in prompt)
    ):
        return [_message(_without_nulls(message) if with_nulls else message) for message in prompt]
    raise ValueError(f"a prompt is text or a list of messages with role and content, got {prompt!r:.60}")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in message.items() if value is not None}
    content = found.get("content")
    if content is None and found.get("tool_calls"):
        return {**found, "content": ""}  # an assistant that only calls tools says nothing; a template would print None
    if isinstance(content, str):
        return found
    if isinstance(content, list):
        return {**found, "content": "\n".join(map(_text, content))}  # as vLLM gives parts to templates that take text
    raise ValueError(
        f"a prompt is text or a list of messages with role and content, got a message {dict(message)!r:.60}"
    )


def _text(part: Any) -> str:
    """The text of one part of a message's content; a template for text would print the part as Python does."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise ValueError(f"a message's content is text or a list of parts of text, got a part {part!r:.60}")
    return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _tools(row: Mapping[str, Any], *, with_nulls: bool) -> list[Any]:
    """The functions of the row's column `tools`: schemas, or JSON text of them. Raises ValueError for anything else."""
    tools = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        tools = [tools] if isinstance(tools, Mapping) else list(tools or [])
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, TypeError) as error:
        raise ValueError(f"`tools` is a list of functions' schemas, or JSON text of one, got {tools!r:.60}") from error
    for tool in tools:
        if not isinstance(tool, Mapping) and not callable(tool):
            raise ValueError(f"`tools` is a list of functions' schemas, got {tool!r:.60} among them")
    return [_without_nulls(tool) for tool in tools] if with_nulls else tools


def _as_prompt(prompt: str | list[dict[str, Any]], domain: Domain, *, is_chat: bool) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        if not is_chat or not domain.as_chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if domain.system_prompt and prompt[0]["role"] != "system":
        return [{"role": "system", "content": domain.system_prompt}, *prompt]
    return prompt


def _answer(row: Mapping[str, Any]) -> Any:
    """The reference under the names in use: `answer`, `ground_truth`, or verl's `reward_model.ground_truth`."""
    for name in ("answer", "ground_truth"):
        if row.get(name) is not None:
            return row[name]
    verl = row.get("reward_model")
    return verl.get("ground_truth") if isinstance(verl, Mapping) else None


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    columns = {name: value for name, value in row.items() if name not in ("prompt", "id", "domain")}
    return {**columns, "answer": _answer(row)}
