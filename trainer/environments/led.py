"""One completion on its way: what was said so far, what its environment is at, and what it is led by."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from polyphony.curricula.records import Completion, Episode, Prompt
from polyphony.trainer.engine.vllm import Request
from polyphony.trainer.environments.acting import Acting
from polyphony.trainer.environments.calls import Ask
from polyphony.trainer.environments.hosts import Host


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What episodes are led by."""

    acting: Mapping[str, Acting]
    hosts: Callable[[Acting], Host]
    timeout_s: float
    episodes: int | None
    """At once; None: all."""
    most_turns: int | None
    """That call tools, of an episode (TRL's `max_tool_calling_iterations`)."""
    context: int | None
    """Tokens that a prompt and its episode may have together."""
    ends: frozenset[int]
    """Tokens that end a turn."""
    ending: int
    """One of them, which stands for a completion of which nothing was said."""
    decode: Callable[[Sequence[int]], str]


@dataclass(kw_only=True, slots=True, eq=False)
class Led:
    """One completion on its way."""

    place: int
    prompt: Prompt
    request: Request
    acting: Acting | None
    seat: int | None = None
    asked: Ask | None = None
    is_begun: bool = False
    """Whether its turn to be asked has come."""
    deadline: float = 0.0
    given_s: float = 0.0
    attempt: int = 0
    is_alone: bool = False
    """In a process of its own."""
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logps: list[float] | None = field(default_factory=list)
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    """Where each turn of the policy begins."""
    ended: int = 0
    """Where its last ended."""
    calls: int = 0
    rounds: int = 0
    """Turns that called tools."""
    failures: list[str] = field(default_factory=list)
    version: int | None = None
    cut: Literal["turns", "length"] | None = None
    fault: str | None = None
    is_forfeit: bool = False
    own_reward: float | None = None

    @property
    def is_at_work(self) -> bool:
        """Whether its environment is."""
        return self.asked is not None and self.is_begun

    @property
    def is_late(self) -> bool:
        """Whether its limit has passed."""
        return self.deadline <= time.monotonic()

    def ask(self, what: Ask, limit_s: float) -> None:
        """Note what its environment is asked."""
        self.asked, self.is_begun = what, False
        self.limit(limit_s)

    def limit(self, limit_s: float) -> None:
        """Let it take so long from now."""
        self.deadline, self.given_s = time.monotonic() + limit_s, limit_s

    def begin_again(self, prompt: Prompt, *, alone: bool) -> None:
        """Forget what was said and done."""
        self.prompt, self.seat, self.asked, self.attempt = prompt, None, None, self.attempt + 1
        self.is_alone, self.cut = alone, None
        self.ids, self.mask, self.logps, self.messages, self.spans = [], [], [], [], []
        self.calls, self.rounds, self.failures, self.version = 0, 0, [], None

    @property
    def opening(self) -> Sequence[int]:
        """The tokens since the policy's last turn, or its prompt, which open its next."""
        return self.ids[self.ended :] if self.spans else self.prompt.ids

    def next_request(self, room: int) -> Request:
        """Return the request of its next turn: a seed a completion and turn."""
        seed = self.request.seed
        if self.spans:
            digest = hashlib.sha256(f"{seed}/{len(self.spans)}".encode()).digest()
            seed = int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
        return replace(self.request, prompt_ids=[*self.prompt.ids, *self.ids], seed=seed, max_tokens=room)

    def add(self, completion: Completion) -> None:
        """Take in what the policy said in a turn."""
        self.spans.append(len(self.ids))
        self.ids += completion.ids
        self.mask += [1] * len(completion.ids)
        self.ended = len(self.ids)
        self.version = completion.version
        if completion.logps is None:
            self.logps = None
        elif self.logps is not None:
            self.logps += completion.logps

    def add_others(self, ids: Sequence[int]) -> None:
        """Take in what was said to it."""
        self.ids += ids
        self.mask += [0] * len(ids)
        if self.logps is not None:
            self.logps += [0.0] * len(ids)

    def completion(self, rules: Rules, environment: Any) -> Completion:
        """Return what came of it, with its environment where that lives in this process."""
        if not self.spans:  # nothing was said: TRL wants a token all the same, which nothing is learned from
            self.ids, self.mask, self.logps = [rules.ending], [0], [0.0]
        ends = [*self.spans[1:], len(self.ids)]
        turns = [self._own(rules, a, b) for a, b in zip(self.spans, ends, strict=False)]
        last = self.spans[-1] if self.spans else 0
        episode = Episode(
            messages=tuple(self.messages),
            turns=len(self.spans),
            calls=self.calls,
            failures=tuple(self.failures),
            cut=self.cut,
            fault=self.fault,
            is_forfeit=self.is_forfeit,
            reward=self.own_reward,
            last=last,
            written="\n".join(turns),
            environment=environment,
        )
        return Completion(
            ids=self.ids,
            logps=self.logps,
            tool_mask=self.mask,
            version=self.version,
            prompt=self.prompt,
            text=turns[-1] if turns else "",
            truncated=self.cut == "length" or (self.fault is None and self.ids[-1] not in rules.ends),
            episode=episode,
        )

    def _own(self, rules: Rules, first: int, last: int) -> str:
        return rules.decode([t for t, own in zip(self.ids[first:last], self.mask[first:last], strict=True) if own])
