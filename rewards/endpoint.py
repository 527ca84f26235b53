"""Ask a model behind an OpenAI-compatible endpoint: many questions at a time, politely, and never twice the same.

A question that stays unanswered is None with the reason counted and logged; nothing is raised, so that a training run
outlives its judge for as long as its recipe allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 16
"""Questions without a single answer; with five attempts each, a judge that restarts has had time to come back."""
_ANSWERED = "answered"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request: chat messages, and how its reply is read."""

    messages: list[dict[str, str]]
    schema: dict[str, Any]
    """The JSON schema of a valid reply, which servers that can will enforce."""
    parse: Callable[[str], Any]
    """Reads the reply; raises ValueError on anything but a valid one."""


class _UnansweredError(Exception):
    """Why a question stayed unanswered; `wait_s` where asking again may help."""

    def __init__(self, why: str, wait_s: float | None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where the judge lives and how it may be asked."""

    url: str
    """Up to and with `/v1`."""
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; sent only where it is set."""
    temperature: float = 0.0
    max_tokens: int = 64
    """A verdict is short; a reasoning model needs thousands."""
    concurrency: int = 16
    """Requests under way at a time."""
    requests_per_minute: float | None = None
    """In this process; None does not limit."""
    attempts: int = 5
    timeout_s: float = 60.0
    """Of one attempt, from connecting to the last byte."""
    backoff_s: float = 0.5
    """Before the second attempt; doubled for each further one, unless the server says how long to wait."""
    longest_wait_s: float = 60.0
    structured: bool = True
    """Send the schema as `response_format`; off for servers that refuse it."""
    cache: str | None = None
    """A SQLite file on a local disk that keeps valid replies by content; None keeps none."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge: endpoint must be an http(s) address up to /v1, got {self.url!r}")
        for name in ("max_tokens", "concurrency", "attempts", "timeout_s", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"judge: {name} must be > 0, got {value}")
        if self.cache and not Path(self.cache).parent.is_dir():
            raise ValueError(f"judge: cache {self.cache!r} would lie in a folder that does not exist")

    async def ask(self, questions: Sequence[Question]) -> list[Any]:
        """Return the parsed replies in order; None for a question that got no valid one.

        Equal questions are asked once. Where the first `GIVE_UP_AFTER` or `concurrency` that ended, whichever is more,
        were all left unanswered, the others are not asked: a judge that is gone must not hold up a draw for hours.
        """
        outcomes: Counter[str] = Counter()
        slots = asyncio.Semaphore(self.concurrency)
        settings: dict[str, Any] = {
            "timeout": self.timeout_s,
            "limits": httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            "headers": self._headers(),
            "verify": self.url.startswith("https"),  # reading the certificates takes longer than most verdicts
        }
        bodies = [self._body(question) for question in questions]
        keys = [hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() for body in bodies]
        asked = {key: (body, question) for key, body, question in zip(keys, bodies, questions, strict=True)}
        async with httpx.AsyncClient(**settings) as client:
            replies = await asyncio.gather(
                *(self._answer(client, slots, key, *asking, outcomes) for key, asking in asked.items())
            )
        outcomes.pop(_ANSWERED, None)
        if outcomes:
            reasons = ", ".join(f"{why} ({count})" for why, count in outcomes.most_common(5))
            logger.warning("judge: %d of %d unanswered: %s", outcomes.total(), len(asked), reasons)
        by_key = dict(zip(asked, replies, strict=True))
        return [by_key[key] for key in keys]

    async def _answer(
        self,
        client: httpx.AsyncClient,
        slots: asyncio.Semaphore,
        key: str,
        body: dict[str, Any],
        question: Question,
        outcomes: Counter[str],
    ) -> Any:
        kept = _kept(self.cache, key) if self.cache else None
        if kept is not None:
            return question.parse(kept)
        try:
            async with slots:
                if not outcomes[_ANSWERED] and outcomes.total() >= max(GIVE_UP_AFTER, self.concurrency):
                    raise _UnansweredError("not asked, as it answered none before", None)
                reply = await self._ask_until_answered(client, body, key)
            verdict = question.parse(reply)
        except (_UnansweredError, ValueError) as error:
            outcomes[str(error)] += 1
            return None
        outcomes[_ANSWERED] += 1
        if self.cache:
            _keep(self.cache, key, reply)
        return verdict

    async def _ask_until_answered(self, client: httpx.AsyncClient, body: dict[str, Any], key: str) -> str:
        jitter = 0.5 + int(key[:8], 16) / 0xFFFFFFFF  # so that those refused together do not come back together
        for attempt in range(self.attempts):
            try:
                await _pace(self.url, self.requests_per_minute)
                return await asyncio.wait_for(self._ask_once(client, body), self.timeout_s)
            except TimeoutError:
                failure = _UnansweredError("timeout", 0.0)
            except httpx.RequestError as error:
                failure = _UnansweredError(type(error).__name__, 0.0)
            except _UnansweredError as error:
                failure = error
            if failure.wait_s is None or attempt + 1 == self.attempts:
                raise failure
            wait_s = failure.wait_s or self.backoff_s * 2**attempt * jitter
            await asyncio.sleep(min(wait_s, self.longest_wait_s))
        raise AssertionError("the last attempt returns or raises")

    async def _ask_once(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        response = await client.post(f"{self.url.rstrip('/')}/chat/completions", json=body)
        if response.status_code != 200:
            again = response.status_code in (408, 409, 429) or response.status_code >= 500
            raise _UnansweredError(f"status {response.status_code}", _retry_after(response) if again else None)
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _UnansweredError("no chat completion in the response", 0.0) from None
        if not isinstance(content, str):
            raise _UnansweredError("an empty message", 0.0)
        return content

    def _body(self, question: Question) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": question.messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if self.structured:
            schema = {"name": "verdict", "schema": question.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.api_key_env)
        return {"Authorization": f"Bearer {key}"} if key else {}


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds a server asks to wait; 0 where it does not say."""
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


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


def _kept(cache: str, key: str) -> str | None:
    with contextlib.closing(_open(cache)) as database:
        row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
    return row[0] if row else None


def _keep(cache: str, key: str, reply: str) -> None:
    with contextlib.closing(_open(cache)) as database, database:
        database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))


def _open(cache: str) -> sqlite3.Connection:
    database = sqlite3.connect(cache, timeout=30.0)  # ranks share the file and wait for each other
    database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
    return database
