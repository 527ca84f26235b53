"""How a completion is written: signs of a shortcut or a loop, its output style, whether its grader could read it.

Pure functions of a completion's text and length. The paper behind the signs (arXiv:2605.28388) names the behaviours;
the thresholds are ours: an answer said three times or more, repeated 8-grams, a response far shorter than correct ones
are, an answer with nothing before it. Lengths in tokens where a tokenizer counted them, in words here. A text that
loops shows two signs: its repeated 8-grams count by themselves and as `answer_repetition`.

Reinforcement learning tends to settle on one style among those of pretraining (arXiv:2504.07912); the share of the
commonest one is its sign.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from polyphony.rewards.answers import ANSWER_WORDS, fenced_blocks, final_answer
from polyphony.rewards.registry import Reward

REPEATED_ANSWERS = 3


REPEATED_NGRAM_SHARE = 0.3


SHORT_OF_MEDIAN = 0.35


REASONING_TOKENS = 32


FEW_STEPS, MANY_STEPS = 2, 4


_STEP = re.compile(r"=|\\frac|\\times|\\cdot|(?<=\d)\s?[-+*/×÷^]\s?(?=\d)")


_WORD = re.compile(r"[\u3040-\u9fff]|[^\s\u3040-\u9fff]+")


_MARK = re.compile(rf"<answer>|\\boxed ?\{{|{ANSWER_WORDS}|####", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Degeneration:
    """Which signs one completion shows."""

    answer_repetition: bool
    repeated_ngrams: bool
    computation_skipping: bool
    bare_answer: bool
    language_mixing: bool


def degeneration(
    text: str, *, tokens: int | None = None, median_correct_tokens: float = math.nan, reference: str | None = None
) -> Degeneration:
    """Return the signs a completion shows.

    `tokens` is its length (None counts words), `median_correct_tokens` its domain's running median over correct
    completions in the same unit (NaN: not known yet), `reference` a worked solution where the row has one.
    """
    length = len(text.split()) if tokens is None else tokens
    loops = repeated_ngram_share(text, 8) > REPEATED_NGRAM_SHARE
    return Degeneration(
        answer_repetition=loops or repeats_answer(text),
        repeated_ngrams=loops,
        computation_skipping=skips_computation(text, length, median_correct_tokens, reference),
        bare_answer=is_bare_answer(text, length),
        language_mixing=mixes_languages(text),
    )


def repeats_answer(text: str) -> bool:
    """Say whether the final answer occurs three times or more after it was first marked.

    Counted from the first marker on, as whole words: a number of the problem may well be its answer.
    """
    answer, mark = final_answer(text), _MARK.search(text)
    if not answer or not mark:
        return False
    return len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", text[mark.start() :])) >= REPEATED_ANSWERS


def repeated_ngram_share(text: str, n: int) -> float:
    """Return the share of the n-grams of words that occurred before in the text; 0 for a text shorter than n words.

    A character of a script that puts no spaces between its words counts as a word.
    """
    words = _WORD.findall(text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def skips_computation(text: str, length: int, median_correct: float, reference: str | None = None) -> bool:
    """Say whether a response is much shorter than correct ones are, or lacks the steps that a worked solution has."""
    if length < SHORT_OF_MEDIAN * median_correct:
        return True
    return reference is not None and count_steps(reference) >= MANY_STEPS and count_steps(reasoning(text)) < FEW_STEPS


def is_bare_answer(text: str, length: int) -> bool:
    """Say whether a marked answer has fewer than 32 tokens before it; `length` is the whole text's, in tokens."""
    return bool(_MARK.search(text)) and length * len(reasoning(text)) < REASONING_TOKENS * len(text)


def reasoning(text: str) -> str:
    """Return what stands before the first answer marker; all of it where there is none."""
    mark = _MARK.search(text)
    return text[: mark.start()] if mark else text


def count_steps(text: str) -> int:
    """Return how many equations and operations on numbers a text shows."""
    return len(_STEP.findall(text))


def script_shares(text: str) -> dict[str, float]:
    """Return the share of a text's letters per writing system (LATIN, CJK, CYRILLIC, ..); empty without letters."""
    counts: dict[str, int] = {}
    for character in text:
        if character.isalpha():
            script = _script(character)
            counts[script] = counts.get(script, 0) + 1
    total = sum(counts.values())
    return {script: count / total for script, count in counts.items()}


def mixes_languages(text: str, *, scripts: Sequence[str] = ("LATIN", "GREEK"), tolerated: float = 0.05) -> bool:
    """Say whether more than the tolerated share of the letters belongs to other writing systems than the expected."""
    return sum(share for script, share in script_shares(text).items() if script not in scripts) > tolerated


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    name = unicodedata.name(character, "UNKNOWN")
    return "LATIN" if name.startswith(("MATHEMATICAL", "FULLWIDTH LATIN")) else name.split()[0]


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
