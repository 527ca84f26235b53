"""The policy's weights on their way to a rollout worker: on another card of this node, or on another node."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polyphony.launch.build import build_trainer
from polyphony.launch.cluster import ray_cluster
from polyphony.launch.measures import RECIPES
from polyphony.launch.measures.result import Result, untried
from polyphony.launch.measures.rollouts import check_followed, sync_result
from polyphony.launch.recipe import load_recipe

ANSWER_S = 60.0
"""What a cluster, or a worker, may take to answer."""


def beside(policy: Path, folder: Path) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Yield the row of a worker on this node."""

    def row() -> Result:
        with over_a_worker(policy, folder / "worker", address="local") as trainer:
            return received(trainer, name="worker sync")

    yield "worker sync", row


def elsewhere(policy: Path, folder: Path) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Yield the row of a worker on another node of the cluster at `RAY_ADDRESS`."""
    yield "two-node sync", lambda: across(policy, folder / "nodes", address=os.environ["RAY_ADDRESS"])


def across(policy: Path, folder: Path, *, address: str) -> Result:
    """Send weights to a worker that can only be on another node, since this one's devices are held meanwhile."""
    ray_cluster.join(address, timeout_s=ANSWER_S)
    here, kind = ray.get_runtime_context().get_node_id(), "GPU" if torch.cuda.is_available() else "CPU"
    there = {node["NodeID"]: node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]}
    if not any(count for node, count in there.items() if node != here):
        return untried("two-node sync", f"the Ray cluster at {address} has no other node with a {kind}")
    holder = _held(here, kind, there.get(here, 0))
    try:
        with over_a_worker(policy, folder, address=address) as trainer:
            node, _ = ray.get(trainer.policy.engine.pool.workers[0].ready)
            if node == here:
                raise RuntimeError("the worker came up on this node")
            return received(trainer, name="two-node sync")
    finally:
        del holder  # gives the devices back


def _held(node: str, kind: str, count: float) -> Any:
    """Take all of a node's devices out of the cluster; hands back what holds them. Raises RuntimeError."""
    if not count:
        return None
    taken: dict[str, Any] = {"num_gpus": count, "num_cpus": 0} if kind == "GPU" else {"num_cpus": count}
    actor: Any = ray.remote(Holder).options(
        **taken, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
    holder = actor.remote()
    try:
        ray.get(holder.is_there.remote(), timeout=ANSWER_S)
    except GetTimeoutError as error:
        raise RuntimeError(f"{count:g} {kind} of this node are not free in its Ray cluster") from error
    return holder


class Holder:
    """Holds what it was given."""

    def is_there(self) -> bool:
        return True


@contextmanager
def over_a_worker(policy: Path, folder: Path, *more: str, address: str) -> Iterator[Any]:
    """Have the debug recipe's trainer over a policy and one worker meanwhile."""
    pool = f"rollouts={{engine: ray, workers: 1, address: '{address}', timeout_s: {ANSWER_S}}}"
    precision = f"grpo.bf16={torch.cuda.is_available()}".lower()
    recipe = load_recipe(RECIPES / "debug.yaml", [f"model={policy}", "tracking.wandb=null", precision, pool, *more])
    trainer = build_trainer(recipe, folder)
    try:
        yield trainer
    finally:
        trainer.policy.engine.close()  # type: ignore[union-attr]


def received(trainer: Any, *, name: str) -> Result:
    """Check that the worker follows the policy's weights, and time a sync. Raises RuntimeError."""
    check_followed(trainer)
    # as after training: an adapter that changes nothing would hide weights that were sent without it
    adapters = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    with torch.no_grad():
        for parameter in adapters:
            parameter.fill_(0.1)
    if adapters:
        check_followed(trainer)
    return sync_result(trainer, trainer.policy.engine, name=name)
