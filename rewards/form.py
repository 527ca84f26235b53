"""How a completion is written, whatever it says: its output style, and whether its grader could read it at all.

Reinforcement learning tends to settle on one style among those of pretraining (arXiv:2504.07912); the share of the
commonest one is its sign.
"""

from __future__ import annotations

import re
from typing import Any

from polyphony.rewards.answers import ANSWER_WORDS
from polyphony.rewards.registry import Reward
from polyphony.rewards.text import fenced_blocks

BARE_WORDS = 8
"""A single line of at most as many words is an answer without any work."""

_STYLES = {
    "tool call": re.compile(r"<tool_call>"),
    "think and answer": re.compile(r"</think>|<answer>"),
    "boxed": re.compile(r"\\boxed ?\{"),
    "marked answer": re.compile(f"{ANSWER_WORDS}|####", re.IGNORECASE),
    "json": re.compile(r"\A\s*[\[{].*[\]}]\s*\Z", re.DOTALL),
    "list": re.compile(r"(?:^[ \t]*(?:[-*•]|\d+[.)])[ \t]+\S.*\n?){2}", re.MULTILINE),
    "latex": re.compile(r"\\(?:frac|sqrt|begin|cdot|times)\b|\$[^$\n]+\$"),
}


def style(text: str) -> str:
    """Return the output style of a text: the first that fits of code, the styles above, `bare` and `prose`."""
    if not text.strip():
        return "empty"
    if fenced_blocks(text):
        return "code"
    for name, pattern in _STYLES.items():
        if pattern.search(text):
            return name
    is_bare = "\n" not in text.strip() and len(text.split()) <= BARE_WORDS
    return "bare" if is_bare else "prose"


def is_valid(text: str, reward: Reward | Any, *, truncated: bool) -> bool:
    """Say whether a completion came to its end, says something, and has the form that its reward asks for.

    A reward asks for a form by having a method `is_valid(text)`; `math`, `function_call`, `format` and `weighted` do.
    """
    if truncated or not text.strip():
        return False
    asks = getattr(reward, "is_valid", None)
    return True if asks is None else bool(asks(text))
