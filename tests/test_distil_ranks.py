"""Two ranks that distil, weights split over them: each runs every teacher as often as the other, and learns from its own
rows."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.conftest import POLICY
from tests.forks import forked_ranks
from tests.ranks import be_taught
from tests.taught import fill, recipe_of
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
    ranks = [torch.load(tmp_path / f"rank-{n}.pt") for n in (0, 1)]
    assert [set(seen["domains"]) for seen in ranks] == [{"expert", "then"}, {"moved", "far"}]
    assert ranks[0]["logged"] == ranks[1]["logged"]

    policy = AutoModelForCausalLM.from_pretrained(POLICY)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), str(shelf / "moved"))
    models = {"expert": AutoModelForCausalLM.from_pretrained(shelf / "expert"), "then": policy, "moved": adapted}
    for seen in ranks:
        for i, domain in enumerate(seen["domains"]):
            prompt, said = seen["prompt_ids"][i][seen["prompt_mask"][i].bool()], seen["completion_ids"][i]
            said = said[seen["completion_mask"][i].bool()]
            ours = logps_of(policy, prompt, said)
            theirs = -1.0 - said % 7 if domain == "far" else logps_of(models[domain], prompt, said)
            expected = (theirs - ours).clamp(-5, 5)
            assert (seen["advantages"][i, : len(said)] - expected).abs().max() < 1e-5
            assert domain == "then" or expected.abs().max() > 1e-3


def logps_of(model, prompt, said):
    with torch.no_grad():
        logits = model(torch.cat([prompt, said]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, said.unsqueeze(1)).squeeze(1)
