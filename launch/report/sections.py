"""The sections of a report that show curves: each takes the sheet and returns HTML, empty where its keys are absent.

Beyond the score: reach, calibration, form, distance to the base, and what entropy still buys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from polyphony.curricula.intervals import Interval
from polyphony.curricula.records import mean
from polyphony.launch.report.charts import Layer, Line, Mark, Panel, draw_panel, draw_stack
from polyphony.launch.report.numbers import FEWEST, Exchange, Findings, budget, fit_exchange
from polyphony.launch.report.run import LoadedRun
from polyphony.launch.report.theme import Sheet

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


SIGNS = SHARES | {"correct_length": "Median length of correct answers, tokens"}


FORGETTING = {
    "bwt": "Backward transfer: now minus the end of the domain's own stage (where it is only watched: minus the start)",
    "drawdown": "Drawdown: now minus the best evaluation so far, cross-fitted",
}


def held_out(sheet: Sheet) -> str:
    """Draw each domain's held-out score with its interval."""

    def lines(name: str) -> list[Line]:
        found = []
        for n, f in enumerate(sheet.findings):
            if scores := f.scores.get(name):
                found.append(sheet.interval_line(n, sheet.colour(name), f.steps, scores))
        return found or sheet.metric_lines(f"heldout/{name}/score", sheet.colour(name))

    return sheet.domain_panels(lines)


def reward(sheet: Sheet) -> str:
    """Draw each domain's training reward."""
    return sheet.domain_panels(lambda name: sheet.metric_lines(f"domain/{name}/reward", sheet.colour(name)))


def entropy(sheet: Sheet) -> str:
    """Draw each domain's entropy in training and at evaluations, over the band where it should stay."""

    def lines(name: str) -> list[Line]:
        found = sheet.metric_lines(f"domain/{name}/entropy", sheet.colour(name), what="in training")
        is_logged = bool(found)
        for n, f in enumerate(sheet.findings):
            points = [(row.step, row.entropy[name]) for row in f.evaluations if name in row.entropy]
            if points:
                mark: Mark = "dots" if is_logged else "both"
                found.append(sheet.line(n, sheet.colour(name), *zip(*points, strict=True), what="held out", mark=mark))
        return found

    def allowed(name: str) -> tuple[float, float] | None:
        known = [f.entropy[name] for f in sheet.findings if name in f.entropy]
        return next(((e.low, e.high) for e in known if math.isfinite(e.low)), None)

    levels = sheet.domain_panels(lines, shares_y=False, allowed_of=allowed)
    return levels + _by_metric(sheet, "domain/", {"entropy_coef": "Coefficient of the entropy term, where it is on"})


def forgetting(sheet: Sheet) -> str:
    """Draw backward transfer, then drawdown, of each domain with intervals."""
    parts = []
    for field, title in FORGETTING.items():

        def lines(name: str, field: str = field) -> list[Line]:
            found = []
            for n, f in enumerate(sheet.findings):
                points = [(m.step, getattr(m, field)[name]) for m in f.moments if name in getattr(m, field)]
                points = [(step, interval) for step, interval in points if math.isfinite(interval.mid)]
                if points:
                    found.append(sheet.interval_line(n, sheet.colour(name), *zip(*points, strict=True)))
            return found

        parts.append(sheet.domain_panels(lines, heading=title, has_zero=True))
    return "".join(parts)


def mixture(sheet: Sheet) -> str:
    """Draw the share of each domain in every draw and list the scheduler's reasons."""
    return sheet.side_by_side([(n, _mixture(sheet, f.run)) for n, f in enumerate(sheet.findings)])


def pool(sheet: Sheet) -> str:
    """Draw how many prompts of each domain are in which state."""
    return sheet.side_by_side([(n, _pool(sheet, f.run)) for n, f in enumerate(sheet.findings)])


def rollouts(sheet: Sheet) -> str:
    """Draw what the rollouts were good for: the run's own keys, then dead groups by domain."""
    keys = dict.fromkeys(key for f in sheet.findings for key in _keys(f.run, "rollout/"))
    overall = _key_panels(sheet, {key: key.split("/", 1)[1].replace("_", " ") for key in keys})
    dead = _by_metric(sheet, "domain/", {"frac_dead": "Dead groups: share of groups drawn with equal rewards",
                                         "dead_correct": "Of what reached the update: dead because all was correct",
                                         "dead_wrong": "Of what reached the update: dead because all was equally wrong",
                                         "dead_equal": "Of what reached the update: dead with equal partial rewards",
                                         })  # fmt: skip
    return _budget(sheet) + overall + dead


def diversity(sheet: Sheet) -> str:
    """Draw how many different answers a group holds."""
    return _by_metric(sheet, "diversity/", {"classes": "Semantic classes a group", "mean": "Mean diversity",
                                            "collapsed": "Share of groups with one class"})  # fmt: skip


