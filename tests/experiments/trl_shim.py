"""TRL's `GRPOTrainer(model, reward_funcs, args, train_dataset, ..)` as one domain of ours, to run TRL's own tests on it.

One domain `trl`, whose reward is the weighted sum of the reward functions; rows that are text stay text (`as_chat: false`).
TRL generates (engine transformers), as it does without vLLM. What a reward logs stands under TRL's names. Tools and an
environment are the domain's; of several environments each is a domain. Nothing here knows a test; what we refuse stays
refused.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datasets import IterableDataset
from transformers import AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.records import Domain
from polyphony.rewards.registry import ask, settled
from polyphony.trainer.domains import DomainData, code_of, context_of
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.metrics import Logged
from polyphony.trainer.reward_model import RewardModel
from polyphony.trainer.settings import DataSettings


class Sum:
    """Reward functions as one: their weighted sum, over those that say something of a row."""

    range = (-1e6, 1e6)
    """TRL's have no bounds; held-out scores need some."""

    def __init__(self, rewards: list[Callable[..., Any]], weights: list[float] | None) -> None:
        self.rewards, self.weights = rewards, weights or [1.0] * len(rewards)

    def __call__(self, log_metric: Callable[[str, float], None], **given: Any) -> list[float | None]:
        """Return the sums; log every function's mean and deviation under TRL's name."""
        said = [list(r) for r in settled([ask(reward, {**given, "log_metric": log_metric}) for reward in self.rewards])]
        for reward, values in zip(self.rewards, said, strict=True):
            known = [float(v) for v in values if v is not None]
            if known:
                log_metric(f"rewards/{reward.__name__}/mean", statistics.fmean(known))
                log_metric(f"rewards/{reward.__name__}/std", statistics.stdev(known) if len(known) > 1 else math.nan)
        rows = [
            [(w, v) for w, v in zip(self.weights, row, strict=True) if v is not None] for row in zip(*said, strict=True)
        ]
        return [sum(w * float(v) for w, v in row) if row else None for row in rows]


class TrlNames(Logged):
    """What rewards log, without the domain's name before it."""

    def flush(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the means as TRL calls them."""
        return {name.partition("/logged/")[2] or name: value for name, value in super().flush(*args, **kwargs).items()}


class OneDomainTrainer(DomainGRPOTrainer):
    """Ours, constructed as TRL's."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        tools: list[Callable[..., Any]] | None = None,
        environment_factory: Any = None,
        **others: Any,
    ) -> None:
        if given := [name for name, value in others.items() if value is not None]:
            raise NotImplementedError(f"{', '.join(given)}: not of this trainer")
        factories = environment_factory if isinstance(environment_factory, dict) else {"trl": environment_factory}
        rewarding = [f for f in factories.values() if hasattr(f, "get_reward")]
        if not (reward_funcs or rewarding):
            raise ValueError("No reward source provided")
        if train_dataset is None:
            train_dataset = _asked_by_environment(args, environment_factory)
        name = model if isinstance(model, str) else model.name_or_path
        args = copy.copy(args or GRPOConfig(f"{name.split('/')[-1]}-GRPO"))
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        classes = reward_processing_classes or [None] * len(rewards)
        classes = classes if isinstance(classes, list) else [classes]
        if len(classes) != len(rewards):
            raise ValueError("the number of reward processing classes must match the number of reward functions")
        if args.reward_weights is not None and len(args.reward_weights) != len(rewards):
            raise ValueError("the number of reward weights must match the number of reward functions")
        is_model = [isinstance(r, str) or hasattr(r, "config") for r in rewards]
        rewards = [RewardModel.of(r, c, args) if m else r for r, c, m in zip(rewards, classes, is_model, strict=True)]
        reward = Sum(rewards, args.reward_weights) if rewards else None
        args.reward_weights = None  # the sum has them
        if isinstance(train_dataset, IterableDataset):
            train_dataset = _read(train_dataset, args)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(name, **code_of(args))
        held = _rows(eval_dataset) or list(train_dataset)[:2]
        domains = [
            Domain(
                name=one,
                kind="open_ended",
                reward=reward,
                as_chat=acts,
                environment=factory,
                tools=tools,
                train=_of(train_dataset, one, factories),
                heldout=_two(_of(held, one, factories) or _of(train_dataset, one, factories)),
            )
            for one, factory in factories.items()
            for acts in [bool(tools) or factory is not None]
        ]
        context = context_of(model, **code_of(args))
        keep = DataSettings(overlap="keep")
        super().__init__(
            model,
            args,
            domains=DomainData.load(domains, tokenizer=tokenizer, args=args, context=context, settings=keep),
            engine="vllm" if args.use_vllm else "transformers",
            max_grader_failures=1.0,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.scorer.logged = TrlNames()
        self.eval_dataset = eval_dataset
        self.reward_processing_classes: Any = [
            r.tokenizer if m else None for r, m in zip(rewards, is_model, strict=True)
        ]

    @property
    def environments(self) -> list[Any] | None:
        """Copies of those of the last batch, by row, as TRL keeps them, which resets what it is given; None without any."""
        rollout: Any = getattr(self, "_rollout", None)
        rows = rollout.rows.values() if rollout else ()
        return [copy.copy(row.episode.environment) for row in rows if row.episode and row.episode.environment] or None

    @environments.setter
    def environments(self, of_trl: Any) -> None:
        """TRL has none where ours has its own."""


def _asked_by_environment(args: GRPOConfig | None, factory: Any) -> list[dict[str, Any]]:
    """Return rows that say nothing, for environments that do. Raises ValueError as TRL does."""
    if factory is None or isinstance(factory, dict):
        raise ValueError("`train_dataset` is required" if factory is None else "this requires a `train_dataset`")
    if args is None or args.max_steps <= 0:
        raise ValueError("`max_steps` is required where the environment owns the data")
    return [{"id": str(n), "prompt": [{"role": "user", "content": ""}]} for n in range(max(2, args.max_steps))]


def _of(rows: Iterable[Mapping[str, Any]], name: str, factories: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one environment, by their column `environment` where there are several; each an id of its own."""
    found = []
    for n, row in enumerate(rows):
        own = {"prompt": [{"role": "user", "content": ""}], **row}
        if factories.keys() != {"trl"}:
            if (chosen := own.pop("environment", None)) not in factories:
                raise ValueError(f"{chosen!r} is not among the environments {list(factories)}")
            own["id"] = str(n)
            if chosen != name:
                continue
        found.append(own)
    return found


def _two(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each half of what is held out: where there is one, that one again."""
    return [{**row, "id": f"held {n}"} for n, row in enumerate((rows * 2)[:2])] if len(rows) < 2 else rows[:2]


def _read(stream: Iterable[Mapping[str, Any]], args: GRPOConfig) -> list[Mapping[str, Any]]:
    """Read a stream under TRL's conditions for one: it has no length, and no worker reads it."""
    config: Any = args.accelerator_config
    if config.dispatch_batches:
        raise ValueError("Iterable datasets require `dispatch_batches=False`")
    config.dispatch_batches, args.dataloader_num_workers = False, 0
    return list(stream)


def _rows(data: Any) -> list[Mapping[str, Any]]:
    """Return the rows of a data set, of a dict of them, or of none."""
    sets = data.values() if isinstance(data, Mapping) else [] if data is None else [data]
    return [row for rows in sets for row in rows]
