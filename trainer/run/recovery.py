"""Recoveries of a run (`action: recover`): which begin, from which checkpoint, when they are over, what is kept for them.

What they draw is the curriculum's (`curricula.recovery`), what is learned from it the trainer's (`teachers.recovery`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.intervals import Interval
from polyphony.curricula.monitors import Alarm
from polyphony.curricula.monitors.guardrails import Guardrail, Verdict, regained
from polyphony.trainer.checkpoint_mark import damage
from polyphony.trainer.domains import DomainData
from polyphony.trainer.metrics import defined, key
from polyphony.trainer.policy import Policy
from polyphony.trainer.run.folder import BEST_BY_DOMAIN_FILE, STATE_FILE
from polyphony.trainer.run.json_lines import read_object, write_object
from polyphony.trainer.teachers.recovery import OwnBest
from polyphony.trainer.teachers.settings import START


class Recovered(Protocol):
    """What recoveries need of a trainer."""

    accelerator: Any
    data: DomainData
    curriculum: Curriculum
    policy: Policy
    own_best: OwnBest


class Rescue:
    """Begin, follow and end the recoveries that guardrails ask for.

    Example: `Rescue(trainer, guardrails, folder.checkpoints).begin(verdict)`
    """

    def __init__(self, trainer: Recovered, guardrails: Sequence[Guardrail], checkpoints: Path) -> None:
        """Raises ValueError where rows to recover a watched domain with were not read."""
        self.trainer, self.checkpoints = trainer, checkpoints
        self.guardrails = {guardrail.domain: guardrail for guardrail in guardrails if guardrail.action == "recover"}
        self._ended = ""
        """The domain whose recovery the last evaluation ended."""
        self._change: tuple[str, Interval] | None = None
        """What the last evaluation measured of a domain in recovery."""
        if unread := [
            g.domain for g in self.guardrails.values() if g.prompts is not None and g.domain not in trainer.data.spare
        ]:
            raise ValueError(f"guardrails.{unread[0]}.prompts: the domains' rows were read without them")

    # --- a recovery, from the guardrail that broke to its end ---------------------------------------------------------

    def begin(self, verdict: Verdict) -> str:
        """Begin the recovery that a broken guardrail asks for; collective over ranks.

        Returns what was done, in words; empty for a domain that is in recovery, or was until this evaluation.
        """
        guardrail, curriculum = verdict.guardrail, self.trainer.curriculum
        name, ledger = guardrail.domain, curriculum.recoveries
        if name == self._ended or curriculum.is_recovered(name):
            return ""
        if ledger.open is not None:
            return f"waits for the recovery of {ledger.open.domain}"
        if ledger.begun.get(name, 0) >= guardrail.times:
            return f"warned: its recoveries are spent ({guardrail.times})"
        if curriculum.draws >= curriculum.total_draws:
            return "warned: no draw is left for a recovery"
        teacher, why = self._agreed_teacher(name) if guardrail.by == "distil" else ("", "")
        if why:
            return f"warned: it cannot be recovered: {why}"
        ledger.begin(name, most=guardrail.draws, teacher=teacher)
        assert ledger.open is not None
        return ledger.open.reason

    def look(self, step: int) -> list[Alarm]:
        """Take in an evaluation: end the recovery that is open where its domain is regained, or its draws are spent.

        Returns what tells of the end, however it came.
        """
        curriculum = self.trainer.curriculum
        self._ended, self._change = "", None
        opened = curriculum.recoveries.open
        if opened is None:
            return []
        name = opened.domain
        guardrail = self.guardrails.get(name)
        if guardrail is None:  # a run that went on with other guardrails
            curriculum.recoveries.end()
            return []
        watched = [domain.name for domain in self.trainer.data.domains if domain.is_watch_only]
        change, since = regained(guardrail, curriculum.evaluations, watch_only=watched)
        self._change = (name, change)
        is_back = change.high >= 0
        if not is_back and opened.drawn < opened.most:
            return []
        curriculum.recoveries.end()
        self._ended = name
        after = "1 draw" if opened.drawn == 1 else f"{opened.drawn} draws"
        lost = f"{change.mid:+.3f} ({change.low:+.3f} to {change.high:+.3f}) {since}"
        told = f"{name} is {'back' if is_back else 'not back'} after {after}: {lost}"
        curriculum.note(f"recovery: {told}")
        return [Alarm(step=step, domain=name, kind="recovery", message=told)]

    @property
    def is_spent(self) -> bool:
        """Whether the recovery that is open has taken all its draws: it is to be evaluated now."""
        opened = self.trainer.curriculum.recoveries.open
        return opened is not None and opened.drawn >= opened.most

    def metrics(self) -> dict[str, float]:
        """Return `recovery/<d>` of the last evaluation."""
        found = {
            key("recovery", "draws", name): float(n) for name, n in self.trainer.curriculum.recoveries.draws.items()
        }
        if self._change is not None:
            name, change = self._change
            for metric, value in {"change": change.mid, "change_low": change.low, "change_high": change.high}.items():
                found[key("recovery", metric, name)] = value
        return defined(found)

    # --- the checkpoints that are kept for it -------------------------------------------------------------------------

    def mark(self, checkpoint: Path) -> None:
        """Note a checkpoint that was evaluated as the best of each domain that it is the best of; of equals the newer."""
        marks, last = self._marks(), self.trainer.curriculum.evaluations[-1]
        for name, guardrail in self.guardrails.items():
            score = last.mean_score(name)
            if guardrail.by == "distil" and not math.isnan(score) and score >= marks.get(name, {"score": 0.0})["score"]:
                marks[name] = {"checkpoint": checkpoint.name, "score": score}
        if marks:
            write_object(self._file, marks)

    @property
    def kept(self) -> set[Path]:
        """The checkpoints that are not to be deleted: each domain's best, and the teacher of the recovery that is open."""
        opened = self.trainer.curriculum.recoveries.open
        names = {mark["checkpoint"] for mark in self._marks().values()} | (
            {opened.teacher} if opened is not None else set()
        )
        return {self.checkpoints / name for name in names if name}

    def forget_gone(self) -> None:
        """Forget checkpoints that are not there any more: another one may get the same name."""
        marks = self._marks()
        there = {name: m for name, m in marks.items() if (self.checkpoints / m["checkpoint"] / STATE_FILE).is_file()}
        if there != marks:
            write_object(self._file, there)

    @property
    def _file(self) -> Path:
        return self.checkpoints / BEST_BY_DOMAIN_FILE

    def _marks(self) -> dict[str, Any]:
        """Return checkpoint and score by domain; nothing where the file cannot be read: the best are sought anew."""
        try:
            found = read_object(self._file) if self._file.is_file() else {}
        except ValueError:
            return {}
        return {
            name: mark
            for name, mark in found.items()
            if isinstance(mark, Mapping) and {"checkpoint", "score"} <= set(mark)
        }

    def _agreed_teacher(self, name: str) -> tuple[str, str]:
        """Return what to distil from, or why nothing can be, as rank 0 has found it."""
        found = [self._teacher(name) if self.trainer.accelerator.is_main_process else ("", "")]
        broadcast_object_list(found, from_process=0)
        return found[0]

    def _teacher(self, name: str) -> tuple[str, str]:
        mark, policy, best = self._marks().get(name), self.trainer.policy, self.trainer.own_best
        start = self.trainer.curriculum.evaluations[0].mean_score(name)
        if mark is None or mark["score"] < start:
            lacks = "no checkpoint was as good as its start, whose weights are known to the script alone"
            return (START, "") if best.knows_start(policy) else ("", lacks)
        checkpoint = self.checkpoints / mark["checkpoint"]
        try:
            best.weights(policy, checkpoint.name)
        except ValueError as error:
            return "", str(error)
        return checkpoint.name, damage(checkpoint)
