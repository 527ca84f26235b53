"""Two trainer ranks on CPU (gloo), DDP, FSDP, ZeRO-1, 2 and 3: the same run as one process with the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import pytest

from polyphony.launch.cluster.local import OURS, Command, Machine, group_words, plan
from polyphony.launch.recipe import load_recipe
from tests.conftest import HOUSE, RECIPES

pytestmark = pytest.mark.slow
WRAPPER = {"ddp": "DistributedDataParallel", "fsdp": "FSDP"}
WRAPPER |= dict.fromkeys(("zero1", "zero2", "zero3"), "DeepSpeedEngine")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run(command: Command, folder, *overrides: str) -> list[dict]:
    """Run tests/ranks.py in the place of `polyphony train`; return what each rank wrote."""
    folder.mkdir()
    environment = {**os.environ, **command.environment, "PYTHONPATH": str(HOUSE)}
    words = ["tests.ranks" if word == "polyphony.launch.cli" else word for word in command.words]
    words = [*words[: words.index("tests.ranks") + 1], str(folder), *overrides]
    done = subprocess.run(words, env=environment, cwd=HOUSE, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-9000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    command = plan(load_recipe(RECIPES / "debug.yaml"), [], Machine(), gpus=0)
    return run(command, tmp_path_factory.mktemp("alone") / "one", "grpo.per_device_train_batch_size=8")[0]


@pytest.fixture(scope="module", params=WRAPPER)
def group(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "two"
    return request.param, run(two_ranks(request.param), folder, "grpo.per_device_train_batch_size=4")


def two_ranks(strategy: str) -> Command:
    overrides = [f"cluster.strategy={strategy}", "cluster.processes=2", f"cluster.port={free_port()}"]
    recipe = load_recipe(RECIPES / "debug.yaml", overrides)
    if strategy != "fsdp":
        return plan(recipe, [], Machine(), gpus=0)
    # `launch` refuses FSDP without GPUs, where accelerate starts none; tests/ranks.py makes it
    words = [*group_words(recipe.cluster, Machine(), gpus=0), *OURS]
    return Command(words=words, environment={"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})


@pytest.fixture(scope="module")
def lookers(tmp_path_factory):
    """One rank and two, looking at groups and refilling; a rank has whole groups, as a look asks for."""
    shape = ["pool.look=4", "grpo.gradient_accumulation_steps=4"]
    folder = tmp_path_factory.mktemp("look")
    command = plan(load_recipe(RECIPES / "debug.yaml"), [], Machine(), gpus=0)
    one = run(command, folder / "one", "grpo.per_device_train_batch_size=8", *shape)
    return one + run(two_ranks("ddp"), folder / "two", "grpo.per_device_train_batch_size=4", *shape)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_look_and_refill_as_one_does(lookers, kind):
    one, first, second = (rank[kind] for rank in lookers)
    assert first["prompts"] == second["prompts"] == one["prompts"]
    assert [a + b for a, b in zip(first["own_ids"], second["own_ids"], strict=True)] == one["own_ids"]
    assert first["rewards"] == second["rewards"] == one["rewards"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-3, abs=1e-5)
    assert one["sampled"] == first["sampled"] == second["sampled"]
    assert {4, 8} == {n for draw in one["sampled"] for n in draw}  # some groups went on, some were left
    assert max(one["rounds"]) > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_are_one_run(alone, group, kind):
    strategy, ranks = group
    first, second = (rank[kind] for rank in ranks)
    one = alone[kind]
    assert (first["ranks"], one["ranks"]) == (2, 1)
    assert first["wrapper"] == second["wrapper"]
    assert WRAPPER[strategy] in first["wrapper"]  # FSDP2 names its classes FSDP and the model's name
    # the same draws on both ranks
    assert first["prompts"] == second["prompts"] == one["prompts"]
    assert first["drawn"] == second["drawn"] == one["drawn"]
    # each rank sampled its half, and the group in the middle was rewarded as the whole that it is
    assert [a + b for a, b in zip(first["own_ids"], second["own_ids"], strict=True)] == one["own_ids"]
    assert first["rewards"] == second["rewards"] == one["rewards"]
    assert len(first["own_ids"][0]) % 8 != 0
    # the same losses up to the order of sums
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-3, abs=1e-5)
    assert any(loss != 0 for loss in one["losses"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_parameter_of_each_ranks_engine_is_the_policys(alone, group, kind):
    for rank in [alone, *group[1]]:
        assert rank[kind]["check"]
        assert rank[kind]["compared"] > 10
        assert rank[kind]["differing"] == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_saved_policy_is_whole_and_has_its_adapter_merged(group, kind):
    for rank in group[1]:
        assert rank[kind]["unlike_saved"] == []
