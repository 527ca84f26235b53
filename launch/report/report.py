"""`polyphony report`: one run or several as one self-contained HTML page, and the same numbers as a dict.

It reads run folders and nothing else: no model, no tracker, no network. `run` reads a folder, `numbers` derives,
`story` puts it in sentences, `sections` and `charts` work out what each chapter shows. The templates write it down:
`frame.html` is the frame, `chapters.html` has a macro a chapter, `parts.html` what they share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from polyphony.curricula.files import replace_file
from polyphony.launch.report import sections
from polyphony.launch.report.acting import acting
from polyphony.launch.report.charts import fmt, place_whisker
from polyphony.launch.report.lessons import lessons
from polyphony.launch.report.numbers import as_json, find
from polyphony.launch.report.run import read_run
from polyphony.launch.report.skills import skills
from polyphony.launch.report.story import LABELS, bounds, signed, tell
from polyphony.launch.report.theme import DARK, LIGHT, Sheet
from polyphony.launch.report.ways import shared, ways
from polyphony.trainer.run import visible


def _tight(value: float, digits: int) -> str:
    """Write a score's change in little room: `+.12`."""
    return f"{value:+.{digits}f}".replace("-", "−").replace("0.", ".", 1)


def _fixed(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: visible(value) if type(value) is str else value,  # markup is a str of another type
)
TEMPLATES.tests["finite"] = math.isfinite
TEMPLATES.filters |= {
    "signed": signed,
    "bounds": bounds,
    "change": sections.change_with_bounds,
    "tight": _tight,
    "fixed": _fixed,
    "number": fmt,
    "cut": _cut,
    "text": sections.as_text,
    "whisker": place_whisker,
    "split_intervals": lambda sentence: re.split(r"(\[[^\]]*\])", sentence),  # every second part is an interval
}


class Chapter(NamedTuple):
    """One part of the page."""

    id: str
    """Its anchor, its name in the navigation, and its macro in chapters.html."""
    title: str
    find: Callable[[Sheet], Any]
    """Returns what the macro of this id draws."""
    how: str
    """How to read it, in a sentence or two."""
    lacks: str
    """What the page's last line says where there is nothing to draw; empty where silence is right."""


CHAPTERS = (
    Chapter("domains", "Domain by domain", sections.summary,
            "Held-out scores on the report half of the items, before and after. Intervals of changes are over items and "
            "hold for all domains together with 95 %; a change is coloured only where its interval leaves out zero. "
            "± is half the 95 % interval of one score.", "domains"),
    Chapter("alarms", "Alarms", sections.alarms, "What went off, when and where.", ""),
    Chapter("entropy", "Entropy", sections.entropy,
            "Nats per token at the run's temperature. Line: rollouts in training; dots: held-out prompts. The grey "
            "zone is the allowed band around the base model's level; each panel has its own scale.",
            "entropy per domain"),
    Chapter("transfer", "What training on one domain did to the others", sections.transfer,
            "Change of held-out score in the column's domain after training on the row's alone, and its 95 % interval. "
            "Bold where the interval leaves out zero; the outlined diagonal is a domain's effect on itself.",
            "single-domain probes or stages, so no transfer heatmap"),
    Chapter("ways", "Other ways to one model", ways,
            "Held-out score of each domain, the mean over seeds, after each way that the probe has measured; "
            "`polyphony plan` weighs them, with intervals and what they cost.", ""),
    Chapter("shared", "Who shares parameters with whom", shared,
            "Of what training on either domain alone changed: how far the tenths of the parameters that each changed "
            "most overlap (Jaccard; two random tenths .05), the share of the common ones moved in opposite directions, and "
            "the cosine of all changes. Means over seeds.", ""),
    Chapter("forgetting", "Forgetting", sections.forgetting,
            "Below zero, something was lost. Intervals are 95 % over all domains together, paired item by item; one that "
            "crosses zero proves neither loss nor its absence.", "a second evaluation, so no forgetting curves"),
    Chapter("mixture", "What was practised, and why", sections.mixture,
            "Share of prompts drawn from each domain; point at the chart for the scheduler's reason.",
            "scheduler decisions"),
    Chapter("prompts", "Prompt states", sections.pool,
            "Training prompts of each domain by state, from the bottom: active in full colour, deferred pale, "
            "impossible grey, mastered in half colour.", "prompt states"),
    Chapter("samples", "In its own words", sections.samples,
            "The same held-out prompts, answered at the start, in the middle and at the end.", "sample completions"),
    Chapter("score", "Held-out score", sections.held_out,
            "One dot an evaluation, with its 95 % interval. All panels share their axes; the strip below is the stage.",
            "held-out evaluations"),
    Chapter("skills", "Skill by skill", skills,
            "Parts of a domain, by the rows' column `skill`: the first value that was logged and the last. Held-out scores "
            "are of the report half; nothing is scheduled by them.", ""),
    Chapter("acting", "Domains that act", acting,
            "Turns of the policy and calls of tools a completion, the share of calls that failed and of completions that a "
            "limit ended; entropy of what the policy wrote in its first, second, third and later turns (nats a token), and "
            "the reward of completions by how many turns they had. The first value that was logged and the last.", ""),
    Chapter("plan", "Plan against outcome", sections.predicted,
            "What the plan predicted for the end of each stage, and what was measured there.", ""),
    Chapter("changed", "Since the run before", sections.since,
            "What differs from the newest earlier run of the same name beside it.", ""),
    Chapter("reward", "Training reward", sections.reward,
            "Mean reward of what was drawn; long runs are averaged in short stretches, the pale band is each stretch's "
            "range.", "training rewards"),
    Chapter("rollouts", "Rollout budget", sections.rollouts,
            "Completions of each domain; the pale part was in groups with equal rewards, which teach nothing.",
            "rollout numbers"),
    Chapter("lessons", "What the teachers did", lessons,
            "How far the policy was from each domain's teacher on its own completions, KL in nats a token, at the first and "
            "the last draw that was taught; the share of tokens whose advantage was cut at distil.clip; the completions "
            "that had none, as the teacher's log-probabilities were no numbers.", ""),
    Chapter("quality", "Beyond the score", sections.quality,
            "What held-out evaluation says about reach, calibration and form, with 95 % intervals over prompts. Watch "
            "overconfidence where a domain is not trained: there it grows unseen.",
            "pass@k, calibration and format share"),
    Chapter("exchange", "What entropy was traded for", sections.exchange,
            "R = b − a·e^H fitted to each domain's evaluations (score R, entropy H): what a domain that follows the law "
            "could still gain before its entropy is used up. Intervals are of the fit.", ""),
    Chapter("diversity", "Diversity", sections.diversity,
            "How many semantically different answers a group of completions holds.", "diversity"),
    Chapter("degeneration", "Degeneration monitors", sections.degeneration,
            "Shares of completions with a sign of decay; signs that no completion showed are left out.",
            "degeneration monitors"),
    Chapter("health", "Health of the run", sections.health, "The trainer's own numbers over all domains.",
            "the trainer's own metrics"),
    Chapter("provenance", "Provenance", sections.provenance, "What is needed to make this run again.", ""),
)  # fmt: skip


