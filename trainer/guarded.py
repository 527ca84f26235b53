"""What a guardrail's `action: recover` needs of the other settings, checked before weights are loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.records import Domain
from polyphony.trainer.teachers.settings import DistilSettings, against_tokens


def check_recoveries(
    guardrails: Sequence[Guardrail],
    domains: Sequence[Domain],
    distil: DistilSettings | None,
    of_trl: Callable[[str], Any],
) -> None:
    """Raise ValueError for what contradicts; `distil` is None under another algorithm than that, all domains are known."""
    named = {domain.name: domain for domain in domains}
    for guardrail in guardrails:
        where, domain = f"guardrails.{guardrail.domain}", named[guardrail.domain]
        if guardrail.action != "recover":
            if guardrail.prompts is not None:
                raise ValueError(f"{where}.prompts are for action: recover, not {guardrail.action}: leave them out")
            continue
        if domain.is_watch_only and guardrail.prompts is None:
            raise ValueError(
                f"{where}: action: recover needs prompts: rows to practise, as the domain is only watched and its held-out "
                "rows are never trained on"
            )
        if not domain.is_watch_only and guardrail.prompts is not None:
            raise ValueError(
                f"{where}.prompts: a trained domain is recovered with its own training rows: leave them out"
            )
        _check_learning(where, guardrail, domain, distil, of_trl)


def check_ahead(ahead: int, guardrails: Sequence[Guardrail], of_trl: Callable[[str], Any]) -> None:
    """Raise ValueError where nothing makes up for older weights, or a recovery would begin with draws in flight."""
    if ahead and of_trl("vllm_importance_sampling_correction") is False:
        raise ValueError(
            f"grpo.vllm_importance_sampling_correction=false with rollouts.ahead={ahead}: draws are of older weights, which "
            "it makes up for; leave it out"
        )
    for guardrail in guardrails:
        if ahead and guardrail.action == "recover":
            raise ValueError(
                f"guardrails.{guardrail.domain}.action=recover with rollouts.ahead={ahead}: draws that are chosen already "
                "would be of other domains; use rollback, stop or warn, or rollouts.ahead=0"
            )


def _check_learning(
    where: str, guardrail: Guardrail, domain: Domain, distil: DistilSettings | None, of_trl: Callable[[str], Any]
) -> None:
    if guardrail.by == "refresh":
        if domain.teacher is not None or distil is None:
            return
        if of_trl("num_generations") == 1:
            raise ValueError(
                f"{where}.by: refresh, and a group of one (grpo.num_generations=1) teaches nothing: distil can"
            )
        if distil.others == "skip":
            raise ValueError(f"{where}.by: refresh, and distil.others: skip learns from no reward: give by: distil")
        return
    if of_trl("loss_type") == "vespo":
        raise ValueError(
            f"grpo.loss_type=vespo with {where}.by: distil: it weighs whole completions by the sign of one advantage"
        )
    for said, why in against_tokens(of_trl):
        raise ValueError(f"{said} with {where}.by: distil: {why}; leave it out, or by: refresh")
