"""What a study's rows say: best rates, ranks, tables with every seed, paired intervals, Holm's correction.

Average and worst are over the domains that are trained, watched over the others; all of the published half. Differences
are between runs of one seed, with Student's t over seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import rankdata, ttest_rel

from polyphony.curricula.intervals import Interval
from polyphony.curricula.records import mean
from tests.experiments.trials import over_seeds

Row = Mapping[str, Any]
Grid = tuple[Sequence[str], Sequence[int]]
"""Worlds and seeds."""

PUBLISHED = ("sec", "pac", "mt_grpo", "dump", "e2h", "visatb")
"""Arms that others published as methods of choosing domains."""
MEASURES = ("average", "worst")
BAND = (0.5, 1.5)


def score(row: Row, measure: str, *, of: str = "scores") -> float:
    """Return a row's average or worst over its trained domains, or the mean over its watched ones (NaN without)."""
    scores = row[of]
    trained = [scores[name] for name in row["trained"]]
    if measure == "watched":
        return mean([value for name, value in scores.items() if name not in row["trained"]])
    return min(trained) if measure == "worst" else mean(trained)


def best_rates(rows: Sequence[Row], grid: Grid) -> dict[str, float]:
    """Return each arm's rate with the highest sum of average and worst, over worlds and seeds; of equals the lower.

    Only rates that were run in all worlds and with all seeds count.
    """
    worlds, seeds = grid
    sums: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["world"] in worlds and row["seed"] in seeds:
            sums.setdefault((row["arm"], row["rate"]), []).append(sum(score(row, m) for m in MEASURES))
    whole = {place: mean(values) for place, values in sums.items() if len(values) == len(worlds) * len(seeds)}
    found: dict[str, float] = {}
    for arm, rate in sorted(whole, key=lambda place: (-whole[place], place[1])):
        found.setdefault(arm, rate)
    return found


