"""Checkpoints that are whole or do not count, kept in number, and found again on resume.

`save_final` makes the policy an ordinary Hugging Face folder: whole, its adapter merged and also beside it, however it is
spread over the ranks.
"""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from trl.trainer.grpo_trainer import GRPOTrainer

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.prompts.pool_file import load_pools, move_aside, save_pools
from polyphony.trainer.checkpoint_mark import begin_mark, damage, discard, is_unfinished, read_mark, write_mark
from polyphony.trainer.engine.engine import reshard
from polyphony.trainer.engine.merge import adapter_parameters, merged_parameters
from polyphony.trainer.policy import Policy
from polyphony.trainer.run.folder import BEST_FILE, POOL_FILE, STATE_FILE
from polyphony.trainer.run.json_lines import read_object, write_object


def save_ledgers(
    checkpoint: Path, curriculum: Curriculum, *, sizes: Mapping[str, int] | None = None, **others: Any
) -> None:
    """Write everything that a run remembers beside its weights, and so mark the checkpoint as whole.

    `others` have state of their own, by name; `sizes` are those of the run's ledgers. Of its evaluations all but the scores,
    which grow with the run and are in its ledger.
    """
    if curriculum.pools:
        save_pools(checkpoint / POOL_FILE, curriculum.pool_columns())
    states = {name: ledger.state_dict() for name, ledger in others.items()}
    own = curriculum.state_dict()
    rows = [{key: value for key, value in row.items() if key != "scores"} for row in own["evaluations"]]
    write_mark(checkpoint, ledgers=dict(sizes or {}), curriculum={**own, **states, "evaluations": rows})


def load_ledgers(checkpoint: Path, curriculum: Curriculum, **others: Any) -> None:
    """Restore what `save_ledgers` wrote; the curriculum has been given the run's evaluations with their scores.

    Raises ValueError where these are not as many as the checkpoint had seen.
    """
    state = load_state(checkpoint)
    rows, given = state["evaluations"], curriculum.evaluations
    if not all("scores" in row for row in rows):  # older versions kept them here
        if len(given) != len(rows):
            raise ValueError(
                f"checkpoint {checkpoint} had seen {len(rows)} evaluations, the ledger has {len(given)}: "
                "lines of it are lost"
            )
        rows = [row | {"scores": past.scores} for row, past in zip(rows, given, strict=True)]
    curriculum.load_state_dict(state | {"evaluations": rows})
    if curriculum.pools:
        curriculum.adopt_pools(load_pools(checkpoint / POOL_FILE))
    for name, ledger in others.items():
        if name in state:  # older versions had fewer
            ledger.load_state_dict(state[name])


