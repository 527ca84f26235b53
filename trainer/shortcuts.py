"""Signs of shortcuts and loops in what the policy writes, by domain: counted, alarmed on, and held against successes.

What most of a domain's first established answers show (a bare letter in multiple choice, another script) is that domain's
manner and no sign of anything. Established are the right ones of groups that are mostly right. The manner is fixed after 64
of them, or a shortcut that has spread would pass for it. Until 16 are known, signs count against rare successes only. The
length of correct answers is watched apart: it collapses before accuracy does (arXiv:2605.28388). All is fed from what every
rank has gathered, so all ranks come to the same verdicts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polyphony.curricula.monitors import Alarm
from polyphony.curricula.monitors.signs import (
    COUNTED,
    ENOUGH_CORRECT,
    ENOUGH_MANNER,
    MANNER,
    SIGNS,
    DomainSigns,
    _add,
)
from polyphony.rewards.style import REPEATED_NGRAM_SHARE, degeneration, mixes_languages, repeated_ngram_share
from polyphony.trainer.advantages import passed, rare_successes
from polyphony.trainer.metrics import key
from polyphony.trainer.scoring import Graded, Sample


class ShortcutWatch:
    """Look at every completion of a run.

    Example: `watch.inspect(sample)` gives signs like `("bare_answer",)`; `watch.observe(step, groups)` learns from them.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = {name: DomainSigns() for name in domains}
        self.pending: list[Alarm] = []
        self._since: dict[str, dict[str, int]] = {}  # counts since the last log

    def inspect(self, sample: Sample) -> tuple[str, ...]:
        """Return the signs that one completion shows."""
        solution = sample.prompt.columns.get("solution")
        found = degeneration(
            sample.text,
            tokens=len(sample.ids),
            median_correct_tokens=self.domains[sample.prompt.domain].median_length,
            reference=solution if isinstance(solution, str) else None,
        )
        signs = {
            "answer_repetition": found.answer_repetition,
            "repeated_ngrams": repeated_ngram_share(sample.text, 8) > REPEATED_NGRAM_SHARE,
            "computation_skipping": found.computation_skipping,
            "bare_answer": found.bare_answer,
            "language_mixing": mixes_languages(sample.text),
            "truncation": sample.truncated,
        }
        return tuple(name for name, shows in signs.items() if shows)

    def suspects(self, group: Sequence[Graded]) -> list[int]:
        """Return the places of a group's successes that show a sign which is not their domain's manner."""
        rewards = [g.reward for g in group]
        known = self.domains[group[0].domain].manner.get("n", 0) >= ENOUGH_MANNER
        rare = rare_successes(rewards)
        successes = passed(rewards) if known else rare
        return [i for i in successes if self._is_foreign(group[i], COUNTED if i in rare else SIGNS)]

    def _is_foreign(self, graded: Graded, signs: Sequence[str]) -> bool:
        manner = self.domains[graded.domain].manner
        known = manner.get("n", 0) >= ENOUGH_MANNER
        return any(not (known and manner.get(s, 0) >= MANNER * manner["n"]) for s in graded.signs if s in signs)

    def observe(self, step: int, groups: Sequence[Sequence[Graded]]) -> None:
        """Take in the groups of one draw, of all ranks."""
        for name in sorted({group[0].domain for group in groups}):
            watch, of_domain = self.domains[name], [group for group in groups if group[0].domain == name]
            since = self._since.setdefault(name, {})
            signs = [g.signs for group in of_domain for g in group]
            watch.count(signs)
            _add(since, signs, COUNTED)
            for group in of_domain:
                self._learn(watch, since, group)
            self.pending += [
                Alarm(step=step, domain=name, kind=kind, message=message) for kind, message in watch.alarms().items()
            ]

    def _learn(self, watch: DomainSigns, since: dict[str, int], group: Sequence[Graded]) -> None:
        suspects, rewards = self.suspects(group), [g.reward for g in group]
        rare = rare_successes(rewards)
        since["rare_successes"] = since.get("rare_successes", 0) + len(rare)
        since["suspects"] = since.get("suspects", 0) + len(suspects)
        all_right = [group[i].length for i in passed(rewards)]
        watch.first_lengths += all_right[: ENOUGH_CORRECT - len(watch.first_lengths)]
        watch.last_lengths = [*watch.last_lengths, *all_right][-ENOUGH_CORRECT:]
        right = [group[i] for i in passed(rewards) if i not in rare and i not in suspects]  # the others set no standard
        watch.lengths = [*watch.lengths, *(g.length for g in right)][-ENOUGH_CORRECT:]
        if len(right) > len(group) / 2 and watch.manner.get("n", 0) < ENOUGH_CORRECT:
            _add(watch.manner, [g.signs for g in right], COUNTED)

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

    def take_alarms(self) -> list[Alarm]:
        """Return the alarms since the last call."""
        alarms, self.pending = self.pending, []
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on; JSON-able."""
        return {name: asdict(watch) for name, watch in self.domains.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.domains = {name: DomainSigns(**state[name]) for name in self.domains}
