"""What tests share: the lab's policy, a recipe over it, and one real engine a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HOUSE = Path(__file__).resolve().parent.parent
RECIPES = HOUSE / "launch" / "recipes"


@pytest.fixture
def debug_recipe():
    from launch.config import load_recipe

    return load_recipe(RECIPES / "debug.yaml", ["tracking.wandb=null"])


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """One in-process vLLM over the lab's policy; trainers attach to it one after the other."""
    from launch.config import load_recipe
    from launch.train import build_trainer

    recipe = load_recipe(RECIPES / "debug.yaml")
    return build_trainer(recipe, tmp_path_factory.mktemp("engine")).engine
