"""Ask a model behind an endpoint by chat messages: what a judge is asked, and in which form it has to reply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from polyphony.rewards.endpoint import Endpoint, Question


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatQuestion:
    """Chat messages, and how their reply is read."""

    messages: list[dict[str, str]]
    schema: dict[str, Any]
    """The JSON schema of a valid reply, which servers that can will enforce."""
    parse: Callable[[str], Any]
    """Reads the reply; raises ValueError on anything but a valid one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatEndpoint(Endpoint):
    """Where the judge lives and how it may be asked.

    Example: `asyncio.run(ChatEndpoint(url="http://127.0.0.1:8001/v1", model="judge").ask([question]))`
    """

    who: ClassVar[str] = "judge"
    temperature: float = 0.0
    max_tokens: int = 64
    """A verdict is short; a reasoning model needs thousands."""
    structured: bool = True
    """Send the schema as `response_format`; off for servers that refuse it."""

    def __post_init__(self) -> None:
        Endpoint.__post_init__(self)  # `super()` knows the class before it had slots
        self._check_positive("max_tokens")

    async def ask(self, questions: Sequence[ChatQuestion], *, spent: Counter[str] | None = None) -> list[Any]:
        """Return the parsed replies in order, as `Endpoint.send` does."""
        return await self.send([self._question(question) for question in questions], spent=spent)

    def _question(self, asked: ChatQuestion) -> Question:
        body = {
            "model": self.model,
            "messages": asked.messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if self.structured:
            schema = {"name": "verdict", "schema": asked.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        missing = "no chat completion in the response"
        return Question(path="/chat/completions", body=body, content=_message, parse=asked.parse, missing=missing)


def _message(reply: Any) -> str:
    text = reply["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError(text)
    return text
