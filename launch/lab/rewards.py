"""How the lab grades stories: by rules that a program can check. The other domains use the reward `exact`."""

from __future__ import annotations

import re
from typing import Any

from polyphony.launch.lab.world import VIVID, WORD_CLASS
from polyphony.rewards.answers import completion_text

SENTENCE = re.compile(r"DA?NVR?(PDA?N)?")
"""Classes of a well-formed sentence: "the (old) fox ran (softly) (in the (misty) forest)"."""

ENOUGH_SENTENCES = 2
ENOUGH_VIVID_WORDS = 4


class StoryRubric:
    """Grade a story in [0, 1]: form x (asked + variety + vividness) / 3.

    form: different well-formed sentences, out of the larger of two and all that were begun; asked: share of the hero
    and the place that are named; variety: share of content words that are not repeats; vividness: different vivid
    words, four being enough. So a repeated sentence, an echo of the prompt or a list of fine words earns little.

    Example: "the fox ran . the fox ran ." about a fox in a cave: form 1/2, asked 1/2, variety 2/4, vividness 0: 1/6.
    """

    def __call__(self, prompts: list, completions: list, hero: list, place: list, **columns: Any) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        return [story_score(text, hero=h, place=p) for text, h, p in zip(texts, hero, place, strict=True)]


def story_score(text: str, *, hero: str, place: str) -> float:
    """Return the rubric's score of one story; 0.0 for an empty one."""
    *finished, rest = [part.split() for part in text.split(".")]
    good = {tuple(words) for words in finished if SENTENCE.fullmatch(_classes(words))}
    begun = len(finished) + bool(rest)
    if not good:
        return 0.0
    words = [word for words in finished for word in words]
    content = [word for word in words if WORD_CLASS.get(word, "?") in "ANVR"]
    form = len(good) / max(ENOUGH_SENTENCES, begun)
    asked = ((hero in words) + (place in words)) / 2
    variety = len(set(content)) / len(content)
    vividness = min(1.0, len(VIVID.intersection(content)) / ENOUGH_VIVID_WORDS)
    return form * (asked + variety + vividness) / 3


def _classes(words: list[str]) -> str:
    return "".join(WORD_CLASS.get(word, "?") for word in words)
