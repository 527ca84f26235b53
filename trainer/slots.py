"""Empty slots: TRL's sampler yields places without a prompt, which are filled just before generation.

accelerate reads one batch ahead of the step, so a sampler that chose prompts would choose before the last rewards were
seen. The curriculum fills a slot when its batch is about to be generated. That removes the lag, makes refill possible,
and makes resume exact (no state of the sampler has to be restored).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawPlan:
    """How a run is cut into draws. A draw is one generation batch; it may span several optimizer steps."""

    prompts_per_draw: int
    draws: int
    steps: int
    """Optimizer steps of the run."""
    micro_batches_per_draw: int
    micro_batches_per_step: int

    def is_boundary(self, step: int) -> bool:
        """True where a checkpoint after `step` optimizer steps falls between two draws."""
        return step * self.micro_batches_per_step % self.micro_batches_per_draw == 0

    def check_boundary(self, name: str, every: int) -> None:
        """Raise ValueError where what is done every so many steps would fall inside a draw."""
        if not self.is_boundary(every):
            span = self.micro_batches_per_draw / self.micro_batches_per_step
            least = self.micro_batches_per_draw // math.gcd(self.micro_batches_per_draw, self.micro_batches_per_step)
            raise ValueError(
                f"{name}={every} falls inside a draw; a draw spans {span:g} optimizer steps: give a multiple of {least}"
            )


def plan_draws(args: GRPOConfig, n_prompts: int) -> DrawPlan:
    """Return the plan for `max_steps`, or for `num_train_epochs` passes over `n_prompts` training prompts."""
    per_draw = args.generation_batch_size // args.num_generations  # type: ignore[operator]
    micro_per_draw = args.steps_per_generation * args.num_iterations  # type: ignore[operator]
    micro_per_step = args.gradient_accumulation_steps
    if args.max_steps > 0:
        steps = args.max_steps
    else:
        steps = math.ceil(math.ceil(args.num_train_epochs * n_prompts / per_draw) * micro_per_draw / micro_per_step)
    return DrawPlan(
        prompts_per_draw=per_draw,
        draws=math.ceil(steps * micro_per_step / micro_per_draw),
        steps=steps,
        micro_batches_per_draw=micro_per_draw,
        micro_batches_per_step=micro_per_step,
    )


def slot_arguments(args: GRPOConfig, plan: DrawPlan) -> GRPOConfig:
    """Return a copy of `args` for a run over slots: one epoch is the whole run, and resume skips no data.

    Relies on Transformers deriving epochs from `max_steps`, and on `ignore_data_skip` restarting the sampler.
    """
    args = copy.copy(args)
    args.max_steps = plan.steps
    args.ignore_data_skip = True
    args.shuffle_dataset = False
    return args


def slot_dataset(plan: DrawPlan) -> Dataset:
    """Return one empty row for each prompt that the run will draw."""
    return Dataset.from_dict({"prompt": [""] * (plan.draws * plan.prompts_per_draw)})
