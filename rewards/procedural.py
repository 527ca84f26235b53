"""`procedural`: questions made by rule, at any difficulty and in any number, with a scorer that knows the rule.

`rows` makes a domain of any reasoning-gym dataset (arXiv:2505.24760), or of `composition`; in a recipe:
`train: {generator: "polyphony.rewards.procedural:rows", dataset: chain_sum, split: train, size: 1000, config: {..}}`.

`composition` is f(g(x)): string functions with made-up names, composed to a depth. After "From f(x) and g(x) to
f(g(x))" (arXiv:2509.25123); the functions are ours. Skills are taught with their definitions in sight (depth 1) and
then asked for without them; whether deeper compositions follow from shallower ones is the measurement. The truth is
computed, so nothing can leak from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from polyphony.rewards.answers import answer_region, final_answer
from polyphony.rewards.registry import tell
from polyphony.rewards.workers import JobError, shared_workers

logger = logging.getLogger(__name__)


ATOMS: dict[str, tuple[str, Callable[[str], str]]] = {
    "blen": ("reverses the string", lambda s: s[::-1]),
    "dorp": ("moves the first letter to the end", lambda s: s[1:] + s[:1]),
    "fask": ("moves the last letter to the front", lambda s: s[-1:] + s[:-1]),
    "gume": ("swaps each pair of neighbouring letters", lambda s: _swap_pairs(s)),
    "hilb": ("drops the first letter", lambda s: s[1:]),
    "jent": ("drops the last letter", lambda s: s[:-1]),
    "kroy": ("writes the first letter twice", lambda s: s[:1] + s),
    "lusp": ("appends the letter z", lambda s: s + "z"),
    "mave": ("replaces each letter by the next of the alphabet, z by a", lambda s: _shift(s, 1)),
    "nirt": ("replaces each letter by the one before it in the alphabet, a by z", lambda s: _shift(s, -1)),
    "pawl": ("sorts the letters", lambda s: "".join(sorted(s))),
    "quob": ("keeps every second letter, beginning with the first", lambda s: s[::2]),
}
"""Name, definition ("blen(s) reverses the string"), function. None makes strings much longer: depth is what is hard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompositionConfig:
    """How hard the questions are."""

    depth: int = 2
    definitions: bool = False
    """Say in the prompt what the functions do."""
    min_letters: int = 4
    max_letters: int = 6

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"composition: depth must be at least 1, got {self.depth}")
        if not 1 <= self.min_letters <= self.max_letters:
            raise ValueError(
                f"composition: needs 1 <= min_letters <= max_letters, got {self.min_letters}, {self.max_letters}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """One question: `chain[0](chain[1](..(letters)))`."""

    chain: tuple[str, ...]
    letters: str

    @property
    def answer(self) -> str:
        """The result, computed from the inside out."""
        result = self.letters
        for name in reversed(self.chain):
            result = ATOMS[name][1](result)
        return result

    @property
    def unseen_key(self) -> str:
        """What must not occur in training for the question to be new: the chain; at depth 1 the function's input."""
        return " ".join(self.chain) if len(self.chain) > 1 else " ".join([*self.chain, self.letters])

    def question(self, definitions: bool) -> str:
        """Return the prompt, with what the functions do or without."""
        call = "(".join(self.chain) + f'("{self.letters}"' + ")" * len(self.chain)
        lines = [f"{name}(s) {ATOMS[name][0]}." for name in sorted(set(self.chain))] if definitions else []
        return "\n".join([*lines, f"What is {call}?"])


def composition(config: CompositionConfig, rng: random.Random) -> Composition:
    """Draw one question whose result is not empty."""
    while True:
        size = rng.randint(config.min_letters, config.max_letters)
        drawn = Composition(
            chain=tuple(rng.choice(sorted(ATOMS)) for _ in range(config.depth)),
            letters="".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(size)),
        )
        if drawn.answer:
            return drawn


def _swap_pairs(s: str) -> str:
    return "".join(s[i : i + 2][::-1] for i in range(0, len(s), 2))


def _shift(s: str, by: int) -> str:
    return "".join(chr((ord(c) - ord("a") + by) % 26 + ord("a")) for c in s)


HELDOUT_ONE_IN = 5
"""A question's own hash puts one in five into the held-out split, whatever the seed and the size."""


BLOCK, BLOCK_S = 20, 120.0
"""Questions made at a time, and the limit for them; the slowest datasets need half a second for one."""


DRAWS_PER_ROW = 10
"""Questions drawn for each row asked before a dataset counts as exhausted; one in five of them is held out."""


def rows(
    *,
    split: Literal["train", "heldout"],
    dataset: str,
    size: int,
    seed: int,
    config: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return `size` different questions with `prompt`, `answer` and what the reward `procedural` needs.

    The splits never share a question; those of `composition` (depth 2 and more) never share a chain of functions.
    Raises ValueError for an unknown dataset or config, or where the dataset has too few questions.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"procedural: split is train or heldout, got {split!r}")
    if size < 1:
        raise ValueError(f"procedural: size must be at least 1, got {size}")
    made: dict[str, dict[str, Any]] = {}
    draw = _compositions if dataset == "composition" else _gym_items
    for key, row in draw(dataset, seed, DRAWS_PER_ROW * size + 100, dict(config or {})):
        if _is_heldout(key) == (split == "heldout"):
            made.setdefault(row["prompt"], row)
        if len(made) == size:
            return list(made.values())
    raise ValueError(
        f"procedural: {dataset} with config {config} yields {len(made)} different {split} rows, not {size}"
    )


