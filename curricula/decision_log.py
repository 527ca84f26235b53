"""Decisions on record: one line a draw with the evidence it stood on, and any scheduler run over such a record again.

Evaluations are named by number (line `n` had seen the first `evaluations` rows of the run's `transfer.json`), so that
a line stays about as long as its numbers: some 100 bytes a domain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from polyphony.curricula.records import Decision, DomainStats, Evaluation, Evidence, Prompt, nan_of, null_of
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


def decision_line(evidence: Evidence, decision: Decision, refs: Sequence[Prompt]) -> dict[str, Any]:
    """Return one draw's line of `decisions.jsonl`; `refs` are the prompts that were drawn. JSON-able, NaN as null."""
    counts = Counter(ref.domain for ref in refs)
    return {
        "draw": evidence.draw,
        "mixture": dict(zip(evidence.domains, decision.mixture, strict=True)),
        "counts": {name: counts[name] for name in evidence.domains},
        "reason": decision.reason,
        "stage": decision.stage,
        "evidence": evidence_as_json(evidence),
    }


def evidence_as_json(evidence: Evidence) -> dict[str, Any]:
    """Return the evidence by columns, evaluations as their number."""
    columns = {f.name: [null_of(getattr(stats, f.name)) for stats in evidence.last] for f in fields(DomainStats)}
    document: dict[str, Any] = {f.name: getattr(evidence, f.name) for f in fields(Evidence)}
    for name, value in document.items():
        if isinstance(value, tuple):
            document[name] = list(value)
    return document | {"last": columns, "evaluations": len(evidence.evaluations)}


def evidence_from_json(document: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> Evidence:
    """Return the evidence of a line; `evaluations` are the run's rows (steer half), of which it takes the first ones.

    Raises ValueError where the run has fewer rows than the line had seen.
    """
    seen = document["evaluations"]
    if seen > len(evaluations):
        raise ValueError(f"draw {document['draw']} had seen {seen} evaluations, the run's file has {len(evaluations)}")
    columns = document["last"]
    rows = zip(*columns.values(), strict=True)
    named: list[dict[str, Any]] = [{k: nan_of(v) for k, v in zip(columns, row, strict=True)} for row in rows]
    last = tuple(DomainStats(**stats) for stats in named)
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