def degeneration(sheet: Sheet) -> str:
    """Draw the signs of decay that any completion showed; say so where none did."""
    logged = [(key.rsplit("/", 1)[1], f.run.metrics[key]) for f in sheet.findings for key in _keys(f.run, "shortcuts/")]
    seen = {name for name, series in logged if series.values.any()}
    drawn = _by_metric(sheet, "shortcuts/", {name: title for name, title in SIGNS.items() if name in seen})
    calm = "" if any(name in seen for name in SHARES) else '<p class="how">No completion showed any of the signs.</p>'
    return calm + drawn if logged else ""


def health(sheet: Sheet) -> str:
    """Draw TRL's own numbers over all domains."""
    return _key_panels(sheet, HEALTH)


def _budget(sheet: Sheet) -> str:
    """Draw a bar a domain, as long as its completions are many: the pale part is dead groups."""
    blocks = []
    for n, f in enumerate(sheet.findings):
        spent = budget(f.run)
        most = max((count for count, _ in spent.values()), default=0.0)
        rows = "".join(_bar(sheet, name, count, dead, most) for name, (count, dead) in spent.items())
        blocks.append((n, f'<table class="budget">{rows}</table>' if rows else ""))
    return sheet.side_by_side(blocks)


def _bar(sheet: Sheet, name: str, count: float, dead: float, most: float) -> str:
    colour = f"background:{sheet.colour(name)}"
    return (
        f'<tr data-domain="{escape(name)}"><th scope="row">{escape(name)}</th><td><div class="bar" '
        f'style="width:{100 * count / most:.1f}%"><i style="{colour};flex:{count - dead:.0f}"></i>'
        f'<i style="{colour};opacity:.3;flex:{dead:.0f}"></i></div></td>'
        f"<td>{count:,.0f}, {dead / count:.0%} dead</td></tr>"
    )


def _mixture(sheet: Sheet, run: LoadedRun) -> str:
    rows = [row for row in run.decisions if isinstance(row.get("mixture"), dict)]
    if not rows:
        return ""
    x = np.array([row.get("step", row.get("draw", k)) for k, row in enumerate(rows)], dtype=float)
    layers = []
    for name in run.domains:
        share = np.array([row["mixture"].get(name, 0.0) for row in rows], dtype=float)
        if share.any():
            layers.append(Layer(name=name, share=share, colour=sheet.colour(name)))
    reasons = _reasons(rows, x)
    chart = draw_stack("share of each draw", x, layers, notes=[(start, words) for start, _, words in reasons])
    return chart + _reason_table(reasons)


def _pool(sheet: Sheet, run: LoadedRun) -> str:
    charts = []
    for name in run.domains:
        found = [run.metrics.get(f"curriculum/{name}/{state}") for state in STATES]
        steps = max((series.steps for series in found if series is not None), key=len, default=None)
        if steps is None:
            continue
        layers = [
            Layer(name=state, colour=tone, share=np.interp(steps, *series))
            for state, series, tone in zip(STATES, found, _tones(sheet.colour(name)), strict=True)
            if series is not None
        ]
        charts.append(draw_stack(name, steps, layers, domain=name, chip=sheet.colour(name), bins=60))
    return f'<div class="panels">{"".join(charts)}</div>' if charts else ""


def _by_metric(sheet: Sheet, prefix: str, titles: dict[str, str]) -> str:
    parts = []
    for metric, title in titles.items():
        drawn = sheet.domain_panels(
            lambda name, metric=metric: sheet.metric_lines(f"{prefix}{name}/{metric}", sheet.colour(name)),
            heading=title,
        )
        parts.append(drawn)
    return f'<div class="groups">{"".join(parts)}</div>' if any(parts) else ""


def _key_panels(sheet: Sheet, titles: Mapping[str, str]) -> str:
    panels = [
        draw_panel(
            Panel(
                title=title,
                lines=sheet.metric_lines(key, "var(--ink)"),
                x_range=sheet.x_range,
                ribbon=sheet.ribbon(),
            )
        )
        for key, title in titles.items()
    ]
    drawn = "".join(panels)
    return f'<div class="panels">{drawn}</div>' if drawn else ""


def _keys(run: LoadedRun, prefix: str) -> list[str]:
    return [key for key in run.metrics if key.startswith(prefix)]


def _reasons(rows, x) -> list[tuple[float, float, str]]:
    """Return (first step, last step, words) of each stretch of draws with the same reason."""
    spans: list[tuple[float, float, str]] = []
    for row, step in zip(rows, x, strict=True):
        words = str(row.get("reason", ""))
        if spans and spans[-1][2] == words:
            spans[-1] = (spans[-1][0], float(step), words)
        else:
            spans.append((float(step), float(step), words))
    return spans


