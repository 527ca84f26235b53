"""Rewards for how something is said, and their composition with what is said.

`format`, `length`, `repetition` and `language` never look at the reference. `weighted` adds rewards up and keeps each
as a number of its own (`components`), so "well formed" and "correct" are never one curve.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from polyphony.rewards.answers import completion_text
from polyphony.rewards.partitions import answer_signature
from polyphony.rewards.registry import ask, declared_range, find_reward, settled
from polyphony.rewards.style import repeated_ngram_share, script_shares


def has_think_answer_format(text: str) -> bool:
    """Say whether a text is one thought and then one answer, in their tags and nothing else.

    The opening `<think>` may be missing: many chat templates put it into the prompt.
    """
    if text.count("</think>") != 1 or text.count("<think>") > 1:
        return False
    thought, _, rest = text.strip().partition("</think>")
    rest = rest.strip()
    return (
        (thought.startswith("<think>") or "<think>" not in thought)
        and bool(thought.removeprefix("<think>").strip())
        and rest.startswith("<answer>")
        and rest.endswith("</answer>")
        and rest.count("<answer>") == rest.count("</answer>") == 1
        and bool(rest.removeprefix("<answer>").removesuffix("</answer>").strip())
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """1.0 where the completion is well formed, else 0.0."""

    pattern: str | None = None
    """A regular expression that the whole completion must match (`.` matches newlines). None asks for one `<think>`
    thought and one `<answer>`."""

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"format: pattern {self.pattern!r} is no regular expression: {error}") from None

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        return [float(self.is_valid(completion_text(completion))) for completion in completions]

    def is_valid(self, text: str) -> bool:
        """Say whether one text is well formed."""
        if self.pattern is None:
            return has_think_answer_format(text)
        return re.fullmatch(self.pattern, text, re.DOTALL) is not None


SOFT_PART = 5
"""Of its limit that part of a completion is punished for which is told nothing else (DAPO)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """0 up to a length, then linearly down to -1 at the limit (DAPO's soft overlong punishment, arXiv:2503.14476)."""

    max_tokens: int | None = None
    """Where the punishment is whole. None: in a domain, its `max_completion_length`."""
    soft_tokens: int | None = None
    """How long before that it begins. None: a fifth of it, as DAPO's 4,096 before 20,480."""
    range: ClassVar[tuple[float, float]] = (-1.0, 0.0)

    def __post_init__(self) -> None:
        most, soft = self.max_tokens, self.soft_tokens
        if min(soft or 1, most or 1) < 1 or 0 in (soft, most) or (soft and most and soft > most):
            raise ValueError(f"length: needs 0 < soft_tokens <= max_tokens, got {soft} and {most}")

    def __call__(
        self, prompts: list, completions: list, completion_ids: list | None = None, **columns: Any
    ) -> list[float | None]:
        if completion_ids is None or any(
            not ids and completion_text(completion) for ids, completion in zip(completion_ids, completions, strict=True)
        ):
            raise ValueError("length: needs completion_ids, the tokens of each completion")
        if self.max_tokens is None:
            raise ValueError(
                "length: needs max_tokens: there is no domain here whose max_completion_length it would be"
            )
        soft = max(1, self.max_tokens // SOFT_PART) if self.soft_tokens is None else self.soft_tokens
        over = [len(ids) - (self.max_tokens - soft) for ids in completion_ids]
        return [0.0 - min(max(tokens, 0) / soft, 1.0) for tokens in over]  # 0.0, and not -0.0, for none


@dataclass(frozen=True, kw_only=True, slots=True)
class Repetition:
    """Minus the share of word n-grams that were said before: 0 for none, towards -1 for a loop."""

    n: int = 3
    """Words; 3 punishes phrases, not vocabulary."""
    range: ClassVar[tuple[float, float]] = (-1.0, 0.0)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"repetition: n must be at least 1, got {self.n}")

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        return [0.0 - repeated_ngram_share(completion_text(completion), self.n) for completion in completions]


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """The share of the letters that belongs to the expected writing systems; 0.0 for an empty completion."""

    scripts: Sequence[str] = ("LATIN", "GREEK")
    """Unicode's names: LATIN, GREEK, CYRILLIC, CJK, HIRAGANA, KATAKANA, HANGUL, ARABIC, HEBREW, DEVANAGARI, .."""

    def __post_init__(self) -> None:
        if isinstance(self.scripts, str) or not self.scripts or not all(map(str.isupper, self.scripts)):
            raise ValueError(f"language: scripts is a list of names in capitals like LATIN, got {self.scripts!r}")

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        return [self._share(completion_text(completion)) for completion in completions]

    def _share(self, text: str) -> float:
        shares = script_shares(text)
        if not shares:
            return float(bool(text.strip()))
        return sum(shares.get(script, 0.0) for script in self.scripts)


