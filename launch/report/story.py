"""What happened and what to do next, in six sentences made from the numbers: none says more than its intervals carry.

A domain is named as better or worse only where its interval, one of those that hold for all domains together, leaves out
zero; for the rest the sentence says that nothing can be told, and how large a loss is still possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from polyphony.curricula.intervals import Interval
from polyphony.curricula.records import mean
from polyphony.launch.report.numbers import Findings, average, dead_share
from polyphony.trainer.run.signals import SIGNALS

NAMED = 4
"""Domains a sentence names before it counts the rest."""


STATES = {
    True: "was stopped before its end",
    False: "is still being written",
    None: "is still being written, or was stopped before its end",
}
"""A run that has not ended, by whether its process has."""


LABELS = ("ran", "learned", "forgot", "entropy", "spent", "next")
"""What ran, what it gained and lost, what was forgotten, where entropy went, rollouts and alarms, and what to do next."""


def tell(findings: Findings) -> list[str]:
    """Return six sentences, of `LABELS`."""
    told = (_ran, _learned, _forgot, _entropy, _spent, _next)
    return [sentence(findings) for sentence in told]


def signed(value: float) -> str:
    """Write a change of a score with its sign: `+0.123`; a dash where undefined."""
    return f"{value:+.3f}".replace("-", "−") if math.isfinite(value) else "–"


def bounds(interval: Interval) -> str:
    """Write an interval's bounds: `[+0.101, +0.145]`."""
    return f"[{signed(interval.low)}, {signed(interval.high)}]"


def _ran(findings: Findings) -> str:
    run, watched = findings.run, findings.run.watch_only
    trained = [name for name in run.domains if name not in watched]
    name = Path(run.setting("model") or "")
    model = (
        f" {name.name if name.is_absolute() else name}" if name.name else ""
    )  # a folder here is told by its own name
    planned = run.planned_steps
    steps = f"{run.steps:,} steps" if planned in (None, run.steps) else f"{run.steps:,} of {planned:,} steps"
    text = f"The run trained{model} for {steps} on {_count(len(trained), 'domain')} ({_list(trained)})"
    text += f" under the {run.scheduler} scheduler" if run.scheduler else ""
    text += (
        f", watching {_list(watched)} without training on {'it' if len(watched) == 1 else 'them'}" if watched else ""
    )
    text += "." if run.is_finished else f"; it {STATES[run.is_left]}."
    since = [str(line) for line in run.provenance.get("since") or ()]
    if since:
        text += f" Changed on the way: {'; '.join(since[:NAMED])}{' and more' if len(since) > NAMED else ''}."
    return text


def _learned(findings: Findings) -> str:
    gaps = [f"{name} {n} of {of} items" for name, (n, of) in findings.compared.items() if n < of]
    told = f" Compared are those graded at both ends: {_list(gaps)}." if gaps else ""
    return _change(findings) + told


def _change(findings: Findings) -> str:
    claims = findings.claims("change")
    if not claims:
        return "There is no second evaluation with per-item scores yet, so what was learned cannot be said."
    up, down, open_ = _sort(claims)
    parts = []
    if up:
        parts.append(f"rose in {_named(up, claims, key=lambda n: -claims[n].mid)}")
    if down:
        parts.append(f"fell in {_named(down, claims, key=lambda n: claims[n].mid)}")
    together = "95 % intervals" + (f" that hold for {len(claims)} domains together" if len(claims) > 1 else "")
    if not parts:
        worst = min(claims.values(), key=lambda i: i.low)
        return (
            f"From the baseline to step {findings.steps[-1]:,} no domain's held-out score can be told from where it "
            f"started ({together}; a change as low as {signed(worst.low)} is not excluded)."
        )
    text = f"From the baseline to step {findings.steps[-1]:,} held-out score {' and '.join(parts)} ({together})"
    return text + (f"; for {_list(open_)} the change cannot be told from zero." if open_ else ".")


