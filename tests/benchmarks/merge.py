"""Merging: two random models of a billion parameters in a process that may have 3 GiB, against reading and writing them.

The limit is the kernel's on a process's own memory (RLIMIT_DATA: an allocation beyond it fails); what it prints is the most
that was resident, pages of the mapped files among them (ru_maxrss).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.benchmarks.commands import GIB, HOUSE
from tests.benchmarks.result import Result, Target, Timing, paired, repeated, timed

LIMIT = 3 * GIB
SHAPES = {"layers": 22, "width": 2048, "inner": 5632, "keys": 256, "words": 32000}
"""Of TinyLlama: 1.1 billion parameters; its largest tensors have 66 million."""
SMALL = {"layers": 1, "width": 64, "inner": 128, "keys": 16, "words": 100}
PIECE = 1 << 24
CHILD = """
import json, resource, sys
from pathlib import Path
from polyphony.trainer.merging.merge import merge
from polyphony.trainer.merging.settings import MergeSettings
from tests.benchmarks.result import timed
limit, method, base, out, *experts = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
took = timed(lambda: merge(experts, Path(out), base=base or None, settings=MergeSettings(method=method)))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"clock": took.clock, "cpu": took.cpu, "peak": peak}))
"""
WAYS = {"linear": (False, 2), "ties": (True, 1)}
"""Methods that are timed: whether the first model is the base, and how many experts there are."""


def random_model(folder: Path, shapes: dict[str, int], *, seed: int) -> Path:
    """Write a Llama of random bfloat16 numbers, in one file; return its folder."""
    torch.manual_seed(seed)
    width, inner, keys = shapes["width"], shapes["inner"], shapes["keys"]
    of_layer = {"q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width)}
    of_layer |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner), "norm": (width,)}
    sizes = {f"layers.{n}.{name}": size for n in range(shapes["layers"]) for name, size in of_layer.items()}
    sizes |= {"embed": (shapes["words"], width), "head": (shapes["words"], width)}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {name: torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02) for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


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
            given = [str(LIMIT), method, base, str(folder / "out"), *map(str, models[-experts:])]
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
            results += _results(method, Timing(took["clock"], took["cpu"]), plain, took["peak"] / GIB)
            for path in (folder / "out").iterdir():
                path.unlink()
            (folder / "out").rmdir()
    return results


def _path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _results(method: str, took: Timing, plain: Timing, peak_gib: float) -> list[Result]:
    target, note = Target(relation="<=", limit=3.0), "against reading both and writing one"
    times = paired(f"merge of two models of 1.1 B, {method}", "s", [(took, plain)], target=target, note=note)
    return [times, repeated(f"its memory, {method}", "GiB", [peak_gib], target=target)]


BENCHMARKS = {"merge": bench_merge}
