"""Training rows that give a held-out row away: the same prompt, or a long run of the same words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from polyphony.trainer.data import PromptTable, prompt_text

NGRAM_WORDS = 13
"""Words in a row that two prompts may not share; 13 is the length GPT-3's decontamination used (arXiv:2005.14165)."""
BOILERPLATE_SHARE = 0.01
"""An n-gram in more than this share of the held-out rows (and in more than two) is a template, not a leak."""


def find_overlap(train: PromptTable, heldout: Iterable[PromptTable]) -> set[str]:
    """Return the ids of training prompts that repeat a held-out prompt of any domain, or a long run of its words."""
    texts = [_normalise(prompt_text(p.prompt)) for table in heldout for p in table]
    whole = set(texts)
    counts = Counter(gram for text in texts for gram in set(_ngrams(text)))
    most = max(2, BOILERPLATE_SHARE * len(texts))
    grams = {gram for gram, count in counts.items() if count <= most}
    return {p.id for p in train if _overlaps(_normalise(prompt_text(p.prompt)), whole, grams)}


def _overlaps(text: str, whole: set[str], grams: set[str]) -> bool:
    return text in whole or any(gram in grams for gram in _ngrams(text))


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def _ngrams(text: str) -> Iterator[str]:
    words = text.split()
    return (" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1))
