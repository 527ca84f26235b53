"""What of a recipe works, but was hardly meant so."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polyphony.launch.recipe import Recipe

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig


def remarks(recipe: Recipe, args: GRPOConfig) -> list[str]:
    """Return what works, but was hardly meant so: a line for each with its number and a remedy."""
    found, grpo = [], recipe.grpo
    trained = sum(not domain.is_watch_only for domain in recipe.domains.values())
    prompts = args.generation_batch_size // args.num_generations  # type: ignore[operator]
    if not args.bf16 and grpo.get("bf16") is None and not grpo.get("fp16"):
        found.append("no GPU here: the policy takes float32")
    if recipe.algorithm != "sft" and prompts < max(2, trained):
        found.append(
            f"a draw holds {prompts} prompt{'s' if prompts > 1 else ''} ({args.generation_batch_size} completions in groups "
            f"of {args.num_generations}) for {trained} trained domain{'s' if trained > 1 else ''}: raise "
            "grpo.gradient_accumulation_steps or per_device_train_batch_size"
        )
    if args.max_steps > 0 and args.warmup_steps >= args.max_steps:
        found.append(
            f"grpo.warmup_steps={args.warmup_steps:g} of grpo.max_steps={args.max_steps}: the learning rate is never reached"
        )
    if recipe.algorithm == "distil" and recipe.pool is not None:
        found.append(
            "pool: prompts of domains with a teacher are sorted by pass rate as well: what is always right, or never, is "
            "drawn less, though the teacher has as much to say of it"
        )
        if recipe.pool.look or recipe.pool.refill.max_rounds:
            found.append("pool.refill and pool.look do nothing in domains with a teacher: no group of theirs is dead")
    found += _apart(recipe)
    for name, (most, used) in USUAL.items():
        if (value := getattr(args, name)) is not None and value > most:
            found.append(f"grpo.{name}={value:g} is far outside what is used, {used}")
    return found


def _apart(recipe: Recipe) -> list[str]:
    """Return why few checkpoints, or none, can become the teacher of a recovery: only those of evaluated weights do."""
    evaluated, saved = recipe.eval.every, recipe.checkpoint.every or recipe.eval.every
    both = math.lcm(evaluated, saved)
    if both == max(evaluated, saved):
        return []
    return [
        f"guardrails.{guardrail.domain}: recovered from a checkpoint that was evaluated, of which there is one every {both} "
        f"steps (eval.every={evaluated}, checkpoint.every={saved}), else from the start: let one divide the other"
        for guardrail in recipe.of_trainer.guardrails
        if guardrail.action == "recover" and guardrail.by == "distil"
    ]


USUAL = {
    "beta": (1, "0 to 0.1: the KL term would outweigh every reward"),
    "epsilon": (1, "0.1 to 0.3: from 1 on no ratio is clipped from below"),
    "learning_rate": (1e-3, "1e-6 for all weights to 1e-4 for adapters: one step would move the policy too far"),
    "temperature": (2, "0.6 to 1.2: completions would be noise"),
}
"""Largest value of a field that is no surprise, and what is used."""
