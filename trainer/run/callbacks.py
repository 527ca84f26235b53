"""A run and its folder: evaluations, ledgers, guardrails, trackers, retention of checkpoints, and how it ended.

The same whether a recipe or a script trains. A recipe adds what only it knows: progress and our W&B tables.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.files import replace_file
from polyphony.curricula.monitors import Alarm
from polyphony.curricula.monitors.guardrails import Verdict, check, exceeded
from polyphony.curricula.prompts.pool_file import own_pool, save_pools
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.checkpoints import (
    best_checkpoint,
    best_to_go_back_to,
    checkpoint_step,
    forget_damaged_best,
    keep_newest,
    mark_best,
    newest_whole,
    read_mark,
    remove_unfinished,
    roll_back,
    save_final,
    whole_checkpoints,
)
from polyphony.trainer.domains import DomainData
from polyphony.trainer.draws import Draws
from polyphony.trainer.engine.weight_check import WeightCheck
from polyphony.trainer.entropy import DomainEntropy
from polyphony.trainer.evaluation.base_kl import BaseReference
from polyphony.trainer.evaluation.evaluator import Evaluator
from polyphony.trainer.metrics import defined
from polyphony.trainer.policy import Policy
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import Interrupted, RunFolder, from_now_on, read_object, write_object
from polyphony.trainer.run.progress import ProgressLine
from polyphony.trainer.run.provenance import provenance, refuse_other_data, settings_of_script, versions_since
from polyphony.trainer.run.recorder import Recorder
from polyphony.trainer.run.stopping import StopOnSignal, largest
from polyphony.trainer.run.tracking import WandbTracker, track_completions, track_decisions, track_transfer
from polyphony.trainer.scoring import Scorer
from polyphony.trainer.settings import CheckpointSettings, EvaluationSettings, TrainerSettings
from polyphony.trainer.shortcuts import ShortcutWatch
from polyphony.trainer.slots import DrawPlan

logger = logging.getLogger(__name__)


class Trained(Protocol):
    """What a run needs of its trainer, `DomainGRPOTrainer`, which nothing imports back."""

    args: GRPOConfig
    state: Any
    accelerator: Any
    callback_handler: Any
    data: DomainData
    plan: DrawPlan
    curriculum: Curriculum
    probes: TransferMatrix | None
    draws: Draws
    scorer: Scorer
    policy: Policy
    evaluator: Evaluator
    entropy: DomainEntropy
    shortcuts: ShortcutWatch
    pending_metrics: dict[str, float]

    def add_callback(self, callback: Any) -> None:
        """Have Transformers call it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Cadence:
    """How often a run evaluates and saves, and what it keeps.

    Example: `Cadence.of(GRPOConfig(eval_steps=20, save_total_limit=3), plan, settings).save_every` is 20.
    """

    evaluate_every: int
    """Optimizer steps; there is always an evaluation before the first step and one after the last."""
    save_every: int
    keep: int
    """Newest checkpoints; the best by worst domain is kept as well."""

    @classmethod
    def of(cls, args: GRPOConfig, plan: DrawPlan, settings: TrainerSettings) -> Cadence:
        """Read TRL's arguments, and our settings for what these do not say. Raises ValueError for what a run cannot keep to.

        `eval_steps` or `evaluation.every`, `save_steps` or `checkpoint.every`, `save_total_limit` or `checkpoint.keep`;
        TRL's default of `save_steps`, 500, counts as not given.
        """
        for name in ("eval_strategy", "save_strategy"):
            if (value := getattr(getattr(args, name), "value", getattr(args, name))) not in ("no", "steps"):
                raise ValueError(f"{name}={value!r} with run=: expected 'steps' or 'no'")
        evaluation, checkpoint = settings.evaluation, settings.checkpoint
        saves = None if args.save_steps == GRPOConfig.save_steps else args.save_steps
        name, value = _once(
            "eval_steps", args.eval_steps, "evaluation.every", evaluation.every, EvaluationSettings().every
        )
        every = _steps(name, value, plan)
        plan.check_boundary(name, every)
        name, value = _once("save_steps", saves, "checkpoint.every", checkpoint.every, None)
        save_every = every if value is None or args.save_strategy == "no" else _steps(name, value, plan)
        if save_every <= plan.steps:
            plan.check_boundary(name, save_every)
        _, keep = _once(
            "save_total_limit", args.save_total_limit, "checkpoint.keep", checkpoint.keep, CheckpointSettings().keep
        )
        if keep < 1:
            raise ValueError(f"save_total_limit={keep} with run=: expected at least 1")
        return cls(evaluate_every=every, save_every=save_every, keep=keep)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outset:
    """What is settled of a run before weights are loaded."""

    folder: RunFolder
    cadence: Cadence
    settings: TrainerSettings
    said: Mapping[str, Any] | None
    """What a script made the run with, for `RunFolder.settings`; None where the folder holds the recipe."""
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """By key path, what the run in the folder was made with and what is given now."""

    @classmethod
    def of(
        cls,
        run: str | Path | RunFolder | None,
        settings: TrainerSettings,
        *,
        args: GRPOConfig,
        plan: DrawPlan,
        data: DomainData,
        **made: Any,
    ) -> Outset | None:
        """Return it for a folder, as a `RunFolder` one that a recipe has claimed; `made` as for `settings_of_script`.

        Raises ValueError for a folder that is of another run, and for a cadence that cannot be kept.
        """
        if run is None:
            if settings.guardrails:
                raise ValueError("guardrails act at a run's evaluations: give run=, a folder for it")
            return None
        folder, cadence = as_folder(run), Cadence.of(args, plan, settings)
        said, changed = None, {}
        if not isinstance(run, RunFolder):
            made["domains"] = data.domains
            said = {"name": folder.path.name} | settings_of_script(settings, args=args, cadence=asdict(cadence), **made)
            changed = folder.refuse_other(said)
        if folder.holds_run and folder.provenance.is_file():
            refuse_other_data(read_object(folder.provenance), data.tables, model=made["model"])
        return cls(folder=folder, cadence=cadence, settings=settings, said=said, changed=changed)

    def arguments(self, args: GRPOConfig) -> GRPOConfig:
        """Return a copy of `args` for a run that evaluates and keeps checkpoints itself, in its folder."""
        args = copy.copy(args)
        args.output_dir, args.save_steps = str(self.folder.checkpoints), self.cadence.save_every
        args.eval_strategy, args.eval_on_start, args.save_total_limit = "no", False, None
        return args


