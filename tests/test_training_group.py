"""Two trainer ranks on CPU (gloo), DDP, FSDP, ZeRO-2 and 3: the same run as one process with the same global batch."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from polyphony.launch.cluster import local
from polyphony.launch.cluster.local import Machine, group_words, plan
from polyphony.launch.recipe import load_recipe
from tests.conftest import POLICY, RECIPES
from tests.forks import Fork, forked_ranks, free_port
from tests.ranks import be_a_rank, unlike

WRAPPER = {"ddp": "DistributedDataParallel", "fsdp": "FSDP", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}
KINDS = {"ddp": ("full", "lora", "look"), "fsdp": ("full", "lora")}
TELL = "import json, os, sys; json.dump(dict(os.environ), open(f'{sys.argv[1]}/told-{os.environ[\"RANK\"]}.json', 'w'))"
"""What a rank is started with in the place of ours: a program that writes down what it is told of its group."""


def run_launcher(words: Sequence[str]) -> None:
    """Do what `python -P -m accelerate.commands.launch ...` does, in this process."""
    module = words.index("-m") + 1
    sys.argv = list(words[module:])
    runpy.run_module(words[module], run_name="__main__", alter_sys=True)


def told_to_ranks(strategy: str, folder: Path) -> dict[str, str]:
    """Launch two ranks as `polyphony launch local` does; return the environment that they are given."""
    overrides = [f"cluster.strategy={strategy}", "cluster.processes=2", f"cluster.port={free_port()}"]
    recipe = load_recipe(RECIPES / "debug.yaml", overrides)
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if strategy != "fsdp":  # which `launch` refuses without GPUs, where accelerate starts none; tests/ranks.py makes it
        environment = plan(recipe, [], Machine(), gpus=0).environment
    words = [*group_words(recipe.cluster, Machine(), gpus=0), sys.executable, "-S", "-c", TELL, str(folder)]
    launcher = Fork(run_launcher, words, log=folder / "launcher", environment=environment)
    assert launcher.wait() == 0, launcher.said[-3000:]
    told = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(one["RANK"], one["WORLD_SIZE"]) for one in told] == [("0", "2"), ("1", "2")]
    # of the group's meeting place, which ended with its launcher, and of the place in the group ranks are told anew
    mine = {name: value for name, value in told[0].items() if os.environ.get(name) != value}
    return {n: v for n, v in mine.items() if not n.startswith(("TORCHELASTIC", "MASTER_")) and "RANK" not in n}


def seen_by(ranks: Sequence[Fork], folder: Path) -> list[dict]:
    for rank in ranks:
        assert rank.wait(500) == 0, rank.said[-9000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    arguments = (folder, KINDS["ddp"], ["grpo.per_device_train_batch_size=8"])
    return seen_by([Fork(be_a_rank, *arguments, log=folder / "log")], folder)[0]


@pytest.fixture(scope="module", params=WRAPPER)
def group(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    kinds = KINDS.get(request.param, ("full", "lora", "dora"))
    arguments = (folder, kinds, ["grpo.per_device_train_batch_size=4"])
    told = told_to_ranks(request.param, folder)
    return request.param, seen_by(forked_ranks(be_a_rank, *arguments, log=folder / "log", **told), folder)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("group", ["ddp"], indirect=True)
def test_two_ranks_look_and_refill_as_one_does(alone, group):
    one, first, second = (rank["look"] for rank in [alone, *group[1]])
    assert first["prompts"] == second["prompts"] == one["prompts"]
    assert [a + b for a, b in zip(first["own_ids"], second["own_ids"], strict=True)] == one["own_ids"]
    assert first["rewards"] == second["rewards"] == one["rewards"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-3, abs=1e-5)
    assert one["sampled"] == first["sampled"] == second["sampled"]
    assert {4, 8} == {n for draw in one["sampled"] for n in draw}  # some groups went on, some were left
    assert max(one["rounds"]) > 0


@pytest.mark.slow
def test_every_parameter_of_each_ranks_engine_is_the_policys(alone, group):
    for seen in (seen for rank in [alone, *group[1]] for seen in rank.values()):
        assert seen["check"]
        assert seen["compared"] > 10
        assert seen["differing"] == []


@pytest.mark.slow
def test_the_saved_policy_is_whole_and_has_its_adapter_merged_and_beside_it(alone, group):
    for seen in (seen for rank in [alone, *group[1]] for seen in rank.values()):
        assert seen["unlike_saved"] == []
        assert seen["written"] == []  # of the base, from before the first step to after the last
    for seen in (rank[kind] for rank in (alone, group[1][0]) for kind in ("lora", "dora") if kind in rank):
        final = Path(seen["final"])
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), final / "adapter")
        assert unlike(dict(merged.merge_and_unload().named_parameters()), load_file(final / "model.safetensors")) == []


@pytest.mark.slow
def test_a_rollback_brings_back_weights_and_optimizer_on_every_rank_and_leaves_the_learning_rate(alone, group):
    for seen in (seen for rank in [alone, *group[1]] for seen in rank.values()):
        back = seen["rolled_back"]
        assert back["moved"] > 6
        assert back["differing"] == []
        assert back["rates"][0] == back["rates"][1]


def test_zero1_differs_from_zero2_in_nothing_but_its_stage():
    """ZeRO-2 splits what ZeRO-1 splits, the optimizer's states, and the gradients too: it is the one that is run."""
    one, two = (json.loads((local.DATA / "deepspeed" / f"zero{stage}.json").read_text()) for stage in (1, 2))
    assert (one.pop("zero_optimization"), two.pop("zero_optimization")) == ({"stage": 1}, {"stage": 2})
    assert one == two
    first, second = ((local.DATA / "accelerate" / f"zero{stage}.yaml").read_text() for stage in (1, 2))
    assert first.splitlines()[1:] == second.splitlines()[1:]
