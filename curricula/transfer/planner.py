"""From a transfer matrix to a plan: which order, what it will reach, and whether a sequence beats a mixture at all.

Predicted final score of domain i under an order (Omni-Thinker, arXiv:2507.14783, with its two assumptions: transfer
does not depend on where training starts, and a domain's own stage brings it to the same level whatever came before):

    predicted_i = s_i + sum_{j after i} T[j -> i]        s_i: score after training on i alone

What we change: the entropy of the domains is part of the objective; every number has an interval, the gain one that
holds whichever order was chosen; and a sequence is recommended only where it is shown to beat a random order and the
joint run, because in a study with 12 matched seeds no data policy beat uniform mixing (arXiv:2609.06107).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from polyphony.curricula.intervals import Interval
from polyphony.curricula.transfer.budget import completed, probed
from polyphony.curricula.transfer.effects import LEVELS, Effects, Means
from polyphony.curricula.transfer.forgetting import measure
from polyphony.curricula.transfer.gains import Gains, gains
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.options import Option, Planned, groups, ranked, weigh, would
from polyphony.curricula.transfer.orders import (
    EXACT_UP_TO,
    MANY_EXACT_UP_TO,
    WALKS,
    Chooser,
    EntropyTerm,
    Objective,
    best_orders,
    is_exact,
)
from polyphony.curricula.transfer.plan import Plan

FEW_ITEMS = 20
"""Below it `sequence` is said too often: of 200 matrices with zero transfer in 11 to 15 % at 10 items, in 7 to 8 % at 20."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """How a plan is made.

    Example: `make_plan(matrix, PlanSettings(resamples=200))`
    """

    resamples: int = 1000
    """Bootstrap resamples; 1000 put about 25 beyond each end of a 95 % interval."""
    seed: int = 0
    entropy_penalty: float = 0.1
    """Score that one nat below a domain's floor costs; 0.1: a fall of half a nat weighs like five points of score."""
    entropy_floor: float = 0.5
    """Floor as a multiple of the entropy before any training: the lower end of the recipe's default band."""

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise ValueError(f"resamples must be at least 2, got {self.resamples}")
        if not (self.entropy_penalty >= 0 and self.entropy_floor >= 0):
            raise ValueError(
                f"entropy_penalty and entropy_floor must be >= 0, got {self.entropy_penalty}, {self.entropy_floor}"
            )


class Solver:
    """The ordering problem of a transfer matrix, solved for all trainable domains or for those that are left.

    Only what the matrix given holds is used: give it `matrix.on("steer")` where something is to be decided.
    """

    def __init__(self, matrix: TransferMatrix, settings: PlanSettings | None = None) -> None:
        self.settings = settings or PlanSettings()
        self.effects = Effects(matrix)
        if bare := [name for name, held in self.effects.gaps.items() if held.startswith("0 ")]:
            raise ValueError(
                f"domains {bare}: no held-out item was graded in every row, so that nothing can be compared"
            )
        if missing := [name for name in matrix.trainable if name not in self.effects.trained]:
            raise ValueError(
                f"domains {missing} have neither a probe nor a stage: probe them, or list them under watch_only"
            )
        self.names = self.effects.trained
        self.rng = np.random.default_rng(self.settings.seed)
        items = self.effects.resample(self.settings.resamples, rng=self.rng)
        self.drawn = self.effects.with_seed_noise(items, rng=self.rng)
        self.transfer, self.resampled = self.effects.square(self.effects.means())[0], self.effects.square(self.drawn)
        self._careful = _chooser(self.effects, matrix, self.settings)

    @cached_property
    def luckiest(self) -> np.ndarray:
        """The best order of each resample under its noise alone, [B, J]."""
        return best_orders(Objective(after=(self.resampled - self.transfer).transpose(0, 2, 1)))

    @cached_property
    def chooser(self) -> Chooser:
        """What orders these domains; not needed for predictions."""
        return self._careful.overruled(self.transfer, self.resampled, self.luckiest)

    def order(self, names: Sequence[str] | None = None, shift: np.ndarray | None = None) -> tuple[str, ...]:
        """Return the best order of `names` (all by default); `shift` [J, J] is added to T where a run has shown it."""
        kept = [self.names.index(name) for name in (self.names if names is None else names)]
        at = np.ix_(kept, kept)
        moved = np.zeros_like(self.transfer) if shift is None else shift
        chosen = self.chooser.part(kept).choose((self.transfer + moved)[at], (self.resampled + moved)[:, *at])
        return tuple(self.names[kept[k]] for k in chosen)

    def predict(self, done: Sequence[str], means: Means | None = None) -> np.ndarray:
        """Return the predicted scores [B, K] after training on the domains `done`, in that order.

        A domain not among them starts at its baseline and takes every transfer: so do watch-only ones.
        """
        means = means or self.effects.means()
        transfer, levels = self.effects.transfer(means), self.effects.own_levels(means)
        rows = [self.names.index(name) for name in done]
        scores = means.base + transfer[:, rows].sum(axis=1)
        for place, j in enumerate(rows):
            column = self.effects.domains.index(self.names[j])
            scores[:, column] = levels[:, j] + transfer[:, rows[place + 1 :], column].sum(axis=1)
        return scores


