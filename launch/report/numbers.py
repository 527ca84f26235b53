"""The numbers a report states, each once: scores, changes, forgetting, transfer, entropy against its band, rollouts.

Every difference carries an interval over held-out items of the `report` half, paired item by item, and so wide that those
of all domains hold together with 95 % (Bonferroni): sentences, tables, curves and JSON have the same. One run is one seed:
the intervals say how sure the evaluation is of this run's weights, not how another seed would have ended.

What entropy was traded for is R = b - a exp(H), score against entropy in nats per token (arXiv:2505.22617). A policy
that follows the law ends at b - a when its entropy is used up; what lies between that and the score now is the headroom
left without new entropy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyphony.curricula.intervals import UNDEFINED, Interval, bounded_mean, changed, on_both, student
from polyphony.curricula.monitors.entropy import place_in_band
from polyphony.curricula.records import Evaluation, mean
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.forgetting import Moment, curves
from polyphony.launch.report.run import LoadedRun, stage_spans


@dataclass(frozen=True, kw_only=True, slots=True)
class Entropy:
    """Token entropy of one domain in nats; NaN where it was not measured."""

    before: float
    after: float
    low: float
    high: float
    """The allowed band: the recipe's multiples of the base model's entropy."""

    @property
    def at(self) -> float:
        """Where it lies in the band, as `heldout/<d>/entropy_place`."""
        return place_in_band(self.after, (self.low, self.high))

    @property
    def place(self) -> str:
        """`below`, `inside` or `above` the band; `unknown` without one."""
        if not (math.isfinite(self.after) and math.isfinite(self.low)):
            return "unknown"
        return "below" if self.after < self.low else "above" if self.after > self.high else "inside"


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """What training on each of J domains did to each of K: tables [J, K]."""

    trained: tuple[str, ...]
    domains: tuple[str, ...]
    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    source: str
    """`probes`, `stages` of the run, or both; and what they are beyond, if they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All that one run says in numbers. Mappings by domain name."""

    run: LoadedRun
    stages: Sequence[tuple[float, float, str]]
    """(First step, step after the last, domain) of the scheduler's stages."""
    evaluations: tuple[Evaluation, ...]
    """The run's moments in order of step, the baseline first; empty before any."""
    scores: Mapping[str, tuple[Interval, ...]]
    """One interval an evaluation."""
    change: Mapping[str, Interval]
    """Last evaluation minus baseline."""
    moments: tuple[Moment, ...]
    """BWT and drawdown at each evaluation after the baseline."""
    transfer: Transfer | None
    entropy: Mapping[str, Entropy]

    @property
    def steps(self) -> list[int]:
        """Steps of the evaluations."""
        return [row.step for row in self.evaluations]

    def final(self, of: str, name: str) -> Interval:
        """Return a domain's `change`, `bwt` or `drawdown` at the last evaluation; UNDEFINED where it has none."""
        found = self.change if of == "change" else getattr(self.moments[-1], of) if self.moments else {}
        return found.get(name, UNDEFINED)

    @property
    def compared(self) -> dict[str, tuple[int, int]]:
        """Of each domain's held-out items, how many were graded both at the baseline and at the last evaluation, and all."""
        if not self.evaluations:
            return {}
        first, last = self.evaluations[0].scores, self.evaluations[-1].scores
        return {name: (len(on_both(last[name], first[name])[0]), len(first[name])) for name in first}

    def claims(self, of: str) -> dict[str, Interval]:
        """Return `change`, `bwt` or `drawdown` at the end, of the domains that have one."""
        names = self.evaluations[0].scores if self.evaluations else ()
        found = {name: self.final(of, name) for name in names}
        return {name: interval for name, interval in found.items() if math.isfinite(interval.mid)}

    @property
    def has_stages(self) -> bool:
        """Whether a trained domain's own stage has ended: backward transfer is since then."""
        return any(name not in self.run.watch_only for name in self.claims("bwt"))


