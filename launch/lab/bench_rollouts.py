"""The engine: tokens per second against a bare `LLM.generate`, and how long the policy's weights take to arrive."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.launch.config import load_recipe
from polyphony.launch.lab.bench_commands import RECIPES
from polyphony.launch.lab.bench_result import Result, Target, paired, repeated

if TYPE_CHECKING:
    from polyphony.trainer.grpo import DomainGRPOTrainer
    from polyphony.trainer.rollouts import InProcessEngine, Request

PROMPTS = 64
COPIES = 8
PAIRS = 7
SYNCS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """One pass over all requests."""

    tokens: int
    seconds: float
    cpu_seconds: float
    """Of this process."""


def bench_engine() -> list[Result]:
    """Sample 64 prompts x 8 through our engine and through the `LLM` inside it, in turns."""
    trainer, engine = _running()
    return [against_bare(engine, requests_of(trainer))]


def against_bare(engine: InProcessEngine, requests: list[Request]) -> Result:
    """Sample the same through our engine and through the `LLM` inside it, in turns."""
    pairs = [_pair(engine, requests, ours_first=i % 2 == 0) for i in range(PAIRS + 1)][1:]  # without the warm-up
    ours, bare = [rate for rate, _ in pairs], [rate for _, rate in pairs]
    return paired(
        "engine",
        "tok/s",
        ours=[rate.tokens / rate.seconds for rate in ours],
        baseline=[rate.tokens / rate.seconds for rate in bare],
        target=Target(relation=">=", limit=0.9),
        note=_note(ours, bare),
    )


def bench_sync() -> list[Result]:
    """Load the lab policy's weights into the engine."""
    trainer, engine = _running()
    seconds = sync_seconds(engine.sync_weights)
    n_parameters = sum(p.numel() for p in trainer.model.parameters())  # type: ignore[union-attr]
    return [repeated("sync", "s", seconds, note=f"{n_parameters / 1e6:.2f} M parameters")]


def sync_seconds(sync: Callable[[], None]) -> list[float]:
    """Return how long each of some syncs took, without the first."""
    import torch

    seconds = []
    for _ in range(SYNCS + 1):
        started = time.perf_counter()
        sync()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


@cache
def _running() -> tuple[DomainGRPOTrainer, InProcessEngine]:
    """Return the demo's trainer and its engine, started once a process."""
    from polyphony.launch.build import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(load_recipe(RECIPES / "demo.yaml"), Path(folder))
    assert isinstance(trainer.engine, InProcessEngine)
    return trainer, trainer.engine


def requests_of(trainer: DomainGRPOTrainer) -> list[Request]:
    """Return the same number of prompts of each domain, every one `COPIES` times, each copy with a seed of its own."""
    from polyphony.trainer.rollouts import Request

    share = PROMPTS // len(trainer.data.train)
    prompts = [prompt for table in trainer.data.train.values() for prompt in [table[i] for i in table.ids[:share]]]
    limit: int = trainer.max_completion_length  # type: ignore[assignment]
    return [
        Request(prompt_ids=ids, seed=COPIES * n + k, max_tokens=limit)
        for n, ids in enumerate(trainer.data.tokenize(prompts))
        for k in range(COPIES)
    ]


def _pair(engine: InProcessEngine, requests: list[Request], *, ours_first: bool) -> tuple[Rate, Rate]:
    """Return ours and the bare pass, run in either order, so that neither always comes second."""
    if ours_first:
        ours = _timed(lambda: [c.ids for c in engine.complete(requests)])
        return ours, _timed(lambda: _bare(engine, requests))
    bare = _timed(lambda: _bare(engine, requests))
    return _timed(lambda: [c.ids for c in engine.complete(requests)]), bare


def _bare(engine: InProcessEngine, requests: list[Request]) -> list[Any]:
    """Generate as a script without us would: one SamplingParams for all, log-probabilities on, vLLM's defaults else."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=engine.sampling.temperature, max_tokens=requests[0].max_tokens, logprobs=0)
    prompts: Any = [{"prompt_token_ids": request.prompt_ids} for request in requests]
    outputs = engine.llm.generate(prompts, sampling_params=params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def _note(ours: Sequence[Rate], bare: Sequence[Rate]) -> str:
    """Say how much both sides generated, and the ratio by processor time, which a busy machine disturbs less."""
    ratios = [a.tokens / a.cpu_seconds / (b.tokens / b.cpu_seconds) for a, b in zip(ours, bare, strict=True)]
    tokens = [statistics.mean(rate.tokens for rate in side) for side in (ours, bare)]
    return f"by cpu time {statistics.median(ratios):.3f}; {tokens[0]:.0f} and {tokens[1]:.0f} tokens a pass"


def _timed(generate: Callable[[], Sequence[Sequence[int]]]) -> Rate:
    started, cpu_started = time.perf_counter(), time.process_time()
    ids = generate()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Rate(tokens=sum(map(len, ids)), seconds=seconds, cpu_seconds=cpu_seconds)


BENCHMARKS = {"engine": bench_engine, "sync": bench_sync}
