"""The text of a completion, whether TRL hands it over as a string or as messages."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]{0,3}```[ \t]{0,3}([\w+-]*)[^\n]*\n", re.MULTILINE)


def completion_text(completion: str | list[dict]) -> str:
    """Return the text: the string itself, or the contents of the assistant's messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of each fenced block in order; a block that is cut off reaches to the end."""
    blocks, position = [], 0
    while opening := _FENCE.search(text, position):
        end = text.find("\n```", opening.end() - 1)
        blocks.append((opening[1].lower(), text[opening.end() : None if end < 0 else end]))
        position = len(text) if end < 0 else end + len("\n```")
    return blocks
