"""Somebody's own rows as a recipe reads them, CSV too: which column is the prompt and which the answer, choices shown."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyphony.launch.recipe import RecipeError
from polyphony.rewards.multiple_choice import choice_names, right_letter
from polyphony.trainer.data import LIKE_A_PROMPT, LIKE_AN_ANSWER
from polyphony.trainer.rows import READABLE, FileRows, load_rows

Row = dict[str, Any]

TABLES = {".csv": ",", ".tsv": "\t"}
"""Files of rows with a header, by what parts their columns."""
PROMPTS, ANSWERS = ("prompt", *LIKE_A_PROMPT), ("answer", "ground_truth", *LIKE_AN_ANSWER)
KNOWN = (*PROMPTS, *ANSWERS, "choices", "tests", "tools", "reward_model", "data_source", "extra_info")
"""Columns that are read, however they are written: `Question` is `question`."""


def read(file: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of a file and where each stands, in words. Raises RecipeError that names the file."""
    if found := re.match(r"(hf|https?|s3):/", str(file)):
        raise RecipeError(
            f"{file}: files of this machine are read, not {found[1]}: download it, or write a recipe's `train:`"
        )
    is_file = file.is_file() and file.suffix.lower() not in TABLES
    if is_file and not any(suffix in READABLE for suffix in file.suffixes):
        raise RecipeError(
            f"{file}: cannot read {file.suffix or 'a file without suffix'}; known: {', '.join((*READABLE, *TABLES))}"
        )
    try:
        found = _table(file) if file.suffix.lower() in TABLES else load_rows(str(file.resolve()), where=str(file))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{file}: not UTF-8, in which it must be saved: {error.reason} at byte {error.start}"
        ) from error
    except (ValueError, OSError, csv.Error) as error:
        raise RecipeError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
    places = [f"line {found.lines[i]}" if isinstance(found, _Table) else f"row {i + 1}" for i in range(len(found))]
    if isinstance(found, FileRows):
        places = [
            f"line {place}" if (place := found.place(i).rpartition(":")[2]).isdecimal() else f"row {i + 1}"
            for i in range(len(found))
        ]
    names = {name for row in found for name in row}
    folded = {n: n.strip().casefold() for n in names if n not in KNOWN and str(n).strip().casefold() in KNOWN}
    back = {n: to for n, to in folded.items() if to not in names and list(folded.values()).count(to) == 1}
    return [{back.get(key, key): value for key, value in row.items()} for row in found], places


class _Table(list):
    """Rows of a CSV file, with the line that each ends on."""

    lines: Sequence[int] = ()


def _table(file: Path) -> _Table:
    if not file.is_file():
        raise ValueError(f"{file}: file does not exist")
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=TABLES[file.suffix.lower()], strict=True)
        _check_header(reader.fieldnames or (), file, TABLES[file.suffix.lower()])
        rows, lines = _Table(), []
        began = 1
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"{file}: line {reader.line_num}: more columns than the header's {len(row) - 1}")
                rows.append(row)
                lines.append(reader.line_num)
                began = reader.line_num
        except csv.Error as error:
            raise ValueError(f"{file}: after line {began}: {error}; is a quote not closed?") from error
    rows.lines = lines
    return rows


def _check_header(names: Sequence[str], file: Path, parted_by: str) -> None:
    """Raise ValueError for columns of one name, and for a header that something else parts."""
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise ValueError(f"{file}: line 1: {names.count(twice[0])} columns are called {twice[0]!r}")
    if len(names) == 1 and (other := [mark for mark in ";\t|," if mark in names[0]]):
        raise ValueError(
            f"{file}: line 1: columns are parted by {other[0]!r}, expected {parted_by!r} in a {file.suffix}"
        )


def column(rows: Sequence[Row], names: Sequence[str], places: Sequence[str], file: Path, *, must: bool) -> str:
    """Return the first of the names that every row has; empty where no row has one.

    Raises RecipeError for the row that lacks what most have, if there `must` be one.
    """
    lacking = {name: [i for i, row in enumerate(rows) if is_nothing(row.get(name))] for name in names}
    if whole := next((name for name in names if rows and not lacking[name]), ""):
        return whole
    most = min(names, key=lambda name: len(lacking[name]))
    if must and len(lacking[most]) <= len(rows) // 2:
        others = f" (and {len(lacking[most]) - 1} more)" if len(lacking[most]) > 1 else ""
        raise RecipeError(f"{file}: {places[lacking[most][0]]}{others} has no `{most}`, which the others have")
    return ""


def is_nothing(value: Any) -> bool:
    """Whether a row says nothing in a column."""
    return value is None or (isinstance(value, str) and not value.strip())


def with_choices(rows: Sequence[Row], places: Sequence[str], file: Path) -> tuple[list[Row], str]:
    """Return rows whose prompt shows their choices and whose answer is a letter, and what was done for it, in words.

    Raises RecipeError naming a row whose answer is none of its choices.
    """
    found, shown, lettered = [], 0, 0
    for row, place in zip(rows, places, strict=True):
        try:
            names = choice_names(row.get("choices"))
            letter = right_letter(_number(row["answer"], names), row.get("choices"))
        except ValueError as error:
            raise RecipeError(f"{file}: {place}: {str(error).removeprefix('multiple_choice: ')}") from error
        prompt = row["prompt"]
        if names and not all(known[0] in _text(prompt) for known in names.values()):
            prompt, shown = (
                _showing(prompt, "\n".join(f"{name}. {known[0]}" for name, known in names.items())),
                shown + 1,
            )
        lettered += letter != row["answer"]
        found.append({**row, "prompt": prompt, "answer": letter})
    done = [f"the choices are written into {shown} prompts"] if shown else []
    done += [f"{lettered} answers, an index or a choice's text, are written as letters"] if lettered else []
    return found, "; ".join(done)


def _number(answer: Any, names: Mapping[str, tuple[str, ...]]) -> Any:
    """Return an index that a file has as text as a number, unless it is a choice's name."""
    is_index = isinstance(answer, str) and answer.strip().isdecimal()
    return int(answer) if is_index and not any(answer.strip() in known for known in names.values()) else answer


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(turn.get("content")) for turn in prompt)


def _showing(prompt: Any, choices: str) -> Any:
    if isinstance(prompt, str):
        return f"{prompt}\n{choices}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n{choices}"}]
