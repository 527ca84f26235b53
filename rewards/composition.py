"""f(g(x)): string functions with made-up names, composed to a depth.

After "From f(x) and g(x) to f(g(x))" (arXiv:2509.25123); the functions are ours. Skills are taught with their
definitions in sight (depth 1) and then asked for without them; whether deeper compositions follow from shallower ones
is the measurement. The truth is computed, so nothing can leak from anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

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
