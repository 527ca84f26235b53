"""TRL's own way to say what is trained on, as domains: `reward_funcs`, `train_dataset` and what goes with them.

A column `domain` of the rows names each row's domain; without one all are of a single domain. What every argument becomes
is a table in `arguments.py`. Nothing here loads the policy.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import ClassLabel, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.declarations import near
from polyphony.curricula.records import Domain
from polyphony.rewards.registry import called
from polyphony.rewards.shaping import Weighted
from polyphony.trainer.arguments import refuse_unheard
from polyphony.trainer.domains import DomainData, code_of, context_of
from polyphony.trainer.held_out import held_out
from polyphony.trainer.policy import refuse_unknown
from polyphony.trainer.reward_model import RewardModel
from polyphony.trainer.rollout_function import refuse_beside, refuse_domains
from polyphony.trainer.run import say
from polyphony.trainer.scoring import Scorer
from polyphony.trainer.script_shape import (
    in_scripts_words,
    refuse_misshapen,
    refuse_no_model,
    refuse_no_reward,
    refuse_no_rows,
    refuse_other_args,
    refuse_unseen,
)
from polyphony.trainer.settings import TrainerSettings
from polyphony.trainer.slots import plan_draws

MOST_READ = 10_000
"""Rows that are read of a stream, or as many as the run's `max_steps` draw where these are more."""
BESIDE = ("reward_funcs", "eval_dataset", "reward_processing_classes", "tools")
"""What says something of a `train_dataset` alone."""


def name_of(model: Any) -> str:
    """Return a model's name, or that of one that is loaded."""
    return model if isinstance(model, str) else model.name_or_path


