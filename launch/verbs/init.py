"""`polyphony init`: a commented recipe for rows that somebody has, with what was guessed and why, and a schema for editors.

Rows are split by their prompts, renamed to what a recipe reads, and written beside it. A reward fits where references are
right under it, and those of other rows wrong.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyphony.curricula.files import replace_file
from polyphony.curricula.records import Domain, Prompt, graded, mean
from polyphony.launch.recipe import RecipeError
from polyphony.launch.schema import schema
from polyphony.rewards import find_reward
from polyphony.trainer.data import LIKE_A_PROMPT, LIKE_AN_ANSWER, PromptTable, content_id
from polyphony.trainer.held_out import held_out, prompt_key
from polyphony.trainer.rows import READABLE, load_rows
from polyphony.trainer.run import say
from polyphony.trainer.run.json_lines import read_object

MODEL = "Qwen/Qwen3-0.6B"
LEAST = 40
"""Rows of a domain: fewer leave nothing to tell a change by."""
TRIED = 48
"""References that a reward is tried on."""
RIGHT, WRONG = 0.95, 0.2
"""Least mean score of a reference under a reward that fits, and most of another row's."""
WORDS = 20
"""Mean length of references from which nobody answers in the same words."""
LONGEST = 512
"""Tokens of an answer."""
REWARDS = ("code", "function_call", "multiple_choice", "math", "short_answer")
"""Tried in this order, the most particular first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """What a file of rows was taken for."""

    name: str
    file: Path
    renamed: Mapping[str, str]
    reward: str
    why: str
    train: Sequence[Mapping[str, Any]]
    heldout: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, file: Path, reward: str | None) -> Guess:
        """Read a file. Raises RecipeError, naming it and the column, where nothing can be made of it."""
        try:
            rows = list(load_rows(str(file.resolve()), where=str(file)))
        except ValueError as error:
            raise RecipeError(str(error)) from error
        renamed = {"prompt": _column(rows, ("prompt", *LIKE_A_PROMPT))}
        if not renamed["prompt"]:
            has = ", ".join(sorted(rows[0])) if rows else "no rows"
            known = ", ".join(("prompt", *LIKE_A_PROMPT))
            raise RecipeError(f"{file}: no column is a prompt in every row; it has {has}, known are {known}")
        if (answer := _column(rows, ("answer", "ground_truth", *LIKE_AN_ANSWER))) and not all(map(_is_verls, rows)):
            renamed["answer"] = answer
        back = {old: new for new, old in renamed.items()}
        rows = [{back.get(key, key): value for key, value in row.items()} for row in rows]
        unique = list({content_id(row): row for row in rows}.values())
        if (prompts := len({prompt_key(row["prompt"]) for row in unique})) < LEAST:
            raise RecipeError(
                f"{file}: {prompts} different prompts; at least {LEAST} are needed to train and to hold out"
            )
        found, why = (reward, "as you said") if reward else _reward(unique, file)
        train, heldout = _split(unique)
        name = re.sub(r"\W+", "_", file.name.partition(".")[0]).strip("_").lower() or "rows"
        return cls(name=name, file=file, renamed=renamed, reward=found, why=why, train=train, heldout=heldout)

    def __str__(self) -> str:
        moved = ", ".join(f"`{new}` is its `{old}`" for new, old in self.renamed.items() if new != old)
        columns = f"; {moved}" if moved else ""
        return (
            f"{self.file}: reward {self.reward} ({self.why}); {len(self.heldout)} rows held out of {self.size}{columns}"
        )

    @property
    def size(self) -> int:
        return len(self.train) + len(self.heldout)


def init(files: Sequence[Path], out: Path, *, model: str = MODEL, reward: str | None = None) -> Path:
    """Write a recipe with rows and schema; return it. Raises RecipeError where one is there, or rows cannot be used."""
    if out.exists():
        raise RecipeError(f"{out} exists; choose another --out")
    guesses = [Guess.of(file, reward) for file in files]
    names = [guess.name for guess in guesses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"two files would be the domain {twice[0]!r}: name them otherwise")
    folder = out.parent / f"{out.stem}-rows"
    if folder.exists():
        raise RecipeError(f"{folder} exists; choose another --out")
    folder.mkdir(parents=True)
    for guess in guesses:
        say(f"init: {guess}")
        for split in ("train", "heldout"):
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in getattr(guess, split))
            replace_file(folder / _file(guess, split), "\n".join(lines) + "\n")
    replace_file(out.with_suffix(".schema.json"), json.dumps(schema(), indent=1))
    replace_file(out, _recipe(guesses, out, folder, model))
    return out


def _column(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Return the first of the names that every row has; empty where none is."""
    return next((name for name in names if rows and all(row.get(name) not in (None, "") for row in rows)), "")


def _is_verls(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("reward_model"), Mapping) and "ground_truth" in row["reward_model"]


