"""The chapters of a report in numbers: each takes the sheet and returns what `chapters.html` draws under its name.

What is of one run comes as a list, one entry a run. Empty where the keys are absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polyphony.curricula.intervals import Interval
from polyphony.curricula.records import graded
from polyphony.launch.report.charts import Figure, Layer, Line, Mark, draw_stack
from polyphony.launch.report.numbers import (
    FEWEST,
    Exchange,
    Findings,
    Transfer,
    average,
    between,
    budget,
    find,
    fit_exchange,
)
from polyphony.launch.report.run import LoadedRun, as_mapping, run_before
from polyphony.launch.report.story import bounds, signed
from polyphony.launch.report.theme import Panels, Sheet
from polyphony.trainer.run import visible

PROMPTS = 3
LETTERS = 100_000
"""Characters of all completions shown together."""
ALARMS = 200
"""Alarms of a run that are shown at most."""
"""Sample prompts shown a domain."""


REASONS = 30
"""Reasons of the scheduler that are listed."""


STATES = ("active", "deferred", "impossible", "mastered")


HEALTH = {
    "reward": "reward, of the rows of the update",
    "entropy": "entropy, nats a token",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "kl": "KL to the reference",
    "step_time": "seconds a step",
    "completions/mean_length": "completion length",
    "completions/clipped_ratio": "cut-off completions",
    "sampling/sampling_logp_difference/mean": "engine against trainer",
}
"""TRL's own keys that tell whether a run is healthy; the last is the mean gap of their log-probabilities."""


SHARES = {
    "answer_repetition": "Says its answer three times or more",
    "repeated_ngrams": "More than 30 % repeated 8-grams",
    "computation_skipping": "Far shorter than correct answers, or without the steps of the solution",
    "bare_answer": "Hardly anything before the answer",
    "language_mixing": "Letters of other scripts",
    "truncation": "Cut at the length limit",
}
"""Metrics of `shortcuts/<d>` that are shares of completions."""


DEAD = {
    "frac_dead": "Dead groups: share of groups drawn with equal rewards",
    "dead_correct": "Of what reached the update: dead because all was correct",
    "dead_wrong": "Of what reached the update: dead because all was equally wrong",
    "dead_equal": "Of what reached the update: dead with equal partial rewards",
}


DIVERSITY = {
    "classes": "Semantic classes a group",
    "mean": "Mean diversity",
    "collapsed": "Share of groups with one class",
}


SIGNS = SHARES | {"correct_length": "Median length of correct answers, tokens"}


FORGETTING = {
    "bwt": "Backward transfer: now minus the end of the domain's own stage (where it is only watched: minus the start)",
    "drawdown": "Drawdown: now minus the best evaluation so far, cross-fitted",
}


QUALITIES = {
    "pass_at_k": "pass@k: any of the k samples is right",
    "majority": "Majority vote",
    "greedy": "Greedy decoding",
    "overconfidence": "Overconfidence: probability given to answers minus share of right ones",
    "consistency_overconfidence": "The same by self-consistency: share of samples that agree minus share of right votes",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
    "auroc": "Does confidence tell right from wrong (AUROC)",
    "format_valid": "Format-valid share",
    "format_share": "Share of the commonest output style",
    "kl_base": "KL(base ‖ policy), nats a token",
    "unique_correct": "Different right answers an item",
    "distinct_2": "Different word pairs in an item's samples",
    "vendi": "Effective number of different samples an item (Vendi, by shared words)",
    "self_bleu": "How much an item's samples repeat each other (self-BLEU)",
}
"""Metrics of `heldout/<d>` and what they say."""


Ends = tuple[float, ...]
"""A number then and now; NaN where it is unknown."""
PACE = {"step_time": "seconds a step", "rollout/tokens_per_s": "tokens a second"}
"""What of the whole run is compared with the run before."""
NOTES, NOTE = 200, 160
"""Reasons that stand under the pointer, and characters of one."""


IN_EVALUATIONS = {"kl_base": "kl"}
"""Where `evaluations.jsonl` has another name for one; pass@k there carries its k."""


# --- scores, forgetting, transfer ---------------------------------------------------------------------------------------


