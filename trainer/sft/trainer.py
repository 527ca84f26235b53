"""Fine-tuning on experts' answers: TRL's SFTTrainer with the evaluations, checkpoints and folder of any run of ours.

A `DomainGRPOTrainer` holds the weights, samples from them and evaluates; it is never trained. TRL's SFTTrainer trains the
same weights, and `Run` calls both. Left out on purpose: packing, a mixture other than that of the rows, a loss of our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from polyphony.curricula.records import Completion
from polyphony.trainer.checkpoints import load_ledgers, name_cpu, saved_whole
from polyphony.trainer.finite import faults_of, norm_of_step
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.run.callbacks import Run
from polyphony.trainer.run.outset import Outset
from polyphony.trainer.sft.passes import Filled, filling, plan_passes
from polyphony.trainer.sft.rows import WithDomains, dataset_of
from polyphony.trainer.slots import DrawPlan
from polyphony.trainer.weight_names import load_converted

ITS_OWN = ("loss_type", "max_steps", "remove_unused_columns", "shuffle_dataset")
"""Fields of SFTConfig that are not as those of GRPOConfig of the same name."""


class DomainSFTTrainer(SFTTrainer):
    """Fine-tune one policy on answers of several domains, evaluated as by GRPO.

    `sampler` was made of the same rows and settings, with `algorithm: sft`; `outset` says where the run is kept, None for
    none. The loss is the mean over all answers' tokens of a step, prompts left out; rows are shuffled anew each pass.

    Example: `launch.build_sft.build_sft(load_recipe("sft.yaml"), Path("runs/sft")).train()`
    """

    args: SFTConfig
    model: Any

    def __init__(
        self, sampler: DomainGRPOTrainer, answers: Sequence[Completion], *, args: GRPOConfig, outset: Outset | None
    ) -> None:
        self.sampler, self.data, self.plan = sampler, sampler.data, plan_passes(args, len(answers))
        self.curriculum, self.probes, self.draws = sampler.curriculum, sampler.probes, sampler.draws
        self.scorer, self.policy, self.evaluator = sampler.scorer, sampler.policy, sampler.evaluator
        self.entropy, self.shortcuts = sampler.entropy, sampler.shortcuts
        self.lesson, self.own_best = sampler.lesson, sampler.own_best
        self.finite = sampler.finite
        self.pending_metrics: dict[str, float] = {}
        self._batch: Any = None
        self._checkpoint: str | None = None
        name = sampler.model.name_or_path
        padding: Any = sampler.processing_class.pad_token_id
        self._n_answers, self._n_filling = len(answers), filling(args, len(answers))
        super().__init__(
            model=sampler.model,
            args=sft_config(outset.arguments(args) if outset else args, self.plan),
            train_dataset=dataset_of(answers, self.curriculum.names, filling=self._n_filling),
            data_collator=WithDomains(DataCollatorForLanguageModeling(pad_token_id=padding)),
            processing_class=sampler.processing_class,
        )
        self.add_callback(SameState(sampler))
        self.run = Run(self, outset, model=name).attach() if outset else None

    # --- one step -------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count the rows of each domain, on all ranks; check that the loss is finite."""
        self._batch, names = dict(inputs), self.curriculum.names
        rows = torch.bincount(inputs.pop("domain"), minlength=len(names) + 1)[:-1].to(self.accelerator.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.finite.see_loss(loss)
        counts: list[int] = self.accelerator.reduce(rows, reduction="sum").tolist()  # type: ignore[union-attr]
        self.curriculum.count(dict(zip(names, counts, strict=True)))
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Put what fills up the last batch of all ranks behind the answers; one process has no such rows."""
        if not self._n_filling:
            return super()._get_train_sampler(train_dataset)
        return Filled(self._n_answers, self._n_filling, seed=self.args.seed)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Leave out a step that is not finite. Relies on Transformers asking for the norm just before the step."""
        return norm_of_step(self, super()._get_grad_norm(model, grad_norm=grad_norm), self._batch)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Take no step where all were taken, or a guardrail stopped the run before: Transformers looks only after one."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    # --- the run, logs and checkpoints ----------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **given: Any) -> Any:
        """Train as TRL does; with a run, go on from its newest checkpoint if asked to, and leave its folder complete.

        A signal that ends a run raises Interrupted, a SystemExit, once its checkpoint is saved.
        """
        if self.run is None:
            return super().train(resume_from_checkpoint, **given)
        return self.run.led(super().train, resume_from_checkpoint, **given)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics beside TRL's, so that one step is one line."""
        if "train_runtime" not in logs:
            logs.update(self.entropy.metrics())
        logs.update(faults_of(self))
        logs.update(self.pending_metrics)
        self.pending_metrics = {}
        super().log(logs, start_time)

    @contextmanager
    def chance_as_saved(self) -> Iterator[None]:
        """Go on from the random numbers of the checkpoint meanwhile; Transformers restores them before the first step."""
        if self._checkpoint is not None:
            self._load_rng_state(self._checkpoint)
        yield

    def state_dict(self) -> dict[str, Any]:
        """Return what of the training TRL does not save; JSON-able."""
        return {"tokens": self._total_train_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self._total_train_tokens = state["tokens"]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the ledgers beside the weights, last: their file marks the checkpoint as whole."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with saved_whole(self, folder, **self._remembering):
            super()._save_checkpoint(model, trial)

    @property
    def _remembering(self) -> dict[str, Any]:
        states: dict[str, Any] = {"entropy": self.entropy, "shortcuts": self.shortcuts, "sft": self}
        return states | {"owed": self.run.owed, "signals": self.run.signals} if self.run else states

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load all weights. Relies on Transformers loading, of what is on disk, what is called so in memory alone."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_converted(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the ledgers with the optimizer. Relies on Transformers calling it on resume."""
        name_cpu(self.args)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_ledgers(Path(checkpoint), self.curriculum, **self._remembering)
            self._checkpoint = checkpoint


class SameState(TrainerCallback):
    """Have the sampler know of which step the weights are: by it, it sends them to its engine anew."""

    def __init__(self, sampler: DomainGRPOTrainer) -> None:
        self.sampler = sampler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.state = state


def sft_config(args: GRPOConfig, plan: DrawPlan) -> SFTConfig:
    """Return TRL's arguments of fine-tuning, with the fields that both trainers have; sequences are as long as they are."""
    both = {f.name for f in fields(args) if f.init} - {*ITS_OWN}
    shared = {f.name: getattr(args, f.name) for f in fields(SFTConfig) if f.name in both}
    prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    config = SFTConfig(**shared, **prepared, max_steps=plan.steps)
    if config.n_gpu != args.n_gpu:  # asked for first, as Transformers counts GPUs by then
        config._n_gpu = args.n_gpu  # one of several, else TRL refuses the policy in DataParallel
    return config
