"""What a domain that acts says of its own: its environment, its tools as the policy sees them, the words of its turns."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)

from polyphony.curricula.records import Domain, Prompt
from polyphony.rewards import find_reward
from polyphony.trainer.data import PromptTable
from polyphony.trainer.environments.calls import NAMES_OF_ROW, Instance, made_in_time
from polyphony.trainer.environments.wording import Wording


class EnvironmentReward:
    """Stands for the reward of a domain whose environments alone reward: it says nothing beside theirs."""

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[None]:
        return [None] * len(completions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Acting:
    """A domain that acts.

    Example: `Acting.of(Domain(name="sums", tools=[add], ..), tokenizer).made().functions["add"]`
    """

    name: str
    environment: Any
    tools: tuple[Any, ...]
    wording: Wording
    schemas: tuple[Mapping[str, Any], ...]
    """What the template shows of its tools."""
    needs: tuple[str, ...]
    """What `reset` cannot do without."""
    is_seeded: bool
    """Whether its environment begins as its seed says; true without one."""
    has_reward: bool
    has_reply: bool
    is_here: bool
    """Whether instances live in this process: what a script hands over, no recipe could name."""

    @classmethod
    def of(cls, domain: Domain, tokenizer: PreTrainedTokenizerBase) -> Acting:
        """Read what a domain says. Raises ValueError naming the key."""
        where = f"domains.{domain.name}.{'tools' if domain.environment is None else 'environment'}"
        if tokenizer.chat_template is None or not domain.as_chat:
            raise ValueError(f"{where}: turns need a chat template, and as_chat: true")
        tools = domain.tools if isinstance(domain.tools, list | tuple) else [domain.tools] if domain.tools else []
        try:
            instance = made_in_time(Instance.made, domain.environment, tools)
            schemas = tuple(_schema(name, function) for name, function in instance.functions.items())
            wording = Wording(tokenizer, chat_template_kwargs=domain.chat_template_kwargs, tools=schemas)
            has_reply = hasattr(instance.environment, "reply")
            wording.check(is_spoken_to=has_reply)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
        environment = instance.environment
        has_reward = hasattr(environment, "get_reward")
        if domain.reward is None and not has_reward:
            raise ValueError(f"domains.{domain.name}.reward: required, as the environment has no get_reward")
        resets = {} if environment is None else inspect.signature(environment.reset).parameters
        kinds = inspect.Parameter
        needs = [
            n
            for n, p in resets.items()
            if p.default is p.empty and p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
        ]
        return cls(
            name=domain.name,
            environment=domain.environment,
            tools=tuple(tools),
            wording=wording,
            schemas=schemas,
            needs=tuple(n for n in needs if n not in NAMES_OF_ROW),
            is_seeded=environment is None or "seed" in resets,
            has_reward=has_reward,
            has_reply=has_reply,
            is_here=not all(isinstance(spec, str | Mapping | None) for spec in (domain.environment, *tools)),
        )

    def made(self) -> Instance:
        """Return a new instance."""
        return Instance.made(self.environment, self.tools)

    def own(self, domain: Domain) -> Domain:
        """Return the domain with a reward, where it leaves that to its environments. Raises ValueError where none could.

        Warns of an environment that no seed makes the same again.
        """
        if not self.is_seeded:
            what = f"domains.{self.name}.environment: its reset takes no `seed`"
            warnings.warn(
                f"{what}: where it is left to chance, a run that goes on is not exactly the same", stacklevel=4
            )
        if domain.reward is None:
            return replace(domain, reward=EnvironmentReward())
        if not self.is_here and "environments" in _parameters_of(domain.reward):
            raise ValueError(
                f"domains.{self.name}.reward: asks for `environments`, which live in processes of their own: give classes "
                "and functions from Python, or have the environment reward by get_reward"
            )
        return domain

    def check_rows(self, table: PromptTable, *, with_tools: Prompt | None) -> None:
        """Raise ValueError for rows without a column that `reset` needs, or with tools of their own."""
        if with_tools is not None:
            raise ValueError(
                f"{table.row_of(with_tools.id)}: has a column `tools`, and the domain its own that are called: leave it out"
            )
        prompt = next(iter(table))
        columns = {"prompt", *prompt.columns}
        if lacking := [name for name in self.needs if name not in columns]:
            raise ValueError(
                f"{table.row_of(prompt.id)}: the environment's reset needs {lacking[0]!r}; there are "
                f"{', '.join(sorted(columns))}"
            )


def those_that_act(
    domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Domain], dict[str, Acting]]:
    """Return the domains, each with a reward, and what those that act say of their own. Raises ValueError."""
    acting = {domain.name: Acting.of(domain, tokenizer) for domain in domains if domain.acts}
    return [acting[d.name].own(d) if d.acts else d for d in domains], acting


def _parameters_of(reward: Any) -> Collection[str]:
    try:
        return inspect.signature(find_reward(reward)).parameters
    except (TypeError, ValueError):  # one without a signature to read, or that is refused where rewards are
        return ()


def _schema(name: str, function: Any) -> dict[str, Any]:
    try:
        return get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"tool {name!r}: {error}") from error
