"""Groups of one completion: TRL's arguments with `num_generations: 1`, which a teacher can learn from and rewards cannot.

TRL refuses less than two, because its advantages compare the completions of a group. All else of it counts with one.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.grpo_config import GRPOConfig


class _One(int):
    """The number one to all arithmetic, but not below two: lifts `num_generations < 2` of GRPOConfig, and nothing else."""

    def __lt__(self, other: Any) -> bool:
        return False if other == 2 else int(self) < other

    __hash__ = int.__hash__


def single_config(**fields: Any) -> GRPOConfig:
    """Return TRL's arguments for groups of one, otherwise as GRPOConfig makes and checks them; for `algorithm: distil`.

    Example: `single_config(output_dir="runs/one", loss_type="grpo").num_generations` is 1.
    """
    config = GRPOConfig(**{**fields, "num_generations": _One(1)})
    config.num_generations = 1
    return config
