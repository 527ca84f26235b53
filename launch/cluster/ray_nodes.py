"""The driver of a Ray job whose trainer ranks stand on several nodes: `launch local` on each of them, as one group.

`python -m polyphony.launch.cluster.ray_nodes --trainer-nodes 2 --rollout-nodes 1 --gpus 8 -- recipe.yaml --out RUN`; each
node is an actor that holds its trainer's GPUs, so that Ray gives them to no rollout worker, and all of the node's where
workers have nodes of their own.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from polyphony.launch.cluster.local import OURS
from polyphony.trainer.run import say

PLACE_S = 300.0
"""How long the nodes may take to be there and free."""
POLL_S = 1.0
END_S = 30.0
"""What is waited for the other nodes' parts once one has failed."""


class Node:
    """One machine of the group."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None

    def address(self) -> str:
        """Return where the others reach it."""
        return ray.util.get_node_ip_address()

    def train(self, words: Sequence[str], rank: int, of: int, main_address: str, cluster: str) -> int:
        """Run this machine's part to its end; return the exit code."""
        group = ["--machines", str(of), "--machine-rank", str(rank), "--main-address", main_address]
        environment = {**os.environ, "RAY_ADDRESS": cluster}
        self.child = subprocess.Popen([*OURS, "launch", "local", *words, *group], env=environment)
        return self.child.wait()

    def tell(self, number: int) -> None:
        """Hand a signal to this machine's part."""
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


def check_nodes(wanted: int, *, timeout_s: float) -> str:
    """Wait for so many nodes; return what is wrong, in a line, if they do not come."""
    deadline = time.monotonic() + timeout_s
    while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() >= deadline:
            return f"cluster.trainer_nodes and rollout_nodes are {wanted} together, the Ray cluster has {there} nodes"
        time.sleep(POLL_S)
    return ""


def gpus_of_nodes() -> list[int]:
    """Return how many GPUs the nodes that are there have, the most first."""
    return sorted((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), reverse=True)


def held(gpus: int, *, trainer_nodes: int, rollout_nodes: int) -> int:
    """Return how many GPUs a trainer's node holds: all where workers have nodes of their own, for none is spare."""
    return max(gpus, gpus_of_nodes()[trainer_nodes - 1]) if gpus and rollout_nodes else gpus


def run(words: Sequence[str], *, trainer_nodes: int, rollout_nodes: int, gpus: int, timeout_s: float = PLACE_S) -> int:
    """Train over the nodes of the cluster that this process is connected to; return the first exit code that is not 0.

    Where a node's part fails, the others are told to end: they would wait for it.
    """
    if fault := check_nodes(trainer_nodes + rollout_nodes, timeout_s=timeout_s):
        say(f"polyphony launch ray: {fault}")
        return 2
    gpus = held(gpus, trainer_nodes=trainer_nodes, rollout_nodes=rollout_nodes)
    group = placement_group([{"GPU": gpus} if gpus else {"CPU": 1}] * trainer_nodes, strategy="STRICT_SPREAD")
    if not group.wait(timeout_seconds=timeout_s):
        need = f"{gpus} free GPUs" if gpus else "a free CPU"
        say(f"polyphony launch ray: cluster.trainer_nodes={trainer_nodes}: not as many nodes have {need} each")
        return 2
    room: dict[str, Any] = {"num_gpus": gpus, "num_cpus": 0 if gpus else 1, "max_concurrency": 2}
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=n) for n in range(trainer_nodes)]
    actor: Any = ray.remote(Node)
    nodes = [actor.options(**room, scheduling_strategy=place).remote() for place in places]

    def tell(number: int, frame: Any) -> None:
        for node in nodes:
            node.tell.remote(number)

    signal.signal(signal.SIGTERM, tell)
    head, cluster = ray.get(nodes[0].address.remote()), ray.get_runtime_context().gcs_address
    parts = [node.train.remote(list(words), n, trainer_nodes, head, cluster) for n, node in enumerate(nodes)]
    while parts:
        ended, parts = ray.wait(parts, num_returns=1)
        if code := ray.get(ended[0]):
            tell(signal.SIGTERM, None)
            if parts:  # Ray takes no empty list
                ray.wait(parts, num_returns=len(parts), timeout=END_S)
            return code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Be the driver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer-nodes", type=int, required=True)
    parser.add_argument("--rollout-nodes", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=0, help="of the trainer on each node")
    parser.add_argument("--processes", type=int, help="of the trainer on each node: a GPU each, if there are any")
    parser.add_argument("words", nargs="+", help="of `polyphony train`")
    given = parser.parse_args(argv)
    ray.init(address="auto")
    gpus = given.gpus if given.processes is None else given.processes * bool(gpus_of_nodes()[0])
    if not gpus and given.trainer_nodes + given.rollout_nodes == 1:  # nothing to hold: here, as without a driver
        ray.shutdown()
        return subprocess.run([*OURS, "launch", "local", *given.words], check=False).returncode
    counts = {"trainer_nodes": given.trainer_nodes, "rollout_nodes": given.rollout_nodes}
    return run(given.words, **counts, gpus=gpus)


if __name__ == "__main__":
    sys.exit(main())
