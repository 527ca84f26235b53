"""An adapter sent by itself beside all weights of a random policy of 0.1 billion parameters: bytes, and seconds until it is
there. In the trainer's process, and through Ray to one worker."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.launch.measures.result import Result, Target, in_turns, paired, timed, tree_cpu_s

if TYPE_CHECKING:
    from polyphony.trainer.grpo import DomainGRPOTrainer

PAIRS = 7
SHAPE = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12}
"""With a vocabulary of 32,768: 105 million parameters."""
LORA = "lora={r: 16}"
AT_MOST = Target(relation="<=", limit=0.2)


def bench_adapter_sync() -> list[Result]:
    """Send an adapter, and all weights of a policy as large, to the engine in this process, in turns."""
    with _policy("rollouts.engine=vllm") as trainer:
        return _rows(trainer, "adapter sync", lambda: _load_all(trainer.policy.engine))


def bench_adapter_worker_sync() -> list[Result]:
    """The same to one worker on Ray; and whole weights of which one parameter changed, beside all of them."""
    with _policy("rollouts={engine: ray, workers: 1}") as trainer:
        rows = _rows(trainer, "adapter worker sync", lambda: _load_all(trainer.policy.engine))
        return [*rows, _changed(trainer.policy.engine)]


def _changed(engine: Any) -> Result:
    from polyphony.launch.cluster.weights import put

    kept = put(engine._base())
    engine.pool.load(engine.version, kept)
    name, norm = next((name, p) for name, p in engine.model.named_parameters() if "norm" in name)
    sent = 0

    def load() -> None:
        nonlocal kept, sent
        norm.data.mul_(1.01)
        before, kept = kept, put(engine._base(), kept)
        sent = sum(new != old for new, old in zip(kept, before, strict=True))
        engine.pool.load(engine.version, kept)

    def load_all() -> None:
        nonlocal kept
        kept = put(engine._base())
        engine.pool.load(engine.version, kept)

    pairs = in_turns(lambda: timed(load, tree_cpu_s), lambda: timed(load_all, tree_cpu_s), pairs=PAIRS)
    note = f"{name} changed: {sent} of {len(kept)} buckets sent"
    return paired("changed worker sync", "s", pairs, note=note)


def _load_all(engine: Any) -> None:
    """Send what a policy without an adapter would: whole weights, nothing to be merged."""
    from polyphony.launch.cluster.weights import put
    from polyphony.trainer.engine.vllm import load_weights

    if hasattr(engine, "llm"):
        load_weights(engine.llm, engine._base())
    else:
        engine.pool.load(engine.version, put(engine._base()))


def _rows(trainer: DomainGRPOTrainer, name: str, load_all: Callable[[], None]) -> list[Result]:
    engine: Any = trainer.policy.engine
    assert trainer.policy.check().is_passed  # type: ignore[union-attr]
    adapter, whole = (sum(t.numel() * t.element_size() for _, t in walk()) for walk in (engine._tensors, engine._base))

    def merged() -> None:
        with engine.merged():
            engine.sync_weights()

    as_before = statistics.median(timed(merged, tree_cpu_s).clock for _ in range(3))
    engine.sync_weights()  # with the base, which is not there any more
    pairs = in_turns(lambda: timed(engine.sync_weights, tree_cpu_s), lambda: timed(load_all, tree_cpu_s), pairs=PAIRS)
    note = f"over whole weights; merged into a copy {as_before:.3g} s"
    size = Result(
        name=f"{name}, size",
        value=adapter / 2**20,
        unit="MiB",
        baseline=whole / 2**20,
        ratio=adapter / whole,
        target=AT_MOST,
        note=LORA,
    )
    return [paired(name, "s", pairs, target=AT_MOST, note=note), size]


@contextmanager
def _policy(engine: str) -> Iterator[DomainGRPOTrainer]:
    """Have a trainer of a random policy with an adapter over an engine of its own."""
    from polyphony.launch.build import build_trainer
    from polyphony.launch.measures.spine import random_policy, recipe_of

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        policy = random_policy(folder / "policy", **SHAPE, vocab_size=32_768)
        recipe = recipe_of(policy, steps=1, more=[LORA, engine])
        trainer = build_trainer(recipe, folder / "out")
        try:
            yield trainer
        finally:
            trainer.policy.close()


BENCHMARKS = {"adapter sync": bench_adapter_sync, "adapter worker sync": bench_adapter_worker_sync}