def summary(sheet: Sheet) -> tuple[tuple[float, float], list]:
    """Return the span of all changes, and of each domain the last scores and their paired differences to the first run."""
    changes = [i for f in sheet.findings for i in f.change.values() if math.isfinite(i.mid)]
    span = (min([0.0, *(i.low for i in changes)]), max([0.01, *(i.high for i in changes)]))
    first, *others = sheet.findings
    rows = [
        (name, [f.scores.get(name, ())[-1:] for f in sheet.findings], [between(first, f, name) for f in others])
        for name in sheet.domains
    ]
    return span, [] if sheet.is_single else rows


def held_out(sheet: Sheet) -> list[Panels]:
    """Draw each domain's held-out score with its interval."""

    def lines(name: str) -> list[Line]:
        found = []
        for n, f in enumerate(sheet.findings):
            if scores := f.scores.get(name):
                found.append(sheet.interval_line(n, sheet.colour(name), f.steps, scores))
        return found or sheet.metric_lines(f"heldout/{name}/score", sheet.colour(name))

    return sheet.domain_panels(lines)


def forgetting(sheet: Sheet) -> list[Panels]:
    """Draw backward transfer, then drawdown, of each domain with intervals."""

    def lines(name: str, field: str) -> list[Line]:
        found = []
        for n, f in enumerate(sheet.findings):
            points = [(m.step, getattr(m, field)[name]) for m in f.moments if name in getattr(m, field)]
            points = [(step, interval) for step, interval in points if math.isfinite(interval.mid)]
            if points:
                found.append(sheet.interval_line(n, sheet.colour(name), *zip(*points, strict=True)))
        return found

    return [
        group
        for field, title in FORGETTING.items()
        for group in sheet.domain_panels(lambda name, field=field: lines(name, field), heading=title, has_zero=True)
    ]


class Cell(NamedTuple):
    """One cell of a heatmap."""

    kinds: str
    """Classes of the style sheet: which way it went, whether its interval leaves out zero, whether it is on itself."""
    depth: float
    effect: Interval


def transfer(sheet: Sheet) -> list[list[tuple[str, list[Cell]]]]:
    """Return what training on each domain did to each, as rows of a heatmap."""
    return [_heatmap(f.transfer) if f.transfer else [] for f in sheet.findings]


def _heatmap(table: Transfer) -> list[tuple[str, list[Cell]]]:
    strongest = float(np.abs(table.effect).max()) or 1.0
    cells = np.stack([table.low, table.effect, table.high], axis=-1)
    return [
        (name, [_cell(Interval(*cells[j, k]), strongest, name == to) for k, to in enumerate(table.domains)])
        for j, name in enumerate(table.trained)
    ]


def _cell(effect: Interval, strongest: float, is_own: bool) -> Cell:
    is_sure = effect.is_above_zero or effect.is_below_zero
    kinds = ["gain" if effect.mid > 0 else "loss", "sure" if is_sure else "open", *(["own"] if is_own else [])]
    return Cell(" ".join(kinds), round(abs(effect.mid) / strongest * (0.62 if is_sure else 0.2), 3), effect)


def predicted(sheet: Sheet) -> list[list[tuple[Any, str, Any, Any]]]:
    """Return (stage, domain, predicted, measured) of the plan's stages."""
    return [
        [
            (stage.get("stage", k + 1), name, guess, (stage.get("measured") or {}).get(name))
            for k, stage in enumerate(f.run.predicted)
            for name, guess in (stage.get("predicted") or {}).items()
        ]
        for f in sheet.findings
    ]


# --- training -----------------------------------------------------------------------------------------------------------


def reward(sheet: Sheet) -> list[Panels]:
    """Draw each domain's training reward."""
    return sheet.domain_panels(lambda name: sheet.metric_lines(f"domain/{name}/reward", sheet.colour(name)))


def entropy(sheet: Sheet) -> tuple[list[Panels], list[Panels]]:
    """Draw each domain's entropy in training and at evaluations, over the band where it should stay; its coefficient."""

    def lines(name: str) -> list[Line]:
        found = sheet.metric_lines(f"domain/{name}/entropy", sheet.colour(name), what="in training")
        mark: Mark = "dots" if found else "both"
        for n, f in enumerate(sheet.findings):
            points = [(row.step, row.entropy[name]) for row in f.evaluations if name in row.entropy]
            if points:
                found.append(sheet.line(n, sheet.colour(name), *zip(*points, strict=True), what="held out", mark=mark))
        return found

    def allowed(name: str) -> tuple[float, float] | None:
        known = [f.entropy[name] for f in sheet.findings if name in f.entropy]
        return next(((e.low, e.high) for e in known if math.isfinite(e.low)), None)

    levels = sheet.domain_panels(lines, shares_y=False, allowed_of=allowed)
    titles = {"entropy_coef": "Coefficient of the entropy term, where it is on"}
    return levels, sheet.metric_panels("domain/{name}/{metric}", titles)


