"""A run and its folder: evaluations, ledgers, guardrails, trackers, retention of checkpoints, and how it ended.

The same whether a recipe or a script trains. A recipe adds what only it knows: progress and our W&B tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from polyphony.curricula.files import replace_file
from polyphony.curricula.monitors import Alarm
from polyphony.curricula.monitors.guardrails import Verdict, check, exceeded
from polyphony.curricula.prompts.pool_file import own_pool, save_pools
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.checkpoint_mark import read_mark
from polyphony.trainer.checkpoints import (
    Chance,
    Found,
    best_checkpoint,
    best_to_go_back_to,
    checkpoint_step,
    forget_damaged_best,
    keep_newest,
    load_state,
    mark_best,
    roll_back,
    save_final,
    whole_checkpoints,
)
from polyphony.trainer.entropy import DomainEntropy
from polyphony.trainer.evaluation.base_kl import BaseReference
from polyphony.trainer.metrics import defined
from polyphony.trainer.run import say
from polyphony.trainer.run.alarm_command import AlarmCommand
from polyphony.trainer.run.changes import check_length, from_now_on
from polyphony.trainer.run.folder import Interrupted
from polyphony.trainer.run.json_lines import read_object, write_object
from polyphony.trainer.run.merged_scores import Scores, merged_beside_adapter
from polyphony.trainer.run.outset import Outset
from polyphony.trainer.run.owed import Owed
from polyphony.trainer.run.progress import ProgressLine
from polyphony.trainer.run.provenance import provenance, versions_since
from polyphony.trainer.run.recorder import Recorder
from polyphony.trainer.run.recovery import Rescue
from polyphony.trainer.run.signals import SIGNALS, Signals, warn
from polyphony.trainer.run.stopping import StopOnSignal, largest
from polyphony.trainer.run.tracking import WandbTracker, track_completions, track_decisions, track_transfer
from polyphony.trainer.run.trained import CheckWeights, Trained
from polyphony.trainer.shortcuts import ShortcutWatch


def _step_of(checkpoint: Path | None) -> int:
    """Return a checkpoint's step; -1, before the first line of any ledger, for none."""
    return -1 if checkpoint is None else checkpoint_step(checkpoint)


def _known_sizes(checkpoint: Path | None) -> Mapping[str, int] | None:
    """Return up to which byte a checkpoint that owes an evaluation knows the lines of its own step; None for any other."""
    mark = {} if checkpoint is None else read_mark(checkpoint)
    return mark["ledgers"] if mark.get("curriculum", {}).get("owed", {}).get("step") is not None else None


