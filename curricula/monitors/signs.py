"""Counts of signs of shortcuts and loops in a domain's completions, and their alarms; `trainer.shortcuts` finds the
signs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

SIGNS = ("answer_repetition", "repeated_ngrams", "computation_skipping", "bare_answer", "language_mixing")
"""What makes any success suspicious. A text that loops shows the first two: its repeated 8-grams count under both."""


COUNTED = (*SIGNS, "truncation")
"""What makes a rare success suspicious: one that was cut off had not come to its end. Where many are right and cut off,
the limit is short."""


ENOUGH_CORRECT = 64
"""Correct answers behind a median: its standard error is then a sixth of the spread."""


ENOUGH_COMPLETIONS = 256
"""Completions behind a share of a sign: a standard error of three points."""


COLLAPSED, RECOVERED = 0.5, 0.75
"""Length of correct answers over that at the start: an alarm below the first; it can fire again once above the second."""


RISEN, FALLEN = 0.2, 0.1
"""Rise of a sign's share above that at the start: an alarm beyond the first; it can fire again once below the second."""


STYLE_SHARE = 0.5
"""A sign belongs to the reference style if at least this share of the completions it is learned from show it."""


ENOUGH_STYLE = 16
"""Completions from which on the reference style is used; it is learned from the first `ENOUGH_CORRECT`."""


@dataclass(kw_only=True, slots=True)
class DomainSigns:
    """The memory of one domain; JSON-able by `asdict`."""

    first_lengths: list[int] = field(default_factory=list)
    """Of the first correct answers, tokens."""
    last_lengths: list[int] = field(default_factory=list)
    """Of the last correct answers, suspected shortcuts included."""
    lengths: list[int] = field(default_factory=list)
    """Of the last correct answers that are neither rare in their group nor suspected shortcuts."""
    first: dict[str, int] = field(default_factory=dict)
    """Signs among the first completions, and how many these were (`n`)."""
    level: dict[str, float] = field(default_factory=dict)
    """Share of each sign, averaged over about the last 256 completions."""
    style: dict[str, int] = field(default_factory=dict)
    """The reference style: signs among the first correct completions of groups that are mostly correct, and their number
    `n`."""
    ringing: list[str] = field(default_factory=list)

    @property
    def median_length(self) -> float:
        return statistics.median(self.lengths) if self.lengths else float("nan")

    def count(self, signs: Sequence[Sequence[str]]) -> None:
        """Take in the signs of one draw's completions."""
        n, weight = len(signs), len(signs) / (len(signs) + ENOUGH_COMPLETIONS)
        for sign in COUNTED:
            share = sum(sign in found for found in signs) / n
            self.level[sign] = (1 - weight) * self.level.get(sign, share) + weight * share
        if self.first.get("n", 0) < ENOUGH_COMPLETIONS:
            tally(self.first, signs)

    def alarms(self) -> dict[str, str]:
        """Return new alarms by kind, each with its message."""
        found = self._risen_signs()
        if len(self.first_lengths) == ENOUGH_CORRECT == len(self.last_lengths):
            now = statistics.median(self.last_lengths)
            ratio = now / statistics.median(self.first_lengths)
            found |= self._turn(
                "length_collapse",
                ratio < COLLAPSED,
                ratio > RECOVERED,
                f"correct answers have shrunk to {now:g} tokens, {ratio:.0%} of the start's",
            )
        return found

    def _risen_signs(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for sign in SIGNS if self.first.get("n", 0) >= ENOUGH_COMPLETIONS else ():
            start, now = self.first.get(sign, 0) / self.first["n"], self.level[sign]
            message = f"{sign.replace('_', ' ')} in {now:.0%} of completions, {start:.0%} at the start"
            found |= self._turn(sign, now > start + RISEN, now < start + FALLEN, message)
        return found

    def _turn(self, kind: str, begins: bool, ends: bool, message: str) -> dict[str, str]:
        if kind in self.ringing:
            if ends:
                self.ringing.remove(kind)
        elif begins:
            self.ringing.append(kind)
            return {kind: message}
        return {}


def tally(counts: dict[str, int], signs: Sequence[Sequence[str]]) -> None:
    """Add the signs of some completions to counts, and how many these were (`n`)."""
    counts["n"] = counts.get("n", 0) + len(signs)
    for sign in COUNTED:
        counts[sign] = counts.get(sign, 0) + sum(sign in found for found in signs)
