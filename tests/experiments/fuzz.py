"""`python -m tests.experiments.fuzz [--recipes 1000] [--files 300] [--seed 7]`: nonsense through the real dry run.

A recipe that works has one to three of its values replaced, misspelt, taken out or moved; or several that are plausible
alone put together; or its text damaged. Files of rows are in `fuzz_rows`. Each goes through `polyphony train RECIPE
--dry-run --offline`, in this process. It fails on

- `traceback`: anything but an exit code and lines that a person can read; `hang`: no end within `LIMIT_S`;
- `unnamed`: refused without a word of the key, the value or the file;
- `accepted`: nonsense that passed and is not in `fuzz_accepted.json`, where each that may pass has a verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from polyphony.launch.cli import main as polyphony
from tests.experiments.fuzz_rows import row_files

POLICY = Path(__file__).resolve().parents[2] / "launch" / "lab" / "policy"
ACCEPTED = Path(__file__).with_suffix("").with_name("fuzz_accepted.json")
"""`{"recipes": [{"path", "values", "verdict"}, ..], "rows": {damage: verdict}}`; a path may be a pattern, values are as
`repr` has them, `*` for any."""
LIMIT_S = 20.0

VALUES: Sequence[Any] = (
    *(None, True, False, 0, -1, -5, 1, 1.5, 0.999, 1e-300, 1e300, 10**30, float("inf"), float("-inf"), float("nan")),
    *(
        "",
        " ",
        "..",
        "a/b",
        "/",
        "~",
        "a\0b",
        "[/b]",
        "<b>",
        "{x}",
        "%s",
        "é" * 300,
        "\ud800",
        "\U0001f600",
        "a\nb",
        "1",
    ),
    *("exact", "auto", "none", "nowhere:f", "math:pi", ":", "a:b:c", "json:loads", "hf://x/y", "x.jsonl", "-1", "inf"),
    *([], {}, [1], [[]], ["sums", "sums"], [1, 0], [0.5, 1.5], [3, 2], {"a": 1}, {"name": 5}, {"": ""}, {"1": 2}),
    *({"path": "gone.jsonl"}, {"path": []}, {"generator": "os:getcwd"}, {"generator": "time:time"}, {"name": "math"}),
    *({"name": "math", "timeout_s": -1}, {"name": "code", "limits": {"cpu_s": "x"}}, {"name": "judge"}, {"sums": 1}),
)
MORE = {
    "advantages": ".",
    "algorithm": ".",
    "checkpoint": "every keep",
    "cluster": "port processes ray_port slurm.setup slurm.time strategy",
    "curriculum": "adaptive adaptive.floor order replay replay.fraction scheduler transfer window",
    "data": "max_unreadable overlap",
    "domains": (
        ". new sums.advantages sums.as_chat sums.chat_template_kwargs sums.diversity "
        "sums.diversity.coefficient sums.diversity.partitioner sums.diversity.shape "
        "sums.max_completion_length sums.system_prompt sums.train.limit sums.train.path sums.weight"
    ),
    "entropy": "band control control.sums max_coefficient push rate rows",
    "eval": "every greedy kl_items samples shown",
    "faults": "grace_s max_skipped",
    "grpo": (
        "beta epsilon epsilon_high fsdp generation_batch_size gradient_accumulation_steps learning_rate "
        "loss_type lr_scheduler_kwargs lr_scheduler_type model_init_kwargs num_iterations "
        "num_train_epochs optim report_to scale_rewards seed steps_per_generation temperature top_k "
        "top_p use_vllm vllm_gpu_memory_utilization vllm_mode warmup_steps"
    ),
    "guard": ". cap",
    "guardrails": ". sums sums.action sums.max_drop",
    "lora": ". alpha r target_modules",
    "pool": ". discount from look mastered_above refill refill.max_rounds sampling when_exhausted",
    "probe": "from seeds steps",
    "rft": ". accept_from dedup top_k",
    "rollouts": ". address engine engine_args max_grader_failures timeout_s workers",
    "tracking": "wandb wandb.mode wandb.project",
    "update": "drop_dead",
}
"""Keys beside those that stand in the recipe, by section; a dot is the section itself."""

PLAUSIBLE: dict[tuple[str, ...], Sequence[Any]] = {
    tuple(path.split(".")): values
    for path, values in {
        "algorithm": ("grpo", "rft"),
        "advantages": ("group", "mean_only"),
        "curriculum": (
            *({"scheduler": name} for name in ("joint", "proportional", "sec", "pac", "mt_grpo", "dump", "e2h", "bwt")),
            {"scheduler": "sequential", "order": ["words", "sums"]},
            {"scheduler": "adaptive", "floor": 0.6},
        ),
        "domains.sums.weight": (0, 1e9),
        "domains.sums.max_completion_length": (4, 9),
        "domains.sums.diversity": ({"partitioner": "exact", "shape": [1, 0]}, {"partitioner": "exact"}),
        "domains.sums.train": (None, ["sums-train.jsonl", "words-train.jsonl"], "*-train.jsonl", "sums-heldout.jsonl"),
        "domains.words.reward": (
            "math",
            "code",
            "function_call",
            "multiple_choice",
            {"name": "length", "max_tokens": 8},
        ),
        "entropy": ({"control": "sampling"}, {"control": "coefficient"}, {"control": {"sums": "adaptive"}}),
        "eval": ({"every": 3}, {"greedy": True}, {"samples": 1, "shown": 0, "kl_items": 0}),
        "checkpoint": ({"every": 3}, {"keep": 1}),
        "grpo.num_generations": (2, 8, 16),
        "grpo.per_device_train_batch_size": (1, 4, 16),
        "grpo.steps_per_generation": (2, 4),
        "grpo.gradient_accumulation_steps": (3, 8),
        "grpo.num_iterations": (2, 3),
        "grpo.max_completion_length": (1, 250, 10_000),
        "grpo.entropy_coef": (0.1,),
        "grpo.use_vllm": (True,),
        "grpo.use_liger_kernel": (True,),
        "grpo.fp16": (True,),
        "grpo.loss_type": ("dr_grpo", "cispo"),
        "guardrails": ({"sums": {"max_drop": 0.05}}, {"words": {"max_drop": 1.0, "action": "stop"}}),
        "lora": ({}, {"r": 1, "target_modules": ["q_proj"]}),
        "pool": ({}, {"look": 2}, {"look": 8}, {"refill": {"max_rounds": 0}}),
        "guard": ({}, {"cap": 0.1}),
        "rollouts.engine": ("ray", "transformers"),
        "rollouts.workers": (2,),
        "rollouts.tensor_parallel": (3,),
        "update": ({"drop_dead": "always"}, {"drop_dead": "never"}),
    }.items()
}
"""Each alone may be meant; together some exclude each other."""

TEXTS: dict[str, Any] = {
    "cut": lambda text, rng: text[: rng.randrange(len(text))],
    "tab": lambda text, rng: text.replace(" ", "\t", 1 + rng.randrange(9)),
    "byte": lambda text, rng: text.encode()[:40] + bytes([rng.randrange(256)]) + text.encode()[40:],
    "utf-16": lambda text, rng: text.encode("utf-16"),
    "bom": lambda text, rng: b"\xef\xbb\xbf" + text.encode(),
    "crlf": lambda text, rng: text.replace("\n", "\r\n"),
    "twice": lambda text, rng: text + "\n" + text,
    "two documents": lambda text, rng: text + "\n---\n" + text,
    "deep": lambda text, rng: text[:-1] + ', "tracking": ' + "[" * 3000 + "]" * 3000 + "}",
    "circle": lambda text, rng: text[:-1] + ', "tracking": &a [*a]}',
    "circle in rows": lambda text, rng: text[:-1] + ', "domains": {"sums": &a {"train": *a}}}',
    "bomb": lambda text, rng: "".join(
        [
            "a0: &a0 [x, x, x, x, x, x, x, x]\n",
            *(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 8)}]\n" for n in range(7)),
        ]
    ),
    "tag": lambda text, rng: text[:-1] + ', "name": !!python/object/apply:os.getcwd []}',
    "a list": lambda text, rng: f"[{text}]",
    "text": lambda text, rng: json.dumps(text),
    "a date": lambda text, rng: text[:-1] + ', "tracking": 2001-01-01}',
    "a set": lambda text, rng: text[:-1] + ', "tracking": !!set {a, b}}',
    "keys that are no text": lambda text, rng: text[:-1] + ', "grpo": {1: 2, null: 3, [a]: 4}}',
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """What became of one recipe or file of rows."""

    changes: tuple[tuple[str, str], ...]
    """What was done to it: key path and value, as `repr` has it; of rows the damage and the format."""
    outcome: str
    said: str
    seconds: float = field(compare=False)


def base_recipe(folder: Path) -> dict[str, Any]:
    """Write rows and a model without weights into a folder; return a recipe over them that nothing is wrong with."""
    shutil.copytree(POLICY, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    domains = {}
    for name, kind in {"sums": "structured", "words": "open_ended"}.items():
        domains[name] = {"kind": kind, "reward": "exact"}
        for split in ("train", "heldout"):
            rows = [json.dumps({"prompt": f"{split} {name} {i} =", "answer": str(i)}) for i in range(4)]
            domains[name][split] = f"{name}-{split}.jsonl"
            (folder / domains[name][split]).write_text("\n".join(rows))
    grpo = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
    return {"name": "two", "model": "model", "domains": domains, "grpo": grpo}


def as_text(value: Any) -> str:
    """Return a value as YAML has it: JSON, with its own words for what JSON has none for."""
    text = json.dumps(value)
    return text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")


def fuzzed_recipes(base: dict[str, Any], n: int, *, rng: random.Random) -> Iterator[tuple[tuple, bytes]]:
    """Yield `n` recipes as they stand in a file, with what was done to each."""
    for _ in range(n):
        kind = rng.choices(("value", "plausible", "text"), (8, 2, 1))[0]
        if kind == "text":
            name = rng.choice(list(TEXTS))
            text = TEXTS[name](as_text(base), rng)
            yield (("text", name),), text if isinstance(text, bytes) else text.encode()
            continue
        document, done = copy.deepcopy(base), []
        if kind == "plausible":
            for path in rng.sample(list(PLAUSIBLE), rng.choice((2, 3, 4))):
                value = rng.choice(PLAUSIBLE[path])
                _put(document, path, value)
                done.append(("plausible", f"{'.'.join(path)}={value!r}"))
        else:
            for _ in range(rng.choice((1, 1, 2, 3))):
                done.append(_changed(document, base, rng))
        yield tuple(done), as_text(document).encode()


def _changed(document: dict[str, Any], base: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """Change one thing of a recipe; return what."""
    value: Any = copy.deepcopy(rng.choice(VALUES))
    if (how := rng.random()) < 0.1:
        path = rng.choice(list(_paths(base)))
        _put(document, path, None, gone=True)
        return ".".join(path), "gone"
    path = rng.choice([*_paths(base), *_more() * 2])
    if how < 0.25:
        at = rng.randrange(len(path[-1]) + 1)
        path = (*path[:-1], path[-1][:at] + rng.choice("sx_-. ") + path[-1][at:])
    _put(document, path, value)
    return ".".join(path), repr(value)[:40]


def _more() -> list[tuple[str, ...]]:
    return [(top, *(key.split(".") if key != "." else ())) for top, keys in MORE.items() for key in keys.split()]


def _paths(document: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in document.items():
        yield (*place, key)
        if isinstance(value, dict):
            yield from _paths(value, (*place, key))


def _put(document: dict[str, Any], path: Sequence[str], value: Any, *, gone: bool = False) -> None:
    for key in path[:-1]:
        if not isinstance(document.get(key), dict):
            document[key] = {}
        document = document[key]
    if gone:
        document.pop(path[-1], None)
    else:
        document[path[-1]] = value


class _HangError(BaseException):
    pass


def _ring(*_: Any) -> None:
    raise _HangError


def dry_run(recipe: Path, changes: tuple, *, named: Sequence[str]) -> Tried:
    """Run a recipe dry, within `LIMIT_S`; `named` are words of which a refusal has to say one."""
    out, err, begun = io.StringIO(), io.StringIO(), time.monotonic()
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(action="ignore"):
            code = polyphony(["train", str(recipe), "--dry-run", "--offline"])
        outcome = {0: "accepted", 2: "refused"}.get(code, "stopped")
    except _HangError:
        outcome = "hang"
    except BaseException:  # what is looked for
        outcome = "traceback"
        err.write("\n" + "".join(traceback.format_exc(limit=-4)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    said = err.getvalue()
    if outcome == "refused" and not any(word in said for word in named):
        outcome = "unnamed"
    return Tried(changes=changes, outcome=outcome, said=said, seconds=time.monotonic() - begun)


def try_recipes(n: int, *, seed: int, folder: Path) -> Iterator[Tried]:
    """Run `n` recipes dry."""
    base = base_recipe(folder)
    (folder / "good.yaml").write_text(as_text(base))
    dry_run(folder / "good.yaml", (), named=())  # imports take longer than a hang may
    for changes, content in fuzzed_recipes(base, n, rng=random.Random(seed)):
        recipe = folder / "recipe.yaml"
        recipe.write_bytes(content)
        parts = [part for path, value in changes for part in (*path.split(".")[-2:], value, "half a character")]
        is_whole = changes[0][0] in ("text", "plausible") or "gone" in dict(changes).values()
        yield dry_run(recipe, changes, named=["polyphony train: "] if is_whole else [part for part in parts if part])


def try_rows(n: int, *, seed: int, folder: Path) -> Iterator[Tried]:
    """Run a recipe dry over `n` files of rows."""
    base = base_recipe(folder)
    for n_th, (damage, form, path) in enumerate(row_files(folder, n, rng=random.Random(seed))):
        recipe = folder / "recipe.yaml"
        place = ("sums", "train") if n_th % 3 else ("words", "heldout")
        document = copy.deepcopy(base)
        _put(document, ("domains", *place), path)
        recipe.write_text(as_text(document))
        yield dry_run(recipe, ((damage, form),), named=[f"domains.{'.'.join(place)}", "rows/"])


def unlisted(tried: Tried, known: dict[str, Any], *, rows: bool) -> list[tuple[str, str]]:
    """Return what was done to an accepted recipe, or to accepted rows, and has no verdict."""
    if rows:
        return [change for change in tried.changes if change[0] not in known["rows"]]
    return [
        (path, value)
        for path, value in tried.changes
        if path != "plausible"
        and not any(
            fnmatchcase(path, one["path"]) and ("*" in one["values"] or value in one["values"])
            for one in known["recipes"]
        )
    ]


def failures(found: Sequence[Tried], known: dict[str, Any], *, rows: bool) -> list[str]:
    """Return a line for each that ought not to be."""
    lines = [f"{t.outcome}: {t.changes}\n{t.said}" for t in found if t.outcome not in ("accepted", "refused")]
    odd = [change for t in found if t.outcome == "accepted" for change in unlisted(t, known, rows=rows)]
    return lines + [f"accepted without a verdict: {' = '.join(change)}" for change in sorted(set(odd))]


@contextlib.contextmanager
def shared_tokenizer() -> Iterator[None]:
    """Read each tokenizer once: all recipes that get so far have the same."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained
    AutoTokenizer.from_pretrained = functools.lru_cache(read)  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutoTokenizer.from_pretrained = read  # type: ignore[method-assign]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, default=1000)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    known, bad = json.loads(ACCEPTED.read_text()), []
    for what, n, tries in (("recipes", asked.recipes, try_recipes), ("files of rows", asked.files, try_rows)):
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as folder, shared_tokenizer():
            found = list(tries(n, seed=asked.seed, folder=Path(folder)))
        counts = Counter(t.outcome for t in found)
        kinds = ("traceback", "hang", "stopped", "unnamed", "refused", "accepted")
        slowest = max((t.seconds for t in found), default=0.0)
        told = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
        print(f"{n} {what}: {told}; {time.process_time() - begun:.0f} s, the slowest {slowest:.1f} s")
        bad += failures(found, known, rows=tries is try_rows)
    print("\n".join(bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