class Weighted:
    """A sum of rewards, each under a name of its own.

    Example: `Weighted(parts={"correct": {"reward": "math", "weight": 0.9}, "format": {"reward": "format", "weight":
    0.1}})`. A weight of 0 only measures. Where a part with weight is None, so is the sum: the rest would be a guess; with
    `missing="part"` that part is left out, as TRL does, where a part says None of rows that it is not for.
    Each part is logged under its name.
    """

    def __init__(self, *, parts: Mapping[str, Mapping[str, Any]], missing: Literal["sum", "part"] = "sum") -> None:
        for name, part in parts.items():
            if set(part) - {"reward", "weight"} or "reward" not in part:
                raise ValueError(f"weighted: part {name!r} needs reward and weight, got {sorted(part)}")
        if not parts:
            raise ValueError("weighted: needs at least one part")
        self.rewards = _found(parts)
        self.weights = {name: float(part.get("weight", 1.0)) for name, part in parts.items()}
        if not all(map(math.isfinite, self.weights.values())) or not any(self.weights.values()):
            raise ValueError(f"weighted: weights must be finite and one of them not 0, got {self.weights}")
        self.missing = missing
        ends = [
            sorted(weight * end for end in declared_range(parts[name]["reward"], self.rewards[name]))
            for name, weight in self.weights.items()
        ]
        low, high = (round(sum(side), 9) for side in zip(*ends, strict=True))  # .7 + .2 + .1 is one
        self.range = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
        """Where sums may lie: [0, 1] where that holds them."""

    @property
    def is_slow(self) -> bool:
        return any(getattr(reward, "is_slow", False) for reward in self.rewards.values())

    def check_host(self) -> None:
        """Raise ValueError where a part can not grade on this host."""
        for part in self.rewards.values():
            getattr(part, "check_host", lambda: None)()

    def components(
        self, prompts: list, completions: list, completion_ids: Any = None, **columns: Any
    ) -> dict[str, list[float | None]]:
        """Return what each part says, by name; asynchronous parts run together."""
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        results = settled([ask(reward, arguments) for reward in self.rewards.values()])
        return dict(zip(self.rewards, (list(getattr(r, "detach", lambda r=r: r)()) for r in results), strict=True))

    def is_valid(self, text: str) -> bool:
        """Say whether a text has the form that each part asks for."""
        return all(part.is_valid(text) for part in self.rewards.values() if hasattr(part, "is_valid"))

    def unreadable(self, **columns: Any) -> str | None:
        """Return why a part can not read a row's reference; None where all can."""
        parts = [part for part in self.rewards.values() if hasattr(part, "unreadable")]
        return next((why for part in parts if (why := part.unreadable(**columns)) is not None), None)

    def remark(self, **columns: Any) -> str | None:
        """Return with which reservation a part grades a row; None where none has one."""
        parts = [part for part in self.rewards.values() if hasattr(part, "remark")]
        return next((why for part in parts if (why := part.remark(**columns)) is not None), None)

    def reads(self, completion: Any, prompt: Any = None, /, **columns: Any) -> Hashable:
        """Return what the parts with weight read; what the text comes to where none of them says what it reads."""
        readers = [part for name, part in self.rewards.items() if self.weights[name] and hasattr(part, "reads")]
        readings = [part.reads(completion, prompt, **columns) for part in readers]
        if not readers:
            return answer_signature(completion_text(completion))
        return tuple(readings) if any(reading is not None for reading in readings) else None

    def combine(self, components: Mapping[str, Sequence[float | None]]) -> list[float | None]:
        """Return the weighted sum of what the parts said."""
        parts = [(self.weights[name], values) for name, values in components.items() if self.weights[name]]
        return [
            self._sum([(w, v) for (w, _), v in zip(parts, row, strict=True)])
            for row in zip(*(values for _, values in parts), strict=True)
        ]

    def _sum(self, terms: Sequence[tuple[float, float | None]]) -> float | None:
        known = [(weight, value) for weight, value in terms if value is not None and value == value]  # no NaN
        if not known or (self.missing == "sum" and len(known) < len(terms)):
            return None
        return sum(weight * value for weight, value in known)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        hooks = {"log_metric": log_metric} if log_metric else {}
        components = self.components(prompts, completions, completion_ids, **hooks, **columns)
        if log_metric is not None:
            for name, values in components.items():
                for value in values:
                    if value is not None:
                        log_metric(name, float(value))
        return self.combine(components)


def _found(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the reward of each part. Raises ValueError with all that cannot be had, by place and name."""
    found, faults = {}, []
    for place, (name, part) in enumerate(parts.items()):
        try:
            found[name] = find_reward(part["reward"])
        except ValueError as error:
            faults.append(f"part {place} ({name}): {error}")
    if faults:
        raise ValueError("; ".join(faults))
    return found


def within(reward: Any, limit: int) -> Any:
    """Return what names a reward, with a domain's limit as `max_tokens` of each `length` in it that says none.

    Example: `within({"name": "length"}, 512)["max_tokens"]` is 512
    """
    if isinstance(reward, list | tuple):
        return [within(one, limit) for one in reward]
    name = reward.get("name") if isinstance(reward, Mapping) else reward
    if name == "length":
        own = dict(reward) if isinstance(reward, Mapping) else {"name": name}
        return own if own.get("max_tokens") is not None else {**own, "max_tokens": limit}
    parts = reward.get("parts") if isinstance(reward, Mapping) and name == "weighted" else None
    if not isinstance(parts, Mapping):
        return reward
    bounded = {k: {**p, "reward": within(p["reward"], limit)} if _has_one(p) else p for k, p in parts.items()}
    return {**reward, "parts": bounded}


def _has_one(part: Any) -> bool:
    return isinstance(part, Mapping) and "reward" in part
