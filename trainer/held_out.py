"""Which of some rows are held out, where nobody has said it: by their prompts, alike in every process and machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

HELD, FEWEST, MOST = 0.1, 16, 256
"""Share of a domain's prompts that is held out, and within which bounds; never more than half."""


def prompt_key(prompt: Any) -> str:
    """Return the same digits for the same prompt."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()


def held_out(prompts: Sequence[Any]) -> list[bool]:
    """Return for each row whether it is held out; rows with one prompt are on one side, whatever their order.

    Example: `sum(held_out([f"{i} + 1 =" for i in range(40)]))` is 16
    """
    keys = [prompt_key(prompt) for prompt in prompts]
    different = sorted(set(keys))
    held = set(different[: min(MOST, max(FEWEST, int(HELD * len(different))), len(different) // 2)])
    return [key in held for key in keys]
