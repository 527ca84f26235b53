"""What happens around the steps of a run: evaluations, ledgers, trackers, progress, checkpoint retention."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from polyphony.curricula.monitors.guardrails import Guardrail, Verdict, check, exceeded
from polyphony.curricula.prompts.pool_file import POOL_FILE, save_pools
from polyphony.trainer.checkpoints import best_checkpoint, keep_newest, mark_best, whole_checkpoints
from polyphony.trainer.evaluation.base_kl import BaseReference
from polyphony.trainer.metrics import defined
from polyphony.trainer.run.progress import ProgressLine
from polyphony.trainer.run.recorder import Recorder
from polyphony.trainer.run.tracking import WandbTracker, track_completions, track_decisions, track_transfer

if TYPE_CHECKING:
    from polyphony.trainer.grpo import DomainGRPOTrainer


logger = logging.getLogger(__name__)


class CheckWeights(TrainerCallback):
    """Before the first step, see that the engine follows the policy's weights. Raises RuntimeError if it does not.

    Not earlier: DeepSpeed and FSDP shard the policy when training begins.
    """

    def __init__(self, trainer: DomainGRPOTrainer, *, say: Callable[[str], None]) -> None:
        self.trainer = trainer
        self.say = say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check = self.trainer.check_weight_sync()
        if check is None:
            return
        if not check.is_passed:
            raise RuntimeError(f"the rollout engine does not follow the policy's weights: {check}")
        if state.is_world_process_zero:
            self.say(f"weight sync: {check}")


class RunCallback(TrainerCallback):
    """Keep a run's folder while it trains.

    Evaluates before the first step, every `evaluate_every` steps and after the last; writes one line of metrics a log.
    """

    def __init__(
        self,
        trainer: DomainGRPOTrainer,
        recorder: Recorder,
        *,
        evaluate_every: int,
        keep_checkpoints: int,
        guardrails: Sequence[Guardrail] = (),
        tracker: WandbTracker | None,
        progress: ProgressLine | None,
    ) -> None:
        self.trainer = trainer
        self.recorder = recorder
        self.evaluate_every = evaluate_every
        self.keep_checkpoints = keep_checkpoints
        self.guardrails = guardrails
        self.tracker = tracker
        self.progress = progress
        self._evaluated_at: int | None = None
        self._rolled_back_at: int | None = None
        trainer.draws.refill_listeners.append(
            lambda n, groups, refs: recorder.record_refill(trainer.state.global_step + 1, n, groups, refs)
        )
        trainer.draws.listeners.append(lambda refs: recorder.record_draw(trainer.state.global_step + 1, refs))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the baseline, unless the run is resumed and has one."""
        if state.global_step == 0:
            self._write(0, self._evaluate(0))
            base = self.trainer.evaluator.remember_base()
            if self.trainer.accelerator.is_main_process:
                self.recorder.folder.write(self.recorder.folder.base.name, base.to_json())
        elif self.recorder.folder.base.is_file():
            self.trainer.evaluator.base = BaseReference.from_json(self.recorder.folder.base.read_text())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        drawn = sum(self.trainer.curriculum.drawn.values())
        state.epoch = drawn / self.trainer.data.n_train
        if state.global_step % self.evaluate_every == 0 or state.global_step == state.max_steps:
            self._look(args, state, control)
        if self._stage_ends(state.global_step):
            self._look(args, state, control)
        self._note_entropy_alarms()
        self._note_shortcut_alarms()
        return control

    def _look(self, args: Any, state: Any, control: Any) -> None:
        """Evaluate, and act on what was lost."""
        self.trainer.pending_metrics.update(self._evaluate(state.global_step))
        control.should_log = True
        for verdict in self._broken_guardrails():
            self._act(verdict, control, Path(args.output_dir))

    def _stage_ends(self, step: int) -> bool:
        """Whether a stage ends here unmeasured: backward transfer counts from a stage's end. Collective over ranks."""
        curriculum = self.trainer.curriculum
        if curriculum.decision is None or curriculum.decision.stage is None or self._evaluated_at == step:
            return False
        return self.trainer.plan.is_boundary(step) and bool(self.trainer.largest(int(curriculum.stage_ends)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        self._write(state.global_step, numbers)
        if self.progress is not None:
            self.progress.update(state.global_step, numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the newest checkpoints and the one whose worst domain is best."""
        if state.is_world_process_zero:
            best = self._best(Path(args.output_dir), state.global_step)
            keep_newest(Path(args.output_dir), self.keep_checkpoints, also=best)
            if self.trainer.curriculum.pools:
                save_pools(self.recorder.folder.path / POOL_FILE, self.trainer.curriculum.pool_columns())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.record_end()
        if self.progress is not None:
            self.progress.close()
        if self.tracker is not None:
            folder, matrix = self.recorder.folder, self.recorder.matrix
            track_decisions(self.tracker, state.global_step, folder.read("decisions"))
            if matrix is not None:
                track_transfer(self.tracker, state.global_step, matrix)
            self.tracker.finish()

    def _evaluate(self, step: int) -> dict[str, float]:
        self._evaluated_at = step
        result = self.trainer.evaluate_heldout()
        self.trainer.entropy.after_evaluation(step, result.item_entropy)
        if self.tracker is not None:
            track_completions(self.tracker, step, result)
        logged = self.trainer.evaluator.scorer.logged.flush("heldout", gather_object)
        return {**self.recorder.record_heldout(step, result), **logged}

    def _note_shortcut_alarms(self) -> None:
        for alarm in self.trainer.shortcuts.take_alarms():
            self.trainer.curriculum.note(f"{alarm.domain}: {alarm.message}")
            if self.trainer.accelerator.is_main_process:
                logger.warning("step %d: %s of %s: %s", alarm.step, alarm.kind, alarm.domain, alarm.message)
                self.recorder.folder.append("alarms", asdict(alarm))
                if self.tracker is not None:
                    self.tracker.alert(f"{alarm.kind} of {alarm.domain}", alarm.message)

    def _note_entropy_alarms(self) -> None:
        """Write down what the entropy monitor has found, on rank 0; the scheduler is told by every rank's own copy."""
        for alarm in self.trainer.entropy.take_alarms():
            self.trainer.curriculum.note(f"{alarm.domain}: {alarm}")
            if self.trainer.accelerator.is_main_process:
                logger.warning("step %d: %s of %s: %s", alarm.step, alarm.kind, alarm.domain, alarm)
                entry = {"step": alarm.step, "domain": alarm.domain, "kind": alarm.kind, "message": str(alarm)}
                self.recorder.folder.append("alarms", entry | {"drawn": dict(alarm.drawn)})
                if self.tracker is not None:
                    self.tracker.alert(f"{alarm.kind} of {alarm.domain}", str(alarm))

    def _broken_guardrails(self) -> list[Verdict]:
        return check(self.guardrails, self.trainer.curriculum.evaluations, watch_only=self._watched)

    def _lost_too_much(self) -> list[str]:
        going_back = [guardrail for guardrail in self.guardrails if guardrail.action == "rollback"]
        return exceeded(going_back, self.trainer.curriculum.evaluations, watch_only=self._watched)

    @property
    def _watched(self) -> list[str]:
        return [d.name for d in self.trainer.data.domains if d.is_watch_only]

    def _act(self, verdict: Verdict, control: Any, checkpoints: Path) -> None:
        """Warn, stop, or go back to the best checkpoint; in every case say so in `alarms.jsonl`."""
        action, domain = verdict.guardrail.action, verdict.guardrail.domain
        best = best_checkpoint(checkpoints) if action == "rollback" else None
        done = {"warn": "warned", "stop": "stopped the run"}.get(action, "stopped the run: no checkpoint to go back to")
        if best is not None:
            self.trainer.rollback(best, because=str(verdict), domain=domain)
            self._rolled_back_at = verdict.step
            done = f"rolled back to {best.name}"
        elif action != "warn":
            control.should_training_stop = True
        logger.warning("guardrail: %s: %s", verdict, done)
        if self.trainer.accelerator.is_main_process:
            entry = {"step": verdict.step, "domain": domain, "kind": "guardrail", "message": f"{verdict}: {done}"}
            self.recorder.folder.append("alarms", entry)
            if self.tracker is not None:
                self.tracker.alert(f"guardrail of {domain}", entry["message"])

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.trainer.accelerator.is_main_process:
            return
        shown = defined(metrics)
        self.recorder.folder.append("metrics", {"step": step, **shown})
        if self.tracker is not None:
            self.tracker.log(step, shown)

    def _best(self, folder: Path, step: int) -> Path | None:
        """Mark this checkpoint as the best so far, if it was evaluated, is, and kept to the guardrails; return the best.

        One that is saved at the step of a rollback holds other weights than were evaluated.
        """
        if self._evaluated_at == step != self._rolled_back_at and not self._lost_too_much():
            mark_best(folder, whole_checkpoints(folder)[-1], self.recorder.worst_steer_score)
        return best_checkpoint(folder)
