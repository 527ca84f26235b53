"""`polyphony init`: a commented recipe for rows that somebody has, with what was guessed and why, and a schema for editors.

Rows are split by their prompts, renamed to what a recipe reads, and written beside it. A reward fits where references are
right under it, and those of other rows wrong.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyphony.curricula.files import replace_file
from polyphony.curricula.records import Domain, Prompt, graded, mean
from polyphony.launch.build import check_names
from polyphony.launch.import_paths import look_in
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.schema import schema
from polyphony.launch.verbs.own_rows import ANSWERS, PROMPTS, column, read, with_choices
from polyphony.launch.verbs.score import spec_of
from polyphony.rewards import find_reward
from polyphony.rewards.registry import called
from polyphony.trainer.data import PromptTable, content_id
from polyphony.trainer.held_out import held_out, prompt_key
from polyphony.trainer.rows import READABLE
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
STRUCTURED = (*REWARDS, "exact", "verl", "procedural")
"""What tells right from wrong."""
JUDGE = {"endpoint": "http://127.0.0.1:8001/v1", "model": "judge"}
"""Stands for what only its owner can say."""
NO_TEXT = ("true", "false", "yes", "no", "on", "off", "null", "none", "y", "n")
"""Words that YAML may read as something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """What a file of rows was taken for."""

    name: str
    file: Path
    renamed: Mapping[str, str]
    reward: Any
    """As a recipe has it: a name, an import path, or a mapping."""
    why: str
    train: Sequence[Mapping[str, Any]]
    heldout: Sequence[Mapping[str, Any]]
    repeated: int = 0
    """Rows that say the same as one before them."""
    done: str = ""
    """What was done to the rows besides, in words."""

    @classmethod
    def of(cls, file: Path, reward: Any = None, *, prompt: str | None = None, answer: str | None = None) -> Guess:
        """Read a file; `prompt` and `answer` are its columns of these, else looked for by their usual names.

        Raises RecipeError, naming it and the column, where nothing can be made of it.
        """
        rows, places = read(file)
        if not rows:
            raise RecipeError(f"{file}: has no rows")
        prompts, answers = _looked_for(rows, prompt, PROMPTS), _looked_for(rows, answer, ANSWERS)
        renamed = {"prompt": column(rows, prompts, places, file, must=True)}
        if not renamed["prompt"]:
            raise RecipeError(
                f"{file}: no column is a prompt in every row; it has {_names(rows)}, known are {', '.join(PROMPTS)}: "
                "give --prompt COLUMN"
            )
        needs = reward is None and not all(map(_is_verls, rows))
        if (answer := column(rows, answers, places, file, must=needs)) and not all(map(_is_verls, rows)):
            renamed["answer"] = answer
        has, moved = _names(rows), {old for new, old in renamed.items() if new != old}
        rest = [{key: value for key, value in row.items() if key not in (*moved, *renamed)} for row in rows]
        rows = [
            {new: row.get(old) for new, old in renamed.items()} | kept for row, kept in zip(rows, rest, strict=True)
        ]
        has_choices = reward in (None, "multiple_choice") and any("choices" in row for row in rows)
        rows, done = with_choices(rows, places, file) if has_choices and answer else (rows, "")
        unique = list({content_id(row): row for row in rows}.values())
        if (n_prompts := len({prompt_key(row["prompt"]) for row in unique})) < LEAST:
            raise RecipeError(
                f"{file}: {n_prompts} different prompts; at least {LEAST} are needed to train and to hold out: fewer tell "
                "no change; a recipe that you write yourself takes any number (README)"
            )
        found, why = (reward, "as you said") if reward else _reward(unique, file, has=has)
        train, heldout = _split(unique)
        sizes = {"repeated": len(rows) - len(unique), "done": done}
        told = {"name": domain_name(file), "file": file, "renamed": renamed, "reward": found, "why": why}
        return cls(**told, train=train, heldout=heldout, **sizes)

    def __str__(self) -> str:
        moved = ", ".join(f"`{new}` is its `{old}`" for new, old in self.renamed.items() if new != old)
        more = [moved] if moved else []
        more += [f"{self.repeated} rows repeat others and are left out"] if self.repeated else []
        more += [self.done] if self.done else []
        more += ["fill in `endpoint` and `model` of the judge"] if self.reward == "judge" else []
        held = f"{len(self.heldout)} rows held out of {self.size}"
        return "; ".join([f"{self.file}: reward {called(self.reward)} ({self.why})", held, *more])

    @property
    def size(self) -> int:
        return len(self.train) + len(self.heldout)


