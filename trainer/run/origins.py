"""Where weights come from, the policy's and teachers', and that they are the same when a run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from polyphony.trainer.checkpoint_mark import digests

ALIKE = 0.1
"""Nats a token by which an endpoint may differ from itself in the mean: other hardware, other batches."""


def origin_of(model: str) -> dict[str, Any]:
    """Return a model's name, and hashes of its files where it is a local folder."""
    files = _beside_weights(Path(model))
    return {"name": model, "sha256": _weights_hash(Path(model))} | ({"files": files} if files else {})


def refuse_other_weights(began: Mapping[str, Any], what: str, *, folder: str) -> None:
    """Raise ValueError, naming what it is, where a folder's files are not those that a run began with."""
    then, now = began.get("sha256"), _weights_hash(Path(folder))
    if then is not None and now is not None and then != now:
        raise ValueError(f"{what}: its weights are not those that the run began with; give them back, or start anew")
    then, now = began.get("files") or {}, _beside_weights(Path(folder)) if began.get("files") else {}
    if others := [name for name in sorted(then | now) if then.get(name) != now.get(name)]:
        raise ValueError(
            f"{what}: {', '.join(others)} {'is' if len(others) == 1 else 'are'} not as the run began with; give back "
            "what was there, or start anew"
        )


def refuse_other_teachers(known: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError, naming it, for a teacher that is another than the run began with, `known` being its provenance.

    One behind an endpoint is known by what it says of a row: weights nearly alike cannot be told apart.
    """
    for name, now in teachers.items():
        then = known.get("teachers", {}).get(name, {})
        if "says" not in now:
            refuse_other_weights(then, f"teachers.{name}", folder=str(now["name"]))
            continue
        said = then.get("says", now["says"] if not then else [])
        apart = [abs(x - y) for x, y in zip(said, now["says"], strict=False)]
        if len(said) != len(now["says"]) or sum(apart) > ALIKE * len(apart):
            raise ValueError(
                f"teachers.{name}: its log-probabilities are not those that the run began with ({then.get('name')} then, "
                f"{now['name']} now): give it back, or start anew"
            )


def _weights_hash(folder: Path) -> str | None:
    """Hash of the weight files of a local folder; None for a hub name, which carries its own revision."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*_model*.bin"))
    if not files:
        return None
    each = _digests(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    return digest(b"".join(map(bytes.fromhex, each)))


@lru_cache(maxsize=16)
def _digests(files: tuple[tuple[Path, int, int], ...]) -> list[str]:
    """Return the sha256 of files, read once a process while size and time stay as they are."""
    return digests([path for path, *_ in files])


BESIDE_WEIGHTS = tuple(
    """
    *config.json *token*.json vocab.* merges.txt *.model *.tiktoken chat_template* additional_chat_templates/* *.py
    """.split()  # noqa: SIM905
)
"""What says how a folder's weights are used: configuration, tokenizer, chat template, code of its own."""


def _beside_weights(folder: Path) -> dict[str, str]:
    """Hashes of a local folder's small files, by name; none for a hub name."""
    paths = sorted({path for pattern in BESIDE_WEIGHTS for path in folder.glob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in paths}


def digest(content: bytes) -> str:
    """Return the sha256 of a content."""
    return hashlib.sha256(content).hexdigest()
