"""Merge experts into a model folder that `eval`, `train` and Transformers read, whole or not at all.

One tensor, or a block of it, is in memory at a time, of every expert. Configuration, tokenizer and the types of numbers are
the first expert's; what it was made from stands beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from polyphony.curricula.files import replace_file
from polyphony.trainer.merging.adapters import are_combined, combine
from polyphony.trainer.merging.methods import BLOCKWISE, OF_MERGEKIT, Trim, blocks, merge_tensor
from polyphony.trainer.merging.settings import MergeSettings, check_out
from polyphony.trainer.merging.sources import Source, found, opened
from polyphony.trainer.merging.tensors import Checkpoint, rewrite
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.origins import BESIDE_WEIGHTS, origin_of

PACKAGES = ("polyphony-rl", "mergekit", "peft", "safetensors", "torch")


def merge(
    experts: Sequence[str],
    out: Path,
    *,
    settings: MergeSettings,
    base: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Merge experts, folders or names on the hub, into the new folder `out`; return it.

    `base` is what they were trained from. Adapters of it are experts too: where all are, and PEFT can, what they become is
    also there as an adapter, in `adapter/`; else each is merged into a copy of the base first. Raises ValueError, in one
    line, where they do not fit together, or a weight is NaN; there is no folder then. `about` is noted beside the weights.
    """
    settings.check(len(experts), has_base=base is not None)
    out = check_out(out)
    sources, of_base = found(experts, base)
    as_adapters = of_base is not None and are_combined(sources, settings)
    if not as_adapters and settings.method in OF_MERGEKIT and find_spec("mergekit") is None:
        raise ValueError(f"method {settings.method} needs mergekit: pip install 'polyphony-rl[merge]'")
    new = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from error
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        with ThreadPoolExecutor(1) as threads:
            hashing = threads.submit(_origins, sources, of_base)  # meanwhile, on another processor where there is one
            if as_adapters:
                assert of_base is not None
                combine(sources, of_base, settings, scratch)
            else:
                with opened(sources, of_base) as (checkpoints, start):
                    _write(checkpoints, start, settings, scratch)
            made = {"method": settings.method, "weights": list(settings.of(len(experts))), "seed": settings.seed}
            made |= {"density": settings.kept, **({"by": "peft"} if as_adapters else {}), **hashing.result()}
        document = {"merge": made, **(about or {}), "packages": _versions()}
        replace_file(RunFolder(scratch).provenance, json.dumps(document, indent=1))
        scratch.chmod(0o755)
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # one that is not empty holds the model
            for folder in new:
                folder.rmdir()
    return out


def _write(experts: Sequence[Checkpoint], base: Checkpoint | None, settings: MergeSettings, out: Path) -> None:
    first = experts[0]
    for file in sorted(set(first.files.values())):
        rewrite(file, out / file.name, lambda name: _merged(first.copies.get(name, name), experts, base, settings))
    for pattern in (*BESIDE_WEIGHTS, "*.safetensors.index.json"):
        for path in first.folder.glob(pattern):
            if path.is_file():
                target = out / path.relative_to(first.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _merged(
    name: str, experts: Sequence[Checkpoint], base: Checkpoint | None, settings: MergeSettings
) -> Iterator[torch.Tensor]:
    """Yield a merged tensor, in blocks where its numbers are merged one by one."""
    if not experts[0].read(name).is_floating_point():
        yield _same(name, experts)
        return

    def merged(part: slice | None) -> torch.Tensor:
        tensors = [expert.numbers(name, part) for expert in experts]
        return merge_tensor(tensors, None if base is None else base.numbers(name, part), settings, trims)

    trims: list[Trim] = []
    if settings.method in BLOCKWISE:
        size = torch.Size(experts[0].shapes[name]).numel()
        if base is not None and settings.method == "ties":
            trims = [Trim.of(size, settings.kept, partial(_difference, expert, base, name)) for expert in experts]
        yield from map(merged, blocks(size))
        return
    # of its name alone, so that what DARE drops does not depend on the order of tensors
    seed = settings.seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = merged(None)
    yield whole


def _difference(expert: Checkpoint, base: Checkpoint, name: str, part: slice) -> torch.Tensor:
    return expert.numbers(name, part).sub_(base.numbers(name, part))


def _same(name: str, experts: Sequence[Checkpoint]) -> torch.Tensor:
    """Return whole numbers, which are not merged. Raises ValueError where they differ."""
    first, *others = (expert.read(name) for expert in experts)
    for expert, other in zip(experts[1:], others, strict=True):
        if not torch.equal(first, other):
            raise ValueError(f"{expert.name}: {name} holds whole numbers ({other.dtype}), other ones than the first's")
    return first


def _origins(sources: Sequence[Source], base: Source | None) -> dict[str, Any]:
    def of(source: Source) -> dict[str, Any]:
        return {**origin_of(str(source.folder)), "name": source.name}

    return {"experts": [of(source) for source in sources], "base": None if base is None else of(base)}


def _versions() -> dict[str, str]:
    return {name: found.version for name in PACKAGES for found in islice(metadata.distributions(name=name), 1)}
