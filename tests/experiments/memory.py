"""`python -m tests.experiments.memory`: the most memory that the trainer and its engine hold, by what is to keep it down.

A random policy of 105 million parameters, 16 rows of 64 tokens, half of the groups dead, two steps at rate 0 (by the
second the optimizer holds its moments); each row of the table is a process of its own. With `ray` the engine is a worker
beside the trainer, with `vllm` it is in it. Loss, gradient and entropies, which must not change, stand beside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from polyphony.launch.cli import set_environment
from tests.benchmarks.adapters import SHAPE

ENGINES = {"ray": "rollouts={engine: ray, workers: 1}", "vllm": "rollouts.engine=vllm"}
TRAINED = {"arithmetic": "EveryOther", "strings": "EveryOther", "facts": "Nothing", "stories": "Nothing"}
SAME = ("loss", "grad_norm", *(f"domain/{name}/entropy" for name in TRAINED))
"""What no cell may change, up to rounding."""


class EveryOther:
    """Pass every other completion, so that no group is dead."""

    def __call__(self, prompts: list, **columns: Any) -> list[float]:
        return [float(n % 2) for n in range(len(prompts))]


class Nothing:
    """Pass no completion, so that every group is dead."""

    def __call__(self, prompts: list, **columns: Any) -> list[float]:
        return [0.0] * len(prompts)


def measure(engine: str, checkpointed: str, drop_dead: str) -> dict[str, Any]:
    """Train two steps in this process; return the most memory (MiB) of trainer and worker, and what was logged."""
    from polyphony.launch.build import build_trainer
    from polyphony.launch.measures.spine import peak_gib, random_policy, recipe_of

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        policy = random_policy(folder / "policy", **SHAPE, vocab_size=32_768)
        more = [ENGINES[engine], f"grpo.gradient_checkpointing={checkpointed}", f"update.drop_dead={drop_dead}"]
        more += [f"domains.{name}.reward=tests.experiments.memory:{reward}" for name, reward in TRAINED.items()]
        more += ["grpo.max_completion_length=64", "grpo.gradient_accumulation_steps=1", "grpo.max_steps=2"]
        more += ["grpo.num_generations=4"]
        trainer = build_trainer(recipe_of(policy, steps=0, more=more), folder / "out")
        loaded, began = peak_gib(), time.perf_counter()
        trainer.train()
        spent = time.perf_counter() - began
        held = {"loaded": loaded, "trainer": peak_gib(), "worker": _worker_gib(trainer), "seconds": spent}
        logged = {name: [line[name] for line in trainer.state.log_history if name in line] for name in SAME}
        trainer.policy.close()
    return held | logged


def _worker_gib(trainer: Any) -> float | None:
    """Return the most memory that the worker's process has held; None where there is none."""
    import ray

    pool = getattr(trainer.policy.engine, "pool", None)
    if pool is None:
        return None
    _, process = ray.get(pool.workers[0].ready)
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2**20


def main(argv: list[str]) -> int:
    """Print the table, or measure the one cell that is named."""
    set_environment()
    if argv:
        print(json.dumps(measure(*argv)))
        return 0
    print(
        "| engine | gradient checkpointing | dead rows | trainer, loaded | trainer, peak | worker, peak | two steps |"
    )
    print("|---|---|---|---|---|---|---|")
    first: dict[str, Any] = {}
    for engine, checkpointed, drop_dead in product(ENGINES, ("false", "true"), ("never", "always")):
        words = [sys.executable, "-m", "tests.experiments.memory", engine, checkpointed, drop_dead]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        cell = json.loads(done.stdout.splitlines()[-1])
        first = first or cell
        worker = "in the trainer" if cell["worker"] is None else f"{cell['worker']:.2f} GiB"
        print(
            f"| {engine} | {'on' if checkpointed == 'true' else 'off'} | {'left out' if drop_dead == 'always' else 'stay'} "
            f"| {cell['loaded']:.2f} GiB | {cell['trainer']:.2f} GiB | {worker} | {cell['seconds']:.0f} s |",
            flush=True,
        )
        apart = max(abs(a - b) / max(abs(b), 1e-3) for n in SAME for a, b in zip(cell[n], first[n], strict=True))
        print(f"loss, gradient and entropies differ by at most {apart:.1e} from the first row's", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