class Mixture(NamedTuple):
    """What one run practised."""

    figure: Figure
    reasons: list[tuple[float, float, str]]
    """(First step, last step, words) of each stretch of draws with the same reason."""
    every: int
    """One reason in so many is listed."""


def mixture(sheet: Sheet) -> list[Mixture | None]:
    """Draw the share of each domain in every draw and list the scheduler's reasons."""
    return [_mixture(sheet, f.run) for f in sheet.findings]


def _mixture(sheet: Sheet, run: LoadedRun) -> Mixture | None:
    rows = [row for row in run.decisions if isinstance(row.get("mixture"), dict)]
    if not rows:
        return None
    x = np.array([row.get("step", row.get("draw", k)) for k, row in enumerate(rows)], dtype=float)
    layers = []
    for name in run.domains:
        share = np.nan_to_num(np.array([row["mixture"].get(name) for row in rows], dtype=float))
        if share.any():
            layers.append(Layer(name=name, share=share, colour=sheet.colour(name)))
    if not layers:
        return None
    reasons = _reasons(rows, x)
    figure = draw_stack("share of each draw", x, layers, notes=_notes(reasons))
    return Mixture(figure, reasons, math.ceil(len(reasons) / REASONS))


def _notes(reasons: Sequence[tuple[float, float, str]]) -> list[tuple[float, str]]:
    """Return what stands under the pointer: of very many reasons every so-manieth, of a long one its beginning."""
    every = math.ceil(len(reasons) / NOTES)
    return [(start, words[:NOTE]) for start, _, words in reasons[:: every or 1]]


def _reasons(rows: Sequence[Mapping[str, Any]], x: np.ndarray) -> list[tuple[float, float, str]]:
    spans: list[tuple[float, float, str]] = []
    for row, step in zip(rows, x, strict=True):
        words = str(row.get("reason", ""))
        if spans and spans[-1][2] == words:
            spans[-1] = (spans[-1][0], float(step), words)
        else:
            spans.append((float(step), float(step), words))
    return spans


def pool(sheet: Sheet) -> list[list[Figure]]:
    """Draw how many prompts of each domain are in which state."""
    return [
        [figure for name in f.run.domains if (figure := _states(sheet, f.run, name)) is not None]
        for f in sheet.findings
    ]


def _states(sheet: Sheet, run: LoadedRun, name: str) -> Figure | None:
    found = [run.metrics.get(f"curriculum/{name}/{state}") for state in STATES]
    steps = max((series.steps for series in found if series is not None), key=len, default=None)
    if steps is None:
        return None
    colour = sheet.colour(name)
    half, pale = (f"color-mix(in oklab,{colour} {share}%,var(--card))" for share in (60, 25))
    layers = [
        Layer(name=state, colour=tone, share=np.interp(steps, *series))
        for state, series, tone in zip(STATES, found, (colour, pale, "var(--muted)", half), strict=True)
        if series is not None
    ]
    return draw_stack(name, steps, layers, domain=name, chip=colour, bins=sheet.bins)


def rollouts(sheet: Sheet) -> tuple[list[dict[str, tuple[float, float]]], list[Panels], list[Panels]]:
    """Return what the rollouts were good for: completions by domain, the run's own keys, dead groups by domain."""
    keys = dict.fromkeys(key for f in sheet.findings for key in _keys(f.run, "rollout/"))
    overall = sheet.key_panels({key: key.split("/", 1)[1].replace("_", " ") for key in keys})
    return [budget(f.run) for f in sheet.findings], overall, sheet.metric_panels("domain/{name}/{metric}", DEAD)


def diversity(sheet: Sheet) -> list[Panels]:
    """Draw how many different answers a group holds."""
    return sheet.metric_panels("diversity/{name}/{metric}", DIVERSITY)


def degeneration(sheet: Sheet) -> tuple[bool, list[Panels]] | None:
    """Return whether no completion showed a sign of decay, and draw the signs that one did; None without any."""
    logged = [(key.rsplit("/", 1)[1], f.run.metrics[key]) for f in sheet.findings for key in _keys(f.run, "shortcuts/")]
    seen = {name for name, series in logged if series.values.any()}
    drawn = sheet.metric_panels("shortcuts/{name}/{metric}", {name: SIGNS[name] for name in SIGNS if name in seen})
    return (seen.isdisjoint(SHARES), drawn) if logged else None