def _once(name: str, value: Any, ours: str, our_value: Any, default: Any) -> tuple[str, Any]:
    """Return what was given of TRL's argument and our setting for one thing, and its name; both only where they agree."""
    if value is None:
        return ours, our_value
    if our_value not in (default, value):
        raise ValueError(f"{name}={value} and {ours}={our_value}: say one of them")
    return name, value


def _steps(name: str, every: float, plan: DrawPlan) -> int:
    """Return steps for a number of them or, below 1, a share of all, as Transformers has it."""
    if not every > 0 or (every >= 1 and every != int(every)):
        raise ValueError(
            f"{name}={every} with run=: expected a whole number of steps, or a share of all between 0 and 1"
        )
    return math.ceil(plan.steps * every) if every < 1 else int(every)


def as_folder(run: str | Path | RunFolder) -> RunFolder:
    """Return the folder of a run. Raises ValueError for what can be none."""
    if isinstance(run, RunFolder):
        return run
    if not isinstance(run, str | Path) or not str(run).strip():
        raise ValueError(f"run={run!r}: expected a folder")
    path = Path(run)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"run={str(run)!r}: {there} is a file, expected a folder")
    return RunFolder(path)


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
            is_main=self.is_main,
        )
        # what only a recipe knows
        self.say: Callable[[str], None] = say
        self.imports_from: Sequence[str] = ()
        """Folders where modules of the user's were found."""
        self.recipe = ""
        """Its text, to be written where it changed."""
        self.tracker: WandbTracker | None = None
        self.progress: ProgressLine | None = None
        self._is_aside = False
        self._stopped_by = ""
        self._evaluated_at: int | None = None
        self._rolled_back_at: int | None = None

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
        newest = self._agreed_newest()
        step = -1 if newest is None else checkpoint_step(newest)
        if self.is_main:
            self._tidy(newest, step)
        self.trainer.accelerator.wait_for_everyone()
        self._record_origin(max(step, 0), is_going_on=newest is not None)
        if newest is not None:
            self.recorder.restore(step, say=self.say)
        elif self.trainer.probes is not None:
            self.recorder.adopt(self.trainer.probes)
        return None if newest is None else str(newest)

    def _agreed_newest(self) -> Path | None:
        """Return the newest whole checkpoint on every rank, as rank 0 has found it. Raises its ValueError on all."""
        found: list[tuple[Path | None, str]] = [(None, "")]
        if self.is_main:
            try:
                found = [(newest_whole(self.folder.checkpoints, say=self.say), "")]
            except ValueError as error:
                found = [(None, str(error))]
        broadcast_object_list(found, from_process=0)
        newest, why = found[0]
        if why:
            raise ValueError(why)
        return newest

    def _tidy(self, newest: Path | None, step: int) -> None:
        """Bring the folder to where it was at a checkpoint; say what is missing and what is taken away."""
        folder, tables = self.folder, self.trainer.data.train
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        folder.end.unlink(missing_ok=True)
        for path in remove_unfinished(folder.checkpoints):
            self.say(f"{path.name} was not saved to its end: removed")
        if newest is not None:
            self._say_lost(newest)
        attempt = folder.cut(step, say=self.say)
        if newest is None and attempt is not None:
            self.say(
                f"{folder.checkpoints} has no whole checkpoint: the run starts anew; {attempt.name} keeps its lines"
            )
        forget_damaged_best(folder.checkpoints, say=self.say)
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
        origin = provenance(model=self.model, tables=self.trainer.data.tables, rewards=self.trainer.scorer.rewards)
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
            interrupted = Interrupted(*self.stopper.stopped)
            if self.said is not None and self.is_main:
                self.say(f"{interrupted}; go on with train(resume_from_checkpoint=True)")
            raise interrupted
        save_final(self.trainer.policy, self.folder.final)
        if not self.is_main:
            return
        step, most = self.trainer.state.global_step, self.trainer.state.max_steps
        if step >= most:
            self.folder.record_end("finished", why="all steps were taken", step=step)
        else:
            self.folder.record_end("stopped", why=self._stopped_by or "a callback asked for it", step=step)

    # --- what Transformers calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the baseline, unless the run is resumed and has one."""
        evaluator = self.trainer.evaluator
        if state.global_step == 0:
            # every tracker of the user's hears of it too
            self.trainer.callback_handler.on_log(args, state, control, self._evaluate(0))
            base = evaluator.remember_base()
            if self.is_main:
                replace_file(self.folder.base, base.to_json())
        else:
            self._remember_base()
            self._evaluated_at = max((row.step for row in self.trainer.curriculum.evaluations), default=None)
            if self.is_main and not self.trainer.curriculum.rolled_back:
                self._best(
                    self.folder.checkpoints, state.global_step
                )  # a kill may have come between checkpoint and mark

    def _remember_base(self) -> None:
        path, why = self.folder.base, "is missing"
        try:
            self.trainer.evaluator.base = BaseReference.from_json(path.read_text())
        except (ValueError, TypeError, OSError) as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            if self.is_main and self.trainer.evaluator.settings.kl_items:
                self.say(f"{path} {why}: the distance to the base model is not measured from here on")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        drawn = sum(self.trainer.curriculum.drawn.values())
        state.epoch = drawn / self.trainer.data.n_train
        if state.global_step % self.cadence.evaluate_every == 0 or state.global_step == state.max_steps:
            self._look(state, control)
        if self._stage_ends(state.global_step):
            self._look(state, control)
        for pending in (self.trainer.entropy.pending, self.trainer.shortcuts.pending):
            for alarm in pending:
                self.trainer.curriculum.note(f"{alarm.domain}: {alarm.message}")  # every rank's own copy
                self._ring(alarm)
            pending.clear()
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if self._is_aside:
            return
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        self._write(state.global_step, numbers)
        if self.progress is not None and state.global_step:
            self.progress.update(state.global_step, numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the newest checkpoints and the one whose worst domain is best."""
        if state.is_world_process_zero:
            best = self._best(self.folder.checkpoints, state.global_step)
            keep_newest(self.folder.checkpoints, self.cadence.keep, also=best)
            self.recorder.save()
            if self.trainer.curriculum.pools:
                save_pools(self.folder.pool, self.trainer.curriculum.pool_columns())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.record_end()
        self.recorder.save()
        if self.progress is not None:
            self.progress.close()
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
        evaluations = self.trainer.curriculum.evaluations
        for verdict in check(self.guardrails, evaluations, watch_only=self._watched):
            self._act(verdict, control)

    def _evaluate(self, step: int) -> dict[str, float]:
        self._evaluated_at = step
        result = self.trainer.evaluator.run()
        result.check_failures(most=self.trainer.draws.failures.most)
        self.trainer.entropy.after_evaluation(step, self.recorder.steer_entropy(result))
        if self.tracker is not None:
            track_completions(self.tracker, step, result)
        logged = self.trainer.evaluator.flush_logged()
        return {**self.recorder.record_heldout(step, result), **logged}

    def _stage_ends(self, step: int) -> bool:
        """Whether a stage ends here unmeasured: backward transfer counts from a stage's end. Collective over ranks."""
        curriculum = self.trainer.curriculum
        if curriculum.decision is None or curriculum.decision.stage is None or self._evaluated_at == step:
            return False
        return self.trainer.plan.is_boundary(step) and bool(largest(int(curriculum.stage_ends)))

    @property
    def _watched(self) -> list[str]:
        return [d.name for d in self.trainer.data.domains if d.is_watch_only]

    def _act(self, verdict: Verdict, control: Any) -> None:
        """Warn, stop, or go back to the best checkpoint; in every case say so among the alarms."""
        action, domain = verdict.guardrail.action, verdict.guardrail.domain
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
        """Write an alarm down, and tell whoever watches."""
        if not self.is_main:
            return
        logger.warning("step %d: %s of %s: %s", alarm.step, alarm.kind, alarm.domain, alarm.message)
        self.folder.append("alarms", alarm.as_line())
        if self.tracker is not None:
            self.tracker.alert(f"{alarm.kind} of {alarm.domain}", alarm.message)

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
        if self._evaluated_at == step != self._rolled_back_at and not exceeded(
            going_back, evaluations, watch_only=self._watched
        ):
            mark_best(folder, whole_checkpoints(folder)[-1], self.recorder.worst_steer_score)
        return best_checkpoint(folder)
