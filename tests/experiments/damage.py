"""`python -m tests.experiments.damage FOLDER [--flips 3]`: damage every file of a run, one at a time, and use the run.

A run of four steps of a policy of 16,000 parameters is made once. Each file of its folder and of its newest checkpoint is
then missing, empty, cut in the middle, of another version, or has one byte flipped, and the run is reported, replayed and
resumed. What is counted:

- `traceback`: a command ended with anything but an exit code and a line that a person can read;
- `silent`: it is of a checkpoint, recipe, held-out matrix or pool, or a ledger's line no longer parses, and no command named
  the file, or what it is of. Other files of which nothing was said are listed as `unseen`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from polyphony.curricula.files import sealed, unsealed
from polyphony.launch.cli import main as polyphony
from polyphony.trainer.run.folder import LEDGERS, RunFolder

OLD = Path(__file__).resolve().parents[1] / "old_run"
"""Of an older version; its recipe and its model serve here too."""
QUICK = [
    "rollouts={engine: transformers}",
    "tracking.wandb=null",
    "grpo.max_steps=4",
    "eval.every=2",
    "checkpoint.every=2",
]
LEFT_ALONE = {"report.html", ".lock"}
"""Nothing reads them."""


def make_run(folder: Path) -> Path:
    """Return a finished run of four steps, with checkpoints at the second and the last; made once."""
    run = folder / "run"
    if not RunFolder(run).has_ended:
        shutil.rmtree(run, ignore_errors=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text((OLD / "recipe.yaml").read_text().replace("@MODEL@", str(OLD / "model")))
        code = polyphony(["train", str(recipe), *QUICK, f"model={OLD / 'model'}", "--out", str(run)])
        if code:
            raise RuntimeError(f"the run that is to be damaged ended with exit code {code}")
    return run


def damages(content: bytes, name: str, *, rng: random.Random, flips: int = 1) -> Iterator[tuple[str, bytes | None]]:
    """Yield what may have become of a file, with its name: None where it is gone."""
    yield "missing", None
    yield "empty", b""
    if len(content) > 1:
        yield "cut", content[: len(content) // 2]
    for n in range(min(flips, len(content))):
        at = rng.randrange(len(content))
        yield f"flip {n}", content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if (other := of_other_version(content, name)) is not None:
        yield "version", other


def of_other_version(content: bytes, name: str) -> bytes | None:
    """Return the file as a later version of ours might write it; None where it has no version."""
    if name.endswith(".npz"):
        arrays = dict(np.load(io.BytesIO(content)))
        about = json.loads(arrays["about"].tobytes()) | {"version": 99}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        out = io.BytesIO()
        np.savez(out, **arrays)
        return out.getvalue()
    first, end, rest = content.partition(b"\n") if name.endswith(".jsonl") else (content, b"", b"")
    try:
        document = json.loads(unsealed(first))
    except ValueError:
        return None
    if not isinstance(document, dict) or "version" not in document:
        return None
    return sealed(json.dumps(document | {"version": 99})).encode() + end + rest


def is_owed(path: Path, run: Path, damaged: bytes | None) -> bool:
    """Whether this damage may not pass in silence."""
    folder = RunFolder(run)
    if folder.checkpoints in path.parents and path.parent != folder.checkpoints:
        return True
    if path in (folder.recipe, folder.transfer, folder.ledger("transfer"), folder.pool):
        return True
    if path not in [folder.ledger(name) for name in LEDGERS]:
        return False
    if not damaged:
        return True
    for line in damaged.split(b"\n"):
        try:
            json.loads(line or b"{}")
        except ValueError:
            return True
    return False


def told(run: Path) -> tuple[str, list[str]]:
    """Return what the verbs say of a run, and the tracebacks of those that failed otherwise than in a line."""
    verbs = {
        "report": ["report", str(run)],
        "json": ["report", str(run), "--json"],
        "replay": ["plan", "--replay", str(run), "--scheduler", "joint"],
        "plan": ["plan", str(RunFolder(run).transfer)],
        "resume": ["train", "--resume", str(run)],
    }
    said, failed = [], []
    for verb, words in verbs.items():
        out, log = io.StringIO(), logging.StreamHandler(io.StringIO())
        logging.getLogger().addHandler(log)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                polyphony(words)
        except BaseException:  # whatever it is, it is what is looked for
            failed.append(f"{verb}: {traceback.format_exc().strip().splitlines()[-1]}\n{traceback.format_exc()}")
        finally:
            logging.getLogger().removeHandler(log)
        said.append(out.getvalue() + log.stream.getvalue())
        if verb == "report" and RunFolder(run).report.is_file():
            said.append(RunFolder(run).report.read_text().rpartition("<footer>")[2])
    return "\n".join(said), failed


def is_named(path: Path, run: Path, said: str) -> bool:
    """Whether what was said tells of a file: by its name, or by that of the checkpoint which is no longer used."""
    folder = RunFolder(run)
    if folder.checkpoints in path.parents and path.parent != folder.checkpoints:
        return (path.parent.name in said and ("moved to" in said or "removed" in said)) or path.name in said
    return path.name in said


def main(argv: Sequence[str] | None = None) -> int:
    """Damage all, print what was not as promised; exit code 1 where anything was."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.damage", description="Damage a run's files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flips", type=int, default=3, help="flipped bytes for each file")
    parser.add_argument("--only", default="", help="files whose path holds this text")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    whole = make_run(arguments.folder.resolve())
    newest = max(RunFolder(whole).checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [*whole.glob("*"), *RunFolder(whole).checkpoints.glob("*"), *newest.rglob("*")]
    counts: Counter[str] = Counter()
    for path in sorted(file for file in files if file.is_file() and file.name not in LEFT_ALONE):
        place = path.relative_to(whole)
        rng = random.Random(str(place))
        for kind, content in damages(path.read_bytes(), path.name, rng=rng, flips=arguments.flips):
            if arguments.only in str(place):
                counts[_try(whole, place, kind, content)] += 1
    print(", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    return int(counts["silent"] + counts["traceback"] > 0)


def _try(whole: Path, place: Path, kind: str, content: bytes | None) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        shutil.copytree(whole, run, symlinks=True)
        (run / place).unlink()
        if content is not None:
            (run / place).write_bytes(content)
        said, failed = told(run)
        if failed:
            print(f"traceback: {place} {kind}: " + "; ".join(failed), flush=True)
            return "traceback"
        if is_named(run / place, run, said):
            return "named"
        found = "silent" if is_owed(run / place, run, content) else "unseen"
        print(f"{found}: {place} {kind}", flush=True)
        return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
