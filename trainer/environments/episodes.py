"""What a trainer holds of its domains that act: who asks for completions asks here, and gets episodes of theirs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from polyphony.curricula.records import Completion, Prompt
from polyphony.trainer.domains import DomainData
from polyphony.trainer.engine.vllm import OnFinished, Request
from polyphony.trainer.environments.acting import Acting
from polyphony.trainer.environments.conversation import Conversations
from polyphony.trainer.environments.hosts import Events, Host
from polyphony.trainer.environments.led import Rules
from polyphony.trainer.environments.processes import Processes
from polyphony.trainer.environments.settings import EnvironmentSettings
from polyphony.trainer.environments.threads import Threads
from polyphony.trainer.policy import Policy

NONE = {"type": "function", "function": {"name": "none", "description": "", "parameters": {"type": "object"}}}


class Episodes:
    """Completions of a policy in all domains; a domain that does not act has one turn.

    Example: `Episodes(acting, policy, settings, most_turns=4).complete(prompts, requests, 8)[0].episode`
    """

    @classmethod
    def of(cls, data: DomainData, policy: Policy, settings: EnvironmentSettings) -> Episodes:
        """Return that of a trainer. Raises ValueError where ranks sample together, so that none can go on alone."""
        if why := policy.joint or ("an engine whose ranks sample together" if policy.is_shared else ""):
            raise ValueError(f"domain {next(iter(data.acting))!r} acts, over several turns: not with {why}")
        rooms = [room for room in (data.context, policy.room) if room is not None]
        most = policy.trainer.args.max_tool_calling_iterations
        return cls(data.acting, policy, settings, most_turns=most, context=min(rooms, default=None))

    def __init__(
        self,
        acting: Mapping[str, Acting],
        policy: Policy,
        settings: EnvironmentSettings,
        *,
        most_turns: int | None,
        context: int | None,
    ) -> None:
        """`context`: tokens that a prompt and its episode may have together."""
        self._policy, self._events = policy, Events()
        numbers = itertools.count()
        self._threads = Threads(self._events, numbers)
        self._processes = Processes(acting, self._events, numbers, episodes=settings.episodes)
        self._acting = acting
        self._rules = Rules(
            acting=acting,
            hosts=self._host,
            timeout_s=settings.tool_timeout_s,
            episodes=settings.episodes,
            most_turns=most_turns,
            context=context,
            ends=policy.ends,
            ending=policy.data.tokenizer.eos_token_id,  # type: ignore[arg-type]
            decode=policy.decode,
        )

    @property
    def tools(self) -> list[Any]:
        """The tools of all domains, as the template shows them; where they are only spoken to one that is never called."""
        return [dict(schema) for one in self._acting.values() for schema in one.schemas] or [NONE]

    def complete(
        self,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        copies: int,
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """Sample one completion a request, as `Policy.complete` does; an episode where the prompt's domain acts."""
        if not any(prompt.domain in self._acting for prompt in prompts):
            return self._policy.complete(requests, copies, on_finished)
        self._policy.wait_for_engine()  # whose episodes may still be under way
        self._threads.release()
        batch = Conversations(prompts, requests, self._rules, self._events, on_finished)
        self._policy.converse(batch)
        return batch.completions()

    def close(self) -> None:
        """Let go of all instances, and end their processes."""
        self._threads.end()
        self._processes.end()

    def _host(self, acting: Acting) -> Host:
        return self._threads if acting.is_here else self._processes