def _reward(rows: Sequence[Mapping[str, Any]], file: Path) -> tuple[str, str]:
    """Return the first reward that fits the rows' references, and why."""
    domain = Domain(name="rows", kind="structured")
    try:
        table = PromptTable(rows, domain=domain, where=str(file), is_chat=True)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    sample = [table[i] for i in sorted(table.ids)[:TRIED]]
    references = [_said(prompt.columns.get("answer")) for prompt in sample]
    if not any(references) and "tests" not in sample[0].columns:
        raise RecipeError(f"{file}: no column is a reference: give --reward judge, or an import path, which need none")
    for name in REWARDS:
        reward = find_reward(name)
        ask = getattr(reward, "unreadable", lambda **_: None)
        if not _is_its_form(name, references, sample) or any(ask(**p.columns) is not None for p in sample):
            continue
        if name == "code":
            return name, f"its tests are read in {len(sample)} rows tried"
        others = references[1:] + references[:1]
        own, of_others = (_scores(reward, sample, said) for said in (references, others))
        pairs = zip(of_others, references, others, strict=True)
        right, wrong = mean(own), mean([score for score, mine, other in pairs if mine != other] or [0.0])
        if right >= RIGHT and wrong <= WRONG:
            return name, f"of {len(sample)} references {right:.0%} are right, of another row's {wrong:.0%}"
    raise RecipeError(
        f"{file}: no reward of {', '.join(REWARDS)} takes its references, {references[0]!r:.60} for one, for right and "
        "those of other rows for wrong: give --reward judge, or an import path"
    )


def _is_its_form(name: str, references: Sequence[str], sample: Sequence[Prompt]) -> bool:
    """Whether rows look as those of a reward, which may read more than it is meant for."""
    if name == "code":
        return all("tests" in prompt.columns for prompt in sample)
    if name == "multiple_choice":
        pairs = zip(sample, references, strict=True)
        return all("choices" in prompt.columns or re.fullmatch("[A-Z]", text) for prompt, text in pairs)
    if name == "function_call":
        return all(text.lstrip().startswith(("[", "{")) for text in references)
    return all(references) and (name != "short_answer" or mean([len(text.split()) for text in references]) <= WORDS)


def _scores(reward: Any, sample: Sequence[Prompt], said: Sequence[str]) -> list[float]:
    columns = {key: [prompt.columns.get(key) for prompt in sample] for key in sample[0].columns}
    prompts = [prompt.prompt for prompt in sample]
    return list(graded(reward(prompts=prompts, completions=list(said), completion_ids=[[0]] * len(sample), **columns)))


def _said(reference: Any) -> str:
    if isinstance(reference, str):
        return reference
    return "" if reference is None else json.dumps(reference, ensure_ascii=False)


def _split(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return training and held-out rows."""
    held = held_out([row["prompt"] for row in rows])
    sides = [[row for row, is_held in zip(rows, held, strict=True) if is_held == side] for side in (False, True)]
    return sides[0], sides[1]


def _file(guess: Guess, split: str) -> str:
    return f"{guess.name}-{split}{READABLE[0]}"


def _longest(model: str) -> int:
    """Return the tokens of an answer: half of the context of a small model whose folder is here."""
    config = Path(model) / "config.json"
    context = read_object(config).get("max_position_embeddings") if config.is_file() else None
    return min(LONGEST, (context or 2 * LONGEST) // 2)


def _recipe(guesses: Sequence[Guess], out: Path, folder: Path, model: str) -> str:
    has_gpu = shutil.which("nvidia-smi") is not None
    lines = [
        f"# yaml-language-server: $schema={out.with_suffix('.schema.json').name}",
        "# Written by `polyphony init`; every key stands in launch/REFERENCE.md. Next:",
        f"#   polyphony train {out.name} --dry-run     checks all but the weights",
        f"#   polyphony train {out.name}",
        f"name: {out.stem}",
        f"model: {json.dumps(model)}",
        "domains:",
    ]
    for guess in guesses:
        kind = "structured" if guess.reward in REWARDS else "open_ended"
        lines += [
            f"  {guess.name}:  # {guess.file.name}, {guess.size} rows",
            f"    kind: {kind}",
            f"    train: {folder.name}/{_file(guess, 'train')}",
            f"    heldout: {folder.name}/{_file(guess, 'heldout')}  # never trained on; without `train` it is only watched",
            f"    reward: {json.dumps(guess.reward)}  # {guess.why}",
        ]
    lines += [
        "pool: {look: 4}  # prompts by their pass rate; a group of equal rewards is cut short",
        "eval: {every: 25, samples: 2}  # draws between held-out evaluations, answers to each item",
        "rollouts: {engine: vllm}",
        "grpo:  # fields of TRL's GRPOConfig",
        "  learning_rate: 1e-6  # with `lora: {}` about 1e-5",
        "  max_steps: 200",
        "  num_generations: 8  # answers to a prompt",
        "  per_device_train_batch_size: 8  # completions at once",
        "  gradient_accumulation_steps: 8  # so 64 completions of 8 prompts make a step",
        f"  max_completion_length: {_longest(model)}  # tokens; what is longer is cut and counts as wrong",
    ]
    lines += [] if has_gpu else ["  bf16: false  # there is no GPU here"]
    return "\n".join([*lines, "tracking: {wandb: null}  # {mode: online} logs there", ""])
