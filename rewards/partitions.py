"""Which answers of a group say the same: the partitioners behind the diversity reward.

A partitioner has `same(groups, prompts)`, which returns for each group the symmetric matrix [n][n] of "i says what j
says", or None where it could not tell. All groups come at once, so that a model sees one batch.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from polyphony.rewards.answers import fenced_blocks, final_answer
from polyphony.rewards.math import plain_number, undressed
from polyphony.rewards.registry import find
from polyphony.rewards.short_answer import normalise

Same = list[list[bool]]

PARTITIONERS = {
    "answer_signature": "polyphony.rewards.partitions:AnswerSignature",
    "classifier": "polyphony.rewards.partitions:Classifier",
    "embedding": "polyphony.rewards.partitions:Embedding",
    "exact": "polyphony.rewards.partitions:ExactText",
    "judge": "polyphony.rewards.judge:SameMeaning",
    "normalised": "polyphony.rewards.partitions:NormalisedText",
}
"""Registry name to `module:Class`."""


class Partitioner(Protocol):
    """Says which texts of a group belong together."""

    def same(self, groups: Sequence[Sequence[str]], prompts: Sequence[Any]) -> list[Same | None]: ...


def find_partitioner(spec: Any) -> Partitioner:
    """Return the partitioner of a name, of `pkg.module:Class`, of `{name: .., **arguments}`, or the object itself."""
    return find("partitioner", PARTITIONERS, spec)


def connected(same: Same) -> list[int]:
    """Return the class of each text, numbered from 0 by first appearance: the connected components of `same`."""
    classes = list(range(len(same)))
    for i, row in enumerate(same):
        for j in range(i):
            if row[j] and classes[i] != classes[j]:
                old, new = max(classes[i], classes[j]), min(classes[i], classes[j])
                classes = [new if c == old else c for c in classes]
    order = {c: k for k, c in enumerate(dict.fromkeys(classes))}
    return [order[c] for c in classes]


def _same_by(key: Callable[[str], Hashable], groups: Sequence[Sequence[str]]) -> list[Same | None]:
    keys = [[key(text) for text in group] for group in groups]
    return [[[a == b for b in group] for a in group] for group in keys]


class ExactText:
    """Two texts are the same if they are equal but for outer white space."""

    def same(self, groups: Sequence[Sequence[str]], prompts: Sequence[Any]) -> list[Same | None]:
        return _same_by(str.strip, groups)


class NormalisedText:
    """Two texts are the same if they differ in case, punctuation, articles and white space only."""

    def same(self, groups: Sequence[Sequence[str]], prompts: Sequence[Any]) -> list[Same | None]:
        return _same_by(normalise, groups)


class AnswerSignature:
    """Two texts are the same if they come to the same answer: number, words, or program but for its layout."""

    def same(self, groups: Sequence[Sequence[str]], prompts: Sequence[Any]) -> list[Same | None]:
        return _same_by(answer_signature, groups)


def answer_signature(text: str) -> Hashable:
    """Return what a text comes to: its final answer, else its last program's syntax tree, else its normalised words."""
    answer = final_answer(text)
    if answer is not None:
        number = plain_number(undressed(answer))
        return ("text", normalise(undressed(answer))) if number is None else ("number", number)
    for language, block in reversed(fenced_blocks(text)):
        if language in ("", "py", "python", "python3"):
            try:
                return "program", ast.dump(ast.parse(block))
            except (SyntaxError, ValueError, MemoryError, RecursionError):
                break
    return "text", normalise(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """Two texts are the same if the cosine of their sentence embeddings reaches a threshold (sentence-transformers)."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A name, a folder, or `module:function` that returns a folder (a model installed as a package)."""
    threshold: float = 0.8
    """Paraphrases of a sentence lie above, other sentences on its subject below; models differ: look at pairs."""
    device: str | None = None
    batch_size: int = 32
    threads: int | None = None
    """CPU threads while it embeds, when nothing else of a run computes; None leaves torch's setting."""

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"embedding: threshold is a cosine in [-1, 1], got {self.threshold}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"embedding: threads must be at least 1, got {self.threads}")

    def same(self, groups: Sequence[Sequence[str]], prompts: Sequence[Any]) -> list[Same | None]:
        texts = [text for group in groups for text in group]
        if not texts:
            return [[] for _ in groups]
        model = _sentence_model(self.model, self.device)
        with _torch_threads(self.threads):
            vectors = model.encode(
                texts, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        return list(self._compare(groups, vectors))

    def _compare(self, groups: Sequence[Sequence[str]], vectors: Any):
        start = 0
        for group in groups:
            part = vectors[start : start + len(group)]
            start += len(group)
            yield (part @ part.T >= self.threshold).tolist()


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Give torch so many CPU threads for a while."""
    import torch  # slow to import

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _sentence_model(model: str, device: str | None) -> Any:
    from sentence_transformers import SentenceTransformer  # slow to import

    place = pkgutil.resolve_name(model)() if ":" in model and "://" not in model else model
    return SentenceTransformer(str(place), device=device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Classifier:
    """Two texts are the same if a classifier of text pairs gives that more than even odds (DARLING, arXiv:2509.02534).

    Any sequence-classification checkpoint whose input is a pair. Like DARLING's it does not see the prompt, and two
    texts of at most five words are compared by shared words instead.
    """

    model: str
    """A name or a folder."""
    same_label: int = 1
    """Index of the label "similar"; a checkpoint with one label gives its odds."""
    max_tokens: int = 4096
    """For both texts together; each is cut to half."""
    device: str | None = None
    batch_size: int = 32

    def same(self, groups: Sequence[Sequence[str]], prompts: Sequence[Any]) -> list[Same | None]:
        pairs = [(a, b) for group in groups for i, a in enumerate(group) for b in group[:i] if a != b]
        hard = [pair for pair in dict.fromkeys(pairs) if shared_words(*pair) is None]
        verdicts = dict(zip(hard, self._classify(hard), strict=True))
        return [
            symmetric(group, lambda a, b: verdicts[a, b] if (quick := shared_words(a, b)) is None else quick)
            for group in groups
        ]

    def _classify(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        import torch  # slow to import

        model, tokenizer = _pair_model(self.model, self.device)
        verdicts: list[bool] = []
        for start in range(0, len(pairs), self.batch_size):
            batch = [self._cut(tokenizer, pair) for pair in pairs[start : start + self.batch_size]]
            inputs = tokenizer([a for a, _ in batch], [b for _, b in batch], padding=True, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**inputs.to(model.device)).logits.float()
            odds = logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self.same_label]
            verdicts += (odds > 0.5).tolist()
        return verdicts

    def _cut(self, tokenizer: Any, pair: tuple[str, str]) -> tuple[str, str]:
        half = (min(self.max_tokens, tokenizer.model_max_length) - 4) // 2  # room for the special tokens
        cut = [
            tokenizer(text, add_special_tokens=False, truncation=True, max_length=half)["input_ids"] for text in pair
        ]
        return tokenizer.decode(cut[0]), tokenizer.decode(cut[1])


@functools.cache
def _pair_model(model: str, device: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # slow to import

    network: Any = AutoModelForSequenceClassification.from_pretrained(model).eval()
    return network.to(device) if device else network, AutoTokenizer.from_pretrained(model)


def shared_words(a: str, b: str, most: int = 5) -> bool | None:
    """Compare two short texts by the words they share (DARLING's released code); None where one is longer."""
    ours, theirs = a.lower().split(), b.lower().split()
    longest = max(len(ours), len(theirs))
    return None if longest > most else 2 * len(set(ours) & set(theirs)) >= longest


def symmetric(group: Sequence[str], same: Callable[[str, str], bool]) -> Same:
    """Return the matrix of a relation asked once a pair, as same(later, earlier); everything is the same as itself."""
    matrix = [[True] * len(group) for _ in group]
    for i, text in enumerate(group):
        for j, other in enumerate(group[:i]):
            matrix[i][j] = matrix[j][i] = text == other or same(text, other)
    return matrix
