"""Rows become prompts: read JSONL, Parquet, hub datasets or a generator; give every row an id, a domain and messages.

Nothing here tokenises or trains. Errors name the file, the line and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from polyphony.curricula.records import Domain, Prompt
from polyphony.rewards.registry import HOOKS

Rows = Sequence[Mapping[str, Any]]

CALLED_WITH = ("prompts", "completions", "completion_ids", *HOOKS)
"""What a reward is called with beside the columns, as TRL does."""


class PromptTable:
    """The prompts of one split of one domain, by id; rows stay where they are (in memory or in Arrow).

    Example: `PromptTable([{"prompt": "1+1=", "answer": "2"}], domain=domain, where="domains.math.train", is_chat=True)`
    """

    def __init__(self, rows: Rows, *, domain: Domain, where: str, is_chat: bool) -> None:
        if len(rows) == 0:
            raise ValueError(f"{where}: no rows")
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
        self._with_nulls = hasattr(rows, "features")  # Arrow's: what one row has, the others have as null
        self._position: dict[str, int] = {}
        for i, row in enumerate(rows):
            self._add(i, row)
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
        return f"{self.where}: row {self._position[prompt_id] + 1}"

    def text_of(self, prompt_id: str) -> str | None:
        """Return a prompt that is text in its row; None for a conversation."""
        prompt = self.rows[self._position[prompt_id]]["prompt"]
        return prompt if isinstance(prompt, str) else None

    def leave_out_unreadable(self, reward: Any, *, most: float) -> None:
        """Leave out the rows whose reference the reward says it cannot read (`unreadable(**columns)`: why, or None), and
        name those that it grades with a reservation (`remark(**columns)`).

        Warns with their number and the first three. Raises ValueError, naming these, where they are more than the share
        `most` of the rows.
        """
        if reasons := self._said(getattr(reward, "unreadable", None)):
            message = f"{self._named(reasons)} have a reference that the reward cannot read ({self._shown(reasons)})"
            if len(reasons) > most * len(self):
                raise ValueError(f"{message}; data.max_unreadable allows a share of {most:g}")
            self._leave_out(reasons, message)
        if remarks := self._said(getattr(reward, "remark", None)):
            warnings.warn(f"{self._named(remarks)} are kept with a reservation ({self._shown(remarks)})", stacklevel=2)

    def leave_out(self, reasons: Mapping[str, str], what: str) -> None:
        """Leave out rows, by id with the reason of each; `what` they do. Raises ValueError where none would stay."""
        message = f"{self._named(reasons)} {what} ({self._shown(reasons)})"
        if len(reasons) == len(self):
            raise ValueError(f"{message}: nothing is left")
        self._leave_out(reasons, message)

    def _leave_out(self, reasons: Mapping[str, str], message: str) -> None:
        warnings.warn(f"{message}; left out", stacklevel=3)
        self.left_out = sorted({*self.left_out, *reasons})
        self.drop(set(reasons))

    def _said(self, ask: Callable[..., str | None] | None) -> dict[str, str]:
        return {prompt.id: why for prompt in self if (why := ask(**prompt.columns)) is not None} if ask else {}

    def _named(self, reasons: Mapping[str, str]) -> str:
        return f"{self.where}: {len(reasons)} of {len(self)} rows"

    def _shown(self, reasons: Mapping[str, str]) -> str:
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
                f"{self.where}: row {i + 1} is text, and under as_chat: false no system_prompt goes before it"
            )
        self._is_text = isinstance(prompt, str) if i == 0 else self._is_text
        if not self.domain.as_chat and isinstance(prompt, str) != self._is_text:
            raise ValueError(
                f"{self.where}: row {i + 1}: under as_chat: false all rows are text, or all are conversations"
            )
        given = row.get("id")
        prompt_id = content_id({**row, "prompt": prompt, "tools": tools}) if given is None else str(given)
        if prompt_id not in self._position:
            self._position[prompt_id] = i
        elif given is None:
            self.repeated += 1
        else:
            first = self._position[prompt_id] + 1
            raise ValueError(f"{self.where}: id {prompt_id!r} stands in row {first} and again in row {i + 1}")


def content_id(row: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the row's prompt, answer and tools: the same on every machine and after every restart."""
    said = [row["prompt"], _answer(row), *([tools] if (tools := row.get("tools")) else [])]
    content = json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """Return what the user says: the text itself, or the contents of the user's messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(m.get("content") or "") for m in prompt if m.get("role") == "user")


def load_rows(source: Any, *, where: str, folder: Path | None = None) -> Rows:
    """Read a data source.

    `source` is rows already (a list or a `datasets.Dataset`), a path (`.jsonl`, `.json`, `.parquet`; relative to
    `folder`), `hf://org/name`, `{path, split, limit}`, or `{generator: "pkg.module:function", **arguments}`.
    Raises ValueError naming `where` for a missing file, a malformed line (with its number) or an unknown form.
    """
    if isinstance(source, Mapping):
        return _load_mapping(dict(source), where=where, folder=folder)
    if not isinstance(source, (str, Path)):
        return _with_length(source, where=where, of=f"{type(source).__name__} {source!r:.60}")
    text = str(source)
    if text.startswith("hf://"):
        return _load_hub(text, split="train", where=where)
    path = (folder or Path()) / text
    check_source(str(path), where=where)
    if path.suffix in (".jsonl", ".json"):
        return list(_read_jsonl(path))
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise ValueError(f"{where}: cannot read {path.name!r}; known: .jsonl, .json (one object a line), .parquet, hf://")


def check_source(source: Any, *, where: str) -> None:
    """Raise ValueError where a source names a file of this machine that is not there."""
    path = source.get("path") if isinstance(source, Mapping) else source
    if isinstance(path, str) and not path.startswith("hf://") and not Path(path).is_file():
        raise ValueError(f"{where}: file {path} does not exist")


def _load_mapping(source: dict[str, Any], *, where: str, folder: Path | None) -> Rows:
    if "generator" in source:
        name = str(source.pop("generator"))
        try:
            generator = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}: generator {name!r} cannot be imported: {error}") from error
        try:
            rows = generator(**source)
        except TypeError as error:
            raise ValueError(f"{where}: generator {name!r}: {error}") from error
        return _with_length(list(rows) if isinstance(rows, Iterator) else rows, where=where, of=f"generator {name!r}")
    unknown = set(source) - {"path", "split", "limit"}
    if "path" not in source or unknown:
        raise ValueError(f"{where}: expected `path` (with `split`, `limit`) or `generator`, got {sorted(source)}")
    path, limit = str(source["path"]), source.get("limit")
    split = source.get("split", "train")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"{where}: limit must be a whole number of at least 1, got {limit!r}")
    is_hub = path.startswith("hf://")
    if not is_hub and split != "train":
        raise ValueError(f"{where}: split {split!r} is for hf:// sources; {path} is one file")
    rows = _load_hub(path, split=split, where=where) if is_hub else load_rows(path, where=where, folder=folder)
    return rows if limit is None else _head(rows, limit)


def _head(rows: Rows, limit: int) -> Rows:
    return rows[:limit] if isinstance(rows, list) else rows.select(range(min(limit, len(rows))))  # type: ignore[attr-defined]


def _with_length(rows: Any, *, where: str, of: str) -> Rows:
    if isinstance(rows, (str, Mapping)) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(f"{where}: expected rows, a path, hf://org/name or a generator, got {of}")
    return rows


def _load_hub(text: str, *, split: str, where: str) -> Rows:
    import datasets  # slow to import

    if text == "hf://":
        raise ValueError(f"{where}: expected hf://org/name, got {text!r}")
    try:
        return datasets.load_dataset(text.removeprefix("hf://"), split=split)  # type: ignore[return-value]
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {text} (split {split!r}) cannot be loaded: {error}") from error


def _read_parquet(path: Path) -> Rows:
    import datasets  # slow to import
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_schema(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    return datasets.Dataset.from_parquet(str(path))  # type: ignore[return-value]


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8: byte {error.start + 1} of the line") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected an object, got {type(row).__name__}")
            yield row


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
