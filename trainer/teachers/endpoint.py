"""A teacher behind an OpenAI-compatible endpoint: it is sent token ids, and tells the log-probability of each.

As vLLM's server does (0.31): `/v1/completions` with `prompt_logprobs: 0`. It samples a token as well, because it has to, and
tells log-probabilities at temperature 1 whatever it samples with. Its prefix cache may stay on: such a request does not read
it. A server that tells none, or logits (`--logprobs-mode raw_logits`), is refused.

Vocabularies are compared by `/detokenize`: each of the policy's token ids has to be the same text there. What cannot be seen
from here: tokens that only the teacher has, which of them ends its answers, and pieces of characters, which all look alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from polyphony.curricula.declarations import nearest
from polyphony.rewards.endpoint import Endpoint, Question
from polyphony.rewards.registry import GraderGoneError, check_arguments, settled
from polyphony.trainer.teachers.settings import TeacherSettings

CLIENT = ("api_key_env", "concurrency", "requests_per_minute", "patience_s", "timeout_s")
"""What `teachers.<name>.client` may say; a cache would outlive a teacher's weights."""
AT_A_TIME = 4096
"""Token ids in one question about the vocabulary."""
MOST_BYTES = 1 << 28
"""Of one reply; a token has about 70."""
MINUS_INFINITY = -9999.0
"""What vLLM writes for it, as JSON has no such number."""
ROUNDED = 1e-3
"""How far above 0 rounding may lift a log-probability."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherEndpoint(Endpoint):
    """Where a teacher lives and how it may be asked.

    Example: `await TeacherEndpoint.of("tutor", settings).found(tokenizer).ask([([1, 5], [9, 2])])` is `[(-0.1, -2.3)]`.
    """

    teacher: str
    """Its name in the recipe."""
    room: int | None = None
    """Tokens that it can score; None where the server does not say."""

    @property
    def who(self) -> str:  # type: ignore[override]
        return f"teachers.{self.teacher}"

    @classmethod
    def of(cls, teacher: str, settings: TeacherSettings) -> TeacherEndpoint:
        """Return it, not asked yet. Raises ValueError for what can be no address, and for what a client does not take."""
        where = f"teachers.{teacher}.client"
        if unknown := [name for name in settings.client if name not in CLIENT]:
            raise ValueError(f"{where}: unknown argument {unknown[0]!r}; {nearest(str(unknown[0]), list(CLIENT))}")
        check_arguments(Endpoint, settings.client, where=where)
        return cls(url=str(settings.endpoint), model=settings.model or "", teacher=teacher, **settings.client)

    def found(self, tokenizer: Any) -> TeacherEndpoint:
        """Return it with the model that it serves. Raises ValueError where it is down, serves another, or has another
        vocabulary than `tokenizer`."""
        cards = self._asked_alone(Question(path="/models", body=None, content=dict, parse=_models, missing=NO_MODELS))
        if self.model and self.model not in cards:
            raise ValueError(
                f"{self.who}.model: {self.url} serves no {self.model!r}; {nearest(self.model, list(cards))}"
            )
        if not self.model and len(cards) != 1:
            raise ValueError(f"{self.who}.model: {self.url} serves {', '.join(cards)}: name one of them")
        model = self.model or next(iter(cards))
        there = replace(self, model=model, room=cards[model] and cards[model] - 1)  # it samples one token as well
        there._check_vocabulary(tokenizer)
        return there

    async def ask(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...]]:
        """Return the log-probability of each token of each row's second part, after its first.

        NaN for all of a row where there is no answer to it. Raises GraderGoneError where nobody is answered any more.
        """
        told = await self.send([self._question(*row) for row in rows])
        return [(math.nan,) * len(said) if t is None else t for t, (_, said) in zip(told, rows, strict=True)]

    def tried(self, ids: Sequence[int]) -> tuple[float, ...]:
        """Return the log-probabilities of the ids after the first. Raises ValueError where they are none."""
        told = self._asked_alone(self._question(ids[:1], ids[1:]))
        if not all(map(math.isfinite, told)):
            raise ValueError(f"{self.who}: {self.url}: its log-probabilities are no numbers")
        return told

    def _question(self, asked: Sequence[int], said: Sequence[int]) -> Question:
        body = {
            "model": self.model,
            "prompt": [*asked, *said],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        parse = partial(_logps, ids=body["prompt"], n=len(said))
        missing = "no completion in the response"
        return Question(
            path="/completions", body=body, content=_choice, parse=parse, missing=missing, most_bytes=MOST_BYTES
        )

    def _check_vocabulary(self, tokenizer: Any) -> None:
        ids = sorted(tokenizer.get_vocab().values())
        chunks = [ids[at : at + AT_A_TIME] for at in range(0, len(ids), AT_A_TIME)]
        for chunk in chunks:
            differing = chunk if self._differs(chunk, tokenizer) else []
            while len(differing) > 1:
                half = differing[: len(differing) // 2]
                differing = half if self._differs(half, tokenizer) else differing[len(half) :]
            if differing:
                (token,) = differing
                raise ValueError(
                    f"{self.who}: {self.url} has another vocabulary than the policy: token {token} is "
                    f"{tokenizer.decode([token])!r} here and {self._text([token])!r} there"
                )

    def _differs(self, ids: Sequence[int], tokenizer: Any) -> bool:
        return self._text(ids) != tokenizer.decode(list(ids))

    def _text(self, ids: Sequence[int]) -> str:
        body = {"model": self.model, "tokens": list(ids)}
        missing = "no text in the response"
        try:
            return self._asked_alone(
                Question(path="/../detokenize", body=body, content=dict, parse=_prompt, missing=missing)
            )
        except ValueError as error:
            raise ValueError(f"{error}: its vocabulary cannot be compared with the policy's") from error

    def _asked_alone(self, question: Question) -> Any:
        """Return the answer to one question. Raises ValueError with the reason where there is none."""
        reasons: Counter[str] = Counter()
        try:
            (found,) = settled([self.send([question], reasons=reasons)])[0]
        except GraderGoneError as error:
            raise ValueError(str(error)) from error
        if reasons:
            raise ValueError(f"{self.who}: {self.url}{question.path}: {next(iter(reasons))}")
        return found


NO_MODELS = "no list of models in the response"


def _models(reply: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the room of each model that is served, by name."""
    try:
        found = {str(card["id"]): card.get("max_model_len") for card in reply["data"]}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(NO_MODELS) from None
    if not found:
        raise ValueError(NO_MODELS)
    return {name: room if type(room) is int and room > 1 else None for name, room in found.items()}


