"""Merging: two random models of a billion parameters in a process that may have 3 GiB, against reading and writing them.

The limit is a control group's where one can be made (cgroup v1, as root): beyond it the kernel ends the process. What is
printed is the most that was resident, pages of the mapped files among them (ru_maxrss). RLIMIT_DATA would not do: torch maps
files privately, and what is mapped counts whole there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from polyphony.launch.measures.result import Result, Target, Timing, paired, repeated, timed
from tests.benchmarks.commands import GIB, HOUSE

LIMIT = 3 * GIB
SHAPES = {"layers": 22, "width": 2048, "inner": 5632, "keys": 256, "words": 32000}
"""Of TinyLlama: 1.1 billion parameters; its largest tensors have 66 million."""
SMALL = {"layers": 1, "width": 64, "inner": 128, "keys": 16, "words": 100}
PIECE = 1 << 24
DRAWN = (1 << 22) + 1
CHILD = """
import json, os, resource, sys
from pathlib import Path
from polyphony.trainer.merging.merge import merge
from polyphony.trainer.merging.settings import MergeSettings
from polyphony.launch.measures.result import timed
group, method, base, out, *experts = sys.argv[1:]
if group:
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
took = timed(lambda: merge(experts, Path(out), base=base or None, settings=MergeSettings(method=method)))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"clock": took.clock, "cpu": took.cpu, "peak": peak}))
"""
WAYS = {"linear": (False, 2), "ties": (True, 1)}
"""Methods that are timed: whether the first model is the base, and how many experts there are."""


def random_model(folder: Path, shapes: dict[str, int], *, seed: int) -> Path:
    """Write a Llama of random bfloat16 numbers, in one file; return its folder."""
    torch.manual_seed(seed)
    numbers = torch.empty(DRAWN, dtype=torch.bfloat16).normal_(std=0.02)  # again and again: more would take minutes
    width, inner, keys = shapes["width"], shapes["inner"], shapes["keys"]
    of_layer = {"q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width)}
    of_layer |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner), "norm": (width,)}
    sizes = {f"layers.{n}.{name}": size for n in range(shapes["layers"]) for name, size in of_layer.items()}
    sizes |= {"embed": (shapes["words"], width), "head": (shapes["words"], width)}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {name: _tensor(numbers, size) for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _tensor(numbers: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(size).numel()
    start = int(torch.randint(len(numbers), ()))
    return numbers.roll(start).repeat(-(-count // len(numbers)))[:count].reshape(size).clone()


@contextmanager
def limited() -> Iterator[str]:
    """Have a control group with the limit, by its folder; none, an empty name, where that is not allowed."""
    group = Path("/sys/fs/cgroup/memory") / f"bench-merge-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield ""
        return
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield str(group)
    finally:
        group.rmdir()


def read_and_write(models: list[Path], out: Path) -> None:
    """Read the models' files, and write one of them again, to the disk."""
    with out.open("wb") as copied:
        for model in models:
            with (model / "model.safetensors").open("rb") as file:
                while piece := file.read(PIECE):
                    if model == models[-1]:
                        copied.write(piece)
        copied.flush()
        os.fsync(copied.fileno())
    out.unlink()


def bench_merge(*, short: bool = False) -> list[Result]:
    """Time a merge of two models, and one of a model over the other as its base, in turns with reading and writing them."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = [random_model(folder / f"model-{n}", SMALL if short else SHAPES, seed=n) for n in range(2)]
        read_and_write(models, folder / "copy")  # both are in the page cache from here on
        for method, (has_base, experts) in WAYS.items():
            plain = timed(lambda: read_and_write(models, folder / "copy"))
            base = str(models[0]) if has_base else ""
            with limited() as group:
                given = [group, method, base, str(folder / "out"), *map(str, models[-experts:])]
                done = subprocess.run(
                    [sys.executable, "-P", "-c", CHILD, *given],
                    capture_output=True,
                    text=True,
                    check=False,
                    cwd=HOUSE,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join([*_path(), str(HOUSE)])},
                )
            if done.returncode != 0:
                raise RuntimeError(f"merge by {method} failed: {done.stderr}")
            took = json.loads(done.stdout.splitlines()[-1])
            held = "in a control group of 3 GiB" if group else "no control group could be made"
            times = Timing(took["clock"], took["cpu"])
            results += _results(method, times, plain, peak_gib=took["peak"] / GIB, held=held)
            for path in (folder / "out").iterdir():
                path.unlink()
            (folder / "out").rmdir()
    return results


def _path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _results(method: str, took: Timing, plain: Timing, *, peak_gib: float, held: str) -> list[Result]:
    target, note = Target(relation="<=", limit=3.0), "against reading both and writing one"
    times = paired(f"merge of two models of 1.1 B, {method}", "s", [(took, plain)], target=target, note=note)
    return [times, repeated(f"its memory, {method}", "GiB", [peak_gib], target=target, note=held)]


BENCHMARKS = {"merge": bench_merge}