def find(run: LoadedRun) -> Findings:
    """Derive a run's numbers."""
    rows = run.moments
    names = tuple(rows[0].scores) if rows else ()
    level = 1 - 0.05 / max(1, len(names))
    return Findings(
        run=run,
        stages=stage_spans(run),
        evaluations=rows,
        scores={name: tuple(bounded_mean(row.scores[name]) for row in rows) for name in names},
        change={name: _change(rows, name, level) for name in names},
        moments=tuple(curves(rows, watch_only=run.watch_only, level=level)) if len(rows) > 1 else (),
        transfer=_transfer(run),
        entropy={name: _entropy(run, rows, name) for name in run.domains},
    )


def between(first: Findings, second: Findings, name: str) -> Interval:
    """Return last score of `second` minus that of `first`, paired; UNDEFINED where the held-out items differ."""
    if not (first.evaluations and second.evaluations):
        return UNDEFINED
    ours, theirs = (f.evaluations[-1].scores.get(name, ()) for f in (first, second))
    ids = [f.run.item_ids.get(name) for f in (first, second)]
    if not ours or len(ours) != len(theirs) or ids[0] != ids[1]:
        return UNDEFINED
    return changed(theirs, ours)


def average(run: LoadedRun, key: str) -> float:
    """Return the mean of a metric over the whole run; NaN if it was never logged."""
    return float(run.metrics[key].values.mean()) if key in run.metrics else math.nan


def budget(run: LoadedRun) -> dict[str, tuple[float, float]]:
    """Return per domain (completions, completions in dead groups) over the run; only domains that logged both."""
    spent = {}
    for name in run.domains:
        share, count = run.metrics.get(f"domain/{name}/dead_completions"), run.metrics.get(f"domain/{name}/n")
        if share is None or count is None:
            continue
        _, at, of = np.intersect1d(count.steps, share.steps, return_indices=True)
        counts = count.values[at]
        if counts.sum() > 0:
            spent[name] = float(counts.sum()), float(counts @ share.values[of])
    return spent


def dead_share(run: LoadedRun) -> float:
    """Return the share of completions in groups without signal; NaN if never logged."""
    spent = budget(run).values()
    total = sum(count for count, _ in spent)
    return sum(dead for _, dead in spent) / total if total else math.nan


def as_json(findings: Findings) -> dict[str, Any]:
    """Return the findings as plain numbers for `polyphony report --json`; undefined is null."""
    run, last = findings.run, findings.moments[-1] if findings.moments else None
    table = findings.transfer
    return {
        "run": run.name,
        "model": run.setting("model"),
        "algorithm": run.setting("algorithm"),
        "scheduler": run.scheduler or None,
        "steps": run.steps,
        "planned_steps": run.planned_steps,
        "finished": run.is_finished,
        "evaluations": len(findings.evaluations),
        "domains": {name: _domain_json(findings, name) for name in run.domains},
        "transfer": {} if table is None else _transfer_json(table),
        "bwt": _plain(last.mean_bwt) if last else None,
        "drawdown_max": _plain(last.worst_drawdown) if last else None,
        "rollouts": {
            "dead_share": _plain(dead_share(run)),
            "useful_token_frac": _plain(average(run, "rollout/useful_token_frac")),
            "tokens_per_s": _plain(average(run, "rollout/tokens_per_s")),
            "step_time_s": _plain(average(run, "step_time")),
        },
        "alarms": [{key: _finite(value) for key, value in alarm.items()} for alarm in run.alarms],
        "missing": list(run.missing),
    }


def _domain_json(findings: Findings, name: str) -> dict[str, Any]:
    scores, entropy = findings.scores.get(name, ()), findings.entropy[name]
    reward = findings.run.metrics.get(f"domain/{name}/reward")
    return {
        "watch_only": name in findings.run.watch_only,
        "score": {"before": _bounds(scores[0]) if scores else None, "after": _bounds(scores[-1]) if scores else None},
        "change": _bounds(findings.final("change", name)),
        "items": dict(zip(("compared", "of"), findings.compared.get(name, (0, 0)), strict=True)),
        "bwt": _bounds(findings.final("bwt", name)),
        "drawdown": _bounds(findings.final("drawdown", name)),
        "entropy": {
            "before": _plain(entropy.before),
            "after": _plain(entropy.after),
            "band": [entropy.low, entropy.high] if math.isfinite(entropy.low) else None,
            "place": entropy.place,
        },
        "reward": None if reward is None else {"first": reward.values[0], "last": reward.values[-1]},
    }


