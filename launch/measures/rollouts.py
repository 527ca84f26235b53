"""The engine beside the `LLM` inside it: tokens a second, seconds until the policy's weights have arrived, if they have."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from polyphony.launch.measures.result import Result, Target, Timing, in_turns, paired, repeated, timed
from polyphony.trainer.engine.vllm import Request

if TYPE_CHECKING:
    from polyphony.trainer.engine.engine import Engine, InProcessEngine
    from polyphony.trainer.engine.weight_check import WeightCheck
    from polyphony.trainer.grpo import DomainGRPOTrainer

PROMPTS = 64
COPIES = 8
SYNCS = 20
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM keeps as one matrix."""


def against_bare(engine: InProcessEngine, requests: list[Request], *, pairs: int) -> Result:
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


def sync_seconds(sync: Callable[[], None], *, times: int = SYNCS) -> list[Timing]:
    """Return how long each of some syncs took, without the first."""

    def whole_sync() -> None:
        sync()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return [timed(whole_sync) for _ in range(times + 1)][1:]


def sync_result(trainer: DomainGRPOTrainer, engine: Engine, *, name: str = "sync", times: int = SYNCS) -> Result:
    """Send the policy's weights to its engine again and again."""
    weights = list(trainer.model.parameters())  # type: ignore[union-attr]
    sizes = sum(p.numel() for p in weights), sum(p.numel() * p.element_size() for p in weights)
    note = f"{sizes[0] / 1e6:.2f} M parameters, {sizes[1] / 2**20:.4g} MiB"
    return repeated(name, "s", sync_seconds(engine.sync_weights, times=times), note=note)


def requests_of(trainer: DomainGRPOTrainer) -> list[Request]:
    """Return the same number of prompts of each domain, every one `COPIES` times, each copy with a seed of its own."""
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
    from vllm import SamplingParams  # slow to import

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


def check_followed(trainer: Any) -> WeightCheck:
    """Return the check of weights. Raises RuntimeError where the engine does not follow them."""
    check = trainer.policy.check()
    if not check.is_passed:
        raise RuntimeError(f"the engine does not follow the policy's weights: {check}")
    return check


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the policy's whole parameters as the engine is sent them; collective."""
    return {name: p.detach().cpu().clone() for name, p in trainer.policy.engine._iter_named_params()}


def differing(trainer: Any) -> list[str]:
    """Return the names of engine parameters that are not bit for bit the policy's, in the engine's precision.

    An adapter that is sent by itself is merged for as long as this takes.
    """
    policy = trainer.policy
    if policy.sends_adapter:
        with policy.merged():
            return differing(trainer)
    ours = parameters(trainer)
    if not hasattr(policy.engine, "llm"):
        return []
    theirs = policy.engine.llm.apply_model(
        lambda model: {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    )[0]
    theirs = {name.replace(".base_layer.", "."): tensor for name, tensor in theirs.items()}
    found = []
    for name, tensor in theirs.items():
        pieces = next((p for f, p in FUSED.items() if f in name), None)
        key = next((f for f in FUSED if f in name), "")
        whole = torch.cat([ours[name.replace(key, piece)] for piece in pieces]) if pieces else ours[name]
        if not torch.equal(tensor[: len(whole)], whole.to(tensor.dtype)):  # vLLM pads the vocabulary
            found.append(name)
    return found
