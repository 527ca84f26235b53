"""GRPO over many domains: one thin subclass of TRL's trainer.

The walk of one prompt: the sampler yields an empty slot; the curriculum fills it just before generation (`_roll_out`); the
engine samples its group, the domain's reward scores it; TRL computes log-probabilities, advantages and loss; entropy by
domain is read off TRL's no-grad pass over all rows; the curriculum observes. Left out on purpose: a loss, an optimizer loop
and a weight loader of our own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.prompts.pool_file import POOL_FILE, load_pools, save_pools
from polyphony.curricula.records import Domain, Group
from polyphony.curricula.schedulers import Scheduler, find_scheduler
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.advantages import Advantages
from polyphony.trainer.checkpoints import BeforeDraw, load_state, save_state, whole_checkpoints, whole_or_none
from polyphony.trainer.data import Prompt
from polyphony.trainer.dead_rows import KEPT_SHARE, live_counts, may_drop_dead, without_dead
from polyphony.trainer.diversity_reward import Fusion
from polyphony.trainer.domains import DomainData, context_of
from polyphony.trainer.draws import Draws, Rollout
from polyphony.trainer.engine.engine import Completion, Engine, EngineFactory
from polyphony.trainer.engine.weight_check import WeightCheck
from polyphony.trainer.entropy import ROW_COEFFICIENT, DomainEntropy
from polyphony.trainer.evaluation.answers import Answer, read_answer
from polyphony.trainer.evaluation.evaluator import Evaluator, HeldoutResult
from polyphony.trainer.finite import FiniteSteps, forget_gradients, save_batch
from polyphony.trainer.metrics import Meter, defined, key
from polyphony.trainer.policy import Policy, refuse_odd_look, refuse_uneven, sums_by_owner
from polyphony.trainer.scoring import Graded, Sample, Scorer, together
from polyphony.trainer.settings import EntropySettings, EvaluationSettings, UpdateSettings
from polyphony.trainer.shortcuts import ShortcutWatch
from polyphony.trainer.slots import plan_draws, slot_arguments, slot_dataset


def domain(**columns: Any) -> list[float | None]:
    """Stand for the routed rewards in TRL's list, which names its metrics after it (`rewards/domain/mean`)."""
    raise RuntimeError("rewards are routed before TRL scores, see DomainGRPOTrainer._calculate_rewards")