def _prompt(reply: Mapping[str, Any]) -> str:
    if not isinstance(text := reply.get("prompt"), str):
        raise ValueError("no text in the response")
    return text


def _choice(reply: Any) -> dict[str, Any]:
    return dict(reply["choices"][0])


def _logps(choice: Mapping[str, Any], *, ids: Sequence[int], n: int) -> tuple[float, ...]:
    """Return the log-probabilities of the last `n` ids. Raises ValueError for anything else."""
    told = choice.get("prompt_logprobs")
    if not isinstance(told, list):
        raise ValueError("no prompt_logprobs in the response, as vLLM's server gives them")
    if len(told) != len(ids):
        raise ValueError(f"prompt_logprobs of {len(told)} tokens in the response, {len(ids)} were sent")
    return tuple(_logp(entry, token) for entry, token in zip(told[-n:], ids[-n:], strict=True))


def _logp(entry: Any, token: int) -> float:
    try:
        value = entry[str(token)]["logprob"]
    except (KeyError, TypeError):
        raise ValueError("prompt_logprobs in the response are not of the tokens that were sent") from None
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("prompt_logprobs in the response are no numbers")
    if value > ROUNDED:
        raise ValueError(f"prompt_logprobs in the response are no log-probabilities: {value:g}")
    return -math.inf if value <= MINUS_INFINITY else float(value)
