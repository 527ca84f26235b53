"""Rows become prompts: every row gets an id, a domain and messages; which are left out is counted and said.

Nothing here reads files (`polyphony.trainer.rows`), tokenises or trains.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from polyphony.curricula.records import Domain, Prompt
from polyphony.rewards.registry import HOOKS
from polyphony.trainer.rows import FileRows, Rows

LIKE_AN_ANSWER = (
    *("solution", "target", "label", "output", "response", "expected", "reference", "gold", "final_answer", "result"),
)
"""What others call a reference."""
LIKE_A_PROMPT = ("messages", "question", "problem", "instruction", "query", "input", "conversations", "text")
"""What others call a prompt."""

PICTURES = ("image", "images")
"""Columns of what TRL shows a policy beside the text."""

CALLED_WITH = ("prompts", "completions", "completion_ids", *HOOKS)
"""What a reward is called with beside the columns, as TRL does."""


class PromptTable:
    """The prompts of one split of one domain, by id; rows stay where they are (in memory or in Arrow).

    Example: `PromptTable([{"prompt": "1+1=", "answer": "2"}], domain=domain, where="domains.math.train", is_chat=True)`
    """

    def __init__(self, rows: Rows, *, domain: Domain, where: str, is_chat: bool, keeps_repeats: bool = False) -> None:
        """With `keeps_repeats`, rows that say the same are each a prompt of its own."""
        if len(rows) == 0:
            raise ValueError(f"{where}: no rows{rows.of_files if isinstance(rows, FileRows) else ''}")
        if domain.system_prompt and not is_chat:
            raise ValueError(f"domain {domain.name!r}: system_prompt needs a tokenizer with a chat template")
        self.rows = rows
        self.domain = domain
        self.where = where
        self.is_chat = is_chat
        self.keeps_repeats = keeps_repeats
        self.repeated = 0
        """Rows left out because an identical one without an `id` of its own came before."""
        self.told: list[str] = []
        """What was said of its rows when they were read, a line each: which repeat, which were left out and why."""
        self.skills: dict[str, str] = {}
        """By id, what a row says in its column `skill`, where it does."""
        self.answered = 0
        """Conversations whose last message is the assistant's: as a rule the answer, left in."""
        self.left_out: list[str] = []
        """Ids of rows whose reference the domain's reward cannot read, and of those that are too long."""
        self._with_nulls = (
            rows.with_nulls if isinstance(rows, FileRows) else hasattr(rows, "features")
        )  # Arrow's: what one row has, the others have as null
        self._position: dict[str, int] = {}
        self._seen = Counter[str]()
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

    def only(self, ids: Sequence[str]) -> PromptTable:
        """Return the table of some of its prompts, in that order."""
        some = copy.copy(self)
        some._position = {prompt_id: self._position[prompt_id] for prompt_id in ids}
        some.ids = list(ids)
        return some

    def has(self, prompt_id: str) -> bool:
        """Whether there is a prompt of this id."""
        return prompt_id in self._position

    def row_of(self, prompt_id: str) -> str:
        """Return where a prompt stands, in words."""
        return f"{self.where}: row {self._position[prompt_id] + 1}{self._place(self._position[prompt_id])}"

    def _place(self, i: int) -> str:
        return f" ({self.rows.place(i)})" if isinstance(self.rows, FileRows) else ""

    def texts_of(self, prompt_id: str) -> list[str]:
        """Return a prompt's text, or that of its messages."""
        prompt = _as_written(self.rows[self._position[prompt_id]]["prompt"], with_nulls=self._with_nulls)
        return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]

    def said(self, prompt_id: str) -> tuple[str, str]:
        """Return what the user says in a row, and all that stands in it; without the domain's own system prompt."""
        if self.domain.environment is not None:  # whose columns are what is played
            return (text := content_text(self.rows[self._position[prompt_id]], with_columns=True)), text
        prompt = _as_written(self.rows[self._position[prompt_id]]["prompt"], with_nulls=self._with_nulls)
        if isinstance(prompt, str):
            return prompt, prompt
        user = "\n".join(m["content"] for m in prompt if m["role"] == "user")
        return user, "\n".join(m["content"] for m in prompt)

    def tell(self) -> None:
        """Warn with the number of rows that were left out because one before says the same, and of answered ones."""
        if self.repeated:
            of = len(self) + self.repeated
            what = "repeat one before them in prompt and answer (and have no `id`)"
            self.warn(f"{self.where}: {self.repeated} of {of} rows {what}; left out")
        if self.answered:
            what = "end with what the assistant said: the policy is asked for one more turn after it"
            self.warn(f"{self.where}: {self.answered} of {len(self)} rows {what}")

    def warn(self, message: str) -> None:
        """Say something of the rows, and keep it for the run's provenance."""
        self.told.append(message)
        warnings.warn(message, stacklevel=4)

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
            self.warn(f"{self._named(remarks)} are kept with a reservation ({self.shown(remarks)})")

    def leave_out(self, reasons: Mapping[str, str], what: str) -> None:
        """Leave out rows, by id with the reason of each; `what` they do. Raises ValueError where none would stay."""
        message = f"{self._named(reasons)} {what} ({self.shown(reasons)})"
        if len(reasons) == len(self):
            raise ValueError(f"{message}: nothing is left")
        self._leave_out(reasons, message)

    def _leave_out(self, reasons: Mapping[str, str], message: str) -> None:
        self.warn(f"{message}; left out")
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
            like = next((f", did you mean `{name}`?" for name in LIKE_A_PROMPT if row.get(name)), "")
            raise ValueError(f"{self.where}: row {i + 1} has no `prompt`{like}; its columns are {sorted(row, key=str)}")
        if taken := [name for name in CALLED_WITH if name in row]:
            raise ValueError(
                f"{self.where}: row {i + 1}: column {taken[0]!r} needs another name: a reward is called with one of its own"
            )
        if pictures := [name for name in PICTURES if not _is_nothing(row.get(name))]:
            raise ValueError(
                f"{self.where}: row {i + 1}: column {pictures[0]!r}: the policy reads text alone, and would not see it"
            )
        if not row["prompt"] or (isinstance(row["prompt"], str) and not row["prompt"].strip()):
            raise ValueError(f"{self.where}: row {i + 1} has an empty `prompt`")
        try:
            prompt = _as_written(row["prompt"], with_nulls=self._with_nulls)
            if self.domain.as_chat and isinstance(prompt, str):
                _refuse_json(prompt)
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
        self.answered += not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
        given = row.get("id")
        if isinstance(given, Mapping | list | bool) or given == "":
            raise ValueError(f"{self.where}: row {i + 1}: an `id` is text or a number, got {given!r:.60}")
        prompt_id = self._checked_id(i, {**row, "prompt": prompt, "tools": tools})
        if prompt_id not in self._position:
            self._position[prompt_id] = i
            if (skill := row.get("skill")) is not None:
                self.skills[prompt_id] = self._checked_skill(i, skill)
        elif given is None:
            self.repeated += 1
        else:
            first = self._position[prompt_id] + 1
            raise ValueError(f"{self.where}: id {prompt_id!r} stands in row {first} and again in row {i + 1}")

    def _checked_skill(self, i: int, skill: Any) -> str:
        if not isinstance(skill, str) or not re.fullmatch(r"\w[\w .+-]*", skill):
            raise ValueError(
                f"{self.where}: row {i + 1}: column `skill` names a part of the domain in metric keys: letters, digits, "
                f"spaces and _.+-, got {skill!r:.60}"
            )
        return skill

    def _checked_id(self, i: int, row: Mapping[str, Any]) -> str:
        given = row.get("id")
        try:
            known = content_id(row, with_columns=self.domain.environment is not None or self.keeps_repeats)
            str(given).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.where}: row {i + 1}: half a character (a lone surrogate) in its text") from error
        except RecursionError as error:
            raise ValueError(f"{self.where}: row {i + 1} is nested too deeply") from error
        if self.keeps_repeats and given is None:
            self._seen[known] += 1
            known = known if self._seen[known] == 1 else f"{known}-{self._seen[known]}"
        return known if given is None else str(given)


