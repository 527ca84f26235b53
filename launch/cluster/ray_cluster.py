"""The Ray cluster that rollout workers live in: joined or started, and checked for room, within a bounded time."""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from polyphony.launch.cluster.local import RAY_GPUS, gpus_here, names_of_gpus
from polyphony.launch.recipe import RecipeError

PACKAGES = ("curricula", "launch", "rewards", "trainer")
POLL_S = 0.5
RAY_NICENESS = "RAY_worker_niceness"
"""Variable for the priority of a cluster's workers. Ray's own lets anything else on the machine go first; the trainer waits
for its workers."""
ANSWER_S = 30.0
"""How long what listens may take to answer; Ray's own commands need some seconds to start."""
NEEDS_TOKEN = "it asks for its token: set RAY_AUTH_MODE=token, and put it in RAY_AUTH_TOKEN or ~/.ray/auth_token"
"""With an address Ray (2.60) looks for no token by itself."""


def join(address: str | None, *, timeout_s: float) -> bool:
    """Connect this process to a cluster; return True if the cluster was started here and ends with this process.

    `address` as in `ray.init`; None takes `RAY_ADDRESS`, or starts a cluster of this machine. Raises RecipeError.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        deadline = time.monotonic() + timeout_s
        wait_for_port(address, timeout_s=timeout_s)
        if "://" not in address:
            check_cluster(address, timeout_s=max(ANSWER_S, deadline - time.monotonic()))
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    if address == "local":
        quiet["include_dashboard"] = False
        os.environ.setdefault(RAY_NICENESS, "0")
    # with a working directory of their own, workers do not look for modules in ours, where a file may bear any name
    # (a job that was given one keeps it)
    quiet["runtime_env"] = (
        {"py_modules": [str(staged_package())]}
        if "working_dir" in _of_the_job()
        else {"working_dir": str(staged_package().parent)}
    )
    try:
        with _spare_gpus_only() if address == "local" else nullcontext():
            ray.init(address=address, **quiet)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise RecipeError(f"Ray cluster {address!r}: {reason(str(error))}") from error
    return address == "local"


def _of_the_job() -> dict[str, Any]:
    """Return the runtime environment of the Ray job that this process is in; empty outside of one."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})


@functools.cache
def staged_package() -> Path:
    """Return a copy of `polyphony` as one folder, alone in another, for interpreters that lack it; gone with this process.

    Here its four folders may stand anywhere: an editable install has no folder of that name.
    """
    folder = Path(tempfile.mkdtemp(prefix="polyphony-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    house = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(house / package, folder / "polyphony" / package, ignore=ignored)
    return folder / "polyphony"


@contextmanager
def _spare_gpus_only() -> Iterator[None]:
    """Leave the trainer ranks' GPUs, the first ones, out of a cluster that is started here."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not (gpus := gpus_here()):
        yield
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    spare = os.environ.get(RAY_GPUS, ",".join(names_of_gpus(gpus)[ranks:]))  # `polyphony launch local` says which
    os.environ["CUDA_VISIBLE_DEVICES"] = spare  # for the processes that ray.init starts; CUDA is up in this one
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def wait_for_port(address: str, *, timeout_s: float) -> None:
    """Wait until something listens at host:port. Raises RecipeError after `timeout_s`."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise RecipeError(f"Ray cluster {address!r}: expected host:port, auto or local")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(POLL_S, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RecipeError(
                    f"Ray cluster {address!r} did not answer within {timeout_s:g} s ({error.strerror or error}); "
                    "start it with `ray start --head`, or leave rollouts.address away"
                ) from error
        time.sleep(POLL_S)


def check_cluster(address: str, *, timeout_s: float) -> None:
    """Ask a cluster for its state. Raises RecipeError where it is silent, asks for a token, or runs another Ray.

    Asked by a process of its own, which can be ended: Ray's client tries a silent address again and again.
    """
    words = [sys.executable, "-P", "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise RecipeError(
            f"Ray cluster {address!r}: what listens there did not answer as Ray's head within {timeout_s:g} s"
        ) from error
    if done.returncode:
        raise RecipeError(f"Ray cluster {address!r}: {reason(done.stderr)}")


def reason(said: str) -> str:
    """Shorten Ray's account of a failure to a line that says what to do."""
    if "AuthToken" in said:
        return NEEDS_TOKEN
    if "ersion mismatch" in said:
        differs = " ".join(said[said.rindex("ersion mismatch") + len("ersion mismatch") :].split()).lstrip(": ")
        return f"Version mismatch: {differs[:300]}; install the same Ray and Python on both sides"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def reserve(n_workers: int, *, cpus: float, gpus: int, timeout_s: float, is_own: bool) -> PlacementGroup:
    """Reserve a place for every worker, near each other. Raises RecipeError, with what there is, after `timeout_s`.

    A cluster of this machine does not grow, so there the answer comes at once.
    """
    kind, each = ("GPU", gpus) if gpus else ("CPU", cpus)
    deadline = time.monotonic() + (0 if is_own else timeout_s)
    while (there := ray.cluster_resources().get(kind, 0)) < n_workers * each:
        if time.monotonic() >= deadline:
            raise RecipeError(
                f"rollouts.workers={n_workers} of {each:g} {kind} each need {n_workers * each:g}, "
                f"the Ray cluster has {there:g}"
            )
        time.sleep(POLL_S)
    bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    group = placement_group([bundle] * n_workers, strategy="PACK")
    if not group.wait(timeout_seconds=timeout_s):
        free = ray.available_resources().get(kind, 0)
        remove_placement_group(group)
        raise RecipeError(
            f"rollouts.workers={n_workers}: no node had room for {each:g} {kind} each within {timeout_s:g} s "
            f"({free:g} of {there:g} {kind} are free)"
        )
    return group


def leave(group: PlacementGroup | None, *, is_own: bool) -> None:
    """Give the places back; end the cluster if it was started here."""
    if not ray.is_initialized():
        return
    if group is not None:
        remove_placement_group(group)
    if is_own:
        ray.shutdown()
