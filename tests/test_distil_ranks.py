"""Two ranks that distil, weights split over them: each runs every teacher as often as the other, and learns from its own
rows."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from polyphony.launch.recipe import load_recipe
from polyphony.launch.train import claim_folder
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import POLICY
from tests.forks import forked_ranks
from tests.ranks import be_recovered, be_taught
from tests.taught import fill, recipe_of
from tests.test_recovery_run import recipe
from tests.test_teacher_endpoint import Tutor
from tests.test_training_group import told_to_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("shelf"))


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_ranks_without_a_row_of_a_teacher_run_it_all_the_same(shelf, tmp_path, strategy):
    teachers = {"expert": {"model": str(shelf / "expert")}, "then": {"model": "self@start"}}
    teachers |= {"moved": {"model": str(shelf / "moved")}}
    overrides = ["grpo.use_cpu=false", "grpo.max_steps=2", "grpo.learning_rate=1e-3"]
    told = told_to_ranks(strategy, tmp_path)
    with Tutor() as server:
        teachers |= {"far": {"endpoint": server.url}}
        recipe_of(tmp_path, teachers, **{name: ("arithmetic", name) for name in teachers})
        for rank in forked_ranks(be_taught, tmp_path, overrides, log=tmp_path / "log", **told):
            assert rank.wait(200) == 0, rank.said[-5000:]
    ranks = seen_by_ranks(tmp_path)
    assert [set(seen["domains"]) for seen in ranks] == [{"expert", "then"}, {"moved", "far"}]
    assert ranks[0]["logged"] == ranks[1]["logged"]

    policy = AutoModelForCausalLM.from_pretrained(POLICY)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), str(shelf / "moved"))
    models = {"expert": AutoModelForCausalLM.from_pretrained(shelf / "expert"), "then": policy, "moved": adapted}
    for seen in ranks:
        for i, domain in enumerate(seen["domains"]):
            prompt, said = row_of(seen, i)
            ours = logps_of(policy, prompt, said)
            theirs = -1.0 - said % 7 if domain == "far" else logps_of(models[domain], prompt, said)
            expected = (theirs - ours).clamp(-5, 5)
            assert (seen["advantages"][i, : len(said)] - expected).abs().max() < 1e-5
            assert domain == "then" or expected.abs().max() > 1e-3


def test_ranks_recover_a_domain_from_its_checkpoint_alike(tmp_path):
    guardrail = {"by": "distil", "draws": 2}
    recipe(tmp_path, guardrail, max_steps=4, per_device_train_batch_size=12)
    overrides = ["domains.safety.reward=tests.taught:lost_after_two", "domains.strings.reward=tests.taught:odd"]
    overrides += ["checkpoint.keep=4"]
    told = told_to_ranks("zero3", tmp_path)
    claim_folder(load_recipe(tmp_path / "recipe.yaml", overrides), tmp_path / "run", resume=False)
    overrides += ["grpo.use_cpu=false"]
    for rank in forked_ranks(
        be_recovered, tmp_path / "recipe.yaml", tmp_path / "run", overrides, log=tmp_path / "log", **told
    ):
        assert rank.wait(300) == 0, rank.said[-5000:]
    folder, (first, second) = RunFolder(tmp_path / "run"), seen_by_ranks(tmp_path)
    assert [line.get("recovery") for line in folder.choices()] == [None, None, "safety", None]
    assert any("safety is back after 1 draw" in line["message"] for line in folder.read("alarms"))
    assert first["logged"] == second["logged"] and first["draws"] == second["draws"] == {"safety": 1}
    teacher, policy = (AutoModelForCausalLM.from_pretrained(folder.checkpoints / f"checkpoint-{n}") for n in (1, 2))
    for seen in (first, second):
        for i in range(12):
            prompt, said = row_of(seen, i)
            expected = logps_of(teacher, prompt, said) - logps_of(policy, prompt, said)
            assert (seen["advantages"][i, : len(said)] - expected).abs().max() < 1e-4
            assert expected.abs().max() > 1e-3


def seen_by_ranks(folder):
    return [torch.load(folder / f"rank-{n}.pt") for n in (0, 1)]


def row_of(seen, i):
    """The token ids of a row's prompt, and of its completion."""
    return (
        seen["prompt_ids"][i][seen["prompt_mask"][i].bool()],
        seen["completion_ids"][i][seen["completion_mask"][i].bool()],
    )


def logps_of(model, prompt, said):
    with torch.no_grad():
        logits = model(torch.cat([prompt, said]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, said.unsqueeze(1)).squeeze(1)