def ranking(rows: Sequence[Row], worlds: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    """Return each arm's mean rank over average and worst in these worlds, 1 the best, each at its rate."""
    arms = [arm for arm in rates if any(row["arm"] == arm for row in rows)]
    ranks: dict[str, list[float]] = {arm: [] for arm in arms}
    for world in worlds:
        for measure in MEASURES:
            means = [mean([score(r, measure) for r in _of(rows, world, arm, rates[arm])]) for arm in arms]
            for arm, rank in zip(arms, rankdata([-value for value in means]), strict=True):
                ranks[arm].append(float(rank))
    return {arm: mean(values) for arm, values in ranks.items()}


def paired(rows: Sequence[Row], others: Sequence[Row], measure: str) -> tuple[Interval, float]:
    """Return the mean difference over the seeds that both have, with its interval, and the p-value of a paired t test."""
    of_other = {row["seed"]: score(row, measure) for row in others}
    pairs = [(score(row, measure), of_other[row["seed"]]) for row in rows if row["seed"] in of_other]
    interval = over_seeds([a - b for a, b in pairs])
    has_spread = len(pairs) > 1 and len({a - b for a, b in pairs}) > 1
    p = float(ttest_rel([a for a, _ in pairs], [b for _, b in pairs]).pvalue) if has_spread else math.nan
    return interval, p


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values adjusted for their number by Holm's step-down rule; NaN counts as 1.

    Example: `holm({"a": 0.01, "b": 0.04}) == {"a": 0.02, "b": 0.04}`
    """
    order = sorted(p_values, key=lambda name: (math.isnan(p_values[name]), p_values[name]))
    found, highest = {}, 0.0
    for n, name in enumerate(order):
        p = 1.0 if math.isnan(p_values[name]) else p_values[name]
        highest = max(highest, min(1.0, p * (len(order) - n)))
        found[name] = highest
    return found


def in_band(row: Row) -> float:
    """Return the share of domains whose entropy at the end is within the band of that at the start."""
    return mean([float(BAND[0] <= ratio <= BAND[1]) for ratio in row["entropy"].values()])


def tokens_to(row: Row, target: float) -> float:
    """Return the rollout tokens at which a run's average, between evaluations in a line, reaches `target`; NaN: never."""
    points = [(tokens, mean([scores[name] for name in row["trained"]])) for _, tokens, scores in row["looks"]]
    points.append((row["tokens"]["rollout"], score(row, "average", of="shown")))
    for (before, low), (after, high) in itertools.pairwise(points):
        if high >= target:
            return before + (after - before) * max(0.0, (target - low) / (high - low) if high > low else 0.0)
    return math.nan


def _of(rows: Sequence[Row], world: str, arm: str, rate: float | None = None, every: int | None = None) -> list[Row]:
    found = [row for row in rows if row["world"] == world and row["arm"] == arm]
    found = [row for row in found if rate in (None, row["rate"]) and every in (None, row["every"])]
    return sorted(found, key=lambda row: row["seed"])


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def _signed(interval: Interval) -> str:
    return f"{interval.mid:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def tuning_report(rows: Sequence[Row], worlds: Sequence[str], seeds: Sequence[int]) -> str:
    """Return average and worst of every arm at every rate in the tuning worlds, and the ranks."""
    tuned = [row for row in rows if row["seed"] in seeds and row["world"] in worlds]
    rates = best_rates(tuned, (worlds, seeds))
    ranks = ranking(tuned, worlds, rates)
    lines = []
    for arm in sorted({row["arm"] for row in tuned}, key=lambda arm: ranks.get(arm, math.inf)):
        for rate in sorted({row["rate"] for row in tuned if row["arm"] == arm}):
            cells = [
                f"{mean([score(r, m) for r in _of(tuned, w, arm, rate)]):.3f}"
                for w in worlds
                for m in (*MEASURES, "watched")
            ]
            is_best = rates.get(arm) == rate
            rank = f"{ranks[arm]:.2f}" if is_best else ""
            lines.append([arm, f"{rate:g}{' *' * is_best}", *cells, str(len(_of(tuned, worlds[0], arm, rate))), rank])
    names = [f"{world} {measure}" for world in worlds for measure in (*MEASURES, "watched")]
    return "\n".join(["", "tuning (* the arm's rate)", "", *_table(["arm", "rate", *names, "seeds", "rank"], lines)])


def report(
    rows: Sequence[Row], *, arms: Sequence[str], rates: Mapping[str, float], tuning: Sequence[str], every: int
) -> str:
    """Return the tables of the final part: a table a world with every seed, then the tests; the candidate is first."""
    out: list[str] = []
    shown = [*arms, *(f"{arm}+" for arm in (arms[0], "joint"))]
    for world in dict.fromkeys(row["world"] for row in rows if row["arm"] != "probe"):
        joint = _of(rows, world, "joint", every=every)
        lines = [_line(rows, world, arm, joint, every) for arm in shown if _of(rows, world, arm, every=every)]
        rare = [row for row in _of(rows, world, arms[0]) if row["every"] != every]
        lines += [_cells(f"{arms[0]}, every {rare[0]['every']}", rare, joint, 0)] if rare else []
        lines += [["start", *_start(joint)]] if joint and joint[0]["looks"] else []
        head = [
            "arm, + with pool and decay and to joint+",
            "seeds",
            "rate",
            "average",
            "to joint",
            "worst",
            "to joint",
            "watched",
            "to joint",
            "in band",
        ]
        head += ["rollout", "evaluation", "probe", "tokens to joint's end"]
        out += ["", world, "", *_table(head, lines), ""]
        for arm in shown:
            of_arm = _of(rows, world, arm, every=every)
            for measure in MEASURES if of_arm else ():
                out.append(f"{arm} {measure}: " + " ".join(f"{score(row, measure):.3f}" for row in of_arm))
    return "\n".join([*out, *_tests(rows, arms, tuning, every)])


def _line(rows: Sequence[Row], world: str, arm: str, joint: Sequence[Row], every: int) -> list[str]:
    found = _of(rows, world, arm, every=every)
    joint = _of(rows, world, "joint+", every=every) if arm.endswith("+") else joint
    probes = [r["tokens"]["probe"] for r in _of(rows, world, "probe") if r["rate"] == found[0]["rate"]]
    is_planned = found[0]["settings"].get("transfer") == "probe"
    return _cells(arm, found, joint, probes[0] if probes and is_planned else 0)


def _start(joint: Sequence[Row]) -> list[str]:
    """Return what stands before the first draw, of the published items that are shown on the way."""
    row = joint[0]
    row = {**row, "shown": row["looks"][0][2]}
    told = [cell for measure in (*MEASURES, "watched") for cell in (f"{score(row, measure, of='shown'):.3f}", "")]
    return ["", "", *told, *[""] * 5]


def _cells(name: str, found: Sequence[Row], joint: Sequence[Row], probed: int) -> list[str]:
    cells = [name, str(len(found)), f"{found[0]['rate']:g}"]
    for measure in (*MEASURES, "watched"):
        cells += [f"{mean([score(row, measure) for row in found]):.3f}", _signed(paired(found, joint, measure)[0])]
    ends = {row["seed"]: score(row, "average", of="shown") for row in joint}
    reached = [tokens_to(row, ends[row["seed"]]) for row in found if row["seed"] in ends]
    there = [tokens for tokens in reached if not math.isnan(tokens)]
    spent = [mean([row["tokens"][kind] for row in found]) for kind in ("rollout", "evaluation")]
    cells += [f"{mean([in_band(row) for row in found]):.2f}", *(f"{n:,.0f}" for n in (*spent, probed))]
    return [*cells, f"{mean(there):,.0f} ({len(there)} of {len(reached)})" if there else "never"]


def _tests(rows: Sequence[Row], arms: Sequence[str], tuning: Sequence[str], every: int) -> list[str]:
    """Return the registered tests of the candidate against joint, and its distance to every other arm."""
    candidate, out = arms[0], ["", f"candidate: {arms[0]}"]
    places = [(world, measure) for world in tuning for measure in MEASURES]
    found = {
        f"{world} {measure}": paired(
            _of(rows, world, candidate, every=every), _of(rows, world, "joint", every=every), measure
        )
        for world, measure in places
    }
    adjusted = holm({name: p for name, (_, p) in found.items()})
    for name, (interval, p) in found.items():
        out.append(f"{name}, to joint: {_signed(interval)}, p {p:.4f}, by Holm {adjusted[name]:.4f}")
    others = [arm for arm in arms if arm not in (candidate, "joint")]
    for (world, measure), other in itertools.product(places, others):
        ours, theirs = (_of(rows, world, arm, every=every) for arm in (candidate, other))
        out.append(f"{world} {measure}, to {other}: {_signed(paired(ours, theirs, measure)[0])}")
    return out
