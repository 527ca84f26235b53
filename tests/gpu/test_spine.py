"""The spine on a GPU: the debug recipe through the CUDA build of vLLM, in-process, TRL's colocate, and Ray over NCCL."""

from __future__ import annotations

import json

import pytest
import torch

from polyphony.launch.build import build_trainer
from polyphony.launch.cli import main
from polyphony.launch.measures import LAB
from polyphony.launch.measures.spine import random_policy, weight_check
from polyphony.launch.measures.workers import over_a_worker, received
from polyphony.launch.recipe import load_recipe
from tests.conftest import RECIPES

LORA = "lora={r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"

DEBUG = str(RECIPES / "debug.yaml")
QUICK = ["grpo.max_steps=2", "eval.every=2", "tracking.wandb=null", "grpo.vllm_gpu_memory_utilization=0.2"]
BF16 = "grpo.bf16=true"


def losses(run) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def half_billion(tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy") / "half-billion")


@pytest.mark.parametrize("engine", ["rollouts.engine=vllm", "grpo.use_vllm=true"], ids=["in-process", "colocate"])
@pytest.mark.parametrize("precision", ["grpo.bf16=false", BF16], ids=["fp32", "bf16"])
def test_a_short_run_trains(tmp_path, engine, precision):
    run = tmp_path / "run"
    assert main(["train", DEBUG, *QUICK, engine, precision, "--out", str(run)]) == 0
    assert len(losses(run)) == 2
    assert (run / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("more", [[], [LORA], ["grpo.vllm_enable_sleep_mode=true"]], ids=["full", "lora", "sleeping"])
def test_half_a_billion_parameters_in_bf16_train(tmp_path, half_billion, more):
    run = tmp_path / "run"
    assert main(["train", DEBUG, *QUICK, BF16, f"model={half_billion}", *more, "--out", str(run)]) == 0
    assert len(losses(run)) == 2


def test_the_engine_follows_the_weights_and_holds_each_of_them(tmp_path):
    weight_check(build_trainer(load_recipe(DEBUG, QUICK), tmp_path))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a worker needs a GPU of its own beside the trainer's")
@pytest.mark.parametrize("more", [[], [LORA]], ids=["full", "lora"])
def test_weights_reach_a_worker_over_nccl(tmp_path, more):
    with over_a_worker(LAB, tmp_path, "grpo.bf16=false", *more, address="local") as trainer:
        received(trainer, name="sync")


@pytest.mark.timeout(900)  # ten minutes, and what comes before the first row
def test_the_doctor_finds_nothing_broken(capsys):
    code = main(["doctor", "--gpu", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["name"]: row["error"] for row in rows if row["error"]} == {}
    assert code == 0