def make_plan(matrix: TransferMatrix, settings: PlanSettings | None = None) -> Plan:
    """Return the plan of a transfer matrix: decided on the `steer` half, its numbers published from `report`.

    Raises ValueError where a trainable domain has neither a probe nor a stage, unless a budget left it out.
    """
    left = [name for name in matrix.trainable if name not in probed(matrix)]
    if left and matrix.probes and "budget" in matrix.provenance:
        return _without(left, make_plan(completed(matrix), settings))
    fair = _without_short_joint_arm(matrix)
    steer = fair.on("steer")
    solver = Solver(steer, settings)
    effects, names = solver.effects, solver.names
    order = solver.order()
    gain = _gains(solver, order)
    options = _options(solver, steer, order, gain, has_short_joint=fair is not matrix)
    tried = next((o for o in options if o.kind == "sequence" and o.source == "measured"), None)
    if tried is not None and tried.is_shown:  # the one that was trained: another may have come to look best since
        order = tuple(name for stage in tried.how["stages"] for name in stage)
        gain = _gains(solver, order)
    precedence, regret = _confidence(solver, order)
    report = fair.on("report")
    published = solver if report is fair else Solver(report, settings)
    predicted, interval = _predictions(published, order)
    beyond = Effects(report, against="placebo") if report.placebo else published.effects
    return Plan(
        order=order,
        decision="sequence" if tried is not None and tried.is_shown else "mix",
        is_promising=gain.are_shown,
        over_mean_order=gain.over_mean_order,
        over_joint=gain.over_joint,
        precedence={
            a: {b: float(precedence[i, j]) for j, b in enumerate(names) if i != j} for i, a in enumerate(names)
        },
        expected_regret=regret,
        predicted=predicted,
        interval=interval,
        transfer=_by_name(beyond),
        placebo=_by_name(Effects(report.of_placebo())) if report.placebo else None,
        search={
            "order": "exact" if is_exact(len(names)) else "insertions",
            "resamples": "exact" if is_exact(len(names), problems=2) else "insertions",
        },
        notes=_notes(effects, matrix),
        measured=measure(report),
        options=options,
    )


def _without(left: Sequence[str], plan: Plan) -> Plan:
    """Return the plan of a file with predicted rows: nothing is recommended that rests on them."""
    names = ", ".join(left)
    options = [
        replace(o, over_mix=None, source=None, is_shown=False, note=would()) if o.kind in ("sequence", "groups") else o
        for o in plan.options
    ]
    note = f"{names} were not probed: what training on them does is predicted, so that no order is recommended."
    return replace(plan, decision="mix", is_promising=False, options=ranked(options), notes=(note, *plan.notes))


def _chooser(effects: Effects, matrix: TransferMatrix, settings: PlanSettings) -> Chooser:
    base, own = effects.entropies()
    columns = [effects.domains.index(name) for name in effects.trained]
    term = EntropyTerm(
        own=own,
        change=effects.entropy_transfer()[:, columns],
        floor=settings.entropy_floor * base,
        penalty=settings.entropy_penalty,
    )
    structured = np.array([matrix.kinds[name] == "structured" for name in effects.trained])
    return Chooser(is_structured=structured, entropy=term)


