"""`polyphony report`: one run or several as one self-contained HTML page, and the same numbers as a dict.

It reads run folders and nothing else: no model, no tracker, no network. `run` reads a folder, `numbers` derives,
`story` puts it in sentences, `sections` and `tables` draw, `report.html` is the frame.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from polyphony.launch.report import sections as beyond
from polyphony.launch.report import sections as curves
from polyphony.launch.report import tables
from polyphony.launch.report.numbers import Findings, as_json, find
from polyphony.launch.report.run import read_run
from polyphony.launch.report.story import tell
from polyphony.launch.report.theme import Sheet, palette
from polyphony.trainer.run.folder import RunFolder

FRAME = Path(__file__).with_name("report.html")


class Chapter(NamedTuple):
    """One part of the page."""

    id: str
    """Its anchor, and its name in the navigation."""
    title: str
    draw: Callable[[Sheet], str]
    how: str
    """How to read it, in a sentence or two."""
    lacks: str
    """What the page's last line says where there is nothing to draw; empty where silence is right."""


SECTIONS = (
    Chapter("domains", "Domain by domain", tables.summary,
            "Held-out scores on the report half of the items, before and after. Intervals are 95 %, over items, each "
            "by itself (the sentences above use wider ones that hold together); a change is coloured only where its "
            "interval leaves out zero.", "domains"),
    Chapter("score", "Held-out score", curves.held_out,
            "One dot an evaluation, with its 95 % interval. All panels share their axes; the strip below is the stage.",
            "held-out evaluations"),
    Chapter("forgetting", "Forgetting", curves.forgetting,
            "Below zero, something was lost. Intervals are 95 %, paired item by item; one that crosses zero proves "
            "neither loss nor its absence.", "a second evaluation, so no forgetting curves"),
    Chapter("transfer", "What training on one domain did to the others", tables.transfer,
            "Change of held-out score in the column's domain after training on the row's alone, and its 95 % interval. "
            "Bold where the interval leaves out zero; the outlined diagonal is a domain's effect on itself.",
            "single-domain probes or stages, so no transfer heatmap"),
    Chapter("plan", "Plan against outcome", tables.predicted,
            "What the plan predicted for the end of each stage, and what was measured there.", ""),
    Chapter("reward", "Training reward", curves.reward,
            "Mean reward of what was drawn; long runs are averaged in short stretches, the pale band is each stretch's "
            "range.", "training rewards"),
    Chapter("entropy", "Entropy", curves.entropy,
            "Nats per token at the run's temperature. Line: rollouts in training; dots: held-out prompts. The grey "
            "zone is the allowed band around the base model's level; each panel has its own scale.",
            "entropy per domain"),
    Chapter("mixture", "What was practised, and why", curves.mixture,
            "Share of prompts drawn from each domain; point at the chart for the scheduler's reason.",
            "scheduler decisions"),
    Chapter("prompts", "Prompt states", curves.pool,
            "Training prompts of each domain by state, from the bottom: active in full colour, deferred pale, "
            "impossible grey, mastered in half colour.", "prompt states"),
    Chapter("rollouts", "Rollout budget", curves.rollouts,
            "Completions of each domain; the pale part was in groups with equal rewards, which teach nothing.",
            "rollout numbers"),
    Chapter("quality", "Beyond the score", beyond.quality,
            "What held-out evaluation says about reach, calibration and form, with 95 % intervals over prompts. Watch "
            "overconfidence where a domain is not trained: there it grows unseen.",
            "pass@k, calibration and format share"),
    Chapter("exchange", "What entropy was traded for", beyond.exchange,
            "R = b − a·e^H fitted to each domain's evaluations (score R, entropy H): what a domain that follows the law "
            "could still gain before its entropy is used up. Intervals are of the fit.", ""),
    Chapter("diversity", "Diversity", curves.diversity,
            "How many semantically different answers a group of completions holds.", "diversity"),
    Chapter("degeneration", "Degeneration monitors", curves.degeneration,
            "Shares of completions with a sign of decay; signs that no completion showed are left out.",
            "degeneration monitors"),
    Chapter("alarms", "Alarms", tables.alarms, "What went off, when and where.", ""),
    Chapter("health", "Health of the run", curves.health, "The trainer's own numbers over all domains.",
            "the trainer's own metrics"),
    Chapter("samples", "In its own words", tables.samples,
            "The same held-out prompts, answered at the start, in the middle and at the end.", "sample completions"),
    Chapter("provenance", "Provenance", tables.provenance, "What is needed to make this run again.", ""),
)  # fmt: skip


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of one run, or of several side by side, to `out` and return it.

    Raises ValueError naming the folder where one holds no file of a run.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder, got none")
    sheet = Sheet(findings=tuple(find(read_run(path)) for path in runs))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(sheet), encoding="utf-8")
    return out