def _forgot(findings: Findings) -> str:
    if not findings.moments:
        return "Forgetting is not defined before the second evaluation."
    watched = findings.run.watch_only
    if findings.has_stages:
        claims = {name: i for name, i in findings.claims("bwt").items() if name not in watched}
        since, subject = "since the end of its own stage", "Backward transfer"
    else:
        claims = findings.claims("drawdown")
        since, subject = "from its best evaluation (cross-fitted)", "Drawdown"
    if not claims:
        return "Neither backward transfer nor drawdown is defined yet."
    up, down, open_ = _sort(claims)
    middle = mean([i.mid for i in claims.values()])
    text = f"{subject} is {signed(middle)} on average over {_count(len(claims), 'domain')}"
    if down:
        text += f"; {since}, score fell in {_named(down, claims, key=lambda n: claims[n].mid)}"
    if up and subject == "Backward transfer":
        text += f"; later training helped {_named(up, claims, key=lambda n: -claims[n].mid)}"
    if open_ and not down:
        worst = min(open_, key=lambda n: claims[n].low)
        text += (f"; no loss {since} can be told from zero, though one of {signed(claims[worst].low)} "
                 f"in {worst} is not excluded")  # fmt: skip
    return text + "."


def _entropy(findings: Findings) -> str:
    known = {name: e for name, e in findings.entropy.items() if math.isfinite(e.after)}
    if not known:
        return "Entropy per domain was not logged, so whether any domain collapsed cannot be said."
    most = min(known, key=lambda n: known[n].after / known[n].before if known[n].before else math.inf)
    moved = f"{most} moved from {known[most].before:.2f} to {known[most].after:.2f} nats a token"
    below, above = ([n for n, e in known.items() if e.place == where] for where in ("below", "above"))
    if all(e.place == "unknown" for e in known.values()):
        return f"No entropy band is known to judge by; the lowest against its start, {moved}."
    if not (below or above):
        return f"Entropy ended inside its band in every domain; the lowest against its start, {moved}."
    parts = [f"{where} it in {_list(names)}" for where, names in (("below", below), ("above", above)) if names]
    quiet = _unalarmed(findings, below, above)
    unsure = f" (no alarm of {_list(quiet)}: the alarm's test cannot tell it from inside)" if quiet else ""
    return f"Entropy ended outside its band, {' and '.join(parts)}{unsure}; the lowest against its start, {moved}."


def _unalarmed(findings: Findings, below: Sequence[str], above: Sequence[str]) -> list[str]:
    """Return the domains whose entropy ended outside its band without an alarm of it."""
    told = {(str(alarm.get("domain")), alarm.get("kind")) for alarm in findings.run.alarms}
    outside = ((below, "collapse"), (above, "explosion"))
    return [name for names, kind in outside for name in names if (name, kind) not in told]


def _spent(findings: Findings) -> str:
    run, parts = findings.run, []
    if math.isfinite(dead := dead_share(run)):
        parts.append(f"{dead:.0%} of the completions were in groups with equal rewards and taught nothing")
    if math.isfinite(useful := average(run, "rollout/useful_token_frac")):
        parts.append(f"{useful:.0%} of the generated tokens were in groups with a signal")
    if math.isfinite(time := average(run, "step_time")):
        parts.append(f"a step took {time:.2g} s")
    text = "; ".join(parts) or "nothing was logged about rollouts"
    if not run.alarms:
        return f"{text[0].upper()}{text[1:]}; no alarm is on record."
    first = run.alarms[0]
    where = " in ".join(str(first[key]) for key in ("kind", "domain") if first.get(key))
    return (f"{text[0].upper()}{text[1:]}; {_count(len(run.alarms), 'alarm')} went off, "
            f"the first at step {first.get('step', '?')} ({where}).")  # fmt: skip


HARDLY = 0.9
"""Share of completions in groups without a gradient from which more steps are no advice."""


