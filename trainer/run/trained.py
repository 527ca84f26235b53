"""What a run needs of its trainer, and the check that comes before the first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from transformers import TrainerCallback

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.domains import DomainData
from polyphony.trainer.draws import Draws
from polyphony.trainer.engine.weight_check import WeightCheck
from polyphony.trainer.entropy import DomainEntropy
from polyphony.trainer.evaluation.evaluator import Evaluator
from polyphony.trainer.policy import Policy
from polyphony.trainer.run import say
from polyphony.trainer.scoring import Scorer
from polyphony.trainer.shortcuts import ShortcutWatch
from polyphony.trainer.slots import DrawPlan
from polyphony.trainer.teachers.lesson import Lesson
from polyphony.trainer.teachers.recovery import OwnBest


class Trained(Protocol):
    """What a run needs of its trainer, `DomainGRPOTrainer` or `DomainSFTTrainer`, which nothing imports back."""

    args: Any
    state: Any
    accelerator: Any
    callback_handler: Any
    data: DomainData
    lesson: Lesson | None
    plan: DrawPlan
    curriculum: Curriculum
    probes: TransferMatrix | None
    draws: Draws
    scorer: Scorer
    policy: Policy
    evaluator: Evaluator
    own_best: OwnBest
    entropy: DomainEntropy
    shortcuts: ShortcutWatch
    pending_metrics: dict[str, float]

    def add_callback(self, callback: Any) -> None:
        """Have Transformers call it."""
        ...

    def chance_as_saved(self) -> AbstractContextManager[None]:
        """Go on from the random numbers of the checkpoint meanwhile; the first draw, from those that this ends with."""
        ...


class CheckWeights(TrainerCallback):
    """Before the first step, see that the engine follows the policy's weights. Raises RuntimeError if it does not.

    Not earlier: DeepSpeed and FSDP shard the policy when training begins.
    """

    def __init__(self, check_weights: Callable[[], WeightCheck | None], *, say: Callable[[str], None] = say) -> None:
        self.check_weights = check_weights
        self.say = say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.check_weights()
        if found is None:
            return
        if not found.is_passed:
            raise RuntimeError(f"the rollout engine does not follow the policy's weights: {found}")
        if state.is_world_process_zero:
            self.say(f"weight sync: {found}")