class Run(TrainerCallback):
    """Keep a run's folder while it trains: `begin`, then TRL's loop, then `finish`.

    Evaluates before the first step, every `evaluate_every` steps and after the last; writes one line of metrics a log.

    Example: `DomainGRPOTrainer(.., run="runs/mine").run.folder.read("metrics")`
    """

    def __init__(self, trainer: Trained, outset: Outset, *, model: str) -> None:
        self.trainer, self.model = trainer, model
        self.folder, self.cadence, self.said = outset.folder, outset.cadence, outset.said
        self.changed = outset.changed
        self.is_main: bool = trainer.accelerator.is_main_process
        self.guardrails = outset.settings.guardrails
        self.stopper = StopOnSignal(trainer.plan, grace_s=outset.settings.faults.grace_s)
        self.recorder = Recorder(
            folder=self.folder,
            domains=trainer.data.domains,
            curriculum=trainer.curriculum,
            seed=trainer.args.seed,
            skills=trainer.data.skills,
            entropy_band=trainer.entropy.monitor.factors,
            is_main=self.is_main,
        )
        self.signals = Signals.of(trainer.args, trainer.plan, trainer.data.domains)
        # what only a recipe knows
        self.say: Callable[[str], None] = say
        self.imports_from: Sequence[str] = ()
        """Folders where modules of the user's were found."""
        self.recipe = ""
        """Its text, to be written where it changed."""
        self.tracker: WandbTracker | None = None
        self.progress: ProgressLine | None = None
        self.alarm_command: AlarmCommand | None = None
        self.rescue = Rescue(trainer, self.guardrails, self.folder.checkpoints)
        self._is_aside = False
        self._stopped_by = ""
        self._evaluated_at: int | None = None
        self._measured: tuple[int, Scores] = (-1, {})
        """Step and scores of the last evaluation of this process."""
        self._rolled_back_at: int | None = None
        self.owed = Owed()
        """The evaluation that the newest checkpoint has still to be given."""
        self._is_saved = True
        """Whether a signal that ended the run left a checkpoint of its step."""
        self._gone: GraderGoneError | None = None

    def attach(self) -> Run:
        """Listen to the trainer: what it draws, and what Transformers calls; the engine's weights are checked first."""
        self.trainer.draws.recorder = self.recorder
        for callback in (CheckWeights(self.trainer.policy.check), self, self.stopper):
            self.trainer.add_callback(callback)
        return self

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Hear no log meanwhile: what a person asks between is none of the run's."""
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

    # --- before and after the loop ------------------------------------------------------------------------------------

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Have the folder to oneself, and leave none behind of a run that never began."""
        if not self.is_main or self.said is None:  # a recipe has seen to it
            yield
            return
        self.folder.path.mkdir(parents=True, exist_ok=True)
        own = self.folder.users_own
        with self.folder.locked(say=self.say):
            has_begun = self.folder.holds_run
            try:
                yield
            except BaseException:
                if not has_begun and not self.folder.holds_run:
                    self.folder.give_up(keep=own)
                raise

    def led(self, train: Callable[..., Any], resume: str | bool | None = None, **given: Any) -> Any:
        """Have Transformers' `train` train, from the newest checkpoint if asked to, and leave the folder complete."""
        with self.owned():
            checkpoint = self.begin(resume)
            try:
                output = train(checkpoint, **given)
            finally:
                self.stopper.rest()
            self.finish()
        return output

    def begin(self, resume: str | bool | None = None) -> str | None:
        """Make the folder ready; return the checkpoint to go on from, None for a start. Collective over ranks.

        `resume` goes on from the newest whole checkpoint, from the start if there is none; what was written after it is kept
        as an attempt. Raises ValueError for a folder that holds a run already, and for another checkpoint.
        """
        newest = (whole_checkpoints(self.folder.checkpoints) or [None])[-1]
        if not resume and self.folder.holds_run:
            raise ValueError(
                f"run folder {self.folder.path} holds a run; choose another, or go on with resume_from_checkpoint=True"
            )
        if isinstance(resume, (str, Path)) and (newest is None or Path(resume).resolve() != newest.resolve()):
            raise ValueError(f"resume_from_checkpoint={str(resume)!r}: a run goes on from its newest, {newest}")
        self.trainer.accelerator.wait_for_everyone()
        newest = self._tidied()
        self._record_origin(max(_step_of(newest), 0), is_going_on=newest is not None)
        if newest is not None:
            self.recorder.restore(_step_of(newest), say=self.say)
        elif self.trainer.probes is not None:
            self.recorder.adopt(self.trainer.probes)
        if self.tracker is not None:
            self.tracker.begin()
        return None if newest is None else str(newest)

    def _tidied(self) -> Path | None:
        """Bring the folder to where it was at its newest whole checkpoint; return that. Collective over ranks.

        Raises what rank 0 refuses on all of them, before anything is changed.
        """
        told: list[tuple[Path | None, str]] = [(None, "")]
        plan = None
        if self.is_main:
            try:
                found = Found.of(self.folder.checkpoints, misfit=self._lost)
                check_length(self.trainer.plan.steps, reached=_step_of(found.newest))
                known = _known_sizes(found.newest)
                plan = found, self.folder.tails(_step_of(found.newest), sizes=known, say=self.say)
                told = [(found.newest, "")]
            except ValueError as error:
                told = [(None, str(error))]
        broadcast_object_list(told, from_process=0)
        newest, why = told[0]
        if why:
            raise ValueError(why)
        if plan is not None:
            self._tidy(*plan)
        self.trainer.accelerator.wait_for_everyone()
        return newest

    def _lost(self, checkpoint: Path) -> str:
        return self.recorder.lost(load_state(checkpoint)["evaluations"], checkpoint_step(checkpoint))

    def _tidy(self, found: Found, tails: Mapping[str, tuple[bytes, bytes]]) -> None:
        """Say what is missing and what is taken away."""
        folder, tables = self.folder, self.trainer.data.train
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        found.settle(say=self.say)
        folder.end.unlink(missing_ok=True)
        if found.newest is not None:
            self._say_lost(found.newest)
        attempt = folder.put_aside(tails)
        if found.newest is None and attempt is not None:
            self.say(
                f"{folder.checkpoints} has no whole checkpoint: the run starts anew; {attempt.name} keeps its lines"
            )
        forget_damaged_best(folder.checkpoints, say=self.say)
        self.rescue.forget_gone()
        own_pool(folder.pool, {name: table.ids for name, table in tables.items()}, say=self.say)
        if self.said is not None:
            write_object(folder.settings, self.said)
        elif self.recipe and self.changed:
            folder.claim(self.recipe)

    def _say_lost(self, newest: Path) -> None:
        """Say what the checkpoint's ledgers have lost since, and which files will be written anew from them."""
        folder, sizes = self.folder, self.folder.sizes()
        for name, size in read_mark(newest).get("ledgers", {}).items():
            if sizes.get(name, 0) < size:
                self.say(f"{folder.ledger(name)} has lost lines: {newest.name} knew {size} bytes of it")
        if "transfer" in sizes:
            try:
                TransferMatrix.load(folder.transfer)
            except (ValueError, FileNotFoundError) as error:
                why = f"{folder.transfer} is missing" if isinstance(error, FileNotFoundError) else str(error)
                self.say(f"{why}: written anew from its ledger")
        if self.trainer.curriculum.pools and not folder.pool.exists():
            self.say(f"{folder.pool} is missing: written anew from {newest.name}")

    def _record_origin(self, step: int, *, is_going_on: bool) -> None:
        """Write where the numbers come from; say what is another version or another setting than before this step."""
        trainer = self.trainer
        teachers = trainer.lesson.origins if trainer.lesson and self.is_main else {}
        data, rewards = trainer.data.tables, trainer.scorer.rewards
        origin = provenance(model=self.model, tables=data, rewards=rewards, teachers=teachers)
        self.recorder.provenance = origin
        if not self.is_main:
            return
        path = self.folder.provenance
        known = read_object(path) if path.is_file() else {}
        told = [*from_now_on(self.changed, step=step), *versions_since(known, origin, step=step)] if known else []
        for line in told:
            self.say(f"--resume {self.folder.path}: {line}")
        if is_going_on and not known:
            self.say(f"{path} is missing: that rows and versions are those from before cannot be seen")
        since = [*known.get("since", []), *told]
        found = {"imports_from": list(self.imports_from)} if self.imports_from else {}
        found |= {"since": since} if since else {}
        write_object(path, {**origin, **found, "end": self.folder.end.name})

    def finish(self) -> None:
        """Save the policy and say that the run is over; collective. Raises Interrupted where a signal ended it."""
        if self.stopper.stopped is not None:
            interrupted = Interrupted(*self.stopper.stopped, is_saved=self._is_saved)
            if self.said is not None and self.is_main:
                self.say(f"{interrupted}; go on with train(resume_from_checkpoint=True)")
            raise interrupted
        if self._gone is not None:
            raise self.ended_by(self._gone)
        save_final(self.trainer.policy, self.folder.final)
        step, most = self.trainer.state.global_step, self.trainer.state.max_steps
        if self.is_main and step >= most:
            self.folder.record_end("finished", why="all steps were taken", step=step)
        elif self.is_main:
            self.folder.record_end("stopped", why=self._stopped_by or "a callback asked for it", step=step)
        measured_at, scores = self._measured
        is_of_final = measured_at == step != self._rolled_back_at
        if is_of_final and (said := merged_beside_adapter(self.trainer, scores)) and self.is_main:
            self.say(said)

    def ended_by(self, error: GraderGoneError) -> GraderGoneError:
        """Return the same with how the run is taken up again."""
        newest = (whole_checkpoints(self.folder.checkpoints) or [None])[-1]
        how = f"the run goes on with --resume, from {newest.name}," if newest else "nothing is trained yet: begin anew"
        return GraderGoneError(f"{error}; {how} once it grades again")

    # --- what Transformers calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the baseline, unless the run is resumed and has one."""
        self._gone = None
        try:
            if state.global_step == 0:
                if self.progress is not None:
                    n_items = sum(map(len, self.trainer.data.heldout.values()))
                    say(f"step 0: held-out scores of {n_items} items")
                # every tracker of the user's hears of it too
                self.trainer.callback_handler.on_log(args, state, control, self._evaluate(0))
                base = self.trainer.evaluator.remember_base()
                if self.is_main:
                    replace_file(self.folder.base, base.to_json())
                return
            self._remember_base()
            self._evaluated_at = max((row.step for row in self.trainer.curriculum.evaluations), default=None)
            is_extra = self.owed.step is not None and not self._saves(state)
            if self.owed.step is not None:
                self._make_up(args, state, control)
        except GraderGoneError as error:
            raise self.ended_by(error) from None
        if self.is_main and not self.trainer.curriculum.rolled_back and not is_extra:
            # a kill may have come between checkpoint and mark
            self._best(self.folder.checkpoints, state.global_step)

    def _saves(self, state: Any) -> bool:
        """Whether the run would have a checkpoint of this step in any case."""
        return state.global_step % self.cadence.save_every == 0 or state.global_step >= state.max_steps

    def _make_up(self, args: Any, state: Any, control: Any) -> None:
        """Evaluate what the checkpoint could not, and write the step's line as it would have been."""
        trainer = self.trainer
        with trainer.chance_as_saved():
            self._look(state, control)
        for name, watch in self._watches.items():
            watch.pending[:0] = self.owed.alarms.get(name, [])
        self._tell_alarms()
        metrics = self.owed.metrics | trainer.entropy.metrics() | trainer.pending_metrics
        trainer.pending_metrics, self.owed = {}, Owed()
        trainer.callback_handler.on_log(args, state, control, metrics)

    def _remember_base(self) -> None:
        path, why = self.folder.base, "is missing"
        try:
            self.trainer.evaluator.base = BaseReference.from_json(path.read_text())
        except (ValueError, TypeError, OSError) as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            if self.is_main and self.trainer.evaluator.settings.kl_items:
                self.say(f"{path} {why}: the distance to the base model is not measured from here on")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.curriculum.draws:  # else Transformers has counted rows of a file, and right
            state.epoch = sum(self.trainer.curriculum.exposure.values()) / self.trainer.data.n_train
        try:
            if state.global_step % self.cadence.evaluate_every == 0 or state.global_step == state.max_steps:
                self._look(state, control)
            if self._stage_ends(state.global_step) or self._recovery_ends(state.global_step):
                self._look(state, control)
        except GraderGoneError as error:
            self._owe(error, state.global_step)
            control.should_log = control.should_save = control.should_training_stop = True
            return control
        self._tell_alarms()
        return control

    @property
    def _watches(self) -> dict[str, DomainEntropy | ShortcutWatch]:
        """Who rings alarms while the run trains."""
        return {"entropy": self.trainer.entropy, "shortcuts": self.trainer.shortcuts}

    def _tell_alarms(self) -> None:
        for watch in self._watches.values():
            for alarm in watch.pending:
                self.trainer.curriculum.note(f"{alarm.domain}: {alarm.message}")  # every rank's own copy
                self._ring(alarm)
            watch.pending.clear()

    def _owe(self, error: GraderGoneError, step: int) -> None:
        """End the run with a checkpoint of this step that is owed its evaluation."""
        self._gone = error
        self.owed = Owed(step=step, alarms={name: list(watch.pending) for name, watch in self._watches.items()})
        for watch in self._watches.values():
            watch.pending.clear()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if self._is_aside:
            return
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        if self._gone is not None:  # the step's line; and the summary of a training that has not ended
            self.owed.metrics = self.owed.metrics or defined(numbers)
            return
        self._write(state.global_step, numbers)
        for alarm in self.signals.see(state.global_step, numbers):
            self._ring(alarm)
        if self.progress is not None:
            self.progress.update(state.global_step, numbers)

    def has_time_to_save(self, wait: Callable[[float | None], bool]) -> bool:
        """Return whether a checkpoint of this step may be saved: whether all draws land while `wait` waits, seconds or None.

        A run that a signal ends has half of its grace period for that; else it goes on from its newest checkpoint.
        """
        if not largest(int(not wait(self.stopper.left_s))):
            return True
        assert self.stopper.stopped is not None
        newest = (whole_checkpoints(self.folder.checkpoints) or [None])[-1]
        self.stopper.stopped = self.stopper.stopped[0], max(_step_of(newest), 0)
        self._is_saved = False
        return False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the newest checkpoints, the one whose worst domain is best, and those that recoveries distil from."""
        if not self._is_saved:
            return
        if state.is_world_process_zero:
            best = self._best(self.folder.checkpoints, state.global_step)
            also = self.rescue.kept | ({best} if best else set())
            keep_newest(self.folder.checkpoints, self.cadence.keep, also=also)
            self.recorder.save()
            if self.trainer.curriculum.pools:
                save_pools(self.folder.pool, self.trainer.curriculum.pool_columns())
        if self.tracker is not None:
            self.tracker.saved()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._gone is None:
            self.recorder.record_end()
        self.recorder.save()
        if self.progress is not None:
            self.progress.close()
        if self.alarm_command is not None and (failed := self.alarm_command.close()):
            self.say(failed)
        if self.tracker is not None:
            track_decisions(self.tracker, state.global_step, self.folder.decisions())
            if self.recorder.matrix is not None:
                track_transfer(self.tracker, state.global_step, self.recorder.matrix)
            self.tracker.finish()

    # --- evaluations and what follows from them -----------------------------------------------------------------------

    def _look(self, state: Any, control: Any) -> None:
        """Evaluate, and act on what was lost."""
        self.trainer.pending_metrics.update(self._evaluate(state.global_step))
        control.should_log = True
        for alarm in self.rescue.look(state.global_step):
            self._ring(alarm)
        self.trainer.pending_metrics.update(self.rescue.metrics())
        evaluations = self.trainer.curriculum.evaluations
        for verdict in check(self.guardrails, evaluations, watch_only=self._watched):
            self._act(verdict, control)

    def _evaluate(self, step: int) -> dict[str, float]:
        chance = Chance()
        try:
            result = self.trainer.evaluator.run()
            result.check_failures(most=self.trainer.draws.failures.most)
        except GraderGoneError:  # on every rank
            self.trainer.policy.rest()
            self.trainer.evaluator.flush_logged()
            chance.restore()
            raise
        self._evaluated_at, self._measured = step, (step, result.scores())
        self.trainer.entropy.after_evaluation(step, self.recorder.steer_entropy(result))
        if self.tracker is not None:
            track_completions(self.tracker, step, result)
        logged = self.trainer.evaluator.flush_logged()
        metrics = self.recorder.record_heldout(step, result)
        kl = result.on("steer").base_kl
        for alarm in self.signals.after_evaluation(self.trainer.curriculum.evaluations, kl):
            self._ring(alarm)
        return {**metrics, **logged}

    def _stage_ends(self, step: int) -> bool:
        """Whether a stage ends here unmeasured: backward transfer counts from a stage's end. Collective over ranks."""
        curriculum = self.trainer.curriculum
        if curriculum.begun is None or curriculum.begun.decision.stage is None or self._evaluated_at == step:
            return False
        return self.trainer.plan.is_boundary(step) and bool(largest(int(curriculum.stage_ends)))

    def _recovery_ends(self, step: int) -> bool:
        """Whether the draws of a recovery are spent unmeasured."""
        if self.trainer.curriculum.recoveries.open is None:
            return False
        return self.rescue.is_spent and self._evaluated_at != step and self.trainer.plan.is_boundary(step)

    @property
    def _watched(self) -> list[str]:
        return [d.name for d in self.trainer.data.domains if d.is_watch_only]

    def _act(self, verdict: Verdict, control: Any) -> None:
        """Warn, stop, go back to the best checkpoint, or recover; in every case say so among the alarms."""
        action, domain = verdict.guardrail.action, verdict.guardrail.domain
        if action == "recover":
            if done := self.rescue.begin(verdict):
                self._ring(verdict.alarm(done))
            return
        best, why = self._agreed_best() if action == "rollback" else (None, "")
        done = {"warn": "warned", "stop": "stopped the run"}.get(action, f"stopped the run: {why}")
        if best is not None:
            roll_back(self.trainer, best)
            self.trainer.curriculum.note(f"rolled back to {best.name}: {verdict}", domain=domain)
            self._rolled_back_at = verdict.step
            done = f"rolled back to {best.name}"
        elif action != "warn":
            control.should_training_stop = True
            self._stopped_by = str(verdict)
        self._ring(verdict.alarm(done))

    def _agreed_best(self) -> tuple[Path | None, str]:
        """Return the best checkpoint on every rank, as rank 0 has found it; None where there is none to go to, and why."""
        found: list[tuple[Path | None, str]]
        found = [best_to_go_back_to(self.folder.checkpoints) if self.is_main else (None, "")]
        broadcast_object_list(found, from_process=0)
        return found[0]

    def _ring(self, alarm: Alarm) -> None:
        """Write an alarm down with what may help, and tell whoever watches."""
        if not self.is_main:
            return
        warn(alarm)
        remedy = SIGNALS[alarm.kind].remedy
        line = alarm.as_line() | {"remedy": remedy}
        self.folder.append("alarms", line)
        if self.progress is not None:
            self.progress.ring(alarm.title)
        if self.alarm_command is not None:
            self.alarm_command.ring(line)
        if self.tracker is not None:
            self.tracker.alert(alarm.title, f"{alarm.message}. What may help: {remedy}")

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.is_main:
            return
        shown = defined(metrics)
        self.folder.append("metrics", {"step": step, **shown})
        if self.tracker is not None:
            self.tracker.log(step, shown)

    def _best(self, folder: Path, step: int) -> Path | None:
        """Mark this checkpoint as the best so far, if it was evaluated, is, and kept to the guardrails; return the best.

        One that is saved at the step of a rollback holds other weights than were evaluated.
        """
        going_back = [guardrail for guardrail in self.guardrails if guardrail.action == "rollback"]
        evaluations = self.trainer.curriculum.evaluations
        if self._evaluated_at == step != self._rolled_back_at:
            newest = whole_checkpoints(folder)[-1]
            self.rescue.mark(newest)
            if not exceeded(going_back, evaluations, watch_only=self._watched):
                mark_best(folder, newest, self.recorder.worst_steer_score)
        return best_checkpoint(folder)
