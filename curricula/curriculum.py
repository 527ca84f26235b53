"""The curriculum: the scheduler's mixture becomes prompts, and what their groups showed becomes the next evidence.

A mixture becomes whole prompts by largest remainder, with the residual carried over to the next draw (`allocate`).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from polyphony.curricula.decision_log import Choice
from polyphony.curricula.prompts.estimate import State
from polyphony.curricula.prompts.passes import PassSampler
from polyphony.curricula.prompts.pool import PoolSettings, PromptPool
from polyphony.curricula.prompts.pool_file import Columns, PoolFileError, load_pools
from polyphony.curricula.records import (
    Decision,
    Domain,
    DomainStats,
    Evaluation,
    Evidence,
    Group,
    Lessons,
    Prompt,
    abs_advantage,
    mean,
    own,
    pass_rate,
    rounded,
)
from polyphony.curricula.recovery import Recoveries, Recovery
from polyphony.curricula.schedulers import Scheduler

logger = logging.getLogger(__name__)

Seen = tuple[Group, tuple[float, ...]]
"""A group and its rewards that exist."""


def allocate(n: int, mixture: Sequence[float], residual: Sequence[float]) -> tuple[list[int], list[float]]:
    """Split `n` prompts by `mixture` [K]; return the counts [K] and the residual [K] owed to each domain afterwards.

    A domain's claim is n p_k plus what earlier draws still owe it. Everyone gets the whole part of its claim (never
    below 0), the rest goes to the largest remainders, ties to the earlier domain. Under a constant mixture no domain
    is ever a whole prompt ahead; what it is owed stays below 1 for up to 3 domains, and a search over thousands of
    mixtures of up to 20 found 1.12 at worst. A mixture that changes against the residuals can push it further, about
    as ln K: no rule that cannot see the future does better (the chip game of Adler et al., 2003).
    """
    claims = [n * p + r for p, r in zip(mixture, residual, strict=True)]
    counts = [max(0, math.floor(c + 1e-9)) for c in claims]
    by_remainder = sorted(range(len(claims)), key=lambda k: (-(claims[k] - counts[k]), k))
    surplus = n - sum(counts)
    for k in by_remainder[:surplus] if surplus > 0 else ():
        counts[k] += 1
    for k in reversed(by_remainder):
        if sum(counts) <= n:
            break
        counts[k] -= min(counts[k], sum(counts) - n)
    return counts, [c - count for c, count in zip(claims, counts, strict=True)]


class ExhaustedError(RuntimeError):
    """No prompt is left to learn from, and the pool is to stop then."""


class Curriculum:
    """Draw prompts for the trainable domains, observe their groups, record evaluations; save and restore all of it.

    Example:
        curriculum = Curriculum(domains=domains, prompts={"math": ids}, scheduler=Joint(), total_draws=100, seed=1)
        refs = curriculum.draw(8)
        curriculum.observe(groups, entropy={"math": 0.7})
    """

    def __init__(
        self,
        *,
        domains: Sequence[Domain],
        prompts: Mapping[str, Sequence[str]],
        scheduler: Scheduler,
        total_draws: int,
        seed: int = 0,
        pool: PoolSettings | None = None,
        spare: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """With `pool`, each domain's prompts are chosen by what is known of their pass rates, else pass by pass.

        `spare` are prompts to recover domains with: of those that are only watched, and of others that may not practise all
        of theirs.

        Raises ValueError where the pool is to start from a file that cannot be read or knows none of the prompts.
        """
        self.domains = tuple(d for d in domains if not d.is_watch_only)
        if not self.domains:
            raise ValueError("no domain has training rows: at least one must not be watch-only")
        if total_draws < 1:
            raise ValueError(f"total_draws must be at least 1, got {total_draws}")
        self.names = tuple(d.name for d in self.domains)
        self.scheduler = scheduler
        self.total_draws = total_draws
        self.pool = pool
        if pool:
            pool.check_parts()
        self.pools = {
            name: PromptPool(prompts[name], name=name, seed=seed, settings=pool) for name in self.names if pool
        }
        self.samplers: Mapping[str, PassSampler | PromptPool] = self.pools or {
            name: PassSampler(prompts[name], seed=seed, name=name) for name in self.names
        }
        self.spare = {name: PassSampler(ids, seed=seed, name=name) for name, ids in (spare or {}).items()}
        self.recoveries = Recoveries()
        self.known = self._adopt_known(pool.start) if pool and pool.start else 0
        """Prompts that the pool's file knew of."""
        self.draws = 0
        self.drawn = dict.fromkeys(self.names, 0)
        self.evaluations: list[Evaluation] = []
        self.decision: Decision | None = None
        self.basis: Evidence | None = None  # what the last decision was made from
        self.aloft: list[Choice] = []
        """Draws that are chosen and not yet begun to be learned from, oldest first."""
        self.begun: Choice | None = None
        """The draw that is learned from."""
        self._state: Mapping[str, Any] = {}
        self._residual = [0.0] * len(self.names)
        self._last = tuple(DomainStats() for _ in self.names)
        self._notes: list[str] = []
        self._alarms: list[str] = []
        self.rolled_back = False  # since the last evaluation
        self._stages: list[str] = []  # named since the last evaluation; empty text for none
        self._shut: set[str] = set()  # domains without an unseen or active prompt
        # pure, so asked once for nothing: what it cannot work with is refused before anything is spent
        scheduler.decide(self.evidence(), self._state)

    def look_ahead(self, n: int) -> None:
        """Be ready to choose a draw while `n` before it are not learned from: the pool keeps their prompts from it."""
        for pool in self.pools.values():
            pool.held = n

    def draw(self, n: int) -> list[Prompt]:
        """Decide a mixture and return `n` prompts by its quotas, domains interleaved in the recipe's order."""
        self.choose(n)
        return list(self.begin().prompts)

    def choose(self, n: int, *, unseen: int = 0) -> Choice:
        """Choose `n` prompts as `draw` does, and put them behind those that wait to be learned from (`aloft`).

        `unseen`: how many draws before it have not been observed.
        """
        self.basis, recovery = self.evidence(), self.recoveries.open
        prompts = self._draw(n) if recovery is None else self._draw_for(recovery, n)
        assert self.decision is not None
        samplers, drawn = {**self.spare, **self.samplers}, {prompt.domain for prompt in prompts}
        choice = Choice(
            draw=self.draws,
            prompts=prompts,
            decision=self.decision,
            places={name: list(samplers[name].places) for name in drawn},
            recovered="" if recovery is None else recovery.domain,
            unseen=unseen,
            basis=self.basis,
        )
        self.draws += 1
        self.aloft.append(choice)
        return choice

    def begin(self) -> Choice:
        """Take the oldest draw that waits: it is learned from now, and counts as practised."""
        self.begun = self.aloft.pop(0)
        self._stages = sorted({*self._stages, self.begun.decision.stage or ""})
        return self.begun

    def _draw(self, n: int) -> list[Prompt]:
        assert self.basis is not None
        self.decision = self.scheduler.decide(self.basis, self._state)
        _check_mixture(self.decision.mixture, self.names)
        counts, self._residual = allocate(n, self.decision.mixture, self._residual)
        self._state, self._notes, self._alarms = self.decision.state, [], []
        refs: list[Prompt] = []
        for name, count in zip(self.names, counts, strict=True):
            self.drawn[name] += count
            refs += [Prompt(domain=name, id=prompt_id) for prompt_id in self.samplers[name].draw(count)]
        self._check_exhausted()
        return refs

    def count(self, practised: Mapping[str, int]) -> None:
        """Take in how many prompts of each domain were practised without a draw: a file of answers is learned from."""
        for name, n in practised.items():
            self.drawn[name] += n

    def _draw_for(self, recovery: Recovery, n: int) -> list[Prompt]:
        """Return `n` prompts of the domain in recovery; what the scheduler knows, and what domains are owed, waits."""
        name = recovery.domain
        self.decision = recovery.decision(self.names, self._state)
        self.recoveries.count(n)
        if name in self.drawn:
            self.drawn[name] += n
        sampler = self.spare[name] if name in self.spare else self.samplers[name]
        return [Prompt(domain=name, id=prompt_id) for prompt_id in sampler.draw(n)]

    def is_recovered(self, name: str) -> bool:
        """Whether the draws just now are of this domain's recovery."""
        return self.recoveries.open is not None and self.recoveries.open.domain == name

    @property
    def exposure(self) -> dict[str, int]:
        """Prompts practised of each domain so far, those of watched ones in recoveries among them."""
        recovered, waiting = self.recoveries.prompts, sum((choice.counts for choice in self.aloft), Counter())
        drawn = {**self.drawn, **{name: n for name, n in recovered.items() if name not in self.drawn}}
        return {name: n - waiting[name] for name, n in drawn.items()}

    def refill(self, counts: Mapping[str, int]) -> list[Prompt]:
        """Return up to that many further prompts of each domain for the same draw, in the recipe's order of domains."""
        return [
            Prompt(domain=name, id=prompt_id)
            for name, pool in self.pools.items()
            for prompt_id in pool.refill(counts.get(name, 0))
        ]

    def reserve(self, choice: Choice, rounds: int) -> Reserve:
        """Return what refills of the last draw may take, so many rounds at most, whatever is learned until then."""
        counts = choice.counts
        return Reserve({name: pool.reserve(counts[name] * rounds) for name, pool in self.pools.items() if counts[name]})

    def observe(
        self,
        groups: Sequence[Group],
        entropy: Mapping[str, float] | None = None,
        lessons: Mapping[str, Lessons] | None = None,
    ) -> None:
        """Take in what the last draw gave: its groups, and per domain the mean token entropy in nats.

        `lessons` are those of domains with a teacher. Of a recovery's draw the scheduler sees nothing.
        """
        by_domain: dict[str, list[Seen]] = {name: [] for name in (*self.names, *self.spare)}
        for group in groups:
            if group.domain not in by_domain:
                raise ValueError(
                    f"a group of domain {group.domain!r}, which this run does not train: {list(self.names)}"
                )
            graded = group.graded
            by_domain[group.domain].append((group, graded))
            if group.domain in self.pools:
                self.pools[group.domain].observe(group.prompt_id, graded)
        if self.recoveries.open is not None:
            return
        self._last = tuple(
            _taught(_domain_stats(by_domain[name], (entropy or {}).get(name, math.nan)), (lessons or {}).get(name))
            for name in self.names
        )

    def record(self, evaluation: Evaluation) -> None:
        """Take in one held-out row, already reduced to the `steer` half."""
        self.evaluations.append(evaluation)
        self._stages, self.rolled_back = [], False

    @property
    def stage(self) -> str | None:
        """The domain whose stage all draws since the last evaluation belonged to, replay included; None under a mixture, and
        in a stage of several domains."""
        return self._stages[0] if len(self._stages) == 1 and self._stages[0] in self.names else None

    @property
    def stage_ends(self) -> bool:
        """True where the next decision would leave the stage of the last one: its end is to be evaluated now."""
        stage = None if self.begun is None else self.begun.decision.stage
        if stage is None or (self.draws >= self.total_draws and not self.aloft):
            return False
        following = self.aloft[0].decision if self.aloft else self.scheduler.decide(self.evidence(), self._state)
        return following.stage != stage

    def reviews(self) -> list[dict[str, Any]]:
        """Return what a scheduler that plans says of its stages once all draws are done; empty for any other."""
        review = getattr(self.scheduler, "reviews", None)
        return (
            review(self.evidence(), self._state) if review and self.draws >= self.total_draws and not self.aloft else []
        )

    def note(self, text: str, *, domain: str | None = None) -> None:
        """Tell the scheduler, at its next decision, about something that happened to the run.

        With a `domain`: that the run was rolled back because of it (call it after a rollback's restore).
        """
        self._notes.append(text)
        if domain is not None:
            self._alarms.append(domain)
            self.rolled_back = True

    def evidence(self) -> Evidence:
        """Return the evidence that the scheduler decides from: what was drawn and measured in recoveries is none."""
        recovered = self.recoveries.prompts
        return Evidence(
            draw=self.draws - sum(self.recoveries.draws.values()),
            total_draws=self.total_draws,
            domains=self.names,
            kinds=tuple(d.kind for d in self.domains),
            weights=tuple(d.weight for d in self.domains),
            sizes=tuple(len(self.samplers[name].ids) for name in self.names),
            drawn=tuple(self.drawn[name] - recovered.get(name, 0) for name in self.names),
            last=self._last,
            evaluations=own(self.evaluations),
            notes=tuple(self._notes),
            alarms=tuple(self._alarms),
        )

    def metrics(self) -> dict[str, float]:
        """Return `<domain>/<metric>`: the mixture of the last draw, and how many prompts are in which state."""
        if self.begun is None:
            return {}
        shares = {f"{name}/mixture": p for name, p in zip(self.names, self.begun.decision.mixture, strict=True)}
        shares |= {f"{name}/mixture": float(self.is_recovered(name)) for name in self.spare if name not in self.names}
        shown = (State.ACTIVE, State.DEFERRED, State.IMPOSSIBLE, State.MASTERED)
        counts = {name: pool.counts() for name, pool in self.pools.items()}
        return shares | {f"{name}/{s.name.lower()}": float(counts[name][s]) for name in counts for s in shown}

    def pool_columns(self) -> dict[str, Columns]:
        """Return what is known of every domain's prompts, for saving."""
        return {name: pool.columns() for name, pool in self.pools.items()}

    def adopt_pools(self, saved: Mapping[str, Columns]) -> int:
        """Take over what is known of prompts that are here too, matched by id; return how many were found."""
        return sum(pool.adopt(saved[name]) for name, pool in self.pools.items() if name in saved)

    def _adopt_known(self, start: str) -> int:
        try:
            known = self.adopt_pools(load_pools(Path(start)))
        except PoolFileError as error:
            raise ValueError(f"pool.from: {error}") from error
        if not known:
            raise ValueError(f"pool.from: {start} is of another data set: it knows none of the training prompts")
        return known

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on drawing the same prompts; JSON-able."""
        return {
            "draws": self.draws,
            "drawn": dict(self.drawn),
            "residual": list(self._residual),
            "scheduler": dict(self._state),
            "samplers": {name: sampler.state_dict() for name, sampler in self.samplers.items()},
            "last": [asdict(stats) for stats in self._last],
            "evaluations": [evaluation.as_row() for evaluation in self.evaluations],
            "notes": list(self._notes),
            "alarms": list(self._alarms),
            "stages": list(self._stages),
            "recoveries": self.recoveries.state_dict(),
            "spare": {name: sampler.state_dict() for name, sampler in self.spare.items()},
            "rolled_back": self.rolled_back,
        } | ({"aloft": [choice.as_row() for choice in self.aloft]} if self.aloft else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Raises ValueError where the run's domains or rows are not those that were saved."""
        if tuple(state["drawn"]) != self.names:
            raise ValueError(f"saved domains {list(state['drawn'])} are not this run's {list(self.names)}")
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(state["samplers"][name])
        self.draws, self.drawn = state["draws"], dict(state["drawn"])
        self._residual, self._state = list(state["residual"]), state["scheduler"]
        self._last = tuple(DomainStats(**stats) for stats in state["last"])
        self.evaluations = [Evaluation.from_row(row) for row in state["evaluations"]]
        self._notes, self._alarms, self._stages = list(state["notes"]), list(state["alarms"]), list(state["stages"])
        self.rolled_back = state.get("rolled_back", False)
        self.aloft = [Choice.from_row(row) for row in state.get("aloft", ())]
        self.recoveries.load_state_dict(state.get("recoveries", {}))  # older versions had none
        if (opened := self.recoveries.open) is not None and opened.domain not in {*self.samplers, *self.spare}:
            self.recoveries.end()  # of a domain that is only watched, whose guardrail with its rows was taken away
        for name, sampler in self.spare.items():
            if name in state.get("spare", {}):
                sampler.load_state_dict(state["spare"][name])

    def _check_exhausted(self) -> None:
        """Warn, once for each domain, where only waiting prompts are left; with `when_exhausted: stop`, stop where all
        are."""
        shut = {name for name, pool in self.pools.items() if not pool.has_open}
        for name in sorted(shut - self._shut):
            logger.warning("domain %r: %s; those nearest to the band are drawn", name, _why(self.pools[name]))
        self._shut = shut
        done = [name for name in shut if self.pools[name].is_exhausted]
        if self.pool and self.pool.when_exhausted == "stop" and len(done) == len(self.pools):
            why = "; ".join(f"domain {name!r}: {_why(self.pools[name])}" for name in sorted(done))
            raise ExhaustedError(
                f"every training prompt is mastered or impossible: {why} (pool.when_exhausted is stop)"
            )


