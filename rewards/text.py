"""The text of a completion, whether TRL hands it over as a string or as messages."""

from __future__ import annotations


def completion_text(completion: str | list[dict]) -> str:
    """Return the text: the string itself, or the contents of the assistant's messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")