@contextmanager
def whole_or_none(checkpoint: Path) -> Iterator[None]:
    """Take away what was written of a checkpoint that cannot be finished (a full disk), so that older ones stand.

    Raises RuntimeError that names the last complete checkpoint.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(checkpoint, ignore_errors=True)
        last = (whole_checkpoints(checkpoint.parent) or [None])[-1]
        raise RuntimeError(
            f"{checkpoint.name} could not be saved ({error}); the last complete checkpoint is "
            f"{last.name if last else 'none'}; make room, then go on with --resume"
        ) from error


@contextmanager
def saved_whole(trainer: Any, checkpoint: Path, **others: Any) -> Iterator[None]:
    """Save a trainer's ledgers beside the weights that are saved meanwhile, last: their file marks the checkpoint as whole,
    on every rank. `others` as for `save_ledgers`."""
    with whole_or_none(checkpoint):
        if trainer.args.should_save:
            begin_mark(checkpoint)
        trainer.accelerator.wait_for_everyone()  # before any rank's file
        yield
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            sizes = trainer.run.folder.sizes() if trainer.run else {}
            save_ledgers(checkpoint, trainer.curriculum, sizes=sizes, **others)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return the ledgers of a checkpoint. Raises ValueError for one that is not whole."""
    return read_mark(checkpoint)["curriculum"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a resume finds among the checkpoints; nothing is changed before `settle`."""

    newest: Path | None
    """The newest that is as it was saved and fits, None where there is none at all."""
    unfit: Mapping[Path, str]
    """Newer ones, and why not: they are moved aside."""
    unfinished: Sequence[Path]
    """Cut off while being saved, so never whole: only these are deleted."""

    @classmethod
    def of(cls, folder: Path, *, misfit: Callable[[Path], str] = lambda _: "") -> Found:
        """Look, the newest first; `misfit` says why a whole one does not fit. Raises ValueError where none does."""
        unfinished = [path for path in _named(folder) if is_unfinished(path)]
        candidates = sorted(set(_named(folder)) - set(unfinished), key=checkpoint_step, reverse=True)
        unfit: dict[Path, str] = {}
        for path in candidates:
            if not (why := damage(path) or misfit(path)):
                return cls(path, unfit, unfinished)
            unfit[path] = why.removeprefix(f"{path}/")
        if unfit:
            told = "; ".join(f"{path.name}: {why}" for path, why in unfit.items())
            raise ValueError(f"{folder}: no checkpoint is whole ({told}); start anew, or give back what is missing")
        return cls(None, unfit, unfinished)

    def settle(self, *, say: Callable[[str], None]) -> None:
        """Move aside what is not fit to go on from, delete what was never whole, and say so."""
        for path, why in self.unfit.items():
            say(f"{path.name}: {why}; moved to {move_aside(path).name}, the run goes on from an older checkpoint")
        for path in self.unfinished:
            discard(path)
            say(f"{path.name} was cut off while being saved, and never whole: removed")


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first; folders of another name are the user's own."""
    return sorted((path for path in _named(folder) if (path / STATE_FILE).is_file()), key=checkpoint_step)


def _named(folder: Path) -> list[Path]:
    return [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]


def checkpoint_step(path: Path) -> int:
    """Return the optimizer step in a checkpoint's name."""
    return int(path.name.rsplit("-", 1)[1])


class Chance:
    """The random numbers of this process, as they are now."""

    def __init__(self) -> None:
        self._random, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        random.setstate(self._random)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class BeforeDraw:
    """What a draw changes beside the weights, as it is now: for a checkpoint, should the draw come to nothing."""

    def __init__(self, curriculum: Curriculum) -> None:
        self._ledgers = json.dumps(curriculum.state_dict())
        self._pools = copy.deepcopy(curriculum.pool_columns())
        self._chance = Chance()

    def restore(self, curriculum: Curriculum) -> None:
        curriculum.load_state_dict(json.loads(self._ledgers))
        curriculum.adopt_pools(self._pools)
        self._chance.restore()


def mark_best(folder: Path, checkpoint: Path, score: float) -> None:
    """Note `checkpoint` as the best of the run if its worst trained domain beats every one before."""
    mark = folder / BEST_FILE
    if not mark.exists() or score > _read_best(mark)[1]:
        write_object(mark, {"checkpoint": checkpoint.name, "worst_domain_score": score})


def forget_damaged_best(folder: Path, *, say: Callable[[str], None]) -> None:
    """Move the note of the best checkpoint aside where it cannot be read, or what it names is gone, and say so."""
    mark = folder / BEST_FILE
    try:
        if mark.exists() and not (folder / (name := _read_best(mark)[0]) / STATE_FILE).is_file():
            raise ValueError(f"{mark}: {name} is gone")
    except ValueError as error:
        say(f"{error}; moved to {move_aside(mark).name}: the best is sought anew from here on")


def _read_best(mark: Path) -> tuple[str, float]:
    """Return the name of the best checkpoint and its score. Raises ValueError that names the file."""
    noted = read_object(mark)
    name, score = noted.get("checkpoint"), noted.get("worst_domain_score")
    if not isinstance(name, str) or not isinstance(score, int | float):
        raise ValueError(f"{mark}: expected checkpoint and worst_domain_score, got {noted}")
    return name, score


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint noted as best; None before one was evaluated."""
    mark = folder / BEST_FILE
    if not mark.exists():
        return None
    best = folder / _read_best(mark)[0]
    return best if (best / STATE_FILE).is_file() else None


def best_to_go_back_to(folder: Path) -> tuple[Path | None, str]:
    """Return the best checkpoint where it is as it was saved; else None, and why not."""
    try:
        best = best_checkpoint(folder)
    except ValueError as error:
        return None, str(error)
    if best is None:
        return None, "no checkpoint to go back to"
    why = damage(best).removeprefix(f"{best}/")
    return (None, f"{best.name}, the best checkpoint: {why}") if why else (best, "")


def keep_newest(folder: Path, keep: int, also: Collection[Path] = ()) -> None:
    """Delete all but the `keep` newest complete checkpoints, and `also` (the best ones)."""
    for path in whole_checkpoints(folder)[:-keep]:
        if path not in also:
            discard(path)


def name_cpu(args: Any) -> None:
    """Call a rank's CPU `cpu`, not `cpu:0`, a location that torch.load does not know."""
    if args.device.type == "cpu":
        args.__dict__["_setup_devices"] = torch.device("cpu")


def roll_back(trainer: Any, checkpoint: Path) -> None:
    """Go back to the weights and optimizer of a checkpoint; steps, learning rate and ledgers go on. Collective over ranks.

    What was spent stays spent and what was learned about the domains stays known. DeepSpeed and FSDP, which hold weights
    and optimizer themselves, load with their own loaders, as on resume.
    """
    name_cpu(trainer.args)
    lr_state, rates = trainer.lr_scheduler.state_dict(), [group["lr"] for group in trainer.optimizer.param_groups]
    if trainer.is_deepspeed_enabled:
        whole = not isinstance(trainer.model, PeftModel)  # else only the adapter was saved
        deepspeed_load_checkpoint(trainer.model_wrapped, str(checkpoint), load_module_strict=whole)
    else:
        trainer._load_from_checkpoint(str(checkpoint), trainer.model_wrapped if trainer.is_fsdp_enabled else None)
    GRPOTrainer._load_optimizer_and_scheduler(trainer, str(checkpoint))  # ours would load the ledgers too
    trainer.lr_scheduler.load_state_dict(lr_state)
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # the scheduler sets it only after the next step
    trainer._last_loaded_step, trainer._buffered_inputs = -1, None
    if trainer.policy.ahead is not None:
        trainer.policy.ahead.drop()


def save_final(policy: Policy, out: Path) -> None:
    """Save policy and tokenizer for `from_pretrained`; collective over ranks.

    Of a policy with an adapter the tensors that the engine is sent, and the adapter alone in `adapter/`: merged into the
    base read from disk, it gives the same bits.
    """
    trainer = policy.trainer
    model, is_main = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.is_main_process
    if isinstance(model, PeftModel):
        reshard(model)
        merged = merged_parameters(model, trainer.accelerator)  # which every rank walks
        whole = {name: parameter.to("cpu", copy=True) for name, parameter in merged if is_main}
        adapter = adapter_parameters(model, trainer.accelerator)
        if is_main:
            model.get_base_model().save_pretrained(out, state_dict=whole)  # type: ignore[operator]
            model.save_pretrained(
                str(out / "adapter"),
                state_dict=adapter,
                selected_adapters=model.active_adapters,
                save_embedding_layers=False,
            )
    else:
        trainer.save_model(str(out))
    if is_main:
        trainer.processing_class.save_pretrained(out)