class Reserve:
    """Further prompts of each domain for one draw, chosen with it.

    Example: `Reserve({"math": ["9f"]}).refill({"math": 2}) == [Prompt(domain="math", id="9f")]`
    """

    def __init__(self, ids: Mapping[str, Sequence[str]]) -> None:
        self._ids = {name: list(of) for name, of in ids.items()}

    def refill(self, counts: Mapping[str, int]) -> list[Prompt]:
        """Return up to that many further prompts of each domain, none of them twice."""
        found = []
        for name, left in self._ids.items():
            found += [Prompt(domain=name, id=prompt_id) for prompt_id in left[: counts.get(name, 0)]]
            del left[: counts.get(name, 0)]
        return found


def _check_mixture(mixture: Sequence[float], names: Sequence[str]) -> None:
    if len(mixture) != len(names):
        raise ValueError(f"the scheduler gave {len(mixture)} shares for {len(names)} domains {list(names)}")
    for name, share in zip(names, mixture, strict=True):
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"domain {name!r}: the scheduler's share must be finite and >= 0, got {share}")
    if abs(sum(mixture) - 1) > 1e-6:
        raise ValueError(f"the scheduler's shares must sum to 1, got {sum(mixture)} from {list(mixture)}")


def _why(pool: PromptPool) -> str:
    counts = pool.counts()
    return (
        f"of {len(pool.ids)} prompts {counts[State.UNSEEN] + counts[State.ACTIVE]} are unseen or active, "
        f"{counts[State.DEFERRED]} deferred, {counts[State.IMPOSSIBLE]} impossible, {counts[State.MASTERED]} mastered"
    )


def _domain_stats(seen: Sequence[Seen], entropy: float) -> DomainStats:
    unselected = [graded if group.look is None else group.unselected for group, graded in seen if graded]
    advantages = [abs_advantage(graded) if group.fused is None else group.abs_advantage for group, graded in seen]
    return DomainStats(
        groups=len(seen),
        reward=rounded(mean([r for rewards in unselected for r in rewards])),
        pass_rate=rounded(mean([pass_rate(rewards) for rewards in unselected if rewards])),
        abs_advantage=rounded(mean([a for a, (_, graded) in zip(advantages, seen, strict=True) if graded])),
        frac_dead=rounded(mean([0.0 if a > 0 else 1.0 for a in advantages])),  # NaN: nothing to learn from
        entropy=rounded(entropy),
        tokens=sum([sum(group.lengths) for group, _ in seen]),
    )


def _taught(stats: DomainStats, lessons: Lessons | None) -> DomainStats:
    """Return what a draw showed of a domain; with a teacher its tokens are what is learned from, and nothing is dead."""
    if lessons is None:
        return stats
    kl, size = rounded(lessons.kl), rounded(lessons.abs_advantage)
    return replace(stats, abs_advantage=size, frac_dead=0.0, teacher_kl=kl)
