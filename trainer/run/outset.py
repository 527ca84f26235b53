"""What is settled of a run before weights are loaded: its folder, and how often it evaluates and saves."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from polyphony.trainer.domains import DomainData
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import read_object
from polyphony.trainer.run.origins import refuse_other_teachers
from polyphony.trainer.run.provenance import refuse_other_data, settings_of_script
from polyphony.trainer.settings import CheckpointSettings, EvaluationSettings, TrainerSettings
from polyphony.trainer.slots import DrawPlan


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

    def refuse_other_teachers(self, lesson: Any) -> None:
        """Raise ValueError for a teacher of a `Lesson` that is another than the run in the folder began with."""
        if self.folder.holds_run and self.folder.provenance.is_file():
            refuse_other_teachers(read_object(self.folder.provenance), lesson.origins)

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
