"""`polyphony score`: run any reward over a file of rows; how a user debugs a grader."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyphony.curricula.records import Completion, Domain
from polyphony.launch.import_paths import renamed
from polyphony.rewards.answers import completion_text
from polyphony.trainer.data import PromptTable
from polyphony.trainer.rows import load_rows
from polyphony.trainer.scoring import Scorer


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a reward said of the rows of a file, in order."""

    rewards: list[float | None]
    """None where the grader failed."""
    logged: dict[str, dict[str, float]]
    """What it logged by name, as `{"sum": .., "of": ..}`."""


def score_rows(path: Path, *, reward: str) -> Scored:
    """Run a reward over every row of a JSONL or Parquet file.

    `completion_ids` are for rewards that count tokens. Raises ValueError for a malformed row.
    """
    rows = [dict(row) for row in load_rows(str(path), where="rows")]
    for number, row in enumerate(rows, start=1):
        if "completion" not in row:
            raise ValueError(f"{path}: row {number} has no `completion`; its columns are {sorted(row)}")
        row["id"] = str(number)  # the same prompt may stand with several completions
    tokens = [row.pop("completion_ids", []) for row in rows]
    domain = Domain(name="rows", kind="structured", reward=spec_of(reward))
    table = PromptTable(rows, domain=domain, where=str(path), is_chat=True)
    completions = [
        Completion(prompt=prompt, ids=ids, text=completion_text(row["completion"]))
        for prompt, row, ids in zip(table, rows, tokens, strict=True)
    ]
    scorer = Scorer([domain])
    rewards = scorer(completions)
    said = {name: {"sum": total, "of": count} for (_, name), (total, count) in scorer.logged.sums.items()}
    return Scored(rewards=rewards, logged=said)


def score_table(scored: Scored) -> str:
    """Return the reward of every row as text, `failed` where there is none, their mean, and what was logged."""
    rewards = scored.rewards
    lines = [f"{n:6d}  {'failed' if value is None else f'{value:g}'}" for n, value in enumerate(rewards, start=1)]
    if graded := [r for r in rewards if r is not None]:
        counts = ", ".join(f"{value:g}: {n}" for value, n in sorted(Counter(graded).items())[:8])
        mean, failed = sum(graded) / len(graded), len(rewards) - len(graded)
        lines.append(f"mean {mean:.3f} of {len(graded)} graded, {failed} failed ({counts})")
    lines += [f"{name.replace('_', ' ')}: {count['sum']:g} of {count['of']}" for name, count in scored.logged.items()]
    return "\n".join(lines)


def spec_of(reward: str) -> Any:
    """Return what a command line says of a reward: a name, an import path, or JSON. Raises ValueError."""
    if not reward.lstrip().startswith("{"):
        return renamed(reward)
    try:
        spec = json.loads(reward)
    except json.JSONDecodeError as error:
        raise ValueError(f"--reward {reward!r}: not valid JSON: {error.msg}") from error
    if not isinstance(spec.get("name"), str):
        raise ValueError(f"--reward {reward!r}: expected a `name`")
    return renamed(spec)
