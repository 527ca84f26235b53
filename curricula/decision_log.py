"""`decisions.jsonl`: one line a draw with the evidence that was decided from, and replay of a scheduler on it.

Evaluations are named by number (line `n` had seen the first `evaluations` rows of the run's `transfer.json`), and a line on
disk leaves out what is as in the line before it (`shortened`, `wholes`): about 100 bytes a domain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from operator import add
from typing import Any

from polyphony.curricula.records import Decision, DomainStats, Evaluation, Evidence, Prompt, nan_of, null_of, own
from polyphony.curricula.schedulers import Scheduler


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """One draw of a saved run, as it was decided and as another scheduler would have decided it."""

    draw: int
    domains: tuple[str, ...]
    ran: tuple[float, ...]
    replayed: tuple[float, ...]
    reason: str
    """The other scheduler's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One draw as it was chosen: its prompts, the decision they follow from, and what that was made from."""

    draw: int
    """The run's own number of it, from 0."""
    prompts: Sequence[Prompt]
    decision: Decision
    places: Mapping[str, Sequence[int]]
    """By domain, where its prompts stand among the training rows, in the order of the draw."""
    recovered: str = ""
    """The domain of a recovery, whose draws the scheduler does not decide."""
    unseen: int
    """How many draws just before this one the decision knew nothing of but their prompts."""
    basis: Evidence | None = None
    """None where the line was read from a checkpoint."""
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        """Prompts by domain."""
        return Counter(prompt.domain for prompt in self.prompts)

    @property
    def line(self) -> dict[str, Any]:
        """The line of `decisions.jsonl`, whole."""
        if self.basis is None:
            return dict(self.told)
        line = decision_line(self.basis, self.decision, self.prompts, draw=self.draw, recovered=self.recovered)
        return line | {"unseen": self.unseen} if self.unseen else line

    def as_row(self) -> dict[str, Any]:
        """Return it for a checkpoint; JSON-able."""
        prompts = [[prompt.domain, prompt.id] for prompt in self.prompts]
        places = {name: list(of) for name, of in self.places.items()}
        told = {
            "draw": self.draw,
            "prompts": prompts,
            "places": places,
            "recovered": self.recovered,
            "unseen": self.unseen,
        }
        return told | {"decision": asdict(self.decision), "told": self.line}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Choice:
        """Restore `as_row`."""
        decision = Decision(**row["decision"] | {"mixture": tuple(row["decision"]["mixture"])})
        prompts = tuple(Prompt(domain=domain, id=prompt_id) for domain, prompt_id in row["prompts"])
        return cls(**{**row, "decision": decision, "prompts": prompts})


def decision_line(
    evidence: Evidence, decision: Decision, refs: Sequence[Prompt], *, draw: int | None = None, recovered: str = ""
) -> dict[str, Any]:
    """Return one draw's line of `decisions.jsonl`; `refs` are the prompts that were drawn. JSON-able.

    `draw` is the run's own number of it, where recoveries came before; `recovered` is the domain of a recovery, whose draws
    the scheduler does not decide.
    """
    counts = Counter(ref.domain for ref in refs)
    names = evidence.domains if recovered in ("", *evidence.domains) else (*evidence.domains, recovered)
    mixture = dict(zip(evidence.domains, decision.mixture, strict=True))
    return {
        "draw": evidence.draw if draw is None else draw,
        "mixture": {name: mixture.get(name, 1.0) for name in names},
        "counts": {name: counts[name] for name in names},
        **({"recovery": recovered} if recovered else {}),
        "reason": decision.reason,
        "stage": decision.stage,
        "evidence": evidence_as_json(evidence),
        "prompts": [ref.id for ref in refs],
    }


def evidence_as_json(evidence: Evidence) -> dict[str, Any]:
    """Return the evidence with evaluations as their number, the last draw by column, and NaN as None."""
    document: dict[str, Any] = {f.name: getattr(evidence, f.name) for f in fields(Evidence)}
    for name, value in document.items():
        if isinstance(value, tuple):
            document[name] = list(value)
    last = {f.name: [null_of(getattr(stats, f.name)) for stats in evidence.last] for f in fields(DomainStats)}
    if not any(value is not None for value in last["teacher_kl"]):  # without teachers, and of older versions
        del last["teacher_kl"]
    return document | {"last": last, "evaluations": len(evidence.evaluations)}


