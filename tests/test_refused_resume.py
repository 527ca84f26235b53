"""A resume that is refused changes nothing: the run stands as it stood, its end and its unfinished checkpoint too."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from pathlib import Path

import pytest

from polyphony.launch.cli import main
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import read_object, write_object
from tests.conftest import HOUSE

OLD = HOUSE / "tests" / "old_run"


@pytest.fixture
def run(tmp_path):
    """A run with all that a resume might tidy away, and recipe and provenance as they are written now."""
    folder = RunFolder(shutil.copytree(OLD / "run", tmp_path / "run"))
    recipe = folder.recipe.read_text().replace("@MODEL@", str(OLD / "model")).replace(" launch.", " polyphony.launch.")
    recipe = recipe.replace("engine: vllm", "engine: transformers")
    folder.claim(recipe.replace("tracking: {}", "tracking: {wandb: {mode: offline}}"))
    write_object(folder.provenance, {"model": {"name": str(OLD / "model")}})
    folder.record_end("stopped", why="it was enough", step=3)
    (folder.checkpoints / "checkpoint-3").mkdir()
    (folder.checkpoints / "checkpoint-3" / "polyphony.json.unfinished").touch()
    (folder.checkpoints / "best.json").write_text("")
    with folder.ledger("alarms").open("a") as file:
        file.write('{"step": 1}\n{"st')
    return folder


def content(folder: RunFolder) -> dict[str, str]:
    """Return a digest of each file, and every folder; the lock, where the last process has its number, apart."""
    paths = (path for path in folder.path.rglob("*") if path != folder.lock)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def other_rows(run: RunFolder) -> None:
    data = {"domains.arithmetic.train": {"rows": 24, "sha256": "of other rows"}}
    write_object(run.provenance, {**read_object(run.provenance), "data": data})


def other_tokenizer(run: RunFolder) -> None:
    model = {"name": str(OLD / "model"), "files": {"tokenizer.json": "of another"}}
    write_object(run.provenance, {"model": model})


def damaged_line(run: RunFolder) -> None:
    with run.ledger("metrics").open("a") as file:
        file.write("[]\n{}\n")


KINDS = {
    "key": (lambda run: None, ["grpo.seed=7"], "grpo.seed=1, now it is 7"),
    "recipe": (lambda run: edit(run.recipe, "seed: 1", "seed: 7"), [], "is not as the run wrote it"),
    "rows": (other_rows, [], "its rows are not those that the run has practised"),
    "tokenizer": (other_tokenizer, [], "tokenizer.json"),
    "ledger": (damaged_line, [], "metrics.jsonl: line"),
    "matrix": (lambda run: run.transfer.write_text("{"), [], "transfer.json"),
    "checkpoint": (
        lambda run: (run.checkpoints / "checkpoint-2" / "optimizer.pt").unlink(),
        [],
        "no checkpoint is whole (checkpoint-2: optimizer* is missing)",
    ),
    "tracker": (lambda run: run.tracked.write_text("[]"), [], "wandb.json"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_resume_changes_nothing_in_the_folder(run, kind, capsys):
    damage, overrides, words = KINDS[kind]
    damage(run)
    before = content(run)
    assert main(["train", "--resume", str(run.path), *overrides]) != 0
    assert words in capsys.readouterr().err
    assert content(run) == before


def test_a_resume_of_a_folder_in_use_changes_nothing_in_it(run, capsys):
    with run.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = content(run)
        assert main(["train", "--resume", str(run.path)]) != 0
        assert "is in use by" in capsys.readouterr().err
        assert content(run) == before