def _gym_items(dataset: str, seed: int, draws: int, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    place = {"dataset": dataset, "seed": seed, "size": draws, "config": json.dumps(config, sort_keys=True)}
    workers = shared_workers("polyphony.rewards.reasoning_gym:work", size=1, timeout_s=BLOCK_S)
    for start in range(0, draws, BLOCK):
        indices = list(range(start, min(start + BLOCK, draws)))
        (block,) = workers.map([place | {"indices": indices}])
        if isinstance(block, JobError):
            raise ValueError(f"procedural: {dataset}, items from {start}: {block}")
        for index, made in zip(indices, block, strict=True):
            if made["accepts"]:
                raise ValueError(f"procedural: reasoning-gym's scorer of {dataset} accepts any answer")
            row = {"prompt": made["question"], "answer": made["answer"]}
            yield made["question"], {**row, "procedural": json.dumps(place | {"index": index})}


def _compositions(dataset: str, seed: int, draws: int, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        settings = CompositionConfig(**config)
    except TypeError as error:
        raise ValueError(f"composition: {error}") from None
    rng = random.Random(f"{seed} {json.dumps(config, sort_keys=True)}")
    for _ in range(draws):
        drawn = composition(settings, rng)
        row = {"prompt": drawn.question(settings.definitions), "answer": drawn.answer}
        yield drawn.unseen_key, {**row, "procedural": json.dumps({"dataset": dataset})}


def _is_heldout(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELDOUT_ONE_IN == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Procedural:
    """Score the final answer to a row that `rows` made.

    An answer that makes the scorer meet its limit or break is wrong; None where the row's own answer does too. The final
    answer is the last tag, box or "answer:" line; without any of them the whole completion.
    """

    version: ClassVar[int] = 2

    partial_credit: bool = False
    """Give reasoning-gym's own score, which pays a little for form and for being near. Off: 1.0 for right, else 0.0."""
    timeout_s: float = 5.0
    workers: int | None = None
    """Processes; None takes one a core, at most 16."""
    max_answer_chars: int = 10_000

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"procedural: timeout_s must be > 0, got {self.timeout_s}")

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: Any = None,
        *,
        answer: list,
        procedural: list,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        places = [_place(place, reference) for place, reference in zip(procedural, answer, strict=True)]
        given = [_final(*row) for row in zip(completions, prompts, answer, strict=True)]
        scores = [self._at_sight(*row) for row in zip(given, answer, places, strict=True)]
        asked = {row: place for row, place in enumerate(places) if place and scores[row] is None}
        results, exhausted = self._scored({row: (place, given[row], answer[row]) for row, place in asked.items()})
        scores = [results.get(row, score) for row, score in enumerate(scores)]
        tell(log_metric, exhausted=[row in exhausted for row, score in enumerate(scores) if score is not None])
        return scores

    def unreadable(self, procedural: Any = None, answer: Any = None, **columns: Any) -> str | None:
        """Return why a row's reference can not be read; None where it can."""
        return None if _place(procedural, answer) else "it is no row of `rows`"

    def reads(self, completion: Any, prompt: Any = None, /, **columns: Any) -> str | None:
        """Return the final answer of a completion."""
        return _final(completion, prompt, columns.get("answer")).strip("\"'") or None

    def _scored(self, asked: dict[int, tuple[dict[str, Any], str, str]]) -> tuple[dict[int, float | None], set[int]]:
        """Return the scorer's word on each row's (place, given, reference), and the rows that have 0 because what was
        given exhausts or breaks it; None where the reference does too."""
        workers = shared_workers("polyphony.rewards.reasoning_gym:work", size=self.workers, timeout_s=self.timeout_s)
        said = workers.map([place | {"answer": given} for place, given, _ in asked.values()])
        results = dict(zip(asked, said, strict=True))
        broken = [row for row, result in results.items() if isinstance(result, JobError)]
        probes = workers.map([asked[row][0] | {"answer": asked[row][2]} for row in broken])
        innocent = {row for row, probe in zip(broken, probes, strict=True) if not isinstance(probe, JobError)}
        for row in broken:
            verdict = "0" if row in innocent else "no score"
            logger.warning("procedural: %s for %.80r: %s", verdict, asked[row][1], results[row])
            results[row] = 0.0 if row in innocent else None
        return {row: score if row in broken else self._reward(score) for row, score in results.items()}, innocent

    def _at_sight(self, given: str, answer: str, place: dict[str, Any] | None) -> float | None:
        if place is None:
            return None
        if not given or len(given) > self.max_answer_chars:
            return 0.0
        if place["dataset"] == "composition":
            return float(given.strip("\"'") == answer)
        return None

    def _reward(self, score: float) -> float:
        return score if self.partial_credit else float(score >= 1.0)


def _place(procedural: Any, answer: Any) -> dict[str, Any] | None:
    """Return where `rows` found a question; None where a row is not one of its."""
    try:
        place = json.loads(procedural)
    except (TypeError, ValueError):
        place = None
    if not isinstance(place, dict) or "dataset" not in place or not isinstance(answer, str):
        logger.warning("procedural: no score: no row of `rows`: procedural %.80r, answer %.80r", procedural, answer)
        return None
    return place


def _final(completion: Any, prompt: Any, answer: Any) -> str:
    """Return the final answer; with the full stop that was said where the reference ends with one."""
    region, found = answer_region(completion, prompt), final_answer(completion, prompt)
    if found is None:
        return region
    said = region.rfind(found)
    stopped = said >= 0 and str(answer).endswith(".") and region.startswith(".", said + len(found))
    return found.strip() + "." * stopped