def _reason_table(reasons: list[tuple[float, float, str]], most: int = 30) -> str:
    every = math.ceil(len(reasons) / most)
    rows = "".join(f"<tr><td>{a:,.0f}–{b:,.0f}</td><td>{escape(words)}</td></tr>" for a, b, words in reasons[::every])
    cut = f"<p>One in {every} of {len(reasons):,} changes of reason.</p>" if every > 1 else ""
    return (
        f"<details{' open' if len(reasons) <= 8 else ''}><summary>Why: the scheduler's reasons</summary>{cut}"
        f'<table class="reasons"><tr><th>steps</th><th>reason</th></tr>{rows}</table></details>'
    )


def _tones(colour: str) -> tuple[str, ...]:
    """Return the colours of STATES in one domain's colour: what is practised is full, what waits is pale."""
    pale = [f"color-mix(in oklab,{colour} {share}%,var(--card))" for share in (60, 25)]
    return colour, pale[1], "var(--muted)", pale[0]


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


IN_EVALUATIONS = {"kl_base": "kl"}
"""Where `evaluations.jsonl` has another name for one; pass@k there carries its k."""


def quality(sheet: Sheet) -> str:
    """Draw what held-out evaluation says beside the score, with intervals where the run kept them; then the styles."""
    parts = []
    for metric, title in QUALITIES.items():

        def lines(name: str, metric: str = metric) -> list[Line]:
            found = [_with_intervals(sheet, n, f, name, metric) for n, f in enumerate(sheet.findings)]
            known = [line for line in found if line is not None]
            return known or sheet.metric_lines(f"heldout/{name}/{metric}", sheet.colour(name))

        parts.append(sheet.domain_panels(lines, heading=title, has_zero=metric.endswith("overconfidence")))
    if not any(parts):
        return ""
    styles = sheet.side_by_side([(n, _styles(sheet, f)) for n, f in enumerate(sheet.findings)])
    return f'<div class="groups">{"".join(parts)}</div>{styles}'


def exchange(sheet: Sheet) -> str:
    """Tabulate the fit R = b - a exp(H) of every domain and the headroom that its entropy leaves."""
    return sheet.side_by_side([(n, _exchange(sheet, f)) for n, f in enumerate(sheet.findings)])


def fit_domain(findings: Findings, name: str) -> Exchange | None:
    """Fit the law to a domain's evaluations; None where there are too few, or entropy stood still."""
    rows = [row for row in findings.evaluations if name in row.entropy and name in row.scores]
    return fit_exchange([row.entropy[name] for row in rows], [mean(row.scores[name]) for row in rows])


def verdict(found: Exchange | None) -> str:
    """Say in a few words what a fit carries."""
    if found is None:
        return f"fewer than {FEWEST} evaluations, or entropy did not move"
    if not found.is_trade:
        return "score did not follow entropy beyond noise: the law says nothing here"
    if not math.isfinite(found.headroom.mid):
        return "entropy is used up"
    return f"using up the rest of the entropy would buy {_plain(found.headroom)}"


def _exchange(sheet: Sheet, findings: Findings) -> str:
    if len(findings.evaluations) < FEWEST:
        return ""
    rows = []
    for name in findings.run.domains:
        found = fit_domain(findings, name)
        a = "–" if found is None else _plain(found.a_interval)
        ceiling = "–" if found is None or not found.is_trade else f"{found.b - found.a:.3f}"
        rows.append(
            f'<tr data-domain="{escape(name)}"><th scope="row"><span class="chip"><i style="background:'
            f'{sheet.colour(name)}"></i>{escape(name)}</span></th><td>{a}</td><td>{ceiling}</td>'
            f"<td>{escape(verdict(found))}</td></tr>"
        )
    head = "<tr><th>domain</th><th>a, score per unit of e^H</th><th>b − a, score at H = 0</th><th>headroom</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _with_intervals(sheet: Sheet, n: int, findings: Findings, name: str, metric: str) -> Line | None:
    points = [
        (line["step"], bounds)
        for line in findings.run.evaluations
        if isinstance(line.get("step"), (int, float))
        and (bounds := _bounds_of(_mapping(_mapping(line.get("domains")).get(name)), metric)) is not None
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


def _styles(sheet: Sheet, findings: Findings) -> str:
    """Tabulate the output styles of each domain at the first and at the last evaluation."""
    lines = [line for line in findings.run.evaluations if _mapping(line.get("domains"))]
    if not lines:
        return ""
    rows = []
    for name in findings.run.domains:
        first, last = (_mapping(_mapping(lines[k]["domains"].get(name)).get("styles")) for k in (0, -1))
        if last:
            cells = "".join(f"<td>{escape(_shares(shares))}</td>" for shares in (first, last))
            rows.append(f'<tr data-domain="{escape(name)}"><th scope="row">{escape(name)}</th>{cells}</tr>')
    head = "<tr><th>output style</th><th>at the start</th><th>at the end</th></tr>"
    return (
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""
    )


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{style} {share:.0%}" for style, share in list(shares.items())[:3]) or "–"


def _plain(interval: Interval) -> str:
    return f"{interval.mid:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]".replace("-", "−")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
