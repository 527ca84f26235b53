"""How often answers are passed over: Transformers takes a step at the end of each pass, whatever it has gathered by then."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from trl.trainer.grpo_config import GRPOConfig

from polyphony.trainer.slots import DrawPlan, plan_draws


def steps_of_pass(args: GRPOConfig, n_answers: int) -> int:
    """Return the optimizer steps of one pass over so many answers."""
    of_batch = args.per_device_train_batch_size * args.world_size
    batches = n_answers // of_batch if args.dataloader_drop_last else math.ceil(n_answers / of_batch)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def plan_passes(args: GRPOConfig, n_answers: int) -> DrawPlan:
    """Return the plan for `max_steps`, or for `num_train_epochs` passes over the answers.

    Example: 10 answers in batches of 4, 2 batches a step, are 2 steps a pass, the second of 2 answers.
    """
    if args.max_steps <= 0:
        args = copy.copy(args)
        args.max_steps = math.ceil(args.num_train_epochs * steps_of_pass(args, n_answers))
    return plan_draws(args, n_answers)


def filling(args: GRPOConfig, n_answers: int) -> int:
    """Return how many rows the last batch of a pass lacks on several ranks, whose batches are equally large."""
    if args.world_size == 1 or args.dataloader_drop_last:
        return 0
    return -n_answers % (args.per_device_train_batch_size * args.world_size)


class Filled(Sampler[int]):
    """A pass over the answers, shuffled as on one process, and behind them the rows that fill up its last batch.

    Accelerate would fill it with answers from the beginning of the pass, which would weigh twice. It makes a sampler of its
    own of no other than PyTorch's, and tells this one which pass it is.

    Example: `[*Filled(3, 1, seed=1)][-1]` is 3.
    """

    def __init__(self, n_answers: int, n_filling: int, *, seed: int) -> None:
        self._answers = SeedableRandomSampler(range(n_answers), data_seed=seed)
        self._filling = range(n_answers, n_answers + n_filling)

    def __iter__(self) -> Iterator[int]:
        yield from self._answers
        yield from self._filling

    def __len__(self) -> int:
        return len(self._answers) + len(self._filling)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the next pass by its number."""
        self._answers.set_epoch(epoch)


def learned(args: GRPOConfig, steps: int, n_answers: int) -> int:
    """Return how many answers so many steps learn from, one of two passes counted twice."""
    of_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    passes, rest = divmod(steps, steps_of_pass(args, n_answers))
    return passes * n_answers + min(n_answers, rest * of_step)
