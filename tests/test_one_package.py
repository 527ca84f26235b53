"""One package to import, `polyphony`: beside a user's files of any name, from a wheel, and by the names of old recipes."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from polyphony.launch.import_paths import look_in, look_in_working_directory, renamed
from polyphony.launch.recipe import load_recipe
from tests.conftest import HOUSE, RECIPES, bare_interpreter, write_rows
from tests.test_architecture import tracked

DEBUG = str(RECIPES / "debug.yaml")
POLYPHONY = str(Path(sys.executable).parent / "polyphony")
TAKEN = ("rewards", "trainer", "launch", "curricula")
"""The most common file names of this field."""
QUICK = ["grpo.max_steps=1", "tracking.wandb=null", "eval.every=1", "eval.samples=1"]


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


@pytest.fixture
def clash(tmp_path):
    """A user's folder: its modules have the names of our folders and may not be imported."""
    for name in TAKEN:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user has a {name}.py')\n")
    return tmp_path


def rows(folder: Path) -> str:
    return write_rows(folder / "rows.jsonl", [{"prompt": "1+1 =", "completion": "2", "answer": "2"}]).name


# --- a user's folder --------------------------------------------------------------------------------------------------


def test_a_script_beside_files_of_our_folders_names_imports_the_library(clash):
    script = "from polyphony.curricula.records import Domain\nfrom polyphony.rewards import find_reward\n"
    script += "from polyphony.trainer.grpo import DomainGRPOTrainer\nimport polyphony.launch.build\n"
    script += "print(find_reward('exact')(prompts=[''], completions=['2'], answer=['2']))\n"
    (clash / "mine.py").write_text(script)
    assert run([sys.executable, "mine.py"], clash).stdout.strip() == "[1.0]"


def test_score_runs_beside_any_file(clash):
    (clash / "polyphony.py").write_text("raise RuntimeError('the user has a polyphony.py')\n")
    assert "mean 1.000" in run([POLYPHONY, "score", rows(clash), "--reward", "exact"], clash).stdout
    assert (
        "mean 1.000" in run([POLYPHONY, "score", rows(clash), "--reward", "math"], clash).stdout
    )  # by workers of ours


@pytest.mark.slow
def test_a_run_and_its_rollout_worker_stand_beside_any_file(clash):
    (clash / "polyphony.py").write_text("raise RuntimeError('the user has a polyphony.py')\n")
    run([POLYPHONY, "train", DEBUG, "--out", "run", "rollouts={engine: ray, workers: 1}", *QUICK], clash)
    assert (clash / "run" / "final" / "model.safetensors").exists()


# --- what a recipe names ----------------------------------------------------------------------------------------------


def mine(folder: Path) -> Path:
    """A recipe whose reward is in a file beside it, of a name that one of our folders has."""
    folder.mkdir()
    (folder / "rewards.py").write_text("class Mine:\n    def __call__(self, prompts, **c):\n        return [0.5]\n")
    (folder / "json.py").write_text("raise RuntimeError('not this json')\n")
    text = (RECIPES / "debug.yaml").read_text().replace("../lab/policy", str(HOUSE / "launch" / "lab" / "policy"))
    (folder / "recipe.yaml").write_text(text.replace("reward: exact", 'reward: "rewards:Mine"'))
    return folder / "recipe.yaml"


def check(recipe: Path, folder: Path) -> None:
    """Look for what a recipe names as the command does, but without the rest of its dry run."""
    program = (
        "from polyphony.launch import build, import_paths, recipe\nimport_paths.look_in_working_directory()\n"
        f"assert not any(build.missing_names(recipe.load_recipe({str(recipe)!r})).values())"
    )
    run([sys.executable, "-P", "-c", program], folder)


def test_a_recipes_own_folder_is_looked_in_last(tmp_path):
    recipe = mine(tmp_path / "recipes")
    assert run([POLYPHONY, "train", str(recipe), "--dry-run"], tmp_path).stdout.count("rewards:Mine") == 2


