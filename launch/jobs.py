"""`polyphony launch ray`: hand the run to a Ray cluster that is up, as a Ray job, and follow it to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from launch.cluster import HOUSE, wait_for_port
from launch.local import Command

ANSWER_S = 30.0
"""How long a cluster's dashboard may take to answer; it is either up or not."""


def plan(address: str, train_words: Sequence[str]) -> Command:
    """Return the `ray job submit` that runs `polyphony train` on the cluster's head node.

    Recipe, rows, model and run folder are read and written where the job runs: their paths have to be shared.
    """
    environment = {"env_vars": {"PYTHONPATH": str(HOUSE)}}
    job = ["python", "-m", "launch.cli", "launch", "local", *train_words]
    words = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
    words += ["--runtime-env-json", json.dumps(environment), "--entrypoint-num-cpus", "0"]
    return Command(words=[*words, "--", *job])


def submit(command: Command, address: str) -> int:
    """Submit and follow the job; return its exit code. Raises RecipeError where no cluster answers."""
    host = address.removeprefix("http://").removeprefix("https://").rstrip("/")
    wait_for_port(host, timeout_s=ANSWER_S)
    done = subprocess.run(command.words, check=False)
    if done.returncode:
        print(
            f"polyphony launch ray: the job ended with exit code {done.returncode}",
            file=sys.stderr,
        )
    return done.returncode
