"""Settings of domains that act. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.records import Domain


@settings
class EnvironmentSettings:
    """Limits of episodes, beside TRL's: `grpo.max_tool_calling_iterations` (turns that call tools) and
    `grpo.max_completion_length` (tokens of an episode, those of tools' answers among them)."""

    tool_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that the calls of one turn, a `reset`, a `reply` or a `get_reward` may take once it is their turn. Calls and
    replies that take longer end their episode with reward 0; in a recipe their process is killed."""
    episodes: int | None = Field(default=None, ge=1)
    """Episodes of a rank at once; null: all that a draw or an evaluation has."""


def check_acting(
    domains: Sequence[Domain],
    guardrails: Sequence[Guardrail],
    *,
    algorithm: str,
    engine: Any,
    of_trl: Callable[[str], Any],
) -> None:
    """Raise ValueError for what does not go with a domain that acts, and for limits of such domains where there is none."""
    acting = [domain for domain in domains if domain.acts]
    if not acting:
        if (most := of_trl("max_tool_calling_iterations")) is not None:
            raise ValueError(f"max_tool_calling_iterations={most}: no domain has `environment` or `tools`")
        return
    where = f"domains.{acting[0].name}.{'tools' if acting[0].environment is None else 'environment'}"
    if algorithm in ("distil", "sft"):
        raise ValueError(f"{where} with algorithm {algorithm}: it learns from answers of one turn; use grpo or rft")
    if of_trl("use_vllm"):
        raise ValueError(f"{where} with use_vllm=true, TRL's own engine: use engine vllm or transformers")
    if of_trl("use_transformers_continuous_batching"):
        raise ValueError(f"{where} with use_transformers_continuous_batching: it cannot be cut at an episode's limit")
    if of_trl("vllm_structured_outputs_regex"):
        raise ValueError(
            f"{where} with vllm_structured_outputs_regex: a call would have to match it too; leave out one"
        )
    if "stop" in (of_trl("generation_kwargs") or {}):
        raise ValueError(
            f"{where} with generation_kwargs.stop: a turn that ends at it has no end for the next to follow"
        )
    by_name = {domain.name: domain for domain in acting}
    for guardrail in guardrails:
        if guardrail.action == "recover" and guardrail.by != "refresh" and guardrail.domain in by_name:
            raise ValueError(
                f"guardrails.{guardrail.domain}.by: {guardrail.by}: a domain that acts is recovered by its rewards; say "
                "by: refresh"
            )
