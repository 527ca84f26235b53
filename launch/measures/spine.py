"""The spine over a policy: ours with the in-process engine, beside stock TRL on that engine and a bare vLLM; and stock TRL
with its own colocated engine, in a process of its own. Without a GPU the same on the CPU: that it runs is all that it shows.
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.generation import vllm_generation

from polyphony.launch.build import grpo_config, load_data
from polyphony.launch.measures import LAB, RECIPES, WARM_UP, Effort
from polyphony.launch.measures.result import Result, Target, repeated
from polyphony.launch.measures.rollouts import (
    against_bare,
    check_followed,
    differing,
    requests_of,
    sync_result,
    sync_seconds,
)
from polyphony.launch.measures.side_by_side import (
    Block,
    SideBySide,
    StepClock,
    TwinEngine,
    step_result,
    stock_trainer,
    twin_engine,
)
from polyphony.launch.recipe import Recipe, load_recipe
from polyphony.trainer.engine.cpu_build import prepare_cpu_build

Rows = Iterator[tuple[str, Callable[[], Result]]]


def random_policy(folder: Path, **changes: Any) -> Path:
    """Write a random policy of the shape of Qwen2.5-0.5B with the lab's tokenizer; `changes` are of its config."""
    shape: dict[str, Any] = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    }
    shape |= {"num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 4096} | changes
    ids = {name: json.loads((LAB / "config.json").read_text())[name] for name in ("bos_token_id", "eos_token_id")}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **ids, tie_word_embeddings=True))
    # logits as far apart as a trained policy's: else nothing that is done to the weights would show in them
    model.model.norm.weight.data.fill_(5.0)
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(LAB / name, folder / name)
    return folder


def recipe_of(policy: Path, *, steps: int, more: Sequence[str] = ()) -> Recipe:
    """Return the demo's recipe over a policy, with weights that stay still and as little evaluation as there can be.

    `more` are overrides of one's own.
    """
    overrides = [f"model={policy}", "name=bench", "grpo.learning_rate=0.0", "eval={every: 1000, samples: 1}"]
    overrides += [f"grpo.max_steps={WARM_UP + steps + 1}", "tracking.wandb=null"]
    overrides += [f"grpo.bf16={torch.cuda.is_available()}".lower()]
    overrides += [f"domains.{name}.heldout.size=8" for name in load_recipe(RECIPES / "demo.yaml").domains]
    if policy != LAB:
        overrides += ["grpo.max_completion_length=256", "grpo.per_device_train_batch_size=16"]
        overrides += ["grpo.gradient_accumulation_steps=4"]
    return load_recipe(RECIPES / "demo.yaml", [*overrides, *more])


def ours(policy: Path, folder: Path, *, effort: Effort, engine: TwinEngine | None = None) -> Rows:
    """Yield what our trainer, and stock TRL on our engine, take; the engine beside a bare vLLM; whether weights arrive."""
    recipe = recipe_of(policy, steps=effort.steps)
    engine = engine or twin_engine(recipe, folder / "engine")
    sides = SideBySide(recipe=recipe, engine=engine, folder=folder)
    trainer = cache(sides.our_trainer)
    yield "weight check", lambda: weight_check(trainer())
    yield "sync", lambda: sync_result(trainer(), engine)
    yield "engine", lambda: against_bare(engine, requests_of(trainer()), pairs=effort.pairs)
    trainer.cache_clear()
    yield "peak memory", lambda: _peak("peak memory", sides.ours)  # before a second trainer adds to it
    yield "step", lambda: step_result(sides, pairs=effort.pairs)[0]


def weight_check(trainer: Any) -> Result:
    """Check that the engine follows the policy's weights and then holds each of them. Raises RuntimeError."""
    check = check_followed(trainer)
    trainer.policy.sync()
    if others := differing(trainer):
        raise RuntimeError(f"{len(others)} of the engine's parameters are not the policy's, {others[0]} among them")
    note = f"nats a token, all weights changed, which moves {check.moved:.2g}; every parameter is the policy's"
    target = Target(relation="<=", limit=check.allowed)
    return Result(name="weight check", value=check.changed, unit="", target=target, note=note)


def _peak(name: str, work: Callable[[], object]) -> Result:
    """Return the most memory that the process holds, of a GPU from now on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    work()
    return Result(name=name, value=peak_gib(), unit="GiB", note=device())


def colocate(policy: Path, folder: Path, *, effort: Effort) -> Rows:
    """Yield what stock TRL takes with its own engine."""
    recipe = recipe_of(policy, steps=effort.steps)
    recipe = recipe.model_copy(update={"grpo": {**recipe.grpo, "use_vllm": True, "save_strategy": "no"}})
    if not torch.cuda.is_available():
        prepare_cpu_build()
        # compiling takes minutes on a CPU
        vllm_generation.LLM = partial(vllm_generation.LLM, enforce_eager=True)  # type: ignore[misc,assignment]
    data = load_data(recipe, grpo_config(recipe, folder))
    prompts = [table[i] for table in data.train.values() for i in table.ids[:64]]
    trainer = stock_trainer(recipe, prompts, folder)

    def step() -> Result:
        block = _counted(trainer)
        note = f"{block.tokens:.0f} tokens a step"
        return Result(name="colocate step", value=block.seconds, unit="s", cpu=block.cpu_seconds, note=note)

    yield "colocate step", step
    yield "colocate peak memory", lambda: Result(name="colocate peak memory", value=peak_gib(), unit="GiB")
    yield "colocate sync", lambda: repeated("colocate sync", "s", sync_seconds(trainer.vllm_generation.sync_weights))


def _counted(trainer: Any) -> Block:
    """Train; return the means of a step."""
    lengths: list[int] = []
    generate = trainer.vllm_generation.generate

    def counted(*arguments: Any, **named: Any) -> Any:
        answer = generate(*arguments, **named)
        lengths.extend(map(len, answer[1]))
        return answer

    trainer.vllm_generation.generate = counted
    clock = StepClock(lambda: sum(lengths))
    trainer.add_callback(clock)
    trainer.train()
    return clock.block(WARM_UP)


def peak_gib() -> float:
    """Return the most memory that this process has held: of a GPU since that was reset, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device() -> str:
    """Name what was measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: says nothing about one"