def _next(findings: Findings) -> str:
    """Say what the alarms, the losses and the run's end ask for."""
    run = findings.run
    if run.is_left is False and not run.is_finished:
        return f"Next: `polyphony watch {run.name}` in the folder of its runs shows how it goes on."
    resumed = f"Next: it goes on with `polyphony train --resume {run.name}` in the folder of its runs"
    again = "" if run.is_finished else resumed
    helps: dict[str, list[str]] = {}
    for alarm in run.alarms:
        if alarm.get("remedy"):
            whose = " of ".join(str(alarm[key]) for key in ("kind", "domain") if alarm.get(key))
            helps.setdefault(str(alarm["remedy"]), []).append(whose)
    if helps:
        said = [f"{remedy} (for {_list(list(dict.fromkeys(whose)))})" for remedy, whose in list(helps.items())[:2]]
        what = f"what may help: {'; or '.join(said)}.{_by_heart(findings)}"
        return f"{again}; {what}" if again else f"Next, {what}"
    if again:
        return f"{again}."
    lost = [name for name, change in findings.claims("change").items() if change.is_below_zero]
    if lost:
        watched = [name for name in lost if name in run.watch_only]
        return (
            f"Next: give {_list(lost)} a guardrail{', or rows to train on' if watched else ''}, or lower learning_rate."
        )
    if not findings.claims("change"):
        return "Next: give domains held-out rows, so that it can be said what was learned."
    nothing_gained = all(not change.is_above_zero for change in findings.claims("change").values())
    if nothing_gained and dead_share(run) >= HARDLY:
        return f"Next: hardly a group had a gradient. {SIGNALS['all_dead'].remedy.capitalize()}."
    if nothing_gained:
        if known := _by_heart(findings):
            return f"Next:{known}"
        return "Next: more steps, or more held-out items, which narrow the intervals: nothing can be told yet."
    places = [[n for n, e in findings.entropy.items() if e.place == where] for where in ("below", "above")]
    if unsure := _unalarmed(findings, *places):
        return f"Next: see whether the entropy of {_list(unsure)} goes on leaving its band; `entropy.control` holds it."
    return "Next: nothing stands out; a second seed would say how far this holds for the recipe."


KNOWN, LATE, ENOUGH, GOOD = 0.5, 4, 8, 0.9
"""Share of groups in which all are right that says that training prompts are known, over the last 1 / LATE of a run of at
least so many logged draws; a domain that began above GOOD has little to gain."""


def _by_heart(findings: Findings) -> str:
    """Say which domains know what they are trained on while no gain is told where they are not; empty where none does."""
    known = []
    for name, change in findings.claims("change").items():
        right = findings.run.metrics.get(f"domain/{name}/dead_correct")
        if right is None or len(right.values) < ENOUGH or change.is_above_zero or change.is_below_zero:
            continue
        is_known = right.values[-len(right.values) // LATE :].mean() >= KNOWN
        if is_known and findings.evaluations[0].mean_score(name) < GOOD:
            known.append(name)
    if not known:
        return ""
    return (
        f" {_list(known)}: training prompts are known, and no gain is told held out: more rows, or fewer steps; more "
        "held-out items tell smaller gains."
    )


def _sort(claims: Mapping[str, Interval]) -> tuple[list[str], list[str], list[str]]:
    """Return the domains above zero, below zero, and those that cannot be told."""
    up = [name for name, i in claims.items() if i.is_above_zero]
    down = [name for name, i in claims.items() if i.is_below_zero]
    return up, down, [name for name in claims if name not in up and name not in down]


def _named(names: Sequence[str], claims: Mapping[str, Interval], key: Callable[[str], float]) -> str:
    return _list([f"{name} {signed(claims[name].mid)} {bounds(claims[name])}" for name in sorted(names, key=key)])


def _list(names: Sequence[str]) -> str:
    named, rest = list(names[:NAMED]), len(names) - NAMED
    if rest == 1:
        named, rest = list(names), 0
    if rest > 0:
        return f"{', '.join(named)} and {rest} more"
    return " and ".join(filter(None, [", ".join(named[:-1]), *named[-1:]]))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
