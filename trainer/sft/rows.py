"""Experts' answers become what is learned: rows matched with the run's prompts by id, checked before weights are loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset

from polyphony.curricula.declarations import nearest
from polyphony.curricula.records import Completion, Domain, Prompt
from polyphony.trainer.data import PromptTable
from polyphony.trainer.domains import DomainData
from polyphony.trainer.rows import FileRows, Rows, load_rows
from polyphony.trainer.sft.settings import ANSWERS, answers_file

LIKE_A_COMPLETION = ("response", "answer", "output", "text", "messages", "completions")
"""What others call an answer."""
IGNORED = -100
"""The label of a token that is no part of the loss."""


def read_answers(source: str, data: DomainData) -> list[Completion]:
    """Return the answers of a file, or of the folder of a sample, each with its prompt and token ids, in order.

    Answers to prompts that the run leaves out are left out. Raises ValueError, naming the row, for one that answers no
    training prompt, and for text of a chat template.
    """
    rows = load_rows(str(answers_file(source)), where=ANSWERS)
    if not len(rows):
        raise ValueError(f"{ANSWERS}: no rows{rows.of_files if isinstance(rows, FileRows) else ''}")
    marks, found, left_out = data.marks, [], 0
    for i, row in enumerate(rows):
        where = f"{ANSWERS}: row {i + 1}" + (f" ({rows.place(i)})" if isinstance(rows, FileRows) else "")
        prompt, text = _asked(row, data, where), _said(row, where)
        if prompt is None:
            left_out += 1
            continue
        if mark := next((mark for mark in marks if mark in text), None):
            raise ValueError(
                f"{where}: {mark!r} is of a chat template, not of an answer: give what was said without it"
            )
        found.append(Completion(ids=(), prompt=prompt, text=text, truncated=_is_truncated(row, where)))
    if left_out:
        warnings.warn(f"{ANSWERS}: {left_out} of {len(rows)} answer prompts that are left out", stacklevel=2)
    if not found:
        raise ValueError(f"{ANSWERS}: all {len(rows)} rows answer prompts that are left out: nothing is left")
    return _tokenized(found, data, rows)


def _asked(row: Mapping[str, Any], data: DomainData, where: str) -> Prompt | None:
    """Return the training prompt that a row answers; None where the run leaves it out."""
    for name in ("domain", "id", "completion"):
        if name not in row:
            like = next(
                (f", did you mean `{n}`?" for n in LIKE_A_COMPLETION if name == "completion" and row.get(n)), ""
            )
            raise ValueError(f"{where} has no `{name}`{like}; its columns are {sorted(row, key=str)}")
    domain, prompt_id = row["domain"], str(row["id"])
    if domain not in data.names:
        raise ValueError(f"{where}: unknown domain {domain!r}; {nearest(str(domain), data.names)}")
    table = data.train.get(domain)
    if table is None:
        raise ValueError(f"{where}: domain {domain!r} is only watched: nothing of it is learned")
    if prompt_id in table.left_out:
        return None
    if not table.has(prompt_id):
        of = "a held-out row" if data.heldout[domain].has(prompt_id) else "no training row"
        raise ValueError(f"{where}: id {prompt_id!r} is of {of} of domain {domain!r}")
    if (then := row.get("prompt")) is not None and then != (now := table.said(prompt_id)[1]):
        raise ValueError(f"{where}: it answers {then!r:.60}, and the prompt of id {prompt_id!r} is {now!r:.60}")
    return table[prompt_id]


def _said(row: Mapping[str, Any], where: str) -> str:
    text = row["completion"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: a `completion` is text, and not empty, got {text!r:.60}")
    return text


def _is_truncated(row: Mapping[str, Any], where: str) -> bool:
    truncated = row.get("truncated")
    if truncated is not None and not isinstance(truncated, bool):
        raise ValueError(f"{where}: `truncated` is true or false, got {truncated!r:.60}")
    return bool(truncated)


def _tokenized(found: Sequence[Completion], data: DomainData, rows: Rows) -> list[Completion]:
    """Return the answers with token ids, and their prompts' as at every draw; an answer that is whole ends with the end of a
    turn."""
    prompts = {prompt: prompt for prompt in data.tokenized(dict.fromkeys(answer.prompt for answer in found))}
    end, openings = data.tokenizer.eos_token_id, data.openings
    told = []
    for answer in found:
        text = answer.text.removeprefix(openings.get(answer.prompt.domain, ""))  # which the prompt ends with
        ids = data.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = prompts[answer.prompt]
        ids = [*ids, *([] if answer.truncated else [end])]  # type: ignore[misc]
        if data.context is not None and (n := len(prompt.ids) + len(ids)) > data.context:
            raise ValueError(
                f"{ANSWERS}: an answer to id {prompt.id!r} of domain {prompt.domain!r}: {n} tokens with its prompt, the "
                f"context holds {data.context}"
            )
        told.append(replace(answer, prompt=prompt, ids=ids))
    return told


def tables_of(answers: Sequence[Completion]) -> dict[str, PromptTable]:
    """Return the answers as tables by place, for a run's provenance: it goes on with the same alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        of = found.setdefault(answer.prompt.domain, [])
        of.append({"prompt": answer.text, "id": f"{len(of)}/{answer.prompt.id}", "truncated": answer.truncated})
    return {
        where: PromptTable(rows, domain=Domain(name=name, kind="structured"), where=where, is_chat=False)
        for name, rows in found.items()
        for where in [f"{ANSWERS} ({name})"]
    }


def dataset_of(answers: Sequence[Completion], names: Sequence[str], *, filling: int = 0) -> Dataset:
    """Return the answers for TRL's SFTTrainer, tokenized: the loss is on their tokens alone. `domain` is a place in
    `names`; that of the `filling` rows behind them, of which nothing is learned, is the one after the last."""
    return Dataset.from_dict(
        {
            "input_ids": [[*answer.prompt.ids, *answer.ids] for answer in answers] + [[0, 0]] * filling,
            "labels": [[IGNORED] * len(answer.prompt.ids) + [*answer.ids] for answer in answers]
            + [[IGNORED] * 2] * filling,
            "domain": [names.index(answer.prompt.domain) for answer in answers] + [len(names)] * filling,
        }
    )


@dataclass(frozen=True, slots=True)
class WithDomains:
    """TRL's collator, and beside what it makes of rows the domain of each."""

    collate: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.collate(list(rows)), "domain": torch.tensor([row["domain"] for row in rows])}