def evidence_from_json(document: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> Evidence:
    """Return the evidence of a line; `evaluations` are the run's rows (steer half), of which it takes the first ones.

    Raises ValueError where the run has fewer rows than the line had seen.
    """
    seen, evaluations = document["evaluations"], own(evaluations)
    if seen > len(evaluations):
        raise ValueError(f"draw {document['draw']} had seen {seen} evaluations, the run's file has {len(evaluations)}")
    columns = {name: [nan_of(v) for v in values] for name, values in document["last"].items()}
    last = tuple(DomainStats(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in document.items()}
    return Evidence(**values | {"last": last, "evaluations": tuple(evaluations[:seen])})


def replay(
    lines: Iterable[Mapping[str, Any]], scheduler: Scheduler, evaluations: Sequence[Evaluation] = ()
) -> list[Replayed]:
    """Run `scheduler` over the evidence of a saved run, its own state carried from draw to draw.

    What it would have seen had it decided is not known: the evidence stays that of the run.
    """
    state: Mapping[str, Any] = {}
    replayed = []
    for line in lines:
        if "recovery" in line:  # no scheduler was asked
            continue
        evidence = evidence_from_json(line["evidence"], evaluations)
        decision = scheduler.decide(evidence, state)
        state = decision.state
        replayed.append(
            Replayed(
                draw=evidence.draw,
                domains=evidence.domains,
                ran=tuple(line["mixture"][name] for name in evidence.domains),
                replayed=decision.mixture,
                reason=decision.reason,
            )
        )
    return replayed


def shortened(line: Mapping[str, Any], before: Mapping[str, Any] | None, places: Sequence[Sequence[int]]) -> dict:
    """Return a draw's line without what it has in common with the one `before` it; whole where there is none.

    Prompts are named by their `places` among the training rows of each domain, which say how many there were too.
    """
    if before is None:
        return {**line, "prompts": places}
    short = {"draw": line["draw"], "prompts": places}
    if line["mixture"] != before["mixture"]:
        short["mixture"] = list(line["mixture"].values())
    short |= {key: line[key] for key in ("stage", "reason") if line[key] != before[key]}
    short |= {"unseen": line["unseen"]} if "unseen" in line else {}
    now, past = line["evidence"], before["evidence"] | {"draw": line["draw"], "drawn": _drawn_by(before)}
    return short | {"evidence": {key: value for key, value in now.items() if value != past[key]}}


def wholes(
    lines: Iterable[dict[str, Any]], ids: Mapping[str, Sequence[str]], *, is_lenient: bool = False
) -> list[dict[str, Any]]:
    """Return the lines as `decision_line` made them; `ids` name each domain's training rows in order.

    Lines that are whole, and those of older versions, come back as they are. Raises ValueError for one that leaves out what
    stands in a line which is not there; with `is_lenient` it is left out.
    """
    found: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for line in _in_order(lines, is_lenient=is_lenient):
        if _is_short(line):
            line = _whole(line, before)
        if _has_places(line):
            line["prompts"] = _named(line["prompts"], [ids.get(name) for name in line["mixture"]])
        if _is_told_whole(line):
            before = line
        found.append(line)
    return found


DECIDED = ("step", "draw", "mixture", "stage", "reason", "recovery")
"""What a line says of the decision itself."""


def choices(lines: Iterable[dict[str, Any]], *, is_lenient: bool = False) -> list[dict[str, Any]]:
    """Return of each line what was decided (`DECIDED`), not from what, nor what was drawn; else as `wholes`."""
    found: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for line in _in_order(lines, is_lenient=is_lenient):
        decided = {key: line[key] for key in DECIDED if key in line}
        if _is_short(line):
            decided = _decided(decided, before)
            before = decided
        elif _is_told_whole(line):
            before = decided
        found.append(decided)
    return found


def _in_order(lines: Iterable[dict[str, Any]], *, is_lenient: bool) -> Iterator[dict[str, Any]]:
    """Pass on the lines but those that leave out what stands in a line which is not there: such a one is an error."""
    last = -2  # the draw of the last line that another one may refer to
    for line in lines:
        if _is_short(line):
            if line.get("draw") != last + 1:
                if is_lenient:
                    continue
                raise ValueError(
                    f"draw {line.get('draw')} is told by what differs from the one before, which is missing"
                )
            last = line["draw"]
        elif _is_told_whole(line):
            last = line.get("draw", -2)
        yield line


def _has_places(line: Mapping[str, Any]) -> bool:
    return bool(line.get("prompts")) and isinstance(line["prompts"][0], list)


def _is_short(line: Mapping[str, Any]) -> bool:
    return "counts" not in line and _has_places(line)


def _is_told_whole(line: Mapping[str, Any]) -> bool:
    return "counts" in line and "domains" in line.get("evidence", {})


def _named(places: Sequence[Sequence[int]], ids: Sequence[Sequence[str] | None]) -> list[Any]:
    """Return the ids at the places of each domain; the places where a domain's ids are not known."""
    if len(places) != len(ids):
        raise ValueError(f"prompts of {len(places)} domains, and shares of {len(ids)}")
    named = [of if known is None else map(known.__getitem__, of) for known, of in zip(ids, places, strict=True)]
    return list(chain.from_iterable(named))


def _whole(short: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    line = _decided(short, before)
    line["counts"] = dict(zip(line["mixture"], map(len, line["prompts"]), strict=True))
    given = {"draw": line["draw"], "drawn": _drawn_by(before)}
    line["evidence"] = before["evidence"] | given | short["evidence"]
    return line


def _decided(short: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    names = before["mixture"]
    line = {"stage": before["stage"], "reason": before["reason"], "mixture": names, **short}
    if line["mixture"] is not names:
        line["mixture"] = dict(zip(names, line["mixture"], strict=True))
    return line


def _drawn_by(line: Mapping[str, Any]) -> list[int]:
    """Return the prompts drawn of each domain after a line's draw."""
    drawn, counts = line["evidence"]["drawn"], line["counts"]
    if len(drawn) != len(counts):
        raise ValueError(f"what was drawn of {len(drawn)} domains, and counts of {len(counts)}")
    return list(map(add, drawn, counts.values()))
