"""Ask a server behind an OpenAI-compatible endpoint: many questions at a time, politely, and never twice the same.

A question that stays unanswered is None with the reason counted and logged. An endpoint that answers nobody is waited for;
when `patience_s` is over, the run is to end. What is asked is `chat.py`'s, for judges, and of teachers the trainer's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate, parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import httpx

from polyphony.rewards.registry import GraderGoneError
from polyphony.rewards.reply_cache import keep, kept

logger = logging.getLogger(__name__)

TRIES = 8
"""Of a question that alone goes unanswered; with the waits between them a good minute."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Between two tries, doubled each time, give or take a half; unless the server says how long to wait."""
PROBE_S = 5.0
"""For an endpoint to say that it is there."""
MOST_TOKENS = 1 << 30
"""Of one reply; what says that it used more is not counted."""
_ANSWERED = "answered"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request, and how its reply is read."""

    path: str
    """Behind the endpoint's address."""
    body: Mapping[str, Any] | None
    """JSON; None asks by GET."""
    content: Callable[[Any], Any]
    """Takes out of the reply what is asked for. What it raises means that this is not there: asking again may help."""
    parse: Callable[[Any], Any]
    """Reads that; raises ValueError on anything but valid content: asking again would not help."""
    missing: str
    """Said where `content` finds nothing."""
    most_bytes: int = 1 << 20
    """Of a reply; what sends more is read no further. A verdict has a few hundred."""


class _UnansweredError(Exception):
    """Why a question stayed unanswered. `again`: whether asking again may help, as all are turned away (`down`), nothing
    came back (`lost`), or this one may be at fault (`maybe`)."""

    def __init__(self, why: str, again: Literal["down", "lost", "maybe", "no"], wait_s: float | None = None) -> None:
        super().__init__(why)
        self.again = again
        self.wait_s = wait_s


@dataclass(slots=True)
class _Health:
    """When an endpoint last answered this process, and when it was last said that it does not; of `time.monotonic()`."""

    answered_at: float = -math.inf
    told_at: float = -math.inf


