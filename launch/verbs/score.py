"""`polyphony score`: run any reward over a file of rows; how a user debugs a grader."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from polyphony.curricula.records import Domain
from polyphony.launch.import_paths import renamed
from polyphony.rewards.answers import completion_text
from polyphony.trainer.data import PromptTable, load_rows
from polyphony.trainer.metrics import Logged
from polyphony.trainer.scoring import Sample, Scorer


def score(path: Path, *, reward: str, as_json: bool) -> None:
    """Print the reward of every row, in order; null where the grader failed. Raises ValueError for a malformed row."""
    logged = Logged()
    rewards = score_rows(path, reward=reward, logged=logged)
    said = {name: {"sum": total, "of": count} for (_, name), (total, count) in logged.sums.items()}
    if as_json:
        print(json.dumps({"rewards": rewards} | ({"logged": said} if said else {})))
        return
    for number, value in enumerate(rewards, start=1):
        print(f"{number:6d}  {'failed' if value is None else f'{value:g}'}")
    graded = [r for r in rewards if r is not None]
    if graded:
        counts = ", ".join(f"{value:g}: {n}" for value, n in sorted(Counter(graded).items())[:8])
        print(
            f"mean {sum(graded) / len(graded):.3f} of {len(graded)} graded, {len(rewards) - len(graded)} failed ({counts})"
        )
    for name, counted in said.items():
        print(f"{name.replace('_', ' ')}: {counted['sum']:g} of {counted['of']}")


def score_rows(path: Path, *, reward: str, logged: Logged | None = None) -> list[float | None]:
    """Return the reward of every row of a JSONL or Parquet file, and in `logged` what the reward logs.

    `completion_ids` are for rewards that count tokens.
    """
    rows = [dict(row) for row in load_rows(str(path), where="rows")]
    for number, row in enumerate(rows, start=1):
        if "completion" not in row:
            raise ValueError(f"{path}: row {number} has no `completion`; its columns are {sorted(row)}")
        row["id"] = str(number)  # the same prompt may stand with several completions
    tokens = [row.pop("completion_ids", []) for row in rows]
    domain = Domain(name="rows", kind="structured", reward=_spec(reward))
    table = PromptTable(rows, domain=domain, where=str(path), is_chat=True)
    samples = [
        Sample(prompt=prompt, ids=ids, text=_text(row["completion"]), truncated=False)
        for prompt, row, ids in zip(table, rows, tokens, strict=True)
    ]
    scorer = Scorer([domain])
    scorer.logged = scorer.logged if logged is None else logged
    return scorer(samples)


def _spec(reward: str) -> Any:
    if not reward.lstrip().startswith("{"):
        return renamed(reward)
    try:
        spec = json.loads(reward)
    except json.JSONDecodeError as error:
        raise ValueError(f"--reward {reward!r}: not valid JSON: {error.msg}") from error
    if not isinstance(spec.get("name"), str):
        raise ValueError(f"--reward {reward!r}: expected a `name`")
    return renamed(spec)


def _text(completion: Any) -> str:
    return completion_text(completion)
