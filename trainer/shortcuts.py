"""Signs of shortcuts and loops in completions, by domain: counted, alarmed on, and used to find suspected shortcuts.

A success is suspected if it shows a sign that its domain's reference style does not show. The reference style is learned
from the first 64 correct completions of groups that are mostly correct: a sign that at least half of them show (a bare
letter in multiple choice, another script) belongs to it. It is not updated after that, so that a shortcut which spreads
later does not become part of it. With fewer than 16 such completions only rare successes are suspected. The length of
correct answers is monitored apart: it collapses before accuracy does (arXiv:2605.28388). The input is what every rank has
gathered, so all ranks agree.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polyphony.curricula.monitors import Alarm
from polyphony.curricula.monitors.signs import (
    COUNTED,
    ENOUGH_CORRECT,
    ENOUGH_STYLE,
    SIGNS,
    STYLE_SHARE,
    DomainSigns,
    tally,
)
from polyphony.curricula.records import Completion, Group, passed, written
from polyphony.rewards.style import degeneration
from polyphony.trainer.advantages import rare_successes
from polyphony.trainer.metrics import key


class ShortcutWatch:
    """Monitor the signs of every completion of a run.

    Example: `watch.inspect([completion])` gives signs like `[("bare_answer",)]`; `watch.observe(step, groups)` learns.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = {name: DomainSigns() for name in domains}
        self.pending: list[Alarm] = []
        """Alarms that nobody has written down yet."""
        self._since: dict[str, dict[str, int]] = {}  # counts since the last log

    def as_now(self) -> ShortcutWatch:
        """Return one that inspects as this one does now, whatever it learns."""
        return copy.deepcopy(self)

    def inspect(self, completions: Sequence[Completion]) -> list[tuple[str, ...]]:
        """Return the signs that each completion shows."""
        medians = {name: self.domains[name].median_length for name in {c.prompt.domain for c in completions}}
        told = written(completions)
        return [self._signs(c, *of, medians[c.prompt.domain]) for c, of in zip(completions, told, strict=True)]

    def _signs(self, completion: Completion, text: str, tokens: int, median: float) -> tuple[str, ...]:
        solution = completion.prompt.columns.get("solution")
        found = degeneration(
            text,
            tokens=tokens,
            median_correct_tokens=median,
            reference=solution if isinstance(solution, str) else None,
        )
        return tuple(s for s in COUNTED if (completion.truncated if s == "truncation" else getattr(found, s)))

    def suspects(self, group: Group) -> list[int]:
        """Return the places of a group's successes that show a sign which the domain's reference style does not show."""
        style = self.domains[group.domain].style
        known = style.get("n", 0) >= ENOUGH_STYLE
        foreign = {s for s in COUNTED if not (known and style.get(s, 0) >= STYLE_SHARE * style["n"])}
        rare = rare_successes(group.rewards)
        successes = passed(group.rewards) if known else rare
        counted = {True: foreign, False: foreign.intersection(SIGNS)}
        return [i for i in successes if counted[i in rare].intersection(group.signs[i])]

    def observe(self, step: int, groups: Sequence[Group]) -> None:
        """Take in the groups of one draw, of all ranks."""
        for name in sorted({group.domain for group in groups}):
            watch, of_domain = self.domains[name], [group for group in groups if group.domain == name]
            since = self._since.setdefault(name, {})
            signs = [shown for group in of_domain for shown in group.signs]
            watch.count(signs)
            tally(since, signs)
            for group in of_domain:
                self._learn(watch, since, group)
            self.pending += [
                Alarm(step=step, domain=name, kind=kind, message=message) for kind, message in watch.alarms().items()
            ]

    def _learn(self, watch: DomainSigns, since: dict[str, int], group: Group) -> None:
        suspects, rare, successes = self.suspects(group), rare_successes(group.rewards), passed(group.rewards)
        since["rare_successes"] = since.get("rare_successes", 0) + len(rare)
        since["suspects"] = since.get("suspects", 0) + len(suspects)
        all_right = [group.lengths[i] for i in successes]
        watch.first_lengths += all_right[: ENOUGH_CORRECT - len(watch.first_lengths)]
        watch.last_lengths = [*watch.last_lengths, *all_right][-ENOUGH_CORRECT:]
        right = [i for i in successes if i not in rare and i not in suspects]  # lengths of the others are no standard
        watch.lengths = [*watch.lengths, *(group.lengths[i] for i in right)][-ENOUGH_CORRECT:]
        if len(right) > len(group.rewards) / 2 and watch.style.get("n", 0) < ENOUGH_CORRECT:
            tally(watch.style, [group.signs[i] for i in right])

    def flush(self) -> dict[str, float]:
        """Return the metrics since the last flush, by full name."""
        counted, self._since = self._since, {}
        metrics: dict[str, float] = {}
        for name, counts in counted.items():
            for sign in COUNTED:
                metrics[key("shortcuts", sign, name)] = counts.get(sign, 0) / counts["n"]
            for what in ("rare_successes", "suspects"):
                metrics[key("shortcuts", what, name)] = counts.get(what, 0)
            last = self.domains[name].last_lengths
            metrics[key("shortcuts", "correct_length", name)] = statistics.median(last) if last else math.nan
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on; JSON-able."""
        return {name: asdict(watch) for name, watch in self.domains.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        renamed = {"manner": "style"}  # in checkpoints of an older version
        self.domains = {
            name: DomainSigns(**{renamed.get(key, key): value for key, value in state[name].items()})
            for name in self.domains
        }