def arguments_of(model: Any, args: Any) -> GRPOConfig:
    """Return TRL's arguments; left out, as TRL makes them of a model's name, without bf16 where there is no accelerator.

    Raises ValueError for any other kind, and for what is no model.
    """
    refuse_no_model(model)
    refuse_other_args(args)
    if args is not None:
        return args
    name = name_of(model)
    bf16: dict[str, Any] = {} if torch.accelerator.is_available() else {"bf16": False}
    return GRPOConfig(f"{name.rstrip('/').rpartition('/')[2]}-GRPO", **bf16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What a script gives TRL's trainer of rewards, rows and tools.

    Example: `Script(reward_funcs=short, train_dataset=rows).domains(args, evaluates=False)[0].name` is "default"
    """

    reward_funcs: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    reward_processing_classes: Any = None
    tools: Any = None
    environment_factory: Any = None
    rollout_func: Any = None
    name: str = "default"
    """The domain of rows without a column `domain`."""

    @property
    def is_given(self) -> bool:
        """Whether there is anything to make domains of. Raises ValueError for what belongs to rows that there are not."""
        if self.train_dataset is not None or self.environment_factory is not None:
            return True
        if lost := [name for name in BESIDE if getattr(self, name) is not None]:
            raise ValueError(f"{lost[0]} without train_dataset: give it, or say a domain's own in domains=")
        return False

    def read(
        self,
        model: Any,
        args: GRPOConfig,
        domains: Sequence[Domain] | DomainData,
        tokenizer: Any,
        settings: TrainerSettings,
        *,
        engine: Any,
        run: Any,
    ) -> tuple[DomainData, GRPOConfig]:
        """Return the rows of all domains, those of `domains` too, and TRL's arguments without what the domains took over.

        Raises ValueError before any weight of the policy is loaded.
        """
        if self.rollout_func is not None:
            acting = {"tools": self.tools, "environment_factory": self.environment_factory}
            refuse_beside(self.rollout_func, settings, engine=engine, **acting)
        refuse_misshapen(self.tools, self.environment_factory)
        heard = without_weights(args) if self.is_given else args
        refuse_unknown(engine)
        refuse_unheard(heard, engine=engine, has_run=run is not None)
        if isinstance(domains, DomainData):
            if self.is_given:
                raise ValueError("train_dataset beside domains= that are read already: give one of them")
            if self.rollout_func is not None:
                refuse_domains(domains.domains)
            return domains, heard
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"processing_class: expected a tokenizer, for text alone, got {type(tokenizer).__name__}")
        code = code_of(args)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name_of(model), **code)
        evaluates = run is not None or args.eval_strategy != "no" or args.eval_on_start
        own = self.domains(args, evaluates=evaluates) if self.is_given else []
        read: dict[str, Any] = {
            "tokenizer": tokenizer,
            "args": heard,
            "context": context_of(model, **code),
            "spare": settings.spare,
        }
        names = {domain.name for domain in own}
        if run is not None:
            refuse_unseen(own)
        if self.rollout_func is not None:
            refuse_domains([*domains, *own])
        try:
            return DomainData.load([*domains, *own], as_trl=names, **read), heard
        except ValueError as error:
            raise ValueError(in_scripts_words(str(error), names)) from error

    def check_fit(self, scorer: Scorer, data: DomainData) -> None:
        """Raise ValueError for a reward that does not take its rows; one may read what a `rollout_func` will return."""
        if self.rollout_func is None:
            scorer.check_fit(table[table.ids[0]] for table in data.train.values() if table.ids)

    def domains(self, args: GRPOConfig, *, evaluates: bool) -> list[Domain]:
        """Return the domains.

        If a run `evaluates`, one that no `eval_dataset` has rows of gives up some of its own, the same at every start, and a
        line says so; else it trains on all, as by TRL. So does the only domain of the training rows beside any
        `eval_dataset`, of whatever names: it has none of these, and what it learns is seen in theirs (with `run`, which
        measures each domain, `read` refuses that). Raises ValueError naming the argument.
        """
        train, heldout = self._train(args), self._heldout(args)
        if self.name in heldout and self.name not in train and not isinstance(self.eval_dataset, Mapping):
            raise ValueError(f"eval_dataset: its rows have no column `domain`, to say which is of {', '.join(train)}")
        rewards = self._reward(args)
        found = []
        for name in (name for name in heldout if name not in train and args.process_index == 0):
            if meant := near(name, list(train)):
                say(f"eval_dataset: no training row is of domain {name!r}, which is watched alone; {meant}")
        for name in dict.fromkeys((*train, *heldout)):
            rows, held = train.get(name), heldout.get(name)
            environment = self._environment(name, rows if rows is not None else held)
            if evaluates and held is None and not (heldout and len(train) == 1):
                rows, held = _split(name, rows, says=args.process_index == 0)
            acts = self.environment_factory is not None or bool(self.tools)
            found.append(
                Domain(
                    name=name,
                    kind="open_ended",
                    train=rows,
                    heldout=held,
                    reward=rewards,
                    environment=environment,
                    tools=self.tools or None,
                    as_chat=acts,  # TRL asks text as it stands; only a chat can act
                )
            )
        return found

    def _reward(self, args: GRPOConfig) -> Any:
        """Return the reward functions as one, weighted as TRL weighs them; None where the environment alone rewards."""
        given = self.reward_funcs
        rewards = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
        classes = self.reward_processing_classes
        classes = [None] * len(rewards) if classes is None else classes if isinstance(classes, list) else [classes]
        weights = args.reward_weights or [1.0] * len(rewards)
        for name, others in (("reward_processing_classes", classes), ("reward_weights", weights)):
            if len(others) != len(rewards):
                raise ValueError(f"{name}: {len(others)} for {len(rewards)} reward functions: give one for each")
        if not rewards:
            if self.environment_factory is None:
                raise ValueError("reward_funcs: required, unless an environment_factory rewards by get_reward")
            return None
        refuse_no_reward(rewards)
        models = [isinstance(one, str | torch.nn.Module) for one in rewards]
        made = [RewardModel.of(r, c, args) if m else r for r, c, m in zip(rewards, classes, models, strict=True)]
        parts, seen = {}, Counter[str]()
        for one, weight in zip(made, weights, strict=True):
            stem = called(one)
            seen[stem] += 1
            parts[stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"] = {"reward": one, "weight": weight}
        return Weighted(parts=parts, missing="part")

    def _train(self, args: GRPOConfig) -> dict[str, Any]:
        if self.train_dataset is not None:
            return self._by_domain(self.train_dataset, args, where="train_dataset")
        if isinstance(self.environment_factory, Mapping):
            raise ValueError(
                "train_dataset: required with several environments: its column `environment` names each row's"
            )
        if args.max_steps <= 0:
            raise ValueError("train_dataset: left out, so that max_steps must say how many episodes are played")
        plan = plan_draws(args, 1)
        asked = [{"role": "user", "content": ""}]  # which `reset` goes on with
        count = min(plan.draws * plan.prompts_per_draw, MOST_READ)
        return {self.name: [{"prompt": asked, "id": str(i)} for i in range(count)]}

    def _heldout(self, args: GRPOConfig) -> dict[str, Any]:
        given = self.eval_dataset
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            return self._by_domain(given, args, where="eval_dataset")
        return {str(name): _rows(rows, args, where=f"eval_dataset[{name!r}]") for name, rows in given.items()}

    def _by_domain(self, given: Any, args: GRPOConfig, *, where: str) -> dict[str, Any]:
        """Return rows by their domain, in the order in which these come first."""
        rows = _rows(given, args, where=where)
        is_table = hasattr(rows, "column_names")
        columns = rows.column_names if is_table else {name for row in rows for name in row}
        column = next((c for c in ("domain", *self._routed) if c in columns), None)
        if self._routed and "environment" not in columns and where == "train_dataset":
            known = ", ".join(map(str, self.environment_factory))
            raise ValueError(f"{where}: no column `environment`, which names each row's: {known}")
        if column is None:
            return {self.name: rows}
        places: dict[str, list[int]] = {}
        label = rows.features[column] if is_table and len(rows) else None
        names = rows[column] if is_table else [row.get(column) for row in rows]
        if isinstance(label, ClassLabel):
            names = [None if name is None else label.int2str(name) for name in names]
        for i, name in enumerate(names):
            if not isinstance(name, str):
                raise ValueError(f"{where}: row {i + 1}: column `{column}` names its domain, got {name!r:.60}")
            places.setdefault(name, []).append(i)
        return {name: _picked(rows, chosen) for name, chosen in places.items()}

    @property
    def _routed(self) -> tuple[str, ...]:
        return ("environment",) if isinstance(self.environment_factory, Mapping) else ()

    def _environment(self, domain: str, rows: Any) -> Any:
        """Return what makes a domain's environments; of several, the one that all its rows name."""
        if not isinstance(self.environment_factory, Mapping):
            return self.environment_factory
        names = sorted({str(row.get("environment")) for row in rows})
        if len(names) > 1:
            raise ValueError(
                f"train_dataset: rows of domain {domain!r} are of {len(names)} environments, {', '.join(names)}"
            )
        if names[0] not in self.environment_factory:
            known = ", ".join(map(str, self.environment_factory))
            raise ValueError(f"train_dataset: column `environment` is {names[0]!r}, expected one of {known}")
        return self.environment_factory[names[0]]


def without_weights(args: GRPOConfig) -> GRPOConfig:
    """Return a copy of `args` without what the domains' rewards have taken over."""
    args = copy.copy(args)
    args.reward_weights = None
    return args


def _rows(given: Any, args: GRPOConfig, *, where: str) -> Any:
    """Return rows that can be counted: as they are, or of a stream the first."""
    refuse_no_rows(given, where)
    if hasattr(given, "column_names") and not isinstance(given, IterableDataset):
        return given
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ValueError(f"{where}: expected a Dataset, a list of rows, or an iterable of them, got {given!r:.60}")
    plan = plan_draws(args, 1) if args.max_steps > 0 else None
    most = max(MOST_READ, plan.draws * plan.prompts_per_draw if plan else 0)
    is_whole = hasattr(given, "__len__") and not isinstance(given, IterableDataset)
    rows = list(given) if is_whole else list(islice(given, most + 1))
    if not is_whole and len(rows) > most and args.process_index == 0:
        say(f"{where}: a stream, of which the first {most:,} rows are read; a Dataset is read whole")
    rows = rows if is_whole else rows[:most]
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: row {i + 1}: expected an object with a `prompt`, got {row!r:.60}")
    return rows


def _picked(rows: Any, places: Sequence[int]) -> Any:
    return rows.select(places) if hasattr(rows, "select") else [rows[i] for i in places]


def _prompts(rows: Any) -> list[Any]:
    return [row.get("prompt") for row in rows]


def _split(name: str, rows: Any, *, says: bool) -> tuple[Any, Any]:
    """Return training and held-out rows, and say how many are held out."""
    held = held_out(_prompts(rows))
    sides = [_picked(rows, [i for i, is_held in enumerate(held) if is_held == side]) for side in (False, True)]
    if len(sides[1]) < 2:
        raise ValueError(
            f"domain {name!r}: too few different prompts to hold some out for evaluation: give eval_dataset, or leave out "
            "run= and eval_strategy"
        )
    if says:
        say(
            f"domain {name!r}: {sum(held)} of {len(held)} rows are held out, by their prompts, and not trained on; give "
            "eval_dataset to choose them"
        )
    return sides[0], sides[1]
