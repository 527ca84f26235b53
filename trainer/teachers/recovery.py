"""A domain's own best weights as its teacher, while a guardrail recovers it (`action: recover`, `by: distil`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from polyphony.curricula.recovery import Recovery
from polyphony.trainer.checkpoints import Chance
from polyphony.trainer.domains import DomainData
from polyphony.trainer.policy import Policy
from polyphony.trainer.teachers.distil import Distil
from polyphony.trainer.teachers.lesson import Lesson
from polyphony.trainer.teachers.settings import START, DistilSettings, TeacherSettings
from polyphony.trainer.teachers.teachers import Teachers
from polyphony.trainer.teachers.weights import TeacherWeights

NAME = "recovery"
"""What the teacher is called, where it has to have a name."""


class OwnBest:
    """The teacher of the recovery that is open: loaded at its first draw, let go when it is over.

    Example: `OwnBest(data, model="Qwen/Qwen3-0.6B", settings=None, loss_type="dapo").of(policy, recoveries.open)`
    """

    def __init__(self, data: DomainData, *, model: Any, settings: DistilSettings | None, loss_type: str) -> None:
        """`model` is what the policy is made of; without `settings` a run distils by the defaults."""
        self.data, self.model, self.loss_type = data, model, loss_type
        self.settings = settings or DistilSettings()
        self._held: tuple[str, str] | None = None
        self._distil: Distil | None = None
        self._told: dict[str, float] = {}

    def of(self, policy: Policy, recovery: Recovery | None) -> Distil | None:
        """Return what turns its draws into advantages; None where nothing is distilled just now. Collective over ranks.

        Raises ValueError where the weights are gone.
        """
        wanted = (recovery.domain, recovery.teacher) if recovery is not None and recovery.teacher else None
        if wanted != self._held:
            self._told = self.flush()
            self._held = self._distil = None  # its memory, before another is loaded
            if wanted is not None:
                self._distil = self._made(policy, *wanted)
            self._held = wanted
        return self._distil

    def weights(self, policy: Policy, teacher: str) -> TeacherWeights:
        """Return where a teacher's weights are, found but not read. Raises ValueError where they are not whole."""
        base = self.model if isinstance(self.model, str) else self.model.name_or_path
        return TeacherWeights.of(NAME, self._settings_of(policy, teacher), base=base)

    def knows_start(self, policy: Policy) -> bool:
        """Whether the weights from before the first step can be had: by their name, or under the adapter."""
        has_adapter = isinstance(policy.trainer.model, PeftModel)
        return isinstance(self.model, str) or (has_adapter and not isinstance(self.model, PeftModel))

    def flush(self) -> dict[str, float]:
        """Return the `distil/<d>` metrics since the last log and start anew."""
        told, self._told = self._told, {}
        return told | (self._distil.flush() if self._distil else {})

    def _settings_of(self, policy: Policy, teacher: str) -> TeacherSettings:
        folder = Path(policy.trainer.args.output_dir)  # type: ignore[arg-type]
        return TeacherSettings(model=START if teacher == START else str(folder / teacher))

    def _made(self, policy: Policy, domain: str, teacher: str) -> Distil:
        chance = Chance()  # a run that is resumed inside loads them again
        lesson = Lesson(
            teachers={NAME: self._settings_of(policy, teacher)},
            weights={NAME: self.weights(policy, teacher)},
            of_domain={domain: NAME},
            data=self.data,
            model=self.model,
        )
        teachers = Teachers(policy, lesson)
        chance.restore()
        return Distil(self.settings, teachers, domains=self.data.names, loss_type=self.loss_type)
