"""Completions that a script's own `rollout_func` makes, as for TRL's trainer: it samples in the place of an engine of ours.

It is given the prompts of this rank's rows and the trainer, and returns a row each of `prompt_ids`, `completion_ids`,
`logprobs` (or None) and whatever else: `env_mask` (1 for a token that the policy wrote), and columns for the rewards. One
domain is trained with it; held-out rows are asked of it as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

from polyphony.curricula.records import Completion, Domain, Prompt
from polyphony.trainer.engine.vllm import OnFinished, Request
from polyphony.trainer.policy import Policy
from polyphony.trainer.settings import TrainerSettings

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
MASK = "env_mask"


class RolloutFunction:
    """A script's `rollout_func`, asked as episodes are.

    Example: `RolloutFunction(function, policy, fits=scorer.check_fit).complete(prompts, requests, 8)[0].ids`
    """

    def __init__(
        self, function: Callable[..., Any], policy: Policy, *, fits: Callable[[Iterable[Prompt]], None]
    ) -> None:
        """`fits` raises ValueError for a prompt whose columns, the function's among them, its reward does not take."""
        self._function, self._policy, self._fits = function, policy, fits

    def complete(
        self,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        copies: int,
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """Return one completion a prompt, `copies` of each in a row; what `requests` say of seeds and lengths is not heard.

        Raises ValueError where the function returns no row for each, or what rows cannot be.
        """
        if not prompts:
            return []
        trainer = self._policy.trainer
        if trainer.use_vllm and trainer.state.global_step != trainer._last_loaded_step:
            self._policy.sync()  # of TRL's engine, which it may sample with
        with self._generations(copies):
            returned = self._function(copy.deepcopy([prompt.prompt for prompt in prompts]), trainer)
        found = [_completion(row, prompt) for row, prompt in zip(_rows(returned, len(prompts)), prompts, strict=True)]
        self._fits([found[0].prompt])
        return found

    @contextmanager
    def _generations(self, copies: int) -> Iterator[None]:
        """Have the trainer say, in an evaluation of ours, what it says in TRL's: its mode, and how often a prompt stands."""
        trainer = self._policy.trainer
        if copies == trainer.num_generations and trainer.model.training:
            yield
            return
        kept, was_training = trainer.num_generations_eval, trainer.model.training
        trainer.num_generations_eval = copies
        trainer.model.eval()
        try:
            yield
        finally:
            trainer.num_generations_eval = kept
            trainer.model.train(was_training)


def as_returned(rows: Sequence[Completion]) -> dict[str, Any]:
    """Return completions as a `rollout_func` hands them to TRL."""
    logps = None if any(row.logps is None for row in rows) else [row.logps for row in rows]
    said: dict[str, Any] = {
        "prompt_ids": [row.prompt.ids for row in rows],
        "completion_ids": [row.ids for row in rows],
        "logprobs": logps,
    }
    masks = [row.tool_mask for row in rows if row.tool_mask is not None]
    return said | ({MASK: masks} if masks else {})


def refuse_beside(function: Any, settings: TrainerSettings, *, engine: Any, **acting: Any) -> None:
    """Raise ValueError for what a `rollout_func` leaves no place for; `acting` are a script's arguments for turns."""
    if not callable(function):
        raise ValueError(f"rollout_func: expected a function of prompts and the trainer, got {function!r:.60}")
    recovered = [f"guardrails.{g.domain}.action='recover'" for g in settings.guardrails if g.action == "recover"]
    teaches = "teachers read prompts of ours"
    beside = {
        f"engine={engine!r:.60}": (engine != "transformers", "it samples in an engine's place: leave engine out"),
        f"pool={settings.pool!r:.60}": (settings.pool, "it is asked once a draw, for whole groups: leave pool out"),
        f"algorithm={settings.update.algorithm!r}": (settings.update.distil, f"{teaches}: use grpo or rft"),
        "".join(recovered[:1]): (recovered, f"{teaches}: say another action"),
    }
    beside |= {f"{n}={one!r:.60}": (one, f"it takes turns by itself: leave {n} out") for n, one in acting.items()}
    for what, (is_given, why) in beside.items():
        if is_given:
            raise ValueError(f"rollout_func with {what}: {why}")


def refuse_domains(domains: Sequence[Domain]) -> None:
    """Raise ValueError for several trained domains, and for what a domain says that a `rollout_func` would not hear."""
    turns = "it takes turns by itself"
    unheard = {
        "tools": turns,
        "environment": turns,
        "max_completion_length": "it samples as long as it likes; trainer.max_completion_length tells it of args",
        "chat_template_kwargs": "it applies the template",
    }
    for domain, name in product(domains, unheard):
        if value := getattr(domain, name):
            raise ValueError(
                f"rollout_func with domains.{domain.name}.{name}={value!r:.60}: {unheard[name]}: leave it out"
            )
    trained = [domain.name for domain in domains if not domain.is_watch_only]
    if len(trained) != 1:
        raise ValueError(
            f"rollout_func with {len(trained)} trained domains, {', '.join(trained)}: it is heard for one, as its prompts "
            "say none: train one, or give engine=, a class of yours with a method `complete` (trainer/README.md)"
        )


def _rows(returned: Any, count: int) -> Iterator[dict[str, Any]]:
    """Yield what was returned of each row; None for one that has none of a shorter list."""
    if not isinstance(returned, Mapping):
        raise ValueError(f"rollout_func: expected it to return a dict, got {type(returned).__name__}")
    if missing := [name for name in REQUIRED if name not in returned]:
        raise ValueError(
            f"rollout_func: what it returned has no {' and no '.join(missing)}; it has {', '.join(returned)}"
        )
    told = {name: returned[name] for name in (*REQUIRED, MASK) if returned.get(name) is not None}
    for name in REQUIRED[:2]:
        if name not in told:
            raise ValueError(f"rollout_func: {name} is None: expected a list of token ids for each of {count} prompts")
    for name, rows in told.items():
        if not hasattr(rows, "__len__") or len(rows) != count:
            got = len(rows) if hasattr(rows, "__len__") else repr(rows)[:60]
            raise ValueError(f"rollout_func: {name} has {got} rows for {count} prompts: return one for each, in order")
    columns = {name: value for name, value in returned.items() if name not in (*REQUIRED, MASK)}
    for i in range(count):
        own = {
            name: value[i] if isinstance(value, list) else value for name, value in columns.items() if _has(value, i)
        }
        yield {"place": i, "columns": own, **{name: rows[i] for name, rows in told.items()}}


def _has(value: Any, i: int) -> bool:
    return not isinstance(value, list) or i < len(value)


def _completion(row: Mapping[str, Any], prompt: Prompt) -> Completion:
    asked, ids = (_ids(row, name) for name in REQUIRED[:2])
    if not ids:
        raise ValueError(f"rollout_func: completion_ids of row {row['place'] + 1} are empty: a completion has a token")
    logps, mask = (None if row.get(name) is None else _list(row[name]) for name in ("logprobs", MASK))
    for name, values in (("logprobs", logps), (MASK, mask)):
        if values is not None and len(values) != len(ids):
            where = f"{name} of row {row['place'] + 1}"
            raise ValueError(f"rollout_func: {where} are {len(values)} for {len(ids)} tokens of completion_ids")
    if logps is not None:
        logps = [math.nan if logp is None else logp for logp in logps]
    prompt = replace(prompt, ids=asked, columns={**prompt.columns, **row["columns"]})
    return Completion(ids=ids, logps=logps, tool_mask=mask, prompt=prompt)


def _ids(row: Mapping[str, Any], name: str) -> list[int]:
    given = row[name]
    ids = None if isinstance(given, str) or not hasattr(given, "__iter__") else _list(given)
    if ids is None or not all(hasattr(i, "__index__") for i in ids):
        raise ValueError(f"rollout_func: {name} of row {row['place'] + 1}: expected token ids, got {given!r:.60}")
    return ids


def _list(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