class DomainGRPOTrainer(GRPOTrainer):
    """Train one policy over several domains with GRPO.

    Takes TRL's `model`, `args`, `processing_class`, `callbacks`, `optimizers` and `peft_config` unchanged. Rows, rewards
    and lengths belong to the `domains`; the `curriculum` is a scheduler, its registry name, or its import path.

    Raises ValueError, before any weight is loaded, for bad rows, unknown rewards and prompts longer than the context.

    Example:
        trainer = DomainGRPOTrainer("Qwen/Qwen3-0.6B", args=GRPOConfig(...), domains=[math, writing], curriculum="joint")
        trainer.train()
    """

    # what TRL's attributes are once it has been constructed; its own annotations are wider
    args: GRPOConfig
    model: Any
    num_generations: int
    max_completion_length: int
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: Any,
        args: GRPOConfig,
        *,
        domains: Sequence[Domain] | DomainData,
        curriculum: str | Scheduler = "joint",
        engine: str | Engine | EngineFactory = "vllm",
        evaluation: EvaluationSettings | None = None,
        entropy: EntropySettings | None = None,
        pool: PoolSettings | None = None,
        update: UpdateSettings | None = None,
        max_grader_failures: float = 0.5,
        max_skipped: int = 3,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
    ) -> None:
        tokenizer = processing_class or AutoTokenizer.from_pretrained(
            model if isinstance(model, str) else model.name_or_path
        )
        self.data = (
            domains
            if isinstance(domains, DomainData)
            else DomainData.load(domains, tokenizer=tokenizer, args=args, context=context_of(model))
        )
        self.scorer = Scorer(self.data.domains, openings=self.data.openings)
        self.heldout_scorer = self.scorer.apart()
        self._framing = self.data.framing
        self.fusion = Fusion.of(self.data.domains)
        self.plan = plan_draws(args, self.data.n_train)
        self.curriculum = Curriculum(
            domains=self.data.domains,
            prompts={name: table.ids for name, table in self.data.train.items()},
            scheduler=find_scheduler(curriculum)() if isinstance(curriculum, str) else curriculum,
            total_draws=self.plan.draws,
            seed=args.seed,
            pool=pool,
        )
        self.finite = FiniteSteps(most=max_skipped)
        self.shortcuts = ShortcutWatch(self.data.names)
        self.advantages = Advantages.of(update or UpdateSettings(), self.data.domains, self.shortcuts.suspects)
        self.entropy = DomainEntropy(self.data.names, entropy or EntropySettings(), args)
        self.pending_metrics: dict[str, float] = {}
        self._rollout: Rollout | None = None
        self._row_entropy: torch.Tensor | None = None
        self._loss_entropy: torch.Tensor | None = None
        self._without_dead: list[dict[str, Any]] | None = None
        self._resumed_from: str | None = None
        super().__init__(
            model=model,
            reward_funcs=[domain],
            args=slot_arguments(args, self.plan),
            train_dataset=slot_dataset(self.plan),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.policy = Policy(
            self, passes=super()._get_per_token_logps_and_entropies, turn=super()._generate_single_turn
        )
        self.meter = Meter(domains=self.data.names, is_useful=self.advantages.is_useful)
        refuse_odd_look(self.policy, pool.look if pool else None)
        if not self.use_vllm:
            self.policy.attach(engine, longest=self.data.longest)
        self.draws = self._draws(pool, max_grader_failures)
        self.drops_dead = may_drop_dead(
            self.advantages.settings.drop_dead,
            args,
            has_entropy_bonus=self._entropy_bonus_enabled or self.entropy.control is not None,
            has_aux_loss=self.aux_loss_enabled,
        )
        self.evaluator = self._evaluator(evaluation or EvaluationSettings())

    def _draws(self, pool: PoolSettings | None, max_grader_failures: float) -> Draws:
        """Return the walk of a draw; groups go to the ranks in order, and one may straddle two."""
        refill_rounds, look = (pool.refill_rounds, pool.look) if pool else (0, None)
        refuse_uneven(self.policy, refill_rounds, look)
        return Draws(
            data=self.data,
            curriculum=self.curriculum,
            scorer=self.scorer,
            fusion=self.fusion.on(self.accelerator),
            seed=self.args.seed,
            group_size=self.num_generations,
            max_grader_failures=max_grader_failures,
            complete=self.policy.complete,
            to_samples=self.to_samples,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            look=look,
            refill_rounds=refill_rounds,
            is_useful=self.advantages.is_useful,
            inspect=self.shortcuts.inspect,
            with_texts=self.data.names if self.advantages.partitioner else (),
        )

    def _evaluator(self, settings: EvaluationSettings) -> Evaluator:
        """Return what scores the policy as it is at each call."""
        return Evaluator(
            tables=self.data.heldout,
            settings=settings,
            seed=self.args.seed,
            tokenize=self.data.tokenize,
            complete=lambda requests: self.policy.complete(requests, settings.samples),
            to_samples=self.to_samples,
            score=lambda samples: together(lambda: self.heldout_scorer(samples), self.scorer.slow, gather_object),
            entropy_sums=self.policy.entropy_sums,
            log_probabilities=self.policy.logps,
            read=self._read,
            limit=self.data.limits.__getitem__,
            gather=gather_object,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            diversity=self.fusion.by_domain,
        )

    @property
    def engine(self) -> Engine | None:
        """What samples from the policy; None where TRL itself generates."""
        return self.policy.engine

    def check_weight_sync(self) -> WeightCheck | None:
        """Check that the engine follows the policy's weights; None without an engine that keeps weights of its own."""
        return self.policy.check(self.data)

    # --- one draw -------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Fill the slots, then let TRL do the rest. Relies on TRL calling it once a draw with this rank's slots."""
        self._rollout = rollout = self._roll_out(len(inputs))
        self.policy.rest()
        self._row_entropy = None
        output = super()._generate_and_score_completions(rollout.rows)
        self.policy.check_agreement(rollout.completions)
        of_rows = self._groups_of_rows(len(inputs))
        owner = [self.data.names.index(group.domain) for group in of_rows]
        entropy = self._domain_entropy(output, owner)
        generated = [*rollout.groups, *rollout.discarded_groups]
        self.curriculum.observe(
            generated, {name: total / tokens for name, (total, tokens) in entropy.items() if tokens}
        )
        self.meter.add(
            rollout.groups,
            entropy,
            rollout.batch.seconds,
            discarded=rollout.discarded_groups,
            rounds=rollout.rounds,
            unmeasured=Counter(g.domain for g in rollout.discarded_completions if not self._tells_entropy(g)),
        )
        self.entropy.after_draw(self.state.global_step + 1, entropy, rollout.groups, rollout.discarded_groups)
        output.update(self.entropy.rows(of_rows, self.accelerator.device))
        if not self.advantages.is_stock:
            first_row = self.accelerator.process_index * len(inputs)
            groups, members = rollout.groups_of_rows, rollout.members_of_rows
            output["advantages"] = self.advantages(output["advantages"], groups, members, first_row)
        self.shortcuts.observe(self.state.global_step + 1, rollout.all_graded)
        return output

    def _roll_out(self, n_rows: int) -> Rollout:
        if self._resumed_from is not None:
            # starting the dataloader consumed random numbers that an uninterrupted run did not consume here
            self._load_rng_state(self._resumed_from)
            self._resumed_from = None
        before = BeforeDraw(self.curriculum) if self.scorer.slow else None
        try:
            return self.draws.roll_out(n_rows)
        except GraderGoneError:
            if before is not None:
                self._save_before(before)
            raise

    def _save_before(self, draw: BeforeDraw) -> None:
        """Leave a checkpoint of the run as it was before a draw that came to nothing; collective over ranks."""
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{step}"
        if step == 0 or folder in whole_checkpoints(folder.parent):  # the run goes on from there by itself
            return
        draw.restore(self.curriculum)
        self._save_checkpoint(self.model, None)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Take dead rows out of the micro-batches. Relies on TRL keeping those of a draw in `_buffered_inputs`."""
        inputs = super()._prepare_inputs(generation_batch)
        if not (self.drops_dead and self.model.training):
            return inputs
        batches: list[dict[str, Any]] = self._buffered_inputs  # type: ignore[assignment]
        if batches is not self._without_dead:  # a new draw
            live: Any = self.accelerator.gather(live_counts(batches).unsqueeze(0))
            batches = without_dead(batches, live.amax(0).tolist(), self.loss_type)
            self._without_dead = self._buffered_inputs = batches
        return batches[self._step % self.args.steps_per_generation]  # type: ignore[operator]

    def decode(self, ids: Sequence[int]) -> str:
        """Return what was said: tokens marked special too, but for those that only frame it."""
        silent = self._framing.union(self.eos_token_ids)
        return self.processing_class.decode([i for i in ids if i not in silent])  # type: ignore[return-value]

    def to_samples(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Sample]:
        """Decode completions; one without an end-of-sequence token was cut off."""
        texts = [self.decode(c.ids) for c in completions]
        ends = {*self.eos_token_ids, self._padding}
        return [
            Sample(prompt=prompt, ids=c.ids, text=text, truncated=c.ids[-1] not in ends, logps=c.logps)
            for prompt, c, text in zip(prompts, completions, texts, strict=True)
        ]

    def _read(self, sample: Sample, score: float | None) -> Answer:
        domain = next(d for d in self.data.domains if d.name == sample.prompt.domain)
        return read_answer(
            sample,
            score,
            reward=self.scorer.rewards[domain.name],
            has_one_answer=domain.kind == "structured",
            decode=self.decode,
        )

    # --- what TRL asks for while it scores: finished already ----------------------------------------------------------

    def _tokenize_prompts(self, prompts: list) -> tuple:
        """Hand over the token ids: chat-template arguments differ by domain, TRL's are global."""
        return self._finished.prompt_ids, None, {}

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple:
        """Hand over the completions. Relies on TRL calling it once a draw, since tools are refused."""
        completions = self._finished.completions
        logps = None if completions[0].logps is None else [c.logps for c in completions]
        return [c.ids for c in completions], logps

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand over the rewards of all ranks, [B_global, 1]; NaN where a grader failed, which TRL leaves out."""
        rewards = [[float("nan") if r is None else r] for r in self._finished.rewards]
        return torch.tensor(rewards, dtype=torch.float32, device=self.accelerator.device)

    @property
    def _finished(self) -> Rollout:
        if self._rollout is None:
            raise RuntimeError("TRL asked for completions outside a draw; Trainer.evaluate is served by `evaluator`")
        return self._rollout

    # --- entropy by domain --------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, compute_entropy: bool = False, **kwargs: Any):
        """Let TRL's first no-grad pass over a draw also return entropies, which it computes in the same kernel."""
        is_old_pass = model is self.model and not torch.is_grad_enabled() and self._row_entropy is None
        logps, entropy, aux_loss = super()._get_per_token_logps_and_entropies(
            model, *args, compute_entropy=compute_entropy or is_old_pass, **kwargs
        )
        if is_old_pass:
            self._row_entropy = entropy
        if torch.is_grad_enabled():
            self._loss_entropy = entropy
        return logps, entropy, aux_loss

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Make up for rows that were left out, add the entropy term if it was asked for.

        Relies on TRL computing entropies with gradient in its own loss.
        """
        loss = super()._compute_loss(model, inputs)
        if KEPT_SHARE in inputs:
            loss = loss * inputs[KEPT_SHARE]
        entropy, self._loss_entropy = self._loss_entropy, None
        if self.entropy.control is None or entropy is None:
            return loss
        bonus = self.entropy.bonus(entropy, inputs["completion_mask"], inputs[ROW_COEFFICIENT])
        return loss - bonus / self.current_gradient_accumulation_steps

    def _groups_of_rows(self, n_rows: int) -> list[Group]:
        """Return the group of each of this rank's rows."""
        groups, start = self._finished.groups, self.accelerator.process_index * n_rows
        return [groups[(start + i) // self.num_generations] for i in range(n_rows)]

    def _domain_entropy(self, output: Mapping[str, Any], owner: Sequence[int]) -> dict[str, tuple[float, float]]:
        """Return summed token entropy (nats) and token count by domain, over all rows of all ranks.

        Always the policy's own entropy at the run's temperature, whatever sampling cuts off. One reduction of a fixed
        shape: domains are listed alike on every rank, drawn or not.
        """
        mask = output["completion_mask"]
        if self._row_entropy is None:  # without importance correction TRL needs no such pass
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            attention = torch.cat([output["prompt_mask"], mask], dim=1)
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(
                    self.model, ids, attention, mask.size(1), self.args.per_device_train_batch_size
                )
        entropy: torch.Tensor = self._row_entropy  # type: ignore[assignment]
        sums = sums_by_owner(entropy, mask, owner, n=len(self.data.names))
        totals = self.accelerator.reduce(sums, reduction="sum").tolist()  # type: ignore[union-attr]
        found = {name: (total, tokens) for name, (total, tokens) in zip(self.data.names, totals, strict=True)}
        # groups that a refill replaced get no forward pass: minus the log-probability of what was sampled is as large
        # in the mean, and leaving them out would hide the very groups where collapse shows first
        for g in self._finished.discarded_completions:
            if self._tells_entropy(g):
                total, tokens = found[g.domain]
                found[g.domain] = (total + (g.surprisal or 0.0), tokens + g.length)
        return {name: (total, tokens) for name, (total, tokens) in found.items() if tokens}

    def _tells_entropy(self, graded: Graded) -> bool:
        """Say whether a completion's own log-probabilities estimate entropy: with `top_p` and its like they are of the
        truncated distribution, which has less of it."""
        return graded.surprisal is not None and self.policy.sampling.is_the_policys

    @property
    def _padding(self) -> int:
        return self._tokenizer.pad_token_id  # type: ignore[return-value]

    # --- held-out evaluation ------------------------------------------------------------------------------------------

    def evaluate_heldout(self) -> HeldoutResult:
        """Score the policy as it is now on every domain's held-out set; collective over ranks."""
        result = self.evaluator.run()
        self.policy.rest()
        return result

    # --- steps that must not be taken ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Look at the loss of every micro-batch."""
        loss = super().training_step(*args, **kwargs)
        self.finite.see_loss(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Leave out a step that is not finite. Relies on Transformers asking for the norm just before the step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses = torch.tensor(float(not self.finite.loss_is_finite), device=self.accelerator.device)
        worst = self.accelerator.reduce(losses, reduction="sum").item()  # type: ignore[union-attr]
        size = 0.0 if norm is None else float(norm)
        if self.finite.judge(grad_norm=size, all_losses_finite=not worst):
            return norm
        # DeepSpeed steps inside the backward pass; it leaves a step out by itself only in half precision
        is_too_late = self.is_deepspeed_enabled and self.model_wrapped.was_step_applied()  # type: ignore[union-attr]
        if not is_too_late:
            forget_gradients(self.model)
        if is_too_late or self.finite.in_a_row > self.finite.most:
            folder, step = Path(self.args.output_dir), self.state.global_step + 1  # type: ignore[arg-type]
            path = save_batch(self._buffered_inputs, folder, step=step, rank=self.accelerator.process_index)
            raise RuntimeError(
                f"step {step}: loss or gradient is not finite, {self.finite.in_a_row} in a row "
                f"(faults.max_skipped={self.finite.most}); the batch is kept in {path}"
            )
        return norm

    # --- logs and checkpoints -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics beside TRL's, so that one step is one line."""
        if "train_runtime" not in logs:  # the summary that Transformers logs once at the end
            for name, value in self.curriculum.metrics().items():
                owner, metric = name.rsplit("/", 1)
                logs[key("curriculum", metric, owner)] = value
            logs.update(self.entropy.metrics())
            logs.update(defined(self.shortcuts.flush()))
        logs.update(self.meter.flush())
        logs.update(self.scorer.logged.flush("domain", gather_object))
        logs.update(self._faults())
        logs.update(self.pending_metrics)
        self.pending_metrics = {}
        super().log(logs, start_time)

    def _faults(self) -> dict[str, float]:
        """Return what went wrong and was made good since the last log."""
        counts: dict[str, float] = {"skipped_steps": self.finite.flush()}
        if self.engine is not None:
            counts |= asdict(self.engine.flush_faults())
        return {key("faults", name): count for name, count in counts.items()}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the ledgers beside the weights, last: their file marks the checkpoint as whole, on every rank."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with whole_or_none(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if not self.args.should_save:
                return
            if self.curriculum.pools:
                save_pools(folder / POOL_FILE, self.curriculum.pool_columns())
            own = {"entropy": self.entropy.state_dict(), "shortcuts": self.shortcuts.state_dict()}
            save_state(folder, {**self.curriculum.state_dict(), **own})

    def _run_epoch(self, **kwargs: Any) -> None:
        """Take no step where all were taken: Transformers looks at the count only after the next one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def largest(self, number: int) -> int:
        """Return the largest of what the ranks pass in; every rank must call it."""
        return max(gather_object([number]))

    def rollback(self, checkpoint: Path, *, because: str, domain: str) -> None:
        """Go back to the weights and optimizer of a checkpoint; steps, learning rate and ledgers go on.

        The scheduler is told that `domain` was hurt, and why.
        What was spent stays spent and what was learned about the domains stays known. Not for DeepSpeed or FSDP, whose
        engines hold the weights themselves.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise RuntimeError("guardrails: rollback is not available under DeepSpeed or FSDP; use stop and --resume")
        lr_state = self.lr_scheduler.state_dict()  # type: ignore[union-attr]
        self._load_from_checkpoint(str(checkpoint))
        super()._load_optimizer_and_scheduler(str(checkpoint))
        self.lr_scheduler.load_state_dict(lr_state)  # type: ignore[union-attr]
        self._last_loaded_step, self._buffered_inputs = -1, None
        self.curriculum.note(f"rolled back to {checkpoint.name}: {because}", domain=domain)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the ledgers with the optimizer: before the first draw. Relies on Transformers calling it on resume."""
        if self.args.device.type == "cpu":  # a rank's CPU is called cpu:0, a location that torch.load does not know
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_state(Path(checkpoint))
            self.curriculum.load_state_dict(state)
            if self.curriculum.pools:
                self.curriculum.adopt_pools(load_pools(Path(checkpoint) / POOL_FILE))
            self.shortcuts.load_state_dict(state["shortcuts"])
            self.entropy.load_state_dict(state["entropy"])
            self._resumed_from = checkpoint
