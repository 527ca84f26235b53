"""The sections of a report that are read: summary, transfer, plan, alarms, samples, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from polyphony.curricula.intervals import UNDEFINED, Interval
from polyphony.launch.report.charts import draw_whisker
from polyphony.launch.report.numbers import Entropy, Findings, Transfer, between
from polyphony.launch.report.run import LoadedRun
from polyphony.launch.report.story import bounds, signed
from polyphony.launch.report.theme import Sheet

PROMPTS = 3
"""Sample prompts shown a domain."""
LETTERS = 3000
"""Characters of a completion shown."""


def summary(sheet: Sheet) -> str:
    """Tabulate every domain: score and entropy before and after, what was forgotten."""
    changes = [i for f in sheet.findings for i in f.change.values() if math.isfinite(i.mid)]
    span = (min([0.0, *(i.low for i in changes)]), max([0.01, *(i.high for i in changes)]))
    blocks = [(n, _summary_table(sheet, f, span)) for n, f in enumerate(sheet.findings)]
    return sheet.side_by_side(blocks, "stacked") + _comparison(sheet)


def transfer(sheet: Sheet) -> str:
    """Tabulate what training on each domain did to each, as a heatmap."""
    found = [(n, f.transfer) for n, f in enumerate(sheet.findings) if f.transfer is not None]
    return sheet.side_by_side([(n, _heatmap(sheet, table)) for n, table in found], "stacked")


def predicted(sheet: Sheet) -> str:
    """Tabulate the plan's predicted scores against the measured ones, stage by stage."""
    return sheet.side_by_side([(n, _predicted(sheet, f.run)) for n, f in enumerate(sheet.findings)])


def alarms(sheet: Sheet) -> str:
    """List the alarms of every run."""
    return sheet.side_by_side([(n, _alarms(sheet, f.run)) for n, f in enumerate(sheet.findings)])


def samples(sheet: Sheet) -> str:
    """Show what the model said to the same held-out prompts at the start, in the middle and at the end."""
    blocks = [
        (n, "".join(_domain_samples(sheet, f.run, name) for name in f.run.domains))
        for n, f in enumerate(sheet.findings)
    ]
    return sheet.side_by_side(blocks, "stacked")


def provenance(sheet: Sheet) -> str:
    """Show with which versions, data and recipe each run was made."""
    return sheet.side_by_side([(n, _provenance(f.run)) for n, f in enumerate(sheet.findings)])


def _summary_table(sheet: Sheet, f: Findings, span: tuple[float, float]) -> str:
    rows = "".join(_summary_row(sheet, f, name, span) for name in f.run.domains)
    heads = ("held-out score", "", "change, 95 %", "backward transfer", "drawdown", "entropy, nats a token")
    head = "".join(f"<th>{text}</th>" for text in ("domain", *heads))
    return f'<table class="summary"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>' if rows else ""


def _predicted(sheet: Sheet, run: LoadedRun) -> str:
    rows = [
        (escape(str(stage.get("stage", k + 1))), _chip(sheet, name), _number(guess), _number(_measured(stage, name)))
        for k, stage in enumerate(run.predicted)
        for name, guess in (stage.get("predicted") or {}).items()
    ]
    return _table(("after stage", "domain", "predicted", "measured"), rows)


def _alarms(sheet: Sheet, run: LoadedRun) -> str:
    rows = []
    for alarm in run.alarms:
        step, kind, message = (escape(str(alarm.get(key, ""))) for key in ("step", "kind", "message"))
        rows.append((step, _chip(sheet, str(alarm.get("domain") or "all")), kind, message))
    return _table(("step", "domain", "alarm", "what was seen"), rows)


def _provenance(run: LoadedRun) -> str:
    facts = {"folder": run.path.name} | dict(run.provenance)
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in _flat(facts))
    recipe = ""
    if run.recipe_text:
        recipe = f"<details><summary>recipe.yaml</summary><pre>{escape(run.recipe_text)}</pre></details>"
    return f'<table class="facts">{rows}</table>{recipe}'


def _summary_row(sheet: Sheet, f: Findings, name: str, span: tuple[float, float]) -> str:
    scores, change = f.scores.get(name, ()), f.change.get(name, UNDEFINED)
    last = f.moments[-1] if f.moments else None
    whisker = draw_whisker(change, span, sheet.colour(name)) if math.isfinite(change.mid) else ""
    watched = " <small>watched</small>" if name in f.run.watch_only else ""
    cells = [
        ("held-out score", _before_after(scores)),
        ("", whisker),
        ("change", _interval(change)),
        ("backward transfer", _interval(last.bwt.get(name, UNDEFINED) if last else UNDEFINED)),
        ("drawdown", _interval(last.drawdown.get(name, UNDEFINED) if last else UNDEFINED)),
        ("entropy", _entropy_cell(f.entropy[name])),
    ]
    body = "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in cells)
    return f'<tr{_owner(name)}><th scope="row">{_chip(sheet, name)}{watched}</th>{body}</tr>'


