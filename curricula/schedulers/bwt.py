"""`bwt`: one stage per domain, in the order planned from measured transfer, with replay of earlier domains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.intervals import paired
from polyphony.curricula.records import Decision, Evidence, graded, mean
from polyphony.curricula.schedulers.online_transfer import Prior, Regression, score_prior
from polyphony.curricula.schedulers.replay import Plateau, Protection, Replay, combine
from polyphony.curricula.transfer.forgetting import moment
from polyphony.curricula.transfer.matrix import NeededProbes
from polyphony.curricula.transfer.planner import Solver


@settings
class Bwt:
    """Within stage s on domain d:  p = q on earlier domains,  1 - sum q on d,  0 on later ones.

    Order: the planner's (Omni-Thinker's rule, arXiv:2507.14783, with uncertainty and entropy, see `planner`).
    q: power-law replay plus protection of domains that are being forgotten, see `replay`; Omni-Thinker has neither.
    Length: a stage gets an equal part of the draws that are left; it ends early when its domain's held-out score has
        stopped rising, or lies below where the stage began with 95 % confidence (single-domain stages can damage
        their own domain). Draws that the last stage leaves over go to all domains alike.
    A guardrail that broke ends the stage that broke it, or protects its domain where that can be replayed.
    After each stage the scores it was predicted to reach are put beside those measured, and the rest is planned again:
        T[j -> i] moves by what the run has shown beyond the probes. The effects of all domains on one are believed to
        be related (see `online_transfer`), so a domain that suffered more than predicted under past stages is expected to
        under those to come, and moves later.
    """

    transfer: NeededProbes = Field(default=None, validate_default=True)
    """Needed: a `TransferMatrix` or the path of a `transfer.json` (`curriculum.transfer`), which `polyphony probe`
    writes."""
    replay: Replay = Replay()
    """Share of a draw for domains whose stage is over: `{kind: power_law, fraction: 0.25, exponent: 1.0}`."""
    protect: Protection = Protection()
    """Additional replay of a domain that is being forgotten: `{max_drop: 0.02, share: 0.25}`."""
    plateau: Plateau | None = Plateau()
    """When a stage ends early: `{window: 2, gain: 0.01}`; None: every stage has its full length."""
    solver: Solver = field(init=False, repr=False, compare=False)
    prior: Prior = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "solver", Solver(self.transfer.on("steer")))
        object.__setattr__(self, "prior", score_prior(self.transfer))

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        run = _Run.from_json(state) if state else self._begin(evidence)
        run, news = self._observe(run, evidence), ""
        if ended := self._ended(run, evidence):
            run, news = self._next_stage(run, evidence, ended)
        if run.stage == len(run.order):
            return self._all_alike(run, evidence, news)
        domain = run.order[run.stage]
        earlier = self._earlier_shares(run, evidence)
        shares = earlier | {domain: 1 - sum(earlier.values())}
        reason = f"stage {run.stage + 1} of {len(run.order)}: {domain}"
        if earlier:
            reason += "; replay " + ", ".join(f"{name} {share:.2f}" for name, share in earlier.items())
        if run.protected:
            reason += f"; protected: {', '.join(run.protected)}"
        return Decision(
            mixture=tuple(shares.get(name, 0.0) for name in evidence.domains),
            reason=reason + news,
            state=run.as_json(),
            stage=domain,
        )

    def reviews(self, evidence: Evidence, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the reviews of all stages begun, the last one's from the evidence at the end of the run."""
        if not state:
            return []
        run = self._observe(_Run.from_json(state), evidence)
        if run.stage < len(run.order):
            run, _ = self._next_stage(run, evidence, "the run is over")
        return [dict(review) for review in run.reviews]

    def _all_alike(self, run: _Run, evidence: Evidence, news: str) -> Decision:
        size = len(evidence.domains)
        return Decision(
            mixture=(1 / size,) * size, reason=f"all stages are over: equal shares{news}", state=run.as_json()
        )

    def _begin(self, evidence: Evidence) -> _Run:
        if set(self.solver.names) != set(evidence.domains):
            raise ValueError(
                f"bwt: the transfer file orders {sorted(self.solver.names)}, the run trains {sorted(evidence.domains)}"
            )
        return _Run(order=self.solver.order())

    def _observe(self, run: _Run, evidence: Evidence) -> _Run:
        """Take in the evaluations that are new: who is to be protected, and what practice has done to whom."""
        rows, past = evidence.evaluations, run.order[: run.stage]
        guarded = [name for name in past if name in evidence.alarms and name not in run.protected]
        run = replace(run, protected=(*run.protected, *guarded))
        if len(rows) <= run.seen:
            return run
        sums = Regression.from_json(run.sums) if run.sums else Regression.empty(len(rows[0].scores), len(run.order))
        for n in range(max(1, run.seen), len(rows)):
            sums = sums.add_scores(rows[n - 1], rows[n], evidence.domains)
        lost = moment(rows).bwt
        alarmed = [name for name in past if lost[name].high < -self.protect.max_drop]
        # who was protected stays so until the loss itself is made up for, not only its certainty
        healing = [name for name in past if name in run.protected and lost[name].mid < -self.protect.max_drop]
        protected = tuple(name for name in past if name in alarmed or name in healing)
        return replace(run, seen=len(rows), sums=sums.as_json(), protected=protected)

    def _ended(self, run: _Run, evidence: Evidence) -> str:
        """Return why the stage is over, or nothing."""
        left = len(run.order) - run.stage
        if left == 0:
            return ""
        if hurt := [name for name in evidence.alarms if name not in run.order[: run.stage]]:
            return f"it broke the guardrail of {', '.join(hurt)}"
        length = max(1, (evidence.total_draws - run.start) // left)
        if evidence.draw - run.start >= length:
            return "its draws are used up"
        return self._does_not_pay(run, evidence)

    def _does_not_pay(self, run: _Run, evidence: Evidence) -> str:
        """Return what the stage's own evaluations say against going on with it, or nothing."""
        domain = run.order[run.stage]
        own = [row.scores[domain] for row in evidence.evaluations[run.first :] if row.trained == (domain,)]
        if self.plateau is None or not own:
            return ""
        if self.plateau.is_reached([mean(graded(items)) for items in own]):
            return "its score has stopped rising"
        before = evidence.evaluations[max(run.first - 1, 0)].scores[domain]
        if paired(own[-1], before).high < 0:
            return "practising it lowers its score"
        return ""

    def _next_stage(self, run: _Run, evidence: Evidence, why: str) -> tuple[_Run, str]:
        ended = run.order[run.stage]
        done, left = run.order[: run.stage + 1], run.order[run.stage + 1 :]
        rest = self.solver.order(left, self._shift(run, evidence)) if left else ()
        news = f"; {ended} ended because {why}"
        if left:
            news += f"; the plan of the rest {'stays' if rest == left else 'becomes'} {', '.join(rest)}"
        review: dict[str, Any] = {"stage": ended, "draw": evidence.draw, "why": why, "rest": list(rest)}
        if evidence.evaluations:
            last = evidence.evaluations[-1]
            now = {name: last.mean_score(name) for name in last.scores}
            predicted = dict(zip(self.solver.effects.domains, self.solver.predict(done)[0].tolist(), strict=True))
            review["predicted"] = {name: predicted[name] for name in now}
            review["measured"] = now
            pairs = ", ".join(f"{name} {predicted[name]:.2f}/{score:.2f}" for name, score in now.items())
            news += f"; predicted/measured {pairs}"
        following = replace(
            run,
            order=(*done, *rest),
            stage=run.stage + 1,
            start=evidence.draw,
            first=len(evidence.evaluations),
            ends={**run.ends, ended: evidence.draw},
            reviews=(*run.reviews, review),
        )
        return following, news

    def _shift(self, run: _Run, evidence: Evidence) -> np.ndarray | None:
        """Return by how much the run has moved each T[j -> i] from the probes, [J, J]; None before two evaluations."""
        names = self.solver.names
        if not run.sums:
            return None
        scored = tuple(evidence.evaluations[0].scores)
        prior = self.prior.select(evidence.domains, scored)
        moved = Regression.from_json(run.sums).posterior(prior)[0] - prior.mean
        at = np.ix_([scored.index(name) for name in names], [evidence.domains.index(name) for name in names])
        return ((moved * prior.steps)[at]).T

    def _earlier_shares(self, run: _Run, evidence: Evidence) -> dict[str, float]:
        ages = {name: evidence.draw - end + 1 for name, end in run.ends.items()}
        return combine(self.replay.shares(ages), dict.fromkeys(run.protected, self.protect.share))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What `bwt` remembers."""

    order: tuple[str, ...]
    stage: int = 0
    start: int = 0
    """Draw at which the stage began."""
    first: int = 0
    """Evaluations that there were then."""
    ends: Mapping[str, int] = field(default_factory=dict)
    """Draw at which each past domain's stage ended."""
    protected: tuple[str, ...] = ()
    seen: int = 0
    sums: Mapping[str, Any] = field(default_factory=dict)
    reviews: tuple[Mapping[str, Any], ...] = ()
    """After each stage: why it ended, predicted and measured scores, the plan of the rest."""

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> _Run:
        tuples = {name: tuple(state[name]) for name in ("order", "protected", "reviews")}
        return cls(**{**state, **tuples})

    def as_json(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("order", "protected", "reviews")}
        plain = ("stage", "start", "first", "ends", "seen", "sums")
        return lists | {name: getattr(self, name) for name in plain}