_health: dict[str, _Health] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a server lives and how it may be asked.

    Example: `asyncio.run(Endpoint(url="http://127.0.0.1:8001/v1", model="m").send([question]))`
    """

    who: ClassVar[str] = "endpoint"
    """Whom messages name."""

    url: str
    """Up to and with `/v1`."""
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; sent only where it is set."""
    concurrency: int = 16
    """Requests under way at a time."""
    requests_per_minute: float | None = None
    """In this process; None does not limit."""
    patience_s: float = 600.0
    """How long to go on asking where nobody is answered; a server that loads a large model is up within minutes."""
    timeout_s: float = 60.0
    """Of one try, from connecting to the last byte."""
    cache: str | None = None
    """A SQLite file on a local disk that keeps valid replies by content; None keeps none."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.who}: endpoint must be an http(s) address up to /v1, got {self.url!r}")
        self._check_positive("concurrency", "patience_s", "timeout_s", "requests_per_minute")
        if self.cache and not Path(self.cache).parent.is_dir():
            raise ValueError(f"{self.who}: cache {self.cache!r} would lie in a folder that does not exist")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{self.who}: {name} must be > 0, got {value}")

    async def send(
        self,
        questions: Sequence[Question],
        *,
        spent: Counter[str] | None = None,
        reasons: Counter[str] | None = None,
    ) -> list[Any]:
        """Return the parsed replies in order; None for a question that got no valid one. Equal ones are asked once.

        `spent` counts the tokens that the server says it read and wrote, `reasons` why questions stayed unanswered, which
        is logged without it. Raises GraderGoneError where for `patience_s` nobody was answered: a judge that is gone must
        not turn a run's rewards into nothing.
        """
        outcomes: Counter[str] = Counter()
        slots = asyncio.Semaphore(self.concurrency)
        settings: dict[str, Any] = {
            "timeout": self.timeout_s,
            "limits": httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            "headers": {"accept-encoding": "identity", **self._headers()},  # what is packed may unpack to anything
            "verify": self.url.startswith("https"),  # reading the certificates takes longer than most verdicts
        }
        keys = [(question.path, _key_of(question)) for question in questions]
        asked = dict(zip(keys, questions, strict=True))
        spent = Counter() if spent is None else spent
        try:
            async with httpx.AsyncClient(**settings) as client, asyncio.TaskGroup() as tasks:
                found = [
                    tasks.create_task(self._answer(client, slots, key, question, outcomes, spent))
                    for (_, key), question in asked.items()
                ]
        except BaseExceptionGroup as group:  # of a kind: all were cancelled by the first
            raise group.exceptions[0] from None
        outcomes.pop(_ANSWERED, None)
        if reasons is not None:
            reasons.update(outcomes)
        elif outcomes:
            told = ", ".join(f"{why} ({count})" for why, count in outcomes.most_common(5))
            logger.warning("%s: %d of %d unanswered: %s", self.who, outcomes.total(), len(asked), told)
        by_key = dict(zip(asked, (task.result() for task in found), strict=True))
        return [by_key[key] for key in keys]

    async def _answer(
        self,
        client: httpx.AsyncClient,
        slots: asyncio.Semaphore,
        key: str,
        question: Question,
        outcomes: Counter[str],
        spent: Counter[str],
    ) -> Any:
        known = kept(self.cache, key) if self.cache else None
        if known is not None:
            with contextlib.suppress(ValueError):  # a row that something else wrote is asked for again
                return question.parse(known)
        try:
            async with slots:
                reply = await self._ask_until_answered(client, question, random.Random(key), spent)
            verdict = question.parse(reply)
        except (_UnansweredError, ValueError) as error:
            outcomes[str(error)] += 1
            return None
        outcomes[_ANSWERED] += 1
        if self.cache:
            keep(self.cache, key, reply)
        return verdict

    async def _ask_until_answered(
        self, client: httpx.AsyncClient, question: Question, rng: random.Random, spent: Counter[str]
    ) -> Any:
        """Ask until there is a reply. Raises _UnansweredError where only this question goes without, GraderGoneError where
        all have for `patience_s`."""
        health, began, tries, alone = _health.setdefault(self.url, _Health()), time.monotonic(), 0, 0
        asked_at = before = began
        while True:
            tries, before = tries + 1, asked_at
            try:
                await _pace(self.url, self.requests_per_minute)
                asked_at = time.monotonic()
                reply = await asyncio.wait_for(self._ask_once(client, question, spent), self.timeout_s)
                self._note_answer(health)
                return reply
            except TimeoutError:
                failure = _UnansweredError("timeout", "lost")
            except httpx.RequestError as error:
                failure = _UnansweredError(type(error).__name__, "lost")
            except _UnansweredError as error:
                failure = error
            alone += failure.again == "maybe" or (
                failure.again == "lost" and (health.answered_at > asked_at or await self._fails_alone(client))
            )
            now, last = time.monotonic(), max(began, health.answered_at)
            is_passed_over = health.answered_at > before and now >= began + self.patience_s  # others have their turn
            if failure.again == "no" or alone >= TRIES or is_passed_over:
                raise failure
            if now >= last + self.patience_s:
                raise GraderGoneError(
                    f"{self.who}: {self.url} has answered nobody for {now - last:.0f} s ({failure}; client.patience_s is "
                    f"{self.patience_s:g})"
                )
            backoff_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(tries - 1, 10)) * rng.uniform(0.5, 1.5)
            wait_s = min(max(failure.wait_s or backoff_s, FIRST_WAIT_S), last + self.patience_s - now)
            self._tell(health, failure, wait_s, last + self.patience_s - now)
            await asyncio.sleep(wait_s)

    async def _fails_alone(self, client: httpx.AsyncClient) -> bool:
        """Say whether an endpoint that has lost this question, and answered others before, is there for any other."""
        if _health[self.url].answered_at == -math.inf:
            return False
        try:
            async with client.stream("GET", f"{self.url.rstrip('/')}/models", timeout=PROBE_S) as response:
                return response.status_code < 500
        except httpx.RequestError:
            return False

    def _tell(self, health: _Health, failure: Exception, wait_s: float, left_s: float) -> None:
        """Say that the endpoint is waited for, once a minute."""
        if time.monotonic() < health.told_at + 60:
            return
        health.told_at = time.monotonic()
        logger.warning(
            "%s: %s does not answer (%s); asking again in %.1f s, for %.0f s more",
            self.who,
            self.url,
            failure,
            wait_s,
            left_s,
        )

    def _note_answer(self, health: _Health) -> None:
        now = time.monotonic()
        if health.told_at > health.answered_at:
            logger.warning("%s: %s answers again", self.who, self.url)
        health.answered_at = now

    async def _ask_once(self, client: httpx.AsyncClient, question: Question, spent: Counter[str]) -> Any:
        content, address = b"", f"{self.url.rstrip('/')}{question.path}"
        method, most = ("GET" if question.body is None else "POST"), question.most_bytes
        async with client.stream(method, address, json=question.body) as response:
            status = response.status_code
            if status != 200:
                is_down = status in (408, 409, 429, 502, 503, 504)
                again = "down" if is_down else "maybe" if status >= 500 else "no"
                raise _UnansweredError(f"status {status}", again, _retry_after(response))
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > most:
                    raise _UnansweredError(f"a reply of more than {most >> 20} MiB", "maybe")
        try:
            reply = json.loads(content)
            found = question.content(reply)
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _UnansweredError(question.missing, "maybe") from None
        usage: Any = reply.get("usage") if isinstance(reply, dict) else None
        for name in ("prompt_tokens", "completion_tokens") if isinstance(usage, dict) else ():
            said = usage.get(name)
            spent[name] += said if type(said) is int and 0 <= said <= MOST_TOKENS else 0
        return found

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.api_key_env)
        return {"Authorization": f"Bearer {key}"} if key else {}


def _key_of(question: Question) -> str:
    return hashlib.sha256(json.dumps(question.body, sort_keys=True).encode()).hexdigest()


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds a server asks to wait, by a number or a date; None where it does not say."""
    said = response.headers.get("retry-after", "")
    try:
        wait_s = float(said) if not parsedate(said) else parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, OverflowError):  # neither, or no day of this calendar
        return None
    return wait_s if 0 < wait_s < math.inf else None


_next_slot: dict[str, float] = {}
_pacing = threading.Lock()


async def _pace(url: str, requests_per_minute: float | None) -> None:
    """Wait for this process's next turn at an endpoint."""
    if requests_per_minute is None:
        return
    with _pacing:
        now = time.monotonic()
        turn = max(now, _next_slot.get(url, 0.0))
        _next_slot[url] = turn + 60.0 / requests_per_minute
    await asyncio.sleep(turn - now)
