"""`python -m tests.experiments.slurm_nodes OUT`: one run over three nodes of a real Slurm on this machine, three times.

Two nodes train, the third has a rollout worker behind Ray. whole: to its end. requeued: preempted in the middle. dies: the
third node is lost in the middle (its slurmd and all that it runs are killed), is up again, and Slurm queues the job anew.
Needs root; nodes are brought up by tests/slurm_node.sh.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.conftest import HOUSE, RECIPES
from tests.test_slurm import launched, state, steps, wait_until

STEPS = 8
OVERRIDES = [
    "rollouts={engine: ray, workers: 1}",
    "cluster={trainer_nodes: 2, rollout_nodes: 1, slurm: {exclusive: false}}",
    "tracking.wandb=null",
    f"grpo.max_steps={STEPS}",
    f"eval.every={STEPS}",
    "eval.samples=1",
    "checkpoint.every=2",
]
LOST = "127.0.0.3"
LONGEST_S = 1200.0
"""For a run, beside other work on two cores."""


def preempt(environment: dict[str, str], job: str, slurm: Path) -> None:
    """Tell the job as Slurm does before it takes the nodes away."""
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=environment, check=True)


def lose_node(environment: dict[str, str], job: str, slurm: Path) -> None:
    """Kill a node's daemon and its steps, say so to Slurm as a time-out would, and bring it up again."""
    daemon = slurm / f"slurmd-{LOST}.pid"
    steps_of = subprocess.run(["pgrep", "-f", f"slurmstepd.*{job}"], capture_output=True, text=True, check=False)
    os.kill(int(daemon.read_text()), signal.SIGKILL)
    for pid in steps_of.stdout.split():
        if f"SLURMD_NODENAME={LOST}" in Path(f"/proc/{pid}/environ").read_text(errors="replace"):
            os.killpg(os.getpgid(int(pid)), signal.SIGKILL)
    down = [f"NodeName={LOST}", "State=DOWN", "Reason=lost"]
    subprocess.run(["scontrol", "update", *down], env=environment, check=True)
    time.sleep(5)
    subprocess.run(["slurmd", "-f", slurm / "slurm.conf", "-N", LOST], check=True)
    subprocess.run(["scontrol", "update", f"NodeName={LOST}", "State=RESUME"], env=environment, check=False)


EVENTS = {"whole": None, "requeued": preempt, "dies": lose_node}


def run(kind: str, out: Path, environment: dict[str, str], slurm: Path) -> str:
    """Run one kind to its end; return its line of the table. Raises AssertionError where it does not get there."""
    folder = out / kind
    job = launched(environment, str(RECIPES / "debug.yaml"), *OVERRIDES, "--out", str(folder))
    log = folder / "logs" / f"slurm-{job}.log"
    began, event = time.monotonic(), EVENTS[kind]
    if event is not None:
        wait_until(lambda: len(steps(folder)) >= 3, timeout_s=LONGEST_S, log=log)
        event(environment, job, slurm)
        wait_until(lambda: state(environment, job) == "PENDING", timeout_s=LONGEST_S, log=log)
        # Slurm holds a requeued job back for two minutes; a node that was lost still ends that job's steps for half of one
        wait = f"StartTime=now+{60 if kind == 'dies' else 3}"
        subprocess.run(["scontrol", "update", f"JobId={job}", wait], env=environment, check=True)
    wait_until(lambda: state(environment, job) in ("COMPLETED", "FAILED"), timeout_s=LONGEST_S, log=log)
    shown = subprocess.run(
        ["scontrol", "show", "job", job], env=environment, capture_output=True, text=True, check=True
    )
    restarts = next(word for word in shown.stdout.split() if word.startswith("Restarts="))
    assert state(environment, job) == "COMPLETED" and steps(folder) == [*range(1, STEPS + 1)], log.read_text()[-3000:]
    took = f"{time.monotonic() - began:.0f} s"
    return f"{kind:<10}{state(environment, job):<12}{restarts:<12}steps 1 to {STEPS} once each, {took}"


def main() -> None:
    """Bring up the nodes, run what is asked for, take them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(EVENTS), default=list(EVENTS))
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    script, slurm = str(HOUSE / "tests" / "slurm_node.sh"), out / "slurm"
    shutil.rmtree(slurm, ignore_errors=True)
    subprocess.run([script, "up", str(slurm), "3"], check=True, timeout=120)
    try:
        environment = {**os.environ, "SLURM_CONF": str(slurm / "slurm.conf"), "HF_HUB_OFFLINE": "1"}
        for kind in given.kinds:
            print(run(kind, out, environment, slurm), flush=True)
    finally:
        subprocess.run([script, "down", str(slurm)], check=False, timeout=60)


if __name__ == "__main__":
    main()