def write_replay(run: str | Path, decisions: Sequence[Mapping[str, Any]], *, scheduler: str, out: str | Path) -> Path:
    """Draw the mixture that ran beside the one `scheduler` would have asked for on the same evidence.

    `decisions` are its lines, as in decisions.jsonl: `draw`, `mixture` by domain, `reason`.
    """
    ran = read_run(run)
    other = replace(ran, name=f"{scheduler}, replayed", decisions=decisions)
    sheet = Sheet(findings=(find(ran), find(other)))
    only = tuple(section for section in SECTIONS if section.id == "mixture")
    title = (
        f"<p>{escape(ran.name)} as it ran, and what {escape(scheduler)} would have asked for on the same evidence.</p>"
    )
    out = Path(out)
    out.write_text(_page(sheet, sections=only, header=title), encoding="utf-8")
    return out


def summarise(run: str | Path) -> dict[str, Any]:
    """Return a run's numbers and its five sentences (`story`), ready for JSON: undefined is None.

    Raises ValueError naming the folder where it holds no file of a run.
    """
    findings = find(read_run(run))
    return as_json(findings) | {"story": tell(findings)}


def _page(sheet: Sheet, *, sections: Sequence[Chapter] = SECTIONS, header: str | None = None) -> str:
    drawn = {section.id: section.draw(sheet) for section in sections}
    present = [section for section in sections if drawn[section.id]]
    body = "".join(
        f'<section id="{s.id}"><h2>{s.title}</h2><p class="how">{s.how}</p>{drawn[s.id]}</section>' for s in present
    )
    names = [f.run.name for f in sheet.findings]
    return Template(FRAME.read_text(encoding="utf-8")).substitute(
        title=escape(" · ".join(names)),
        palette=palette(),
        header=header or sheet.side_by_side([(n, _story(f)) for n, f in enumerate(sheet.findings)]),
        links="".join(f'<a href="#{s.id}">{s.id.capitalize()}</a>' for s in present),
        body=body,
        missing=_missing(sheet, [s.lacks for s in sections if s.lacks and not drawn[s.id]]),
    )


def _story(findings: Findings) -> str:
    labels = ("ran", "learned", "forgot", "entropy", "spent")
    lines = "".join(
        f"<dt>{label}</dt><dd>{_soften(sentence)}</dd>" for label, sentence in zip(labels, tell(findings), strict=True)
    )
    return f'<dl class="story">{lines}</dl>'


def _soften(sentence: str) -> str:
    """Set intervals smaller, so that a sentence reads by its words and values."""
    return re.sub(r"\[[^\]]*\]", lambda found: f"<small>{found[0]}</small>", escape(sentence))


def _unlike_graders(sheet: Sheet) -> list[str]:
    """Return a line for each domain that the runs shown were graded on by unlike rewards, or versions of one."""
    found = []
    for domain in sheet.domains:
        graders = [f.run.provenance.get("graders", {}).get(domain) for f in sheet.findings]
        known = [grader for grader in graders if grader is not None]
        if any(grader != known[0] for grader in known[1:]):
            said = ", ".join(f"{grader['reward']} version {grader['version']}" for grader in known)
            found.append(f"scores of {domain} are not comparable: graded by {said}")
    return found


def _missing(sheet: Sheet, lacks: Sequence[str]) -> str:
    """Name, in one line, what the folders do not hold."""
    parts = [f"not logged: {', '.join(lacks)}"] if lacks else []
    for n, found in enumerate(sheet.findings):
        parts += [f"{sheet.letter(n)} {note}".strip() for note in found.run.missing]
        absent = [name for name in sheet.domains if name not in found.run.domains]
        parts += [f"{sheet.letter(n)} has no domain {', '.join(absent)}"] if absent else []
    parts += _unlike_graders(sheet)
    return escape("; ".join(parts)) or "nothing"


def report(runs: Sequence[Path], *, out: Path | None, as_json: bool) -> None:
    """Write the report and print where it lies, or print the summary of each run as JSON."""
    if as_json:
        summaries = {run.name: summarise(run) for run in runs}
        print(json.dumps(summaries[runs[0].name] if len(runs) == 1 else summaries))
        return
    path = out or RunFolder(runs[0]).report
    try:
        print(write_report(runs, path))
    except OSError as error:
        raise ValueError(f"report {path} cannot be written: {error.strerror}") from error
