"""The lab's policy as one that calls tools: its digits are calls, by a template and a response template of these tests."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from tests.conftest import POLICY

TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for tool in tools or [] %}{{ '<|system|>' + tool.function.name + '<|end|>' }}{% endfor %}"
    "{% for message in messages %}"
    "{{ '<|' + ('system' if message.role == 'tool' else message.role) + '|>' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name + ' ' + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ANSWERS: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"(?=-?[0-9])",
            "close_pattern": r"<\|end\|>|$",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "look", "arguments": {"what": "{content}"}}},
        },
        "content": {"close_pattern": r"<\|end\|>", "content": "text"},
    },
}
"""A turn that begins with a digit calls `look`, with all that it says."""

SPELLED = {"open": "call ", "close_pattern": r";|<\|end\|>|$", "repeats": True, "content": "json"}
AS_JSON = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": SPELLED | {"transform": {"type": "function", "function": "{content}"}},
        "content": {"close_pattern": r"<\|end\|>", "content": "text"},
    },
}
"""`call {"name": .., "arguments": {..}};` is a call, any number of them."""


def tokenizer(answers: Any = ANSWERS) -> Any:
    """Return the lab's, with calls."""
    found = AutoTokenizer.from_pretrained(POLICY)
    found.chat_template, found.response_template = TEMPLATE, answers
    return found