def content_id(row: Mapping[str, Any], *, with_columns: bool = False) -> str:
    """Return 16 hex digits of the row's content: the same on every machine and after every restart."""
    return hashlib.sha256(content_text(row, with_columns=with_columns).encode()).hexdigest()[:16]


def content_text(row: Mapping[str, Any], *, with_columns: bool = False) -> str:
    """Return the row's prompt, answer and tools as text; with its other columns where an environment begins with them."""
    said = [row["prompt"], _answer(row), *([tools] if (tools := row.get("tools")) else [])]
    if with_columns:
        said.append({k: v for k, v in row.items() if k not in ("prompt", "id", "tools") and v is not None})
    return json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)


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


def _refuse_json(text: str) -> None:
    """Raise ValueError for messages that a table has kept as JSON text: the policy would be asked that text."""
    if not text.lstrip().startswith("[") or '"role"' not in text:
        return
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(found, list) and found and all(isinstance(m, Mapping) and {"role", "content"} <= {*m} for m in found):
        raise ValueError(
            f"its `prompt` is JSON text of messages, {text!r:.60}: give the messages, or such a text in one"
        )


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


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple) and not value)


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    columns = {name: value for name, value in row.items() if name not in ("prompt", "id", "domain")}
    return {**columns, "answer": _answer(row)}
