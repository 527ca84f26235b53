"""`polyphony probe`: one row a run, and a probe that is killed goes on with the next."""

from __future__ import annotations

import json
import time

import pytest

from polyphony.launch.cli import main
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.verbs.probe import claim_probe, cost, plan_arms, probe, restricted
from tests.conftest import RECIPES
from tests.forks import Fork


def recipe(*overrides):
    return load_recipe(RECIPES / "debug.yaml", ["tracking.wandb=null", *overrides])


def test_every_seed_measures_the_start_each_domain_and_all_of_them_for_the_same_total():
    arms = plan_arms(recipe("probe.seeds=2"), ["arithmetic", "stories"])
    assert [(arm.seed, arm.label, arm.steps) for arm in arms] == [
        (1, "start", 0),
        (1, "arithmetic", 2),
        (1, "stories", 2),
        (1, "joint", 4),
        (2, "start", 0),
        (2, "arithmetic", 2),
        (2, "stories", 2),
        (2, "joint", 4),
    ]


def test_without_the_joint_arm_a_probe_costs_half():
    names = ["arithmetic", "stories"]
    whole, half = recipe(), recipe("probe.joint_arm=false")
    # a step generates 16 x 2 completions of at most 32 tokens: 1024
    assert cost(whole, plan_arms(whole, names), items=100).startswith(
        "8 optimizer steps and 4 evaluations: at most 0.0082 million rollout tokens to train on, and "
    )
    assert cost(half, plan_arms(half, names), items=100).startswith(
        "4 optimizer steps and 3 evaluations: at most 0.0041 million rollout tokens to train on, and "
    )


def test_the_cost_of_a_probe_has_its_warm_up_and_its_evaluations_in_it():
    warmed = recipe("probe.from=joint:6", "probe.seeds=2", "eval.samples=4", "domains.stories.max_completion_length=64")
    said = cost(warmed, plan_arms(warmed, ["arithmetic", "stories"]), items=100)
    # 2 x (8 + 6) steps of 32 completions, 8 evaluations of 100 items with 4 samples, each of up to 64 tokens
    assert said == (
        "28 optimizer steps and 8 evaluations: at most 0.057 million rollout tokens to train on, "
        "and 0.2 million to evaluate 100 held-out items, 4 times each"
    )


def test_an_arm_trains_its_domain_and_watches_the_others():
    (_, arithmetic, _, _) = plan_arms(recipe(), ["arithmetic", "stories"])
    alone = restricted(recipe("curriculum.scheduler=sequential"), arithmetic, "start")
    assert [name for name, section in alone.domains.items() if section.train is not None] == ["arithmetic"]
    assert list(alone.domains) == ["arithmetic", "stories", "safety"]
    assert (alone.model, alone.curriculum.scheduler) == ("start", "joint")
    assert (alone.grpo["max_steps"], alone.grpo["seed"]) == (2, 1)


def test_a_folder_holds_the_probe_of_one_recipe(tmp_path):
    assert claim_probe(recipe(), tmp_path / "probe")
    assert not claim_probe(recipe(), tmp_path / "probe")
    with pytest.raises(RecipeError, match="holds a probe of another recipe; choose another --out"):
        claim_probe(recipe("probe.steps=3"), tmp_path / "probe")


def rows(folder) -> list[dict]:
    path = folder / "transfer.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def kill_after_the_first_row(folder) -> None:
    command = ["probe", str(RECIPES / "debug.yaml"), "tracking.wandb=null", "--out", str(folder)]
    process = Fork(main, command, log=folder.parent / "log")
    deadline = time.monotonic() + 300
    while process.is_running and not rows(folder) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.is_running, f"the probe ended before it could be killed: {process.said[-2000:]}"
    process.kill()


@pytest.mark.slow
def test_a_killed_probe_goes_on_with_the_next_run_and_repeats_none(tmp_path, engine):
    folder = tmp_path / "probe"
    kill_after_the_first_row(folder)
    before = rows(folder)
    assert 1 <= len(before) < 4
    probe(recipe(), folder, engine=engine)
    after = rows(folder)
    assert after[: len(before)] == before
    assert [(row["trained"], row["step"], row["probe"]) for row in after] == [
        ([], 0, True),
        (["arithmetic"], 2, True),
        (["stories"], 2, True),
        (["arithmetic", "stories"], 4, True),
    ]
    assert [row["exposure"] for row in after[1:3]] == [{"arithmetic": 8}, {"stories": 8}]  # 2 steps of 32 / 8 prompts
    written = (folder / "transfer.json").stat().st_mtime_ns
    probe(recipe(), folder, engine=engine)
    assert (folder / "transfer.json").stat().st_mtime_ns == written