def health(sheet: Sheet) -> list[Panels]:
    """Draw TRL's own numbers over all domains."""
    return sheet.key_panels(HEALTH)


# --- beyond the score: reach, calibration, form, distance to the base, and what entropy still buys ------------------------


def quality(sheet: Sheet) -> tuple[list[Panels], list] | None:
    """Draw what held-out evaluation says beside the score, with intervals where the run kept them; then the styles."""

    def lines(name: str, metric: str) -> list[Line]:
        found = [_with_intervals(sheet, n, f, name, metric) for n, f in enumerate(sheet.findings)]
        known = [line for line in found if line is not None]
        return known or sheet.metric_lines(f"heldout/{name}/{metric}", sheet.colour(name))

    groups = [
        group
        for metric, title in QUALITIES.items()
        for group in sheet.domain_panels(
            lambda name, metric=metric: lines(name, metric),
            heading=title,
            has_zero=metric.endswith("overconfidence"),
        )
    ]
    return (groups, [list(_styles(f)) for f in sheet.findings]) if groups else None


def exchange(sheet: Sheet) -> list[list[tuple[str, Exchange | None, str]]]:
    """Return of every domain the fit R = b - a exp(H) and, in words, the headroom that its entropy leaves."""
    return [
        [(name, found := fit_domain(f, name), verdict(found)) for name in f.run.domains]
        if len(f.evaluations) >= FEWEST
        else []
        for f in sheet.findings
    ]


def fit_domain(findings: Findings, name: str) -> Exchange | None:
    """Fit the law to a domain's evaluations; None where there are too few, or entropy stood still."""
    rows = [row for row in findings.evaluations if name in row.entropy and graded(row.scores.get(name, ()))]
    return fit_exchange([row.entropy[name] for row in rows], [row.mean_score(name) for row in rows])


def verdict(found: Exchange | None) -> str:
    """Say in a few words what a fit carries."""
    if found is None:
        return f"fewer than {FEWEST} evaluations, or entropy did not move"
    if not found.is_trade:
        return "score did not follow entropy beyond noise: the law says nothing here"
    if not math.isfinite(found.headroom.mid):
        return "entropy is used up"
    return f"using up the rest of the entropy would buy {change_with_bounds(found.headroom)}"


def change_with_bounds(interval: Interval) -> str:
    """Write a change with its interval: `+0.123 [+0.101, +0.145]`."""
    return f"{signed(interval.mid)} {bounds(interval)}"


def _with_intervals(sheet: Sheet, n: int, findings: Findings, name: str, metric: str) -> Line | None:
    points = [
        (line["step"], bounds)
        for line in findings.run.evaluations
        if isinstance(line.get("step"), (int, float))
        and (bounds := _bounds_of(as_mapping(as_mapping(line.get("domains")).get(name)), metric)) is not None
    ]
    if not points:
        return None
    steps, intervals = zip(*points, strict=True)
    low, mid, high = zip(*intervals, strict=True)
    return sheet.interval_line(n, sheet.colour(name), steps, [Interval(*b) for b in zip(low, mid, high, strict=True)])


def _bounds_of(statistics: Mapping[str, Any], metric: str) -> Sequence[float] | None:
    if metric == "pass_at_k":
        named = [key for key in statistics if key.startswith("pass@")]
        key = max(named, key=lambda name: int(name.removeprefix("pass@")), default="")
    else:
        key = IN_EVALUATIONS.get(metric, metric)
    found = statistics.get(key)
    return found if isinstance(found, list) and len(found) == 3 else None


def _styles(findings: Findings) -> Iterable[tuple[str, str, str]]:
    """Yield (domain, output styles at the first evaluation, at the last)."""
    lines = [line for line in findings.run.evaluations if as_mapping(line.get("domains"))]
    for name in findings.run.domains if lines else ():
        first, last = (as_mapping(as_mapping(lines[k]["domains"].get(name)).get("styles")) for k in (0, -1))
        if last:
            yield name, _shares(first), _shares(last)


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{style} {share:.0%}" for style, share in list(shares.items())[:3]) or "–"


# --- what the model said, and how the run was made --------------------------------------------------------------------