def init(
    files: Sequence[Path],
    out: Path | None = None,
    *,
    model: str = MODEL,
    reward: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
) -> Path:
    """Write a recipe with rows and schema; return it. `out` is by default called as the first file, in this folder.

    `prompt` and `answer` are columns of at least one file; where a file lacks one, its usual names are looked for.

    Raises RecipeError where one is there, where rows cannot be used, and where the recipe could not be read; nothing is left
    on disk then.
    """
    out = out or Path(f"{domain_name(files[0])}.yaml")
    if out.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"--out {out}: expected a name that ends in .yaml")
    folder, described = out.parent / f"{out.stem}-rows", out.with_suffix(".schema.json")
    for path in (out, folder, described):
        if path.exists():
            raise RecipeError(f"{path} exists; choose another --out")
    look_in(out.parent.resolve())
    spec, model = _asked(reward), _model(model)
    _check_columns(files, prompt=prompt, answer=answer)
    guesses, refused = [], []
    for file in files:
        try:
            guesses.append(Guess.of(file, spec, prompt=prompt, answer=answer))
        except RecipeError as error:
            refused += error.problems
    if refused:
        raise RecipeError(*refused)
    names = [guess.name for guess in guesses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"two files would be the domain {twice[0]!r}: name them otherwise")
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True)
        for guess in guesses:
            for split in ("train", "heldout"):
                lines = (json.dumps(row, ensure_ascii=False, default=str) for row in getattr(guess, split))
                replace_file(folder / _file(guess, split), "\n".join(lines) + "\n")
        replace_file(described, json.dumps(schema(), indent=1))
        replace_file(out, _recipe(guesses, out, folder, model))
        check_names(load_recipe(out))
    except BaseException:  # whatever it is, nothing stays half written
        for path in (out, described):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made[1:]:
            parent.rmdir()
        raise
    for guess in guesses:
        say(f"init: {guess}")
    return out


def _check_columns(files: Sequence[Path], *, prompt: str | None, answer: str | None) -> None:
    """Raise RecipeError for a column that was asked for and is in no file, or is to be both."""
    if prompt is not None and prompt == answer:
        raise RecipeError(f"--prompt {prompt} and --answer {answer}: one column cannot be both")
    tables = {}
    for file in files if prompt or answer else ():
        with suppress(RecipeError):  # told with what else is wrong
            tables[file] = read(file)[0]
    for option, asked in (("--prompt", prompt), ("--answer", answer)):
        if asked and tables and not any(asked in row for rows in tables.values() for row in rows):
            has = "; ".join(f"{file} has {_names(rows)}" for file, rows in tables.items() if rows)
            raise RecipeError(f"{option} {asked}: no such column; {has}")


