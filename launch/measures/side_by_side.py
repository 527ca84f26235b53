"""Two trainers on one engine, in turns: ours with everything on, and stock TRL given the same work.

The learning rate is 0, so the policy stays what it is; the stock trainer gets the prompts that ours drew and, through
`TwinEngine`, the same sampling seeds. So both sides generate and train on the very same tokens, step for step.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from polyphony.curricula.decision_log import Choice
from polyphony.curricula.records import Completion, Prompt
from polyphony.launch.build import build_trainer, grpo_config
from polyphony.launch.measures import RECIPES, WARM_UP
from polyphony.launch.measures.result import Result, Target, Timing, in_turns, paired
from polyphony.launch.recipe import Recipe, load_recipe
from polyphony.launch.train import claim_folder, start
from polyphony.rewards import Reward, find_reward
from polyphony.trainer.engine.engine import InProcessEngine
from polyphony.trainer.engine.vllm import OnFinished, Request, completion_seed
from polyphony.trainer.grpo import DomainGRPOTrainer


class TwinEngine(InProcessEngine):
    """An engine that counts what it generates, and can give a second run the seeds of the first."""

    tokens: int = 0
    twin_seeds: Iterator[int] | None = None
    """Seeds that requests get instead of their own; None leaves them theirs."""

    def complete(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Completion]:
        if self.twin_seeds is not None:
            requests = [replace(request, seed=next(self.twin_seeds)) for request in requests]
        completions = super().complete(requests, on_finished)
        self.tokens += sum(len(completion.ids) for completion in completions)
        return completions


def twin_engine(recipe: Recipe, folder: Path) -> TwinEngine:
    """Start an engine for the recipe's policy."""
    rollouts = replace(recipe.rollouts, engine="transformers")
    trainer = build_trainer(recipe.model_copy(update={"rollouts": rollouts}), folder)
    return TwinEngine(
        trainer.model,
        trainer.accelerator,
        trainer.processing_class,
        sampling=trainer.policy.sampling,
        max_model_length=trainer.args.vllm_max_model_length,
        max_num_seqs=trainer.args.generation_batch_size,  # type: ignore[arg-type]
        dtype=str(trainer.policy.precision).removeprefix("torch."),
        gpu_memory_utilization=trainer.args.vllm_gpu_memory_utilization,
    )


