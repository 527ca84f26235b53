"""The report's sections beyond the score: reach, calibration, form, distance to the base, and what entropy still buys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from polyphony.curricula.exchange import FEWEST, Exchange, fit_exchange
from polyphony.curricula.intervals import Interval
from polyphony.curricula.records import mean
from polyphony.trainer.report_charts import Line
from polyphony.trainer.report_numbers import Findings
from polyphony.trainer.report_sheet import Sheet

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
