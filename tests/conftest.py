"""What tests share: the lab's policy, a recipe over it, and one real engine a session."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import venv
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HOUSE = Path(__file__).resolve().parent.parent
RECIPES = HOUSE / "launch" / "recipes"
EXPERIMENTS = HOUSE / "tests" / "experiments"
POLICY = HOUSE / "launch" / "lab" / "policy"


TOGETHER = {
    **dict.fromkeys(("test_launch_ray", "test_nccl", "test_ray_engine", "test_simulate", "test_slurm"), "ray"),
    **dict.fromkeys(
        (
            "test_training_group",
            "test_distil_ranks",
            "test_resume",
            "test_launch_local",
            "test_stopping",
            "test_probe",
            "test_diversity_reward",
            "test_families",
            "test_sft",
        ),
        "forks",
    ),
}
"""Files that bring up clusters: never two at once. Files that fork from one loaded process (tests/forks.py): one of it."""
LATER = {"activation_checkpointing", "activation_checkpointing_kwargs"}
"""Fields of GRPOConfig with Transformers 5.24: heard in a script, and unknown to recipes as long as another is tested."""
LONGEST = ("ray", "forks", "test_judge_vllm", "test_guardrail_run", "test_planner", "test_lab", "test_evaluate")
"""Begun first, so that no worker is left alone with them at the end."""


def group_of(path: str) -> str:
    """The tests that one worker runs: a whole file, because its fixtures are engines and trained policies."""
    return TOGETHER.get(Path(path).stem, Path(path).stem)


def pytest_collection_modifyitems(items):
    place = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(group_of(str(item.path)), len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Groups as `group_of` has them; xdist's own `loadgroup` has no effect under pytest 9.2, whose ids are fixed."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::")[0])

    return Grouped(config, log)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def below(word: str) -> list[psutil.Process]:
    """Return the living processes below this one with `word` in a word of their command; some end while they are asked."""
    return [process for process, command in commands_below().items() if any(word in part for part in command)]


def commands_below() -> dict[psutil.Process, list[str]]:
    """Return the living processes below this one, and what was called."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process] = process.cmdline()
    return found


def bare_interpreter(folder: Path) -> Path:
    """Make an environment with the packages of this one, but not with what is installed here as editable."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "packages.pth").write_text(here)  # a .pth file in a folder that a .pth file names is not read
    return folder / "bin" / "python"


@pytest.fixture(scope="session", autouse=True)
def own_kernels(tmp_path_factory):
    """DeepSpeed's kernels are built in a folder of these tests: in the user's a killed build may have left its lock."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("extensions"))


@pytest.fixture(autouse=True)
def one_package():
    """Nothing of ours is imported by a name that a user's own file may have."""
    yield
    assert not {"trainer", "rewards", "curricula", "launch"} & set(sys.modules)


@pytest.fixture
def debug_recipe():
    from polyphony.launch.recipe import load_recipe

    return load_recipe(RECIPES / "debug.yaml", ["tracking.wandb=null"])


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """One in-process vLLM over the lab's policy; trainers attach to it one after the other."""
    from polyphony.launch.build import build_trainer
    from polyphony.launch.recipe import load_recipe

    recipe = load_recipe(RECIPES / "debug.yaml")
    return build_trainer(recipe, tmp_path_factory.mktemp("engine")).policy.engine


@pytest.fixture
def recipe(tmp_path):
    """A recipe of two domains whose model has no weights: whoever comes to load them fails with another message."""
    model = shutil.copytree(POLICY, tmp_path / "model")
    (model / "model.safetensors").unlink()
    domains = {}
    for name in ("sums", "words"):
        domains[name] = {"kind": "structured", "reward": "exact"}
        for split in ("train", "heldout"):
            rows = [{"prompt": f"{split} {name} {i} =", "answer": str(i), "id": f"{split}-{i}"} for i in range(4)]
            domains[name][split] = write_rows(tmp_path / f"{name}-{split}.jsonl", rows).name
    grpo = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
    grpo |= {"bf16": False, "gradient_checkpointing": False}
    document = {"name": "two", "model": "model", "domains": domains, "grpo": grpo}
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))  # JSON is YAML
    return tmp_path / "recipe.yaml"


@pytest.fixture
def completions(tmp_path):
    answered = [("4", "4"), ("5", "4"), ([{"role": "assistant", "content": " 4 "}], "4")]
    rows = [{"prompt": "2+2 =", "completion": text, "answer": answer} for text, answer in answered]
    return write_rows(tmp_path / "completions.jsonl", rows)