@cache
def lab_engine() -> TwinEngine:
    """Return the engine with the demo's policy that all benchmarks of a process share."""
    with tempfile.TemporaryDirectory() as folder:
        return twin_engine(load_recipe(RECIPES / "demo.yaml"), Path(folder))


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Means over the measured steps of one run."""

    seconds: float
    median_seconds: float
    """Of a step: what hits single steps from outside does not move it."""
    cpu_seconds: float
    """Of this process: what others do on the machine hardly touches it."""
    tokens: float
    """Generated."""

    @property
    def sample(self) -> Timing:
        """Seconds of a step."""
        return Timing(self.seconds, self.cpu_seconds)


class StepClock(TrainerCallback):
    """Note the time at the start of every optimizer step; a step ends, its logs included, where the next one begins."""

    def __init__(self, count: Callable[[], float]) -> None:
        self.count = count
        """Tells the tokens generated so far."""
        self.ticks: list[tuple[float, float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ticks.append((time.perf_counter(), time.process_time(), self.count()))

    def block(self, warm_up: int) -> Block:
        """Return the means after `warm_up` steps, without the last one: a run ends with an evaluation, not with a tick."""
        steps = len(self.ticks) - 1 - warm_up
        seconds, cpu_seconds, tokens = (
            (end - begin) / steps for begin, end in zip(self.ticks[warm_up], self.ticks[-1], strict=True)
        )
        starts = [tick[0] for tick in self.ticks[warm_up:]]
        median = statistics.median(end - begin for begin, end in itertools.pairwise(starts))
        return Block(seconds=seconds, median_seconds=median, cpu_seconds=cpu_seconds, tokens=tokens)


@dataclass(kw_only=True, slots=True)
class SideBySide:
    """Run one recipe by either trainer, as often as wanted. The first run must be ours: it says what stock repeats.

    Example: `SideBySide(recipe=recipe, engine=lab_engine(), folder=folder).ours().seconds`
    """

    recipe: Recipe
    engine: TwinEngine
    folder: Path
    warm_up: int = WARM_UP
    prompts: list[Prompt] = field(default_factory=list)
    """What our last run drew, in order."""
    seeds: list[int] = field(default_factory=list)
    """Of the completions of these prompts."""
    _runs: Iterator[int] = field(default_factory=itertools.count)

    def ours(self) -> Block:
        """Run as `polyphony train` does: curriculum, routed rewards, entropy by domain, meter, ledgers, W&B."""
        return self.run(self.our_trainer())

    def stock(self) -> Block:
        """Run TRL's own trainer on what our last run drew."""
        return self.run(self.stock_trainer())

    def our_trainer(self) -> DomainGRPOTrainer:
        """Return a fresh trainer of ours."""
        folder = claim_folder(self.recipe, self.next_folder(), resume=False)
        trainer = start(self.recipe, folder, engine=self.engine)
        assert isinstance(trainer, DomainGRPOTrainer)
        self.prompts, self.seeds = [], []
        draws, recorder = itertools.count(), trainer.draws.recorder
        assert recorder is not None

        def keep(step: int, choice: Choice) -> None:
            recorder.record_draw(step, choice)
            draw = next(draws)
            for ref in choice.prompts:
                self.prompts.append(trainer.data.train[ref.domain][ref.id])
                copies: int = trainer.num_generations  # type: ignore[assignment]
                self.seeds += [completion_seed(trainer.args.seed, draw, ref.id, 0, k) for k in range(copies)]

        trainer.draws.recorder = SimpleNamespace(record_draw=keep, record_refill=recorder.record_refill)  # type: ignore
        return trainer

    def stock_trainer(self) -> GRPOTrainer:
        """Return a fresh stock trainer with the engine behind it and the work of our last run before it."""
        recipe = self.recipe.model_copy(
            update={"grpo": {**self.recipe.grpo, "save_strategy": "no", "shuffle_dataset": False}}
        )
        trainer = stock_trainer(recipe, self.prompts, self.next_folder())
        self.engine.attach(trainer.model, trainer.accelerator)
        self.engine.twin_seeds = iter(self.seeds)
        trainer.vllm_generation, trainer.use_vllm, trainer._last_loaded_step = self.engine, True, -1
        return trainer

    def run(self, trainer: GRPOTrainer) -> Block:
        """Train and return the means of a step."""
        clock = StepClock(lambda: self.engine.tokens)
        trainer.add_callback(clock)
        try:
            trainer.train()
        finally:
            self.engine.twin_seeds = None  # the next one to use the engine has seeds of its own
        return clock.block(self.warm_up)

    def next_folder(self) -> Path:
        """Return where the next run goes."""
        return self.folder / f"run{next(self._runs)}"


def step_result(sides: SideBySide, *, pairs: int) -> tuple[Result, list[Block]]:
    """Run both sides in turns; return the comparison and our blocks."""
    seen = in_turns(sides.ours, sides.stock, pairs=pairs)
    result = paired(
        "step",
        "s",
        [(ours.sample, stock.sample) for ours, stock in seen],
        target=Target(relation="<=", limit=1.05),
        note=describe(seen),
    )
    return result, [ours for ours, _ in seen]


def describe(pairs: Sequence[tuple[Block, Block]]) -> str:
    """Say how much both sides generated."""
    ours, stock = (statistics.mean(block.tokens for block in side) for side in zip(*pairs, strict=True))
    return f"{ours:.1f} and {stock:.1f} tokens a step"


def stock_trainer(recipe: Recipe, prompts: Sequence[Prompt], folder: Path) -> GRPOTrainer:
    """Return TRL's own trainer over prompts of the recipe's domains."""
    trainer = GRPOTrainer(
        recipe.model,
        RoutedReward({name: find_reward(section.reward) for name, section in recipe.domains.items()}),
        args=grpo_config(recipe, folder),
        train_dataset=_rows(prompts),
    )
    trainer.remove_callback(PrinterCallback)  # ours prints no logs either
    return trainer


def _rows(prompts: Sequence[Prompt]) -> Dataset:
    """Return the prompts as one dataset; a column that a domain does not have is None there."""
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    return Dataset.from_list(
        [{"prompt": p.prompt, "domain": p.domain, **{c: p.columns.get(c) for c in columns}} for p in prompts]
    )


class RoutedReward:
    """What a user of stock TRL writes to mix domains: one reward function that looks at a column."""

    __name__ = "routed"

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = rewards

    def __call__(self, domain: Sequence[str], **columns: Any) -> list[float | None]:
        scores: list[float | None] = [None] * len(domain)
        for name in set(domain):
            places = [i for i, other in enumerate(domain) if other == name]
            chosen = {
                key: [values[i] for i in places] if isinstance(values, list) else values
                for key, values in columns.items()
            }
            for i, score in zip(places, self.rewards[name](**chosen), strict=True):
                scores[i] = score
        return scores