def _confidence(solver: Solver, order: Sequence[str]) -> tuple[np.ndarray, float]:
    """Return the precedence table [J, J] and the expected regret of `order` over the resampled problems."""
    problems = solver.chooser.objective(solver.resampled.transpose(0, 2, 1))
    chosen = np.array([solver.names.index(name) for name in order])
    best = best_orders(problems, start=chosen)
    rank = np.argsort(best, axis=1)
    precedence = (rank[:, :, None] < rank[:, None, :]).mean(axis=0)
    regret = (problems.value(best) - problems.value(chosen[None])).mean() / len(order)
    return precedence, float(regret)


def _gains(solver: Solver, order: Sequence[str]) -> Gains:
    if len(solver.names) == 1:
        return Gains(over_mean_order=Interval(0.0, 0.0, 0.0), over_joint=None)
    chosen = np.array([solver.names.index(name) for name in order])
    return gains(solver.effects, solver.chooser, chosen, solver.drawn, luckiest=solver.luckiest, rng=solver.rng)


def _options(
    solver: Solver, matrix: TransferMatrix, order: tuple[str, ...], gain: Gains, *, has_short_joint: bool
) -> tuple[Option, ...]:
    planned = Planned(
        order=order,
        over_joint=gain.over_joint,
        stages=groups(solver.effects, order),
        has_short_joint=has_short_joint,
    )
    return weigh(matrix, planned, resamples=solver.settings.resamples, rng=solver.rng)


def _predictions(solver: Solver, order: Sequence[str]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    domains = solver.effects.domains
    low, high = np.quantile(solver.predict(order, solver.drawn), LEVELS, axis=0).tolist()
    mid = solver.predict(order)[0].tolist()
    bounds = zip(low, high, strict=True)
    return dict(zip(domains, mid, strict=True)), dict(zip(domains, bounds, strict=True))


def _by_name(effects: Effects) -> dict[str, dict[str, float]]:
    table = zip(effects.trained, effects.transfer().tolist(), strict=True)
    return {name: dict(zip(effects.domains, row, strict=True)) for name, row in table}


def _notes(effects: Effects, matrix: TransferMatrix) -> tuple[str, ...]:
    notes = []
    if effects.noise.seeds == 1:
        notes.append("One seed a probe: the intervals hold evaluation noise only, a second seed would say more.")
    if not matrix.joint_arm:
        notes.append("No joint run was measured, so mixing is not among what is compared.")
    if {row.trained[0] for row in matrix.probes} != set(matrix.trainable):
        notes.append("Some domains were never probed: their transfer is that of the run's stages.")
    for name in effects.domains:
        items = effects.after[effects.domains.index(name)].shape[1]
        if items < FEW_ITEMS:
            notes.append(f"Domain {name} is decided by {items} items: its intervals are too narrow for so few.")
    notes += [f"Of {name} {held} are compared, those graded in every row." for name, held in effects.gaps.items()]
    notes += _search_note(len(effects.trained))
    ran, total = _steps(matrix)
    if ran is not None and ran != total:
        what = "too few to compare with, so it was left out" if ran < total else "not the same"
        notes.append(f"The joint run ran {ran} steps and the probes {total} together: {what}.")
    return tuple(notes)


def _search_note(size: int) -> list[str]:
    """Return how orders were found where not all are proven best."""
    if not is_exact(size):
        how = f"searched by insertions from {WALKS} starts, not proven best: exact search serves up to {EXACT_UP_TO}"
        return [f"The order of {size} domains was {how}."]
    if not is_exact(size, problems=2):
        how = f"searched by insertions: exact search serves those up to {MANY_EXACT_UP_TO} domains"
        return [f"The order is proven best; those of the resamples, which its bounds come from, were {how}."]
    return []


def _steps(matrix: TransferMatrix) -> tuple[int | None, int]:
    """Return the steps of the shortest joint run, None without one, and those of all domains' probes together."""
    start = matrix.baselines(probe=True)[0].step
    alone = {row.trained[0]: row.step - start for row in matrix.probes}
    ran = min((row.step - start for row in matrix.joint_arm), default=None)
    return ran, sum(alone.values())


def _without_short_joint_arm(matrix: TransferMatrix) -> TransferMatrix:
    """Return the matrix without a joint run that had less training than the probes: any order would beat it."""
    ran, total = _steps(matrix)
    if ran is None or ran >= total:
        return matrix
    return replace(matrix, rows=tuple(row for row in matrix.rows if row not in matrix.joint_arm))
