"""The spine on a GPU: the debug recipe through the CUDA build of vLLM, in-process, TRL's colocate, and Ray over NCCL."""

from __future__ import annotations

import json

import pytest
import torch

from launch.build import build_trainer
from launch.cli import main
from launch.config import load_recipe
from tests.conftest import RECIPES
from tests.ranks import differing

DEBUG = str(RECIPES / "debug.yaml")
QUICK = ["grpo.max_steps=2", "eval.every=2", "tracking.wandb=null", "grpo.vllm_gpu_memory_utilization=0.2"]


def losses(run) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("engine", ["rollouts.engine=vllm", "grpo.use_vllm=true"], ids=["in-process", "colocate"])
def test_a_short_run_trains(tmp_path, engine):
    run = tmp_path / "run"
    assert main(["train", DEBUG, *QUICK, engine, "--out", str(run)]) == 0
    assert len(losses(run)) == 2
    assert (run / "final" / "model.safetensors").exists()


def test_the_engine_follows_the_weights_and_holds_each_of_them(tmp_path):
    trainer = build_trainer(load_recipe(DEBUG, QUICK), tmp_path)
    assert trainer.check_weight_sync().is_passed
    trainer.sync_engine()
    assert differing(trainer) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a worker needs a GPU of its own beside the trainer's")
def test_weights_reach_a_worker_over_nccl(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYPHONY_ROLLOUT_GPUS", "1")
    trainer = build_trainer(load_recipe(DEBUG, [*QUICK, "rollouts={engine: ray, workers: 1}"]), tmp_path)
    try:
        assert trainer.check_weight_sync().is_passed
    finally:
        trainer.engine.close()