def samples(sheet: Sheet) -> tuple[list[list[tuple[str, list]]], int]:
    """Return (domain, [(prompt, rows)]): answers to the same held-out prompts at the start, in the middle and at the end,
    and how many characters of each there is room for."""
    found = [[(name, said) for name in f.run.domains if (said := _said(f.run, name))] for f in sheet.findings]
    n = sum(len(rows) for of_run in found for _, prompts in of_run for _, rows in prompts)
    return found, max(200, min(3000, LETTERS // max(1, n)))


def alarms(sheet: Sheet) -> tuple[list[list[Mapping[str, Any]]], list[str]]:
    """Return each run's alarms, of very many the first of each kind and domain and the newest; and what is left out, in
    words."""
    shown, more = [], []
    for n, f in enumerate(sheet.findings):
        rung = list(f.run.alarms)
        if len(rung) > ALARMS:
            first = {(alarm.get("kind"), alarm.get("domain")): k for k, alarm in reversed([*enumerate(rung)])}
            kept = sorted({*sorted(first.values())[: ALARMS // 2], *range(len(rung) - ALARMS // 2, len(rung))})
            whose = f"{sheet.letter(n)} " if sheet.letter(n) else ""
            more.append(f"{whose}{len(rung):,} alarms: the first of each kind and domain, and the newest.")
            rung = [rung[k] for k in kept]
        shown.append(rung)
    return shown, more


def _said(run: LoadedRun, name: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    rows = [row for row in run.samples if row.get("domain") == name and isinstance(row.get("step"), (int, float))]
    steps = sorted({row["step"] for row in rows})
    chosen = dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]) if steps else ()
    first: dict[str, dict[float, Mapping[str, Any]]] = {}
    for row in rows:
        first.setdefault(as_text(row.get("prompt")), {}).setdefault(row["step"], row)
    return [(prompt, [at[s] for s in chosen if s in at]) for prompt, at in list(first.items())[:PROMPTS]]


def as_text(value: Any) -> str:
    """Return a prompt or completion as text, whether it is one or a list of messages."""
    if isinstance(value, list):
        return visible("\n".join(str(m.get("content", "")) if isinstance(m, Mapping) else str(m) for m in value))
    return "" if value is None else visible(str(value))


def since(sheet: Sheet) -> list[Since | None]:
    """Return each run beside the one before it."""
    return [_since(f) if sheet.is_single else None for f in sheet.findings]


class Since(NamedTuple):
    """A run beside the one of its name before it."""

    before: str
    scores: list[tuple[str, Interval, Ends, Ends]]
    """Domain, score now minus then, and entropy and drawdown then and now."""
    pace: list[tuple[str, Ends]]
    keys: list[tuple[str, str, str]]


def _since(findings: Findings) -> Since | None:
    before = run_before(findings.run)
    if before is None:
        return None
    then, now = (dict(_flat(run.recipe)) for run in (before, findings.run))
    keys = [(key, then.get(key, "–"), now.get(key, "–")) for key in sorted({*then, *now})]
    earlier = find(before)
    both = (earlier, findings)
    scores = [
        (
            name,
            between(earlier, findings, name),
            tuple(f.entropy[name].after if name in f.entropy else math.nan for f in both),
            tuple(f.final("drawdown", name).mid for f in both),
        )
        for name in findings.run.domains
    ]
    pace = [(words, (average(before, key), average(findings.run, key))) for key, words in PACE.items()]
    return Since(before.title, scores, pace, [(key, old, new) for key, old, new in keys if old != new])


def provenance(sheet: Sheet) -> list[list[tuple[str, str]]]:
    """Return how each run is made again, and with which versions and data it was made, by key path."""
    return [list(_flat(_again(f.run) | dict(f.run.provenance))) for f in sheet.findings]


def _again(run: LoadedRun) -> dict[str, str]:
    """Return a run's folder and the command that makes it again; one from Python has a script of its own."""
    again = f"polyphony train {run.recipe_name} --out AGAIN, with the recipe below" if run.recipe_text else ""
    of_script = run.recipe_name.endswith(".json")
    return {"folder": run.path.name, **({"to make it again": again} if again and not of_script else {})}


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            lines = isinstance(value, list) and value and all(isinstance(line, str) for line in value)
            text = "; ".join(value) if lines else json.dumps(value)
            yield f"{prefix}{key}", value if isinstance(value, str) else text


def _keys(run: LoadedRun, prefix: str) -> list[str]:
    return [key for key in run.metrics if key.startswith(prefix)]