def test_a_recipes_own_folder_is_nearer_than_the_working_directory(tmp_path):
    recipe = mine(tmp_path / "recipes")
    (tmp_path / "rewards.py").write_text("class Other: ...\n")
    for folder in (tmp_path, HOUSE):  # our own source tree has a folder of that name
        check(recipe, folder)


def test_a_run_that_is_resumed_looks_where_its_recipe_was(tmp_path):
    recipe = mine(tmp_path / "recipes")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(load_recipe(recipe).as_yaml())
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({"imports_from": [str(recipe.parent)]}))
    check(tmp_path / "run" / "recipe.yaml", tmp_path)
    assert str(recipe.parent) in sys.path
    sys.path.remove(str(recipe.parent))


OLD = json.loads((Path(__file__).parent / "old_names.json").read_text())
"""What recipes could name at the first version, by import path."""


@pytest.mark.parametrize("old", OLD)
def test_every_old_name_is_told_its_new_one(old):
    with pytest.warns(UserWarning, match=f"{old!r} is now called 'polyphony"):
        new = renamed(old)
    assert callable(pkgutil.resolve_name(new))


def test_a_recipe_with_old_names_is_read_as_with_new_ones(tmp_path):
    text = (RECIPES / "debug.yaml").read_text().replace("../lab/policy", str(HOUSE / "launch" / "lab" / "policy"))
    (tmp_path / "old.yaml").write_text(text.replace("polyphony.", ""))
    with pytest.warns(UserWarning, match=r"'launch.lab.world:rows' is now called 'polyphony.launch.lab.world:rows'"):
        assert load_recipe(tmp_path / "old.yaml") == load_recipe(DEBUG)


def test_old_names_are_known_beside_files_of_our_folders_names(clash):
    (clash / "curricula").mkdir()
    done = run([POLYPHONY, "score", rows(clash), "--reward", "rewards.exact:Exact"], clash)
    assert "'rewards.exact:Exact' is now called 'polyphony.rewards.short_answer:Exact'" in done.stderr
    assert renamed("launch.lab.planted:Missing") == "launch.lab.planted:Missing"


def test_a_users_package_of_an_old_name_is_the_users(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    for name in ("__init__.py", "math.py"):
        (tmp_path / "rewards" / name).write_text("class Math: ...\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renamed({"reward": "rewards.math:Math"}) == {"reward": "rewards.math:Math"}


def test_folders_are_looked_in_after_all_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["first"])
    monkeypatch.setattr("polyphony.launch.import_paths._last", [])
    look_in(tmp_path)
    look_in(tmp_path)
    assert sys.path == ["first", str(tmp_path)]
    monkeypatch.chdir("/")
    look_in_working_directory()
    look_in(tmp_path / "recipes")  # a recipe's own folder is nearer
    assert sys.path == ["first", str(tmp_path), str(tmp_path / "recipes"), "/"]


# --- the distribution -------------------------------------------------------------------------------------------------


def test_every_folder_of_ours_is_in_the_distribution():
    listed = tomllib.loads((HOUSE / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(HOUSE) for wing in TAKEN for path in (HOUSE / wing).rglob("*.py")}
    assert set(listed["packages"]) == {".".join(("polyphony", *folder.parts)) for folder in folders}
    assert listed["package-dir"] == {f"polyphony.{wing}": wing for wing in TAKEN}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The interpreter of an environment that has the wheel and not the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for file in tracked():  # what lies about in build/ would be packed too
        (folder / "tree" / file.relative_to(HOUSE)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "tree" / file.relative_to(HOUSE))
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    run([*wheel, str(folder / "tree")], folder)
    python = bare_interpreter(folder / "venv")
    (built,) = folder.glob("*.whl")
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(built)], folder)
    return python


@pytest.mark.slow
def test_the_wheel_holds_all_that_a_run_needs(installed, tmp_path):
    where = run([str(installed), "-c", "import polyphony.launch.cli as cli; print(cli.__file__)"], tmp_path)
    assert str(installed.parent.parent) in where.stdout
    recipe = Path(where.stdout.strip()).parent / "recipes" / "debug.yaml"
    run([str(installed.parent / "polyphony"), "train", str(recipe), "--out", "run", *QUICK], tmp_path)
    assert (tmp_path / "run" / "report.html").exists()