def _transfer_json(table: Transfer) -> dict[str, dict[str, list[float]]]:
    cells = np.stack([table.low, table.effect, table.high], axis=-1)
    return {
        source: {target: cells[j, k].tolist() for k, target in enumerate(table.domains)}
        for j, source in enumerate(table.trained)
    }


def _change(rows: Sequence[Evaluation], name: str, level: float) -> Interval:
    return changed(rows[-1].scores[name], rows[0].scores[name], level=level) if len(rows) > 1 else UNDEFINED


def _transfer(run: LoadedRun) -> Transfer | None:
    if run.transfer is None:
        return None
    effects = Effects(run.transfer, against="placebo")
    if not effects.trained:
        return None
    low, high = effects.transfer_interval()
    probed = {row.trained[0] for row in run.transfer.probes}
    kinds = {"probes" if name in probed else "stages of the run" for name in effects.trained}
    return Transfer(
        trained=effects.trained,
        domains=effects.domains,
        effect=effects.transfer(),
        low=low,
        high=high,
        source=" and ".join(sorted(kinds)) + (", beyond what shuffled rewards did" if run.transfer.placebo else ""),
    )


def _entropy(run: LoadedRun, rows: Sequence[Evaluation], name: str) -> Entropy:
    held_out = [row.entropy[name] for row in rows if name in row.entropy]
    band = run.setting("entropy", "band")
    factors = band if held_out and isinstance(band, Sequence) and len(band) == 2 else (math.nan, math.nan)
    base = held_out[0] if held_out else math.nan
    logged = run.metrics.get(f"domain/{name}/entropy")
    before, after = base, held_out[-1] if len(held_out) > 1 else math.nan
    if not held_out and logged is not None:
        few = max(1, len(logged.values) // 20)
        before, after = mean(logged.values[:few].tolist()), mean(logged.values[-few:].tolist())
    return Entropy(before=before, after=after, low=factors[0] * base, high=factors[1] * base)


def _bounds(interval: Interval) -> list[float] | None:
    return [*interval] if math.isfinite(interval.mid) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


FEWEST = 4
"""Evaluations a fit needs: two parameters, and two degrees of freedom for its interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The law fitted to one domain's evaluations."""

    a: float
    """Score bought per unit of exp(H); with its interval in `a_interval`."""
    b: float
    a_interval: Interval
    headroom: Interval
    """b - a minus the score that the law gives at the last entropy: what using up the rest would still buy."""

    @property
    def is_trade(self) -> bool:
        """True where score rose as entropy fell beyond what noise explains."""
        return self.a_interval.low > 0


def fit_exchange(entropy: Sequence[float], score: Sequence[float], *, level: float = 0.95) -> Exchange | None:
    """Return the least-squares fit over evaluations [T] in order; None for fewer than four or an entropy that stood.

    Intervals are those of ordinary least squares with T - 2 degrees of freedom: residuals only, not the items behind
    each score.
    """
    if len(entropy) != len(score):
        raise ValueError(f"entropies and scores must come in pairs, got {len(entropy)} and {len(score)}")
    if len(entropy) < FEWEST:
        return None
    x, y = np.exp(np.asarray(entropy, dtype=float)), np.asarray(score, dtype=float)
    spread = float(((x - x.mean()) ** 2).sum())
    if spread < 1e-12:
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    residual = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt(float((residual**2).sum()) / (len(x) - 2) / spread)
    half = student(level, len(x) - 2) * error
    a = Interval(-slope - half, -slope, -slope + half)
    left = float(x[-1]) - 1  # exp(H) falls to exp(0)
    headroom = Interval(*(left * bound for bound in a)) if left > 0 else UNDEFINED
    return Exchange(a=a.mid, b=float(y.mean()) + a.mid * float(x.mean()), a_interval=a, headroom=headroom)
