"""Sums and counts of what the draws showed, divided once when they are logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from polyphony.curricula.records import Group
from polyphony.trainer.dashboard import defined, key


@dataclass(slots=True)
class DomainSums:
    """Running sums of one domain between two logs."""

    groups: int = 0
    dead: int = 0
    dead_completions: int = 0
    updated: int = 0
    dead_correct: int = 0
    dead_wrong: int = 0
    dead_equal: int = 0
    completions: int = 0
    failures: int = 0
    graded: int = 0
    passed: int = 0
    reward: float = 0.0
    reward_squared: float = 0.0
    tokens: int = 0
    useful_tokens: int = 0
    truncated: int = 0
    entropy: float = 0.0
    entropy_tokens: float = 0.0

    def add(self, group: Group, *, is_useful: bool) -> None:
        graded = group.unselected
        tokens = sum(group.lengths)
        self.groups += 1
        self.dead += not is_useful
        self.dead_completions += 0 if is_useful else len(group.rewards)
        self.completions += len(group.rewards)
        self.failures += len(group.rewards) - len(group.graded)
        self.graded += len(graded)
        self.passed += sum(r >= 1.0 for r in graded)
        self.reward += sum(graded)
        self.reward_squared += sum(r * r for r in graded)
        self.tokens += tokens
        self.useful_tokens += tokens if is_useful else 0
        self.truncated += sum(group.truncated)

    def update_with(self, group: Group, *, is_useful: bool) -> None:
        """Count a group that went on to the update."""
        self.updated += 1
        if not is_useful:
            self.dead_correct += group.cause == "all_correct"
            self.dead_wrong += group.cause == "all_wrong"
            self.dead_equal += group.cause == "all_equal"

    def metrics(self) -> dict[str, float]:
        """Return the `domain/<d>` metrics; NaN where nothing was counted."""
        mean = _ratio(self.reward, self.graded)
        variance = _ratio(self.reward_squared - self.graded * mean**2, self.graded - 1) if self.graded > 1 else math.nan
        return {
            "reward": mean,
            "reward_std": math.sqrt(max(0.0, variance)) if not math.isnan(variance) else math.nan,
            "entropy": _ratio(self.entropy, self.entropy_tokens),
            "pass_rate": _ratio(self.passed, self.graded),
            "frac_dead": _ratio(self.dead, self.groups),
            "dead_completions": _ratio(self.dead_completions, self.completions),
            "dead_correct": _ratio(self.dead_correct, self.updated),
            "dead_wrong": _ratio(self.dead_wrong, self.updated),
            "dead_equal": _ratio(self.dead_equal, self.updated),
            "mean_length": _ratio(self.tokens, self.completions),
            "clipped_ratio": _ratio(self.truncated, self.completions),
            "grader_failures": self.failures,
            "n": self.completions,
        }


@dataclass(slots=True)
class DiversitySums:
    """Running sums of one domain's diversity reward between two logs."""

    groups: int = 0
    """Compared by the partitioner."""
    failures: int = 0
    classes: int = 0
    collapsed: int = 0
    completions: int = 0
    diversity: float = 0.0
    learned: int = 0
    fused: float = 0.0

    def add(self, group: Group) -> None:
        assert group.fused is not None
        fused = group.fused
        if fused.classes is None or fused.diversity is None:
            self.failures += 1
            return
        self.groups += 1
        self.classes += len(set(fused.classes))
        self.collapsed += len(fused.classes) > 1 and len(set(fused.classes)) == 1
        self.completions += len(fused.diversity)
        self.diversity += sum(fused.diversity)
        known = [r for r in fused.rewards if r is not None]
        self.learned += len(known)
        self.fused += sum(known)

    def metrics(self) -> dict[str, float]:
        """Return the `diversity/<d>` metrics; NaN where nothing was counted."""
        return {
            "classes": _ratio(self.classes, self.groups),
            "mean": _ratio(self.diversity, self.completions),
            "collapsed": _ratio(self.collapsed, self.groups),
            "reward": _ratio(self.fused, self.learned),
            "failures": self.failures,
        }


@dataclass(slots=True)
class Meter:
    """Per-domain metrics between two logs. `domains` is fixed, so that every rank reduces the same shape."""

    domains: tuple[str, ...]
    is_useful: Callable[[Group], bool] = lambda group: group.has_signal
    """Whether a group can move the policy."""
    sums: dict[str, DomainSums] = field(default_factory=dict)
    diversity: dict[str, DiversitySums] = field(default_factory=dict)
    """Of the domains with a diversity reward."""
    seconds: float = 0.0
    """Spent generating."""
    draws: int = 0
    rounds: int = 0
    """Of refill."""

    def add(
        self,
        groups: Sequence[Group],
        entropy: Mapping[str, tuple[float, float]],
        seconds: float,
        *,
        discarded: Sequence[Group] = (),
        rounds: int = 0,
    ) -> None:
        """Take in one draw: its groups, per domain the summed entropy and its token count, and the time it took.

        `discarded` are the groups that were generated too, but replaced, in that many refill `rounds`.
        """
        for group in (*groups, *discarded):
            self.sums.setdefault(group.domain, DomainSums()).add(group, is_useful=self.is_useful(group))
        for group in groups:
            self.sums[group.domain].update_with(group, is_useful=self.is_useful(group))
            if group.fused is not None:
                self.diversity.setdefault(group.domain, DiversitySums()).add(group)
        self.draws += 1
        self.rounds += rounds
        for name, (total, tokens) in entropy.items():
            sums = self.sums.setdefault(name, DomainSums())
            sums.entropy += total
            sums.entropy_tokens += tokens
        self.seconds += seconds

    def flush(self) -> dict[str, float]:
        """Return all metrics since the last flush and start anew; undefined ones are absent."""
        sums, diversity, seconds, draws, rounds = self.sums, self.diversity, self.seconds, self.draws, self.rounds
        self.sums, self.diversity, self.seconds, self.draws, self.rounds = {}, {}, 0.0, 0, 0
        metrics = {
            key("domain", metric, name): value
            for name, counted in sums.items()
            if counted.completions
            for metric, value in counted.metrics().items()
        }
        for name, compared in diversity.items():
            metrics.update({key("diversity", metric, name): value for metric, value in compared.metrics().items()})
        tokens = sum(s.tokens for s in sums.values())
        metrics[key("rollout", "tokens_per_s")] = _ratio(tokens, seconds)
        metrics[key("rollout", "useful_token_frac")] = _ratio(sum(s.useful_tokens for s in sums.values()), tokens)
        metrics[key("rollout", "refill_rounds")] = _ratio(rounds, draws)
        dead = sum(s.dead_correct + s.dead_wrong + s.dead_equal for s in sums.values())
        metrics[key("rollout", "shortfall")] = _ratio(dead, draws)
        return defined(metrics)


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