def _looked_for(rows: Sequence[Mapping[str, Any]], asked: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    return (asked,) if asked is not None and any(asked in row for row in rows) else usual


def _names(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted(map(str, rows[0])))


def domain_name(file: Path) -> str:
    """Return what rows of a file are called."""
    return re.sub(r"\W+", "_", file.name.partition(".")[0]).strip("_").lower() or "rows"


def _asked(reward: str | None) -> Any:
    """Return a reward that is asked for, as a recipe has it. Raises RecipeError where there is none of that name."""
    try:
        spec = None if reward is None else spec_of(reward)
        if spec is not None:
            find_reward({"name": spec, **JUDGE} if spec == "judge" else spec)
    except ValueError as error:
        raise RecipeError(f"--reward: {error}") from error
    return spec


def _model(model: str) -> str:
    """Return a name on the hub as it is, a folder's from the root on. Raises RecipeError for a folder that is not there."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise RecipeError(f"--model {model}: no such folder, and no name on the hub")
    return model


def _is_verls(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("reward_model"), Mapping) and "ground_truth" in row["reward_model"]


def _reward(rows: Sequence[Mapping[str, Any]], file: Path, *, has: str) -> tuple[str, str]:
    """Return the first reward that fits the rows' references, and why; `has` names the file's columns."""
    domain = Domain(name="rows", kind="structured")
    try:
        table = PromptTable(rows, domain=domain, where=str(file), is_chat=True)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    sample = [table[i] for i in sorted(table.ids)[:TRIED]]
    references = [_said(prompt.columns.get("answer")) for prompt in sample]
    tried = ("multiple_choice",) if all("choices" in prompt.columns for prompt in sample) else REWARDS
    if not any(references) and "tests" not in sample[0].columns:
        how = f"it has {has}; give --answer COLUMN, or call one {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}"
        if _is_answered(sample[0].prompt):
            how = "its messages end with the answer: move that to a column `answer`"
        raise RecipeError(
            f"{file}: no column is a reference: {how}, or give --reward judge or an import path, which need none"
        )
    for name in tried:
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
        f"{file}: no reward of {', '.join(tried)} takes its references, {references[0]!r:.60} for one, for right and "
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
    is_short = mean([len(text.split()) for text in references]) <= WORDS
    has_mark = name == "math" and all("####" in text or r"\boxed" in text for text in references)
    return all(references) and (is_short or has_mark)


def _is_answered(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and prompt[-1].get("role") == "assistant"


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


def _quoted(text: str) -> str:
    """Return a text as YAML reads it as text: as it stands where it could be nothing else."""
    is_plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", text) and text.lower() not in NO_TEXT
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _longest(model: str) -> int:
    """Return the tokens of an answer: half of the context of a small model whose folder is here."""
    config = Path(model) / "config.json"
    context = read_object(config).get("max_position_embeddings") if config.is_file() else None
    return min(LONGEST, (context or 2 * LONGEST) // 2)


SMALL = 100 * 2**20
"""Bytes of weights below which a model is a toy."""


def _rate(model: str) -> str:
    """Return a learning rate for a model, with what it goes by."""
    sizes = [path.stat().st_size for path in Path(model).glob("*.safetensors")]
    if sizes and sum(sizes) < SMALL:
        return "2e-4  # for a model this small; of half a billion parameters and more 1e-6"
    return "1e-6  # with `lora: {}` about 1e-5"


def _recipe(guesses: Sequence[Guess], out: Path, folder: Path, model: str) -> str:
    has_gpu = shutil.which("nvidia-smi") is not None
    lines = [
        f"# yaml-language-server: $schema={out.with_suffix('.schema.json').name}",
        "# Written by `polyphony init`; every key stands in launch/REFERENCE.md. Next:",
        f"#   polyphony train {out.name} --dry-run     checks all but the weights",
        f"#   polyphony train {out.name}",
        f"name: {_quoted(out.stem)}",
        f"model: {_quoted(model)}",
        "domains:",
    ]
    for guess in guesses:
        kind = "structured" if called(guess.reward) in STRUCTURED else "open_ended"
        reward = {"name": "judge", **JUDGE} if guess.reward == "judge" else guess.reward
        train, held = (f"{folder.name}/{_file(guess, split)}" for split in ("train", "heldout"))
        why = "fill in endpoint and model" if guess.reward == "judge" else guess.why
        lines += [
            f"  {_quoted(guess.name)}:  # {' '.join(guess.file.name.split())}, {guess.size} rows",
            f"    kind: {kind}",
            f"    train: {_quoted(train)}",
            f"    heldout: {_quoted(held)}  # never trained on; without `train` it is only watched",
            f"    reward: {_quoted(reward) if isinstance(reward, str) else json.dumps(reward)}  # {why}",
        ]
    lines += [
        "pool: {look: 4}  # prompts by their pass rate; a group of equal rewards is cut short",
        "eval: {every: 25, samples: 2}  # steps between held-out evaluations, answers to each item",
        "rollouts: {engine: vllm}",
        "grpo:  # fields of TRL's GRPOConfig",
        f"  learning_rate: {_rate(model)}",
        "  max_steps: 200",
        "  num_generations: 8  # answers to a prompt",
        "  per_device_train_batch_size: 8  # completions at once",
        "  gradient_accumulation_steps: 8  # so 64 completions of 8 prompts make a step",
        f"  max_completion_length: {_longest(model)}  # tokens; what is longer is cut and counts as wrong",
    ]
    lines += [] if has_gpu else ["  bf16: false  # there is no GPU here"]
    return "\n".join([*lines, "tracking: {wandb: null}  # {mode: online} logs there", ""])
