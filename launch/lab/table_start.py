"""Rebuild the policy that acts: `python -m polyphony.launch.lab.table_start [--seed 0] [--out launch/lab/table_policy]`.

Like `warm_start`, with a template that shows tools and a `response_template` that reads calls: a small Qwen3 is taught to
ask the lab's table, then the flawed habits that it ends with. It guesses, asks for the wrong cell, takes the first answer
for the last, gives up on a call that failed: each step is right about every other time, so that two calls seldom are.
Forty seconds of processor time; on one thread the same seed gives the same weights, as there.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from polyphony.launch.lab.table import FAILS, NUMBERS, PEOPLE, RELATIONS, WORDS, Table
from polyphony.launch.lab.warm_start import (
    BATCH,
    END,
    ROLES,
    SKILLS_UNTIL,
    build_model,
    build_tokenizer,
    fit,
    padded,
    save_policy,
)

MARKS = (*ROLES, "<|tool|>", "<|call|>")
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for tool in tools or [] %}{{ '<|system|>' + tool.function.name }}"
    "{% for name in tool.function.parameters.properties %}{{ ' ' + name }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '<|call|>' + call.function.name }}"
    "{% for name, value in call.function.arguments.items() %}{{ ' ' + name + '=' + value }}{% endfor %}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RESPONSE_TEMPLATE: Mapping[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<\|call\|>(?P<name>[a-z]+)",
            "close_pattern": r"<\|end\|>|(?=<\|call\|>)|$",
            "repeats": True,
            "content": "kv-lines",
            "content_args": {"line_sep": " ", "kv_sep": "="},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<\|end\|>", "content": "text"},
    },
}
"""`<|call|>look who=ada what=room` is a call, any number of them; what stands before is text."""

ASKS, ASKS_RIGHT, ASKS_AGAIN, GOES_ON, COPIES = 0.75, 0.7, 0.4, 0.5, 0.8
"""Shares of turns, at the end of the warm start, that call where they should; of calls for the right cell; of failed calls
that are made again; of first answers of two that are followed up; of last answers that are told as they are."""
WIDTH, STEPS, ROWS = 64, 400, 4000


def build_table_tokenizer() -> Any:
    """Return the tokenizer, with what it reads calls by."""
    tokenizer = build_tokenizer(words=WORDS, marks=MARKS, chat_template=CHAT_TEMPLATE)
    tokenizer.response_template = dict(RESPONSE_TEMPLATE)
    return tokenizer


class Teaching:
    """Episodes as they are taught, in tokens: of prompts and answers those that a rollout has.

    Example: `ids, learned = Teaching(tokenizer).episode(row, random.Random(0), is_flawed=False)`
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tools = [get_json_schema(Table().look)]
        self._ids = lru_cache(None)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self._asked = lru_cache(None)(self._prompt)

    def _prompt(self, question: str) -> str:
        message = {"role": "user", "content": question}
        return self._tokenizer.apply_chat_template(
            [message], tools=self._tools, add_generation_prompt=True, tokenize=False
        )

    def episode(self, row: Mapping[str, Any], chance: random.Random, *, is_flawed: bool) -> tuple[list[int], list[int]]:
        """Return the token ids of prompt and episode, and a mask of those that the policy says."""
        ids = list(self._ids(self._asked(row["prompt"])))
        learned = [0] * len(ids)
        for said, told in turns(row, chance, is_flawed=is_flawed):
            own = self._ids(f"{said}{END}")
            after = [] if told is None else self._ids(f"<|tool|>{told}{END}<|assistant|>")
            ids, learned = [*ids, *own, *after], [*learned, *[1] * len(own), *[0] * len(after)]
        return ids, learned


def turns(row: Mapping[str, Any], chance: random.Random, *, is_flawed: bool) -> list[tuple[str, str | None]]:
    """Return what the policy says in each turn, and what the tool answers; None at the end."""
    table, found = Table(), []
    table.reset(row["table"], row["late"])
    who, *path = reversed(row["prompt"].removesuffix(" ?").split(" of "))
    right = (lambda share: chance.random() < share) if is_flawed else (lambda share: True)
    for n, what in enumerate(path):
        if not right(GOES_ON if n else ASKS):
            return [*found, (who if n and chance.random() < 0.5 else _guess(chance), None)]
        if not right(ASKS_RIGHT):
            who, what = _other_cell(who, what, chance)
        for attempt in range(2):
            if attempt and not right(ASKS_AGAIN):
                return [*found, (FAILS if chance.random() < 0.5 else _guess(chance), None)]
            answer = _answer(table, who, what)
            found.append((f"<|call|>look who={who} what={what}", answer))
            if "error" not in answer:
                break
        who = found[-1][1]
        if n + 1 < len(path) and who not in PEOPLE:
            break
    return [*found, (who if right(COPIES) else _retold(who, chance), None)]


def _answer(table: Table, who: str, what: str) -> str:
    try:
        return table.look(who, what)
    except RuntimeError as error:
        return str({"error": str(error)})


def _guess(chance: random.Random) -> str:
    return str(chance.randint(10, 99))


def _other_cell(who: str, what: str, chance: random.Random) -> tuple[str, str]:
    """Return a cell that nobody asked for: of somebody else, or another of the same person's."""
    if chance.random() < 0.5:
        return chance.choice(PEOPLE), what
    return who, chance.choice((*NUMBERS, *RELATIONS))


def _retold(answer: str, chance: random.Random) -> str:
    return chance.choice((f"it is {answer}", _guess(chance)))


def train_table_policy(*, seed: int, steps: int = STEPS) -> tuple[Any, Any]:
    """Return (model, tokenizer) after `steps` supervised steps."""
    import torch  # slow to import

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    tokenizer = build_table_tokenizer()
    model = build_model(len(tokenizer), tokenizer, width=WIDTH)
    teaching, chance = Teaching(tokenizer), random.Random(f"table start/{seed}")
    rows = list(Table.rows(ROWS, -1 - seed))

    def parts(step: int) -> list[dict[str, Any]]:
        is_flawed = step >= SKILLS_UNTIL * steps
        shown = [teaching.episode(chance.choice(rows), chance, is_flawed=is_flawed) for _ in range(BATCH)]
        shown.sort(key=lambda pair: len(pair[0]))
        return [padded(part, padding=tokenizer.pad_token_id) for part in (shown[: BATCH // 2], shown[BATCH // 2 :])]

    fit(model, parts, steps=steps)
    return model.eval(), tokenizer


def main() -> None:
    """Rebuild the committed policy, or one of another seed."""
    parser = argparse.ArgumentParser(description="Rebuild the lab's policy that acts.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "table_policy")
    arguments = parser.parse_args()
    model, tokenizer = train_table_policy(seed=arguments.seed)
    save_policy(model, tokenizer, arguments.out)
    print(f"{model.num_parameters():,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
