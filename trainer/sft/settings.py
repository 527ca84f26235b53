"""What a recipe says of fine-tuning on answers, and what makes no sense beside it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import field_validator

from polyphony.curricula.declarations import settings
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.records import Domain
from polyphony.trainer.run.folder import RunFolder

ANSWERS = "sft.answers"


@settings
class SftSettings:
    """Fine-tuning on experts' answers (`algorithm: sft`) through TRL's SFTTrainer, with the loss on the answers' tokens.

    The domains are mixed as the rows are, and all rows are shuffled by `grpo.seed`, anew each pass.
    """

    answers: str | None = None
    """The folder that `polyphony sample` wrote, or a file of such rows: `domain` and `id` of a training prompt, and
    `completion`, the answer without the chat template's tokens (`truncated: true` where it is only the beginning of one)."""

    @field_validator("answers")
    @classmethod
    def _is_a_path(cls, answers: str | None) -> str | None:
        if answers is not None and (not answers.strip() or not answers.isprintable()):
            raise ValueError("expected a file, or the folder of a sample")
        return answers


OF_DRAWS = frozenset(
    """
    beta cast_lm_head_to_fp32 delta entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon
    epsilon_high generation_batch_size importance_sampling_level log_completions log_completions_hub_repo log_multimodal
    log_unique_prompts loss_type mask_truncated_completions max_tool_calling_iterations multi_objective_aggregation
    num_completions_to_print num_generations num_iterations off_policy_mask_threshold ref_model_mixup_alpha
    ref_model_sync_steps reward_weights sapo_temperature_neg sapo_temperature_pos scale_rewards steps_per_generation
    sync_ref_model top_entropy_quantile use_adaptive_entropy use_bias_correction_kl use_liger_kernel vespo_k_neg vespo_k_pos
    vespo_lambda_neg vespo_lambda_pos vllm_importance_sampling_cap vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode
    """.split()  # noqa: SIM905
)
"""Fields of TRL's GRPOConfig that shape draws and what is learned from them: not heard where a file is learned from."""

SECTIONS = ("advantages", "curriculum", "distil", "guard", "pool", "teachers", "update")
"""Of a recipe, what acts on draws: refused where it is said."""
OF_A_DOMAIN = ("advantages", "diversity", "teacher", "weight")
ACTIONS = ("warn", "stop")
"""What a guardrail may do: others change what is drawn, or draw again."""


def check_sft(
    sft: SftSettings,
    said: Sequence[str],
    *,
    domains: Sequence[Domain],
    guardrails: Sequence[Guardrail],
    grpo: Mapping[str, Any],
) -> None:
    """Raise ValueError for all that has no meaning where a file of answers is learned from.

    `said` are the names of a recipe's `SECTIONS` that are not as they are where nobody says them.
    """
    unheard = [*said]
    for domain in domains:
        defaults = {name: Domain.__pydantic_fields__[name].default for name in OF_A_DOMAIN}  # type: ignore[attr-defined]
        unheard += [
            f"domains.{domain.name}.{name}" for name, plain in defaults.items() if getattr(domain, name) != plain
        ]
    unheard += [f"grpo.{name}" for name in sorted(OF_DRAWS & grpo.keys())]
    problems = []
    if unheard:
        it = "it" if len(unheard) == 1 else "them"
        why = f"a file of answers is learned from, nothing is drawn; leave {it} out"
        problems.append(f"{', '.join(unheard)} with algorithm: sft: {why}")
    for guardrail in guardrails:
        if guardrail.action not in ACTIONS:
            problems.append(
                f"guardrails.{guardrail.domain}.action={guardrail.action} with algorithm: sft: the rows that follow are the "
                f"same, so that it would be lost again; {' or '.join(ACTIONS)}"
            )
    if (temperature := grpo.get("temperature", 1.0)) != 1.0:
        problems.append(
            f"grpo.temperature={temperature} with algorithm: sft: its loss is at 1, and held-out answers are sampled as "
            "was learned; leave it out"
        )
    if split := next((name for name in ("deepspeed", "fsdp") if grpo.get(name)), None):
        problems.append(f"grpo.{split} with algorithm: sft: every rank holds all weights; leave it out")
    if sft.answers is None:
        problems.append("algorithm: sft needs sft.answers, the rows to learn from; `polyphony sample` writes them")
    if problems:
        raise ValueError("; ".join(problems))


def answers_file(source: str) -> Path:
    """Return the file of rows that is named, or that of a sample's folder. Raises ValueError where there is none."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{ANSWERS}: file {path} does not exist")
    if path.is_dir() and not (rows := RunFolder(path).rows).is_file():
        raise ValueError(
            f"{ANSWERS}: folder {path} has no {rows.name}: no `polyphony sample` has come to its end there"
        )
    return RunFolder(path).rows if path.is_dir() else path
