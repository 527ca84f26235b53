"""`polyphony launch ray`: hand the run to a Ray cluster that is up, as a Ray job, and follow it to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from polyphony.launch.cluster.local import Command
from polyphony.launch.cluster.ray_cluster import ANSWER_S, NEEDS_TOKEN, reason, staged_package, wait_for_port
from polyphony.launch.recipe import RecipeError
from polyphony.launch.sections import ClusterSection
from polyphony.trainer.run import say


def plan(address: str, train_words: Sequence[str], cluster: ClusterSection, *, gpus: int | None) -> Command:
    """Return the `ray job submit` that runs `polyphony train` on the cluster, on its head node where it takes no GPUs.

    `gpus` are the trainer ranks' of a node: Ray has to know of them, or it would give the same to a rollout worker; None: a
    driver there asks whether the nodes have any. Recipe, rows, model and run folder are read and written where the job runs:
    their paths have to be shared.
    """
    environment = {"py_modules": [str(staged_package())]}  # the `python` there may lack it
    job = ["python", "-P", "-m", "polyphony.launch.cli", "launch", "local", *train_words]
    if gpus is None or cluster.trainer_nodes + cluster.rollout_nodes > 1:
        nodes = ["--trainer-nodes", str(cluster.trainer_nodes), "--rollout-nodes", str(cluster.rollout_nodes)]
        nodes += ["--processes", str(cluster.processes)] if gpus is None else ["--gpus", str(gpus)]
        job = [
            "python",
            "-P",
            "-m",
            "polyphony.launch.cluster.ray_nodes",
            *nodes,
            "--",
            *train_words,
        ]
        gpus = 0  # its actors hold them
    words = [sys.executable, "-P", "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
    words += ["--runtime-env-json", json.dumps(environment), "--entrypoint-num-cpus", "0"]
    words += ["--entrypoint-num-gpus", str(gpus)] if gpus else []
    return Command(words=[*words, "--", *job])


def submit(command: Command, address: str) -> int:
    """Submit and follow the job; return its exit code. Raises RecipeError where no cluster takes it."""
    check_dashboard(address, timeout_s=ANSWER_S)
    done = subprocess.run(command.words, check=False)
    if done.returncode:
        say(f"polyphony launch ray: the job ended with exit code {done.returncode}")
    return done.returncode


def check_dashboard(address: str, *, timeout_s: float) -> None:
    """Raise RecipeError where no Ray dashboard answers at this URL, it asks for a token, or is of another Ray.

    `ray job submit` waits without end for what listens and is silent.
    """
    import ray  # slow to import

    wait_for_port(address.split("://", 1)[1].rstrip("/"), timeout_s=timeout_s)
    request = urllib.request.Request(f"{address}/api/version", headers=_token())
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            version = json.load(answer)["ray_version"]
    except (OSError, HTTPException, ValueError, KeyError) as error:
        if isinstance(error, HTTPError) and error.code in (401, 403):
            raise RecipeError(f"Ray dashboard {address}: {NEEDS_TOKEN}") from error
        why = f"what listens there does not answer as one ({type(error).__name__}); its port is 8265 unless chosen"
        raise RecipeError(f"Ray dashboard {address}: {why}") from error
    if version != ray.__version__:
        differs = f"Version mismatch: the cluster has Ray {version}, here it is {ray.__version__}"
        raise RecipeError(f"Ray dashboard {address}: {reason(differs)}")


def _token() -> dict[str, str]:
    """Return the header that Ray's token goes into, from where Ray's own commands take it; none if none is asked for."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return {}
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text() if path.is_file() else "")
    return {"Authorization": f"Bearer {token.strip()}"}
