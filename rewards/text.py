"""The text of a completion, whether TRL hands it over as a string or as messages."""

from __future__ import annotations

import re
import textwrap

_FENCE = re.compile(r"^[ \t]{0,3}```[ \t]{0,3}([\w+-]*)[^\n]*\n", re.MULTILINE)

_CLOSING = re.compile(r"\n[ \t]{0,3}```")


def completion_text(completion: str | list[dict]) -> str:
    """Return the text: the string itself, or the contents of the assistant's messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of each fenced block in order; a block that is cut off reaches to the end."""
    blocks, position = [], 0
    while opening := _FENCE.search(text, position):
        closing = _CLOSING.search(text, opening.end() - 1)
        content = text[opening.end() : closing.start() if closing else None]
        indented = opening[0][0] in " \t"  # a block of a list's entry
        blocks.append((opening[1].lower(), textwrap.dedent(content) if indented else content))
        position = closing.end() if closing else len(text)
    return blocks