def names_of(runs: Sequence[Path]) -> list[str]:
    """Return what tells run folders apart: their names, where two bear one with their folders', else whole paths.

    Raises ValueError for a folder that is given twice.
    """
    paths = [run.resolve() for run in runs]
    if twice := next((str(run) for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1), None):
        raise ValueError(f"{twice} is given twice")
    for names in ([path.name for path in paths], [f"{path.parent.name}/{path.name}" for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of one run, or of several side by side, to `out` and return it.

    Raises ValueError naming the folder where one holds no file of a run.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder, got none")
    sheet = Sheet(findings=tuple(find(read_run(path)) for path in runs), names=names_of([*map(Path, runs)]))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, _page(sheet))
    return out


def write_replay(run: str | Path, decisions: Sequence[Mapping[str, Any]], *, scheduler: str, out: str | Path) -> Path:
    """Draw the mixture that ran beside the one `scheduler` would have asked for on the same evidence.

    `decisions` are its lines, as in decisions.jsonl: `draw`, `mixture` by domain, `reason`.
    """
    ran = read_run(run)
    other = replace(ran, name=f"{scheduler}, replayed", decisions=decisions)
    sheet = Sheet(findings=(find(ran), find(other)), names=(ran.name, other.name))
    only = [chapter for chapter in CHAPTERS if chapter.id == "mixture"]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, _page(sheet, chapters=only, replayed=scheduler))
    return out


def summarise(run: str | Path) -> dict[str, Any]:
    """Return a run's numbers and its six sentences (`story`), ready for JSON: undefined is None.

    Raises ValueError naming the folder where it holds no file of a run.
    """
    findings = find(read_run(run))
    return as_json(findings) | {"story": tell(findings)}


def _page(sheet: Sheet, *, chapters: Sequence[Chapter] = CHAPTERS, replayed: str = "") -> str:
    macros = TEMPLATES.get_template("chapters.html").make_module({"sheet": sheet})
    drawn = {chapter.id: getattr(macros, chapter.id)(chapter.find(sheet)).strip() for chapter in chapters}
    return TEMPLATES.get_template("frame.html").render(
        sheet=sheet,
        title=" · ".join(f.run.title for f in sheet.findings),
        light=LIGHT,
        dark=DARK,
        replayed=replayed,
        stories=[zip(LABELS, tell(f), strict=True) for f in sheet.findings],
        chapters=[chapter for chapter in chapters if drawn[chapter.id]],
        drawn=drawn,
        missing=_missing(sheet, [c.lacks for c in chapters if c.lacks and not drawn[c.id]]),
    )


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
    return "; ".join(parts) or "nothing"