def _comparison(sheet: Sheet) -> str:
    """Tabulate last scores side by side, with paired differences to the first run where items are the same."""
    if sheet.is_single:
        return ""
    first, rows = sheet.findings[0], []
    for name in sheet.domains:
        cells = [f"<td>{_score(f.scores[name][-1]) if f.scores.get(name) else '–'}</td>" for f in sheet.findings]
        gaps = [f"<td>{_interval(between(first, f, name))}</td>" for f in sheet.findings[1:]]
        rows.append(f'<tr{_owner(name)}><th scope="row">{_chip(sheet, name)}</th>{"".join(cells + gaps)}</tr>')
    letters = [sheet.letter(n) for n in range(len(sheet.findings))]
    heads = [f"<th>{a} at its end</th>" for a in letters] + [f"<th>{b} minus {letters[0]}</th>" for b in letters[1:]]
    return (
        '<h3>Side by side</h3><p class="how">Last held-out score of each run; differences are paired over the same '
        "items, a dash where the items differ. One run a method is one seed: a difference here is between these runs, "
        f'not yet between their methods.</p><div class="scroll"><table><thead><tr><th>domain</th>{"".join(heads)}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heatmap(sheet: Sheet, table: Transfer) -> str:
    digits = 3 if len(table.domains) <= 6 else 2
    strongest = float(np.abs(table.effect).max()) or 1.0
    head = "".join(f'<th scope="col">{_chip(sheet, name)}</th>' for name in table.domains)
    rows = []
    for j, source in enumerate(table.trained):
        cells = "".join(
            _heat_cell(
                Interval(table.low[j, k], table.effect[j, k], table.high[j, k]),
                strongest,
                digits,
                is_own=source == target,
            )
            for k, target in enumerate(table.domains)
        )
        rows.append(f'<tr><th scope="row">{_chip(sheet, source)}</th>{cells}</tr>')
    corner = "<th>trained ↓<br>moved →</th>"
    return (
        f'<p class="how">Measured by {table.source}.</p><div class="scroll"><table class="heat">'
        f"<thead><tr>{corner}{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heat_cell(effect: Interval, strongest: float, digits: int, *, is_own: bool) -> str:
    sure = effect.is_above_zero or effect.is_below_zero
    side = "gain" if effect.mid > 0 else "loss"
    depth = round(abs(effect.mid) / strongest * (0.62 if sure else 0.2), 3)
    low, mid, high = (_tight(value, digits) for value in effect)
    kinds = " ".join(filter(None, [side, "sure" if sure else "open", "own" if is_own else ""]))
    return f'<td class="{kinds}" style="--a:{depth}">{mid}<small>{low}…{high}</small></td>'


def _tight(value: float, digits: int) -> str:
    """Write a score's change in little room: `+.12`."""
    return f"{value:+.{digits}f}".replace("-", "−").replace("0.", ".", 1)


def _domain_samples(sheet: Sheet, run: LoadedRun, name: str) -> str:
    rows = [row for row in run.samples if row.get("domain") == name and isinstance(row.get("step"), (int, float))]
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return ""
    chosen = list(dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]))
    prompts = list(dict.fromkeys(_text(row.get("prompt")) for row in rows))
    blocks = []
    for k, prompt in enumerate(prompts[:PROMPTS]):
        said = [row for row in rows if _text(row.get("prompt")) == prompt]
        cards = "".join(_card(row) for step in chosen for row in [r for r in said if r["step"] == step][:1])
        blocks.append(
            f"<details{' open' if k == 0 else ''}><summary>{escape(_cut(prompt, 600))}</summary>"
            f'<div class="cards">{cards}</div></details>'
        )
    return f'<div class="samples"{_owner(name)}><h4>{_chip(sheet, name)}</h4>{"".join(blocks)}</div>'


def _card(row: Mapping[str, Any]) -> str:
    score = row.get("score")
    said = f"score {score:.2f}" if isinstance(score, (int, float)) else "no score"
    text = escape(_cut(_text(row.get("completion")), LETTERS))
    return f'<div class="card"><b>step {row["step"]:,}</b> <span>{said}</span><pre>{text}</pre></div>'


def _text(value: Any) -> str:
    """Return a prompt or completion as text, whether it is one or a list of messages."""
    if isinstance(value, list):
        return "\n".join(str(m.get("content", "")) if isinstance(m, Mapping) else str(m) for m in value)
    return "" if value is None else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _measured(stage: Mapping[str, Any], name: str) -> Any:
    return (stage.get("measured") or {}).get(name)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table of cells that are HTML already; empty text without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _chip(sheet: Sheet, name: str) -> str:
    square = f'<i style="background:{sheet.colour(name)}"></i>' if name in sheet.domains else ""
    return f'<span class="chip">{square}{escape(name)}</span>'


def _owner(name: Any) -> str:
    return f' data-domain="{escape(str(name))}"' if name else ""


def _before_after(scores: Sequence[Interval]) -> str:
    if not scores:
        return "–"
    if len(scores) == 1:
        return _score(scores[0])
    first, last = scores[0], scores[-1]
    return f"{first.mid:.3f} → <b>{last.mid:.3f}</b><small>{_half(first)} → {_half(last)}</small>"


def _score(score: Interval) -> str:
    return f"{score.mid:.3f}<small>{_half(score)}</small>"


def _half(score: Interval) -> str:
    return f"±{(score.high - score.low) / 2:.3f}"


def _interval(interval: Interval) -> str:
    if not math.isfinite(interval.mid):
        return "–"
    kind = "gain" if interval.is_above_zero else "loss" if interval.is_below_zero else "open"
    return f'<span class="{kind}">{signed(interval.mid)}</span><small>{bounds(interval)}</small>'


def _entropy_cell(entropy: Entropy) -> str:
    if not math.isfinite(entropy.before):
        return "–"
    after = f" → <b>{entropy.after:.2f}</b>" if math.isfinite(entropy.after) else ""
    band = ""
    if math.isfinite(entropy.low):
        band = f'<small class="{entropy.place}">{entropy.place} {entropy.low:.2f}–{entropy.high:.2f}</small>'
    return f"{entropy.before:.2f}{after}{band}"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"
