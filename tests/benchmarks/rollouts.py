"""The engine: tokens per second against a bare `LLM.generate`, and how long the policy's weights take to arrive."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.launch.recipe import load_recipe
from tests.benchmarks.commands import RECIPES
from tests.benchmarks.result import Result, Target, Timing, in_turns, paired, repeated, timed

if TYPE_CHECKING:
    from polyphony.trainer.engine.engine import InProcessEngine
    from polyphony.trainer.engine.vllm import Request
    from polyphony.trainer.grpo import DomainGRPOTrainer

PROMPTS = 64
COPIES = 8
PAIRS = 7
SYNCS = 20


def bench_engine(*, short: bool = False) -> list[Result]:
    """Timing 64 prompts x 8 through our engine and through the `LLM` inside it, in turns."""
    trainer, engine = _attached()
    requests = requests_of(trainer)
    return [against_bare(engine, requests[:64] if short else requests, pairs=1 if short else PAIRS)]


def against_bare(engine: InProcessEngine, requests: list[Request], *, pairs: int = PAIRS) -> Result:
    """Timing the same through our engine and through the `LLM` inside it, in turns."""
    seen = in_turns(
        lambda: rate_of(lambda: [c.ids for c in engine.complete(requests)]),
        lambda: rate_of(lambda: _bare(engine, requests)),
        pairs=pairs,
    )
    ours, bare = (statistics.mean(tokens for tokens, _ in side) for side in zip(*seen, strict=True))
    return paired(
        "engine",
        "tok/s",
        [(ours, bare) for (_, ours), (_, bare) in seen],
        target=Target(relation=">=", limit=0.9),
        note=f"{ours:.0f} and {bare:.0f} tokens a pass",
    )


def bench_sync(*, short: bool = False) -> list[Result]:
    """Load the lab policy's weights into the engine."""
    trainer, engine = _attached()
    samples = sync_seconds(engine.sync_weights, times=2 if short else SYNCS)
    n_parameters = sum(p.numel() for p in trainer.model.parameters())  # type: ignore[union-attr]
    return [repeated("sync", "s", samples, note=f"{n_parameters / 1e6:.2f} M parameters")]


def sync_seconds(sync: Callable[[], None], *, times: int = SYNCS) -> list[Timing]:
    """Return how long each of some syncs took, without the first."""
    import torch

    def whole_sync() -> None:
        sync()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return [timed(whole_sync) for _ in range(times + 1)][1:]


def _attached() -> tuple[DomainGRPOTrainer, InProcessEngine]:
    """Return the demo's trainer and the engine that the benchmarks share, attached to it."""
    from polyphony.launch.build import build_trainer
    from tests.benchmarks.side_by_side import lab_engine

    engine = lab_engine()
    with tempfile.TemporaryDirectory() as folder:
        return build_trainer(load_recipe(RECIPES / "demo.yaml"), Path(folder), engine=engine), engine


def requests_of(trainer: DomainGRPOTrainer) -> list[Request]:
    """Return the same number of prompts of each domain, every one `COPIES` times, each copy with a seed of its own."""
    from polyphony.trainer.engine.vllm import Request

    share = PROMPTS // len(trainer.data.train)
    prompts = [prompt for table in trainer.data.train.values() for prompt in [table[i] for i in table.ids[:share]]]
    limit: int = trainer.max_completion_length  # type: ignore[assignment]
    return [
        Request(prompt_ids=prompt.ids, seed=COPIES * n + k, max_tokens=limit)
        for n, prompt in enumerate(trainer.data.tokenized(prompts))
        for k in range(COPIES)
    ]


def _bare(engine: InProcessEngine, requests: list[Request]) -> list[Any]:
    """Generate as a script without us would: one SamplingParams for all, log-probabilities on, vLLM's defaults else."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=engine.sampling.temperature, max_tokens=requests[0].max_tokens, logprobs=0)
    prompts: Any = [{"prompt_token_ids": request.prompt_ids} for request in requests]
    outputs = engine.llm.generate(prompts, sampling_params=params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def rate_of(
    generate: Callable[[], Sequence[Sequence[int]]], cpu_s: Callable[[], float] = time.process_time
) -> tuple[int, Timing]:
    """Return how many tokens were generated, and how many a second."""
    answers: list[Sequence[int]] = []
    spent = timed(lambda: answers.extend(generate()), cpu_s)
    tokens = sum(map(len, answers))
    return tokens, spent.rate(tokens)


BENCHMARKS = {"engine": bench_engine, "sync": bench_sync}
