"""How turns become tokens, and back: later ones are appended to the tokens that were sampled, which are never encoded again.

What follows a turn of the policy is rendered by the chat template after a stand-in for that turn, and cut off behind its
end, as TRL does. What tools and users say is text: a special token inside is spelled out in several tokens, so that it
opens no turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
    supports_tool_calling,
)

Message = Mapping[str, Any]

OPENS, CLOSES = "\U000f0000", "\U000f0001"
"""Around the number of a special token in a text that is rendered: of the private characters, which no template knows."""
NO_MARKS = dict.fromkeys(map(ord, OPENS + CLOSES))
SPELLED = re.compile(f"{OPENS}(\\d+){CLOSES}")


class Wording:
    """The words of one domain's turns, by its tokenizer and its arguments of the chat template.

    Example: `Wording(tokenizer, chat_template_kwargs={}, tools=[schema]).after([{"role": "user", "content": "go on"}])`
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat_template_kwargs: Mapping[str, Any], tools: Sequence[Any]
    ) -> None:
        """Raises ValueError for a template that cannot show calls, or drops what was said before."""
        self._tokenizer: Any = tokenizer
        self._kwargs = dict(chat_template_kwargs)
        self._tools = list(tools)
        self._names = {tool["function"]["name"] for tool in tools}
        self._known: dict[str, list[int]] = {}
        if tools and not supports_tool_calling(tokenizer):
            raise ValueError("the chat template shows no calls of tools and their answers")
        self._template: str | None = None
        if tools and not is_chat_template_prefix_preserving(tokenizer):
            self._template = get_training_chat_template(tokenizer)
        if tools and not any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema")):
            add_response_schema(tokenizer)  # for TRL's known templates; ValueError for others
        if tools:  # TRL asks the tokenizer once more, where it takes in a draw
            self._tokenizer.parse_response = partial(
                _parsed_or_refused, type(tokenizer).parse_response, tokenizer, **_read_once(tokenizer)
            )

    def check(self, *, is_spoken_to: bool) -> None:
        """Raise ValueError where what was said, thoughts among it, would be shown otherwise once the next turn has come."""
        said = {"role": "assistant", "content": "said", "reasoning_content": "thought"}
        nexts: list[tuple[str, Message, Message]] = []
        if self._tools:
            calling = said | {"content": "", "tool_calls": _call_of("f")}
            nexts.append(("a tool has answered", calling, {"role": "tool", "name": "f", "content": "told"}))
        if is_spoken_to:
            nexts.append(("the user speaks again", said, {"role": "user", "content": "told"}))
        for when, turn, following in nexts:
            asked = {"role": "user", "content": "asked"}
            try:
                before = self._rendered([asked, turn], opens=False)
                after = self._rendered([asked, turn, following], opens=True)
                self.after([following])
            except (TemplateError, TypeError, ValueError) as error:
                raise ValueError(f"the chat template cannot go on once {when}: {error}") from error
            if "thought" in before and "thought" not in after:
                raise ValueError(
                    f"the chat template drops earlier thoughts once {when}, and the policy would learn with them: use one "
                    "that keeps them"
                )
            if "told" not in after:
                raise ValueError(f"the chat template does not show what is said once {when}")

    def prompt(self, messages: Sequence[Message], told: str = "") -> list[int]:
        """Return the tokens of a prompt, with the tools it may call; what the environment `told` ends its last message."""
        if told:
            messages = told_at_end(messages, self._spelled(told))
        return self._encoded(self._rendered(messages, opens=True, tools=self._tools or None))

    def after(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens between a turn of the policy and its next: what tools or a user said, and what frames it.

        Raises ValueError for a template that shows the turn before otherwise because of them.
        """
        is_tools = messages[0]["role"] == "tool"
        stand_in: dict[str, Any] = {"role": "assistant", "content": "" if is_tools else "dummy"}
        if is_tools:  # some templates take the answer's name from the call
            stand_in["tool_calls"] = _call_of(self._spelled(messages[0]["name"]))
        begun = [{"role": "user", "content": "dummy"}, stand_in]
        spelled = [{**m, **{n: self._spelled(m[n]) for n in ("content", "name") if n in m}} for m in messages]
        before = self._before(begun, messages[0]["name"] if is_tools else "")
        whole = self._encoded(self._rendered([*begun, *spelled], opens=True))
        if whole[: len(before)] != before:
            raise ValueError("the chat template shows a turn otherwise once another follows it")
        return whole[len(before) :]

    def _before(self, begun: Sequence[Message], called: str) -> list[int]:
        """Return the tokens up to the end of the stand-in for a turn, which are the same for all that call one tool."""
        if called in self._known:
            return self._known[called]
        before = self._encoded(self._rendered(begun, opens=False))
        # what a template writes behind the end of a turn belongs to what follows; one without such an end ends by itself
        ends = [i for i, token in enumerate(before) if token == self._tokenizer.eos_token_id]
        before = before[: ends[-1] + 1] if ends else before
        if not called or called in self._names:  # others the policy makes up
            self._known[called] = before
        return before

    def parsed(self, ids: Sequence[int], before: Sequence[int]) -> tuple[dict[str, Any], bool]:
        """Return what the policy said as a message, with `tool_calls` where it called, and whether it was malformed, which
        makes it text.

        `before`: the tokens since its last turn, or the prompt.
        """
        if not self._tools:
            return {"role": "assistant", "content": self._tokenizer.decode(ids, skip_special_tokens=True)}, False
        reader: Any = _Reader(self._tokenizer)
        said = parse_response(reader, list(ids), prefix=list(before), tools=self._tools)
        return said, reader.read is None or ("tool_calls" in reader.read and "tool_calls" not in said)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest token, at most: a text of more than so many a token does not fit."""
        return max(map(len, self._tokenizer.get_vocab()))

    @cached_property
    def _marks(self) -> list[str]:
        """The added tokens, longest first: those that a text could be mistaken for; blanks and words are none."""
        added = [str(token) for token in self._tokenizer.added_tokens_decoder.values()]
        return sorted((t for t in added if len(t.strip()) > 2 and not t.isalnum()), key=len, reverse=True)

    @cached_property
    def _mark(self) -> re.Pattern[str] | None:
        return re.compile("|".join(map(re.escape, self._marks))) if self._marks else None

    def _spelled(self, text: str) -> str:
        """Return a text for the template, with numbers in the place of special tokens, and none of its own."""
        text = text.translate(NO_MARKS)
        if self._mark is None or not self._mark.search(text):
            return text
        return self._mark.sub(lambda found: f"{OPENS}{self._marks.index(found[0])}{CLOSES}", text)

    def _encoded(self, text: str) -> list[int]:
        """Return the tokens of a rendered text; what stands for a special token is spelled out."""
        ids: list[int] = []
        for i, part in enumerate(SPELLED.split(text)):
            pieces = [self._marks[int(part)][:1], self._marks[int(part)][1:]] if i % 2 else [part]
            ids += [t for p in pieces for t in self._tokenizer.encode(p, add_special_tokens=False) if p]
        return ids

    def _rendered(self, messages: Sequence[Message], *, opens: bool, tools: Any = None) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            add_generation_prompt=opens,
            tokenize=False,
            chat_template=self._template,
            **self._kwargs,
        )


def told_at_end(messages: Sequence[Message], told: str) -> list[Message]:
    """Return messages whose last ends with what was told; as in TRL a part of its own where it consists of parts."""
    *before, last = messages
    content: Any = last["content"]
    return [
        *before,
        {**last, "content": content + (told if isinstance(content, str) else [{"type": "text", "text": told}])},
    ]


class _Reader:
    """A tokenizer that keeps what it `read` of a turn: TRL takes what it could not read, or could not call, for text."""

    read: Any = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def parse_response(self, *given: Any, **named: Any) -> Any:
        self.read = self._tokenizer.parse_response(*given, **named)
        return self.read


def _read_once(tokenizer: Any) -> dict[str, Any]:
    """Return the response template as it is read, which costs as much as a turn that is parsed by it."""
    if (template := getattr(tokenizer, "response_template", None)) is None:
        return {}
    from transformers.utils.chat_parsing.response_templates import load_response_template  # of those that know any

    return {"schema": load_response_template(template)}


def _parsed_or_refused(parse: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Return what a tokenizer parsed; what is nested too deeply is malformed like other calls."""
    try:
        return parse(*given, **named)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _call_of(name: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": {}}}]
