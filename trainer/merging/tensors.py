"""Checkpoints as files of tensors: found, compared by their headers, read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from polyphony.curricula.files import replacing
from polyphony.trainer.run.json_lines import read_object
from polyphony.trainer.teachers.weights import CONFIG

OUTPUT, EMBEDDINGS = "lm_head.weight", (".embed_tokens.weight", ".wte.weight")
"""What Transformers' models call their output layer and their embeddings."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The safetensors files of a folder.

    Example: `Checkpoint.of("tutor", Path("runs/demo/final")).shapes["model.norm.weight"] == (128,)`
    """

    name: str
    """What errors call it."""
    folder: Path
    files: dict[str, Path]
    """By tensor."""
    shapes: dict[str, tuple[int, ...]]
    copies: dict[str, str]
    """Tensors of the files that a model reads another for: its output layer, where that is tied to its embeddings. They have
    no shape here, for a model saved anew has none."""
    _last: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, name: str, folder: Path) -> Checkpoint:
        """Read the headers of all files of a folder; `lacking` has looked whether they are whole."""
        files, shapes = {}, {}
        for path in _files(folder):
            with safe_open(path, framework="pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118  # of the file, which is no mapping
                    files[tensor], shapes[tensor] = path, tuple(opened.get_slice(tensor).get_shape())
        copies = _copies(folder, shapes)
        shapes = {tensor: shape for tensor, shape in shapes.items() if tensor not in copies}
        return cls(name, folder, files, shapes, copies)

    def read(self, name: str, part: slice | None = None) -> torch.Tensor:
        """Return a tensor, or some of its numbers in a row, as they stand in the file.

        What is looked at of the file counts as the process's memory for as long as the tensor lives: the last one is kept,
        for its other parts, and the file is opened again for the next.
        """
        if self._last.get("name") != name:
            self._last.clear()
            with safe_open(self.files[name], framework="pt") as opened:
                self._last.update(name=name, tensor=opened.get_tensor(name))
        tensor = self._last["tensor"]
        return tensor if part is None else tensor.flatten()[part]

    def numbers(self, name: str, part: slice | None = None) -> torch.Tensor:
        """Return a tensor, or some of its numbers in a row, in float32. Raises ValueError where one is NaN or infinite."""
        numbers = self.read(name, part).to(torch.float32, copy=True)
        # a sum that is finite is of finite numbers, and needs no second tensor
        if not numbers.sum().isfinite() and not numbers.isfinite().all():
            raise ValueError(f"{self.name}: {name} has weights that are NaN or infinite")
        return numbers

    def refuse_other_shapes(self, other: Checkpoint) -> None:
        """Raise ValueError, naming the first tensor, where another has not the same ones."""
        for name in sorted(self.shapes.keys() | other.shapes.keys()):
            ours, theirs = self.shapes.get(name), other.shapes.get(name)
            if ours != theirs:
                raise ValueError(
                    f"{other.name}: {name} {_told(theirs)}, in {self.name} it {_told(ours)}: only models of the same shapes "
                    "are merged"
                )


def _files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: those of its index, else the one of that name, else all."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return sorted({folder / file for file in read_object(index).get("weight_map", {}).values()})
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _copies(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    said = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    tied = said.get("tie_word_embeddings", said.get("text_config", {}).get("tie_word_embeddings"))
    embeddings = [name for name, of in shapes.items() if name.endswith(EMBEDDINGS) and of == shapes.get(OUTPUT)]
    return {OUTPUT: embeddings[0]} if tied and embeddings else {}


def _told(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {list(shape)}"


def rewrite(source: Path, target: Path, tensors: Callable[[str], Iterator[torch.Tensor]]) -> None:
    """Write a safetensors file with the header of `source`, byte for byte, and other numbers in it.

    `tensors` gives each one by its name, whole or in blocks, in any type: it is cast to that of the header.
    """
    with source.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    places = {name: at["data_offsets"] for name, at in json.loads(header).items() if name != "__metadata__"}
    with replacing(target, "wb") as file, safe_open(source, framework="pt") as opened:
        file.write(length + header)
        for name, (start, end) in sorted(places.items(), key=lambda at: at[1]):
            dtype = opened.get_tensor(name).dtype
            for block in tensors(name):
                kept = block.to(dtype).contiguous().flatten()
                file.write(kept.view(torch.uint8).numpy().data)
            assert file.tell() == 8 + len(header) + end, f"{name}: {end - start} bytes"
