"""GRPO over many domains: one thin subclass of TRL's trainer.

The path of one prompt: the sampler yields an empty slot; the curriculum fills it just before generation (`_roll_out`); the
engine samples its group, the domain's reward grades it; TRL computes log-probabilities, advantages and loss; entropy by
domain is read off TRL's no-grad pass over all rows; teachers, where there are some, score the rows (`_learn`); the
curriculum observes. Left out on purpose: a loss, an optimizer loop and a weight loader of our own.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import Completion, Domain, Group, Lessons, Rollout
from polyphony.curricula.schedulers import Scheduler, as_scheduler
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.advantages import Advantages
from polyphony.trainer.ahead import Ahead
from polyphony.trainer.arguments import refuse_unsampled, sampler_of
from polyphony.trainer.checkpoints import (
    BeforeDraw,
    Chance,
    load_ledgers,
    name_cpu,
    saved_whole,
    whole_checkpoints,
)
from polyphony.trainer.dead_rows import KEPT_SHARE, live_counts, may_drop_dead, without_dead
from polyphony.trainer.diversity_reward import Fusion
from polyphony.trainer.domains import DomainData, code_of
from polyphony.trainer.draws import Draws
from polyphony.trainer.engine.engine import Engine, EngineFactory
from polyphony.trainer.engine.here import engine_here
from polyphony.trainer.engine.merge import refuse_unmergeable
from polyphony.trainer.entropy import ROW_COEFFICIENT, DomainEntropy
from polyphony.trainer.environments.counts import TURNS
from polyphony.trainer.environments.episodes import Episodes
from polyphony.trainer.environments.settings import EnvironmentSettings
from polyphony.trainer.evaluation.evaluator import Evaluator
from polyphony.trainer.extra_columns import Extra
from polyphony.trainer.finite import FiniteSteps, faults_of, norm_of_step
from polyphony.trainer.from_trl import Script, arguments_of, name_of
from polyphony.trainer.guarded import check_ahead
from polyphony.trainer.metrics import Meter, defined, key
from polyphony.trainer.policy import Policy, own_mask, sums_by_owner, turns_of
from polyphony.trainer.rollout_function import RolloutFunction, as_returned
from polyphony.trainer.run.callbacks import Run
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.outset import Outset
from polyphony.trainer.run.recorder import grader_failures, heldout_metrics
from polyphony.trainer.run.signals import Signals, warn
from polyphony.trainer.scoring import Failures, Scorer
from polyphony.trainer.script_shape import in_place, quantized_by, refuse_misspelt
from polyphony.trainer.settings import (
    MAX_GRADER_FAILURES,
    CheckpointSettings,
    EvaluationSettings,
    FaultSettings,
    TrainerSettings,
    UpdateSettings,
    with_probes,
)
from polyphony.trainer.shortcuts import ShortcutWatch
from polyphony.trainer.slots import plan_draws, slot_arguments, slot_dataset
from polyphony.trainer.teachers.context import FEEDBACK
from polyphony.trainer.teachers.distil import Distil
from polyphony.trainer.teachers.lesson import Lesson
from polyphony.trainer.teachers.recovery import OwnBest
from polyphony.trainer.teachers.teachers import Teachers
from polyphony.trainer.weight_names import load_converted


def domain(**columns: Any) -> list[float | None]:
    """Stand for the routed rewards in TRL's list, which names its metrics after it (`rewards/domain/mean`)."""
    raise RuntimeError("rewards are routed before TRL scores, see DomainGRPOTrainer._calculate_rewards")


class DomainGRPOTrainer(GRPOTrainer):
    """Train one policy over several domains with GRPO.

    Takes what TRL's trainer takes, and makes domains of it (`arguments.OF_TRAINER` says what becomes of each argument); or
    `domains`, to which rows, rewards and lengths belong; or both. The `curriculum` is a scheduler, its registry name, or its
    import path, or a mapping of `scheduler` and its settings. The `engine` is `vllm`, `transformers` (TRL generates), an
    import path, an `Engine`, or what makes one. All settings may be given as mappings, with a recipe's keys.

    With `run`, a folder, it does what `polyphony train` does: check of the engine's weights, baseline, held-out evaluation,
    ledgers, `guardrails`, checkpoints in the folder, of which the newest and the best stay, a checkpoint and the end at
    SIGTERM (`Interrupted`), and the trained policy in `final/`. How often is said by `args.eval_steps` (under
    `eval_strategy="steps"` TRL puts `logging_steps` there) or `evaluation.every`, by `args.save_steps` (500, its default,
    counts as not given) or `checkpoint.every`, else as often, and by `args.save_total_limit` or `checkpoint.keep`. Without
    `run`, nothing is written that TRL would not write, and TRL's arguments alone say when.

    Raises TypeError for an unknown argument.
    Raises ValueError, before any weight is loaded, for bad rows, unknown rewards, prompts longer than the context, settings
    that exclude each other, a folder that is not free or of another run, and evaluations or checkpoints inside a draw;
    before an engine is started, for an adapter that cannot be merged for it or for `final/` (LoRA, rsLoRA and DoRA can).

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
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        domains: Sequence[Domain] | DomainData = (),
        domain_name: str = "default",
        curriculum: str | Mapping[str, Any] | Scheduler = "auto",
        engine: str | Engine | EngineFactory = "vllm",
        run: str | Path | RunFolder | None = None,
        guardrails: Sequence[Guardrail | Mapping[str, Any]] = (),
        evaluation: EvaluationSettings | Mapping[str, Any] | None = None,
        entropy: EntropySettings | Mapping[str, Any] | None = None,
        pool: PoolSettings | Mapping[str, Any] | None = None,
        update: UpdateSettings | Mapping[str, Any] | None = None,
        faults: FaultSettings | Mapping[str, Any] | None = None,
        checkpoint: CheckpointSettings | Mapping[str, Any] | None = None,
        environments: EnvironmentSettings | Mapping[str, Any] | None = None,
        max_grader_failures: float = MAX_GRADER_FAILURES,
        **unknown: Any,
    ) -> None:
        refuse_misspelt(unknown, inspect.signature(DomainGRPOTrainer.__init__).parameters)
        reward_funcs, args = in_place(reward_funcs, args)
        args = arguments_of(model, args)
        engine = engine_here(engine, use_vllm=bool(args.use_vllm), is_replaced=rollout_func is not None)
        given = {"evaluation": evaluation, "entropy": entropy, "pool": pool, "update": update, "faults": faults}
        given |= {"checkpoint": checkpoint, "environments": environments, "max_grader_failures": max_grader_failures}
        settings = TrainerSettings.of(guardrails=guardrails, **given).with_samples(args.num_generations_eval)
        rows: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "tools": tools}
        rows |= {"reward_funcs": reward_funcs, "reward_processing_classes": reward_processing_classes}
        rows |= {"environment_factory": environment_factory, "rollout_func": rollout_func}
        script = Script(**rows, name=domain_name)
        quantized = quantized_by(model, quantization_config, args)
        refuse_unsampled(engine, args, quantized=quantized, has_run=run is not None)
        self.data, args = script.read(model, args, domains, processing_class, settings, engine=engine, run=run)
        self.plan = plan_draws(args, self.data.n_train)
        settings.check(self.data.domains, engine=engine, of_trl=partial(getattr, args))
        made = {"model": model, "curriculum": curriculum, "engine": engine, "peft_config": peft_config}
        made |= {"rollout_func": rollout_func, "optimizers": optimizers}
        outset = self._outset(run, settings, args, **made, quantized=quantization_config)
        self._steer_and_watch(args, curriculum, settings, model, outset)
        script.check_fit(self.scorer, self.data)
        of_trl = {"callbacks": callbacks, "optimizers": optimizers, "peft_config": peft_config}
        self._load(model, args, outset, **of_trl, quantization_config=quantization_config)
        self._walk_and_evaluate(engine, settings, rollout_func, merges=outset is not None)
        self.evaluator.cuts = script.is_given and outset is None
        self.run = Run(self, outset, model=name_of(model)).attach() if outset else None

    def _outset(
        self, run: Any, settings: TrainerSettings, args: GRPOConfig, *, optimizers: tuple, quantized: Any, **made: Any
    ) -> Outset | None:
        """Return what is settled of a run, which keeps what a script made the trainer with."""
        own = self.data.tokenizer.name_or_path == name_of(made["model"])
        made |= {"processing_class": None if own else self.data.tokenizer, "quantization_config": quantized}
        made |= {"optimizers": optimizers if any(optimizers) else None}
        return Outset.of(run, settings, args=args, plan=self.plan, data=self.data, **made)

    def _load(self, model: Any, args: GRPOConfig, outset: Outset | None, **of_trl: Any) -> None:
        """Let TRL load the weights, over slots in the place of rows."""
        slotted = slot_arguments(args, self.plan)
        super().__init__(
            model=model,
            reward_funcs=[domain],
            args=outset.arguments(slotted) if outset else slotted,
            train_dataset=slot_dataset(self.plan),
            eval_dataset=None if args.eval_strategy == "no" else slot_dataset(self.plan),  # `evaluate` knows its own
            processing_class=self.data.tokenizer,
            **of_trl,
        )
        self.policy = Policy(
            self, self.data, passes=super()._get_per_token_logps_and_entropies, turn=super()._generate_single_turn
        )

    def _steer_and_watch(
        self, args: GRPOConfig, curriculum: Any, settings: TrainerSettings, model: Any, outset: Outset | None
    ) -> None:
        """Make what steers a run and what watches it: these need rows and no weights."""
        trusts = code_of(args)["trust_remote_code"]
        taught = partial(Lesson.of, settings.update.teachers, self.data, model=model, trusts_code=trusts)
        self.lesson = taught() if settings.update.distil else None
        if outset and self.lesson:
            outset.refuse_other_teachers(self.lesson)
        given, self.probes = with_probes(curriculum)
        scheduler = as_scheduler(given, entropy=settings.entropy, domains=self.data.names)
        self.finite = FiniteSteps(most=settings.faults.max_skipped)
        self.scorer = Scorer(self.data.domains, openings=self.data.openings)
        self.scorer.extra = self.extra = Extra()
        self.scorer.state_of = lambda: getattr(self, "state", None)
        self.fusion = Fusion.of(self.data.domains)
        self.curriculum = Curriculum(
            domains=self.data.domains,
            prompts={name: table.ids for name, table in self.data.train.items()},
            scheduler=scheduler,
            total_draws=self.plan.draws,
            seed=args.seed,
            pool=settings.pool,
            spare=self.data.to_recover(g.domain for g in settings.guardrails if g.action == "recover"),
        )
        self.shortcuts = ShortcutWatch(self.data.names)
        self.advantages = Advantages.of(settings.update, self.data.domains, self.shortcuts.suspects)
        self.advantages.recoveries = self.curriculum.recoveries
        self.own_best = OwnBest(self.data, model=model, settings=settings.update.distil, loss_type=args.loss_type)
        self.entropy = DomainEntropy(self.data.names, settings.entropy)
        self.signals = Signals.of(args, self.plan, self.data.domains)  # of a script; a run has its own
        self.meter = Meter(domains=self.data.names, is_useful=self.advantages.is_useful, skill_of=self.data.skills)
        self.pending_metrics: dict[str, float] = {}
        self._rollout: Rollout | None = None
        self._row_entropy: torch.Tensor | None = None
        self._row_logps: torch.Tensor | None = None
        self._loss_entropy: torch.Tensor | None = None
        self._without_dead: list[dict[str, Any]] | None = None
        self._chance_of_draw: Callable[[], None] | None = None

    def _walk_and_evaluate(self, engine: Any, settings: TrainerSettings, rollout_func: Any, *, merges: bool) -> None:
        """Make what samples from the policy: its engine, the draws, the held-out evaluation."""
        if merges or sampler_of(self.args, engine) != "transformers":  # which samples from the policy, nothing merged
            refuse_unmergeable(self.model, self.accelerator)
        pool = settings.pool
        refill_rounds, look = (pool.refill.max_rounds, pool.look) if pool else (0, None)
        if pool:
            pool.check_look(self.num_generations, rank_rows=self.policy.rank_rows)
        if self.use_vllm:
            self.policy.keep_base()
        else:
            self.policy.attach(engine)
        if pool:
            pool.check_uneven(self.policy.joint)
        self.episodes = Episodes.of(self.data, self.policy, settings.environments) if self.data.acting else None
        if self.episodes:
            self.tools = self.episodes.tools  # by which TRL knows that rows may hold what the policy did not write
        self.by_script: RolloutFunction | None = None
        if rollout_func is not None:
            self.by_script = RolloutFunction(rollout_func, self.policy, fits=self.scorer.check_fit)
            self.rollout_func = self._play
        self.draws = Draws(
            data=self.data,
            curriculum=self.curriculum,
            policy=self.policy,
            scorer=self.scorer,
            fusion=self.fusion.on(self.accelerator),
            advantages=self.advantages,
            shortcuts=self.shortcuts,
            seed=self.args.seed,
            failures=Failures(most=settings.max_grader_failures, acting=self.data.acting),
            look=look,
            refill_rounds=refill_rounds,
            by=self.by_script or self.episodes,
        )
        self.ahead = self._look_ahead(settings)
        self.distil: Distil | None = None
        if self.lesson is not None and (distil := settings.update.distil):
            teachers = Teachers(self.policy, self.lesson)
            self.distil = Distil(distil, teachers, domains=self.data.names, loss_type=self.loss_type)
        self.drops_dead = may_drop_dead(
            self.advantages.settings.drop_dead,
            self.args,
            has_entropy_bonus=self._entropy_bonus_enabled or self.entropy.control is not None,
            has_aux_loss=self.aux_loss_enabled,
        )
        self.evaluator = Evaluator(
            data=self.data,
            policy=self.policy,
            scorer=self.scorer.apart(),
            settings=settings.evaluation,
            seed=self.args.seed,
            fusion=self.fusion,
            by=self.by_script or self.episodes,
        )

    def _look_ahead(self, settings: TrainerSettings) -> Ahead | None:
        """Return what generates draws ahead, where the engine is to. Raises ValueError for what does not go with it."""
        n = self.policy.engine.draws_ahead if self.policy.engine is not None else 0
        check_ahead(n, settings.guardrails, partial(getattr, self.args))
        if not n:
            return None
        self.policy.ahead = ahead = Ahead(self.draws, n)
        return ahead

    # --- one draw -------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Fill the slots, then let TRL do the rest. Relies on TRL calling it once a draw with this rank's slots.

        In evaluation, of a data set that `evaluate` was given, rows are no slots.
        """
        if not self.model.training:
            self._rollout = self.draws.answer(inputs, self.num_generations_eval or self.num_generations)
            return super()._generate_and_score_completions(inputs)
        self._rollout = rollout = self._roll_out(len(inputs))
        self.policy.rest()
        self._row_entropy = None
        output = super()._generate_and_score_completions([{"prompt": c.prompt.prompt} for c in rollout.rows.values()])
        if self.by_script is None:  # whose log-probabilities may be of whatever it samples with
            self.policy.check_agreement(list(rollout.rows.values()))
        groups, step = list(rollout.groups.values()), self.state.global_step + 1
        of_rows = [rollout.groups[place // self.num_generations] for place in rollout.rows]
        entropy, unmeasured = self._domain_entropy(output, of_rows)
        if not self.advantages.is_stock:
            first_row = self.policy.rank * len(inputs)
            output["advantages"] = self.advantages(output["advantages"], rollout.groups_of_rows, first_row)
        lessons = self._learn(output, list(rollout.rows.values()))
        if lessons or not self.advantages.is_stock:
            self._show_advantages(output["advantages"], own_mask(output))
        domains = self.data.names
        per_token = {name: total / n for name, (total, n) in entropy.items() if name in domains}
        self.curriculum.observe(rollout.sampled, per_token, lessons)
        self.meter.add(
            groups,
            entropy,
            rollout.seconds,
            discarded=rollout.discarded,
            rounds=rollout.rounds,
            unmeasured=unmeasured,
            by_turn=self._entropy_by_turn(output, of_rows),
        )
        self.entropy.after_draw(step, entropy, groups, rollout.discarded)
        output.update(self.entropy.rows(of_rows, self.accelerator.device))
        self.shortcuts.observe(step, rollout.sampled)
        return output

    def _learn(self, output: dict[str, Any], rows: Sequence[Completion]) -> Mapping[str, Lessons]:
        """Put teachers' advantages [B, T] in the place of those by reward [B]. Relies on TRL's loss taking both."""
        ledger = self.curriculum.recoveries
        distil = (self.own_best.of(self.policy, ledger.open) if ledger.begun else None) or self.distil
        if distil is None:
            return {}
        old, mask = self._row_logps, own_mask(output)
        assert old is not None
        learned = distil(output["advantages"], output.get("old_per_token_logps", old), mask, rows)
        output["advantages"] = learned.advantages
        return learned.lessons

    def _show_advantages(self, advantages: torch.Tensor, mask: torch.Tensor) -> None:
        """Have TRL's table show these of all ranks, [B] or a row's mean of [B, T], not its own (`log_completions`)."""
        if self.log_completions:
            of_rows = advantages if advantages.dim() == 1 else advantages.sum(1) / mask.sum(1).clamp(min=1)
            shown: list[float] = self.accelerator.gather(of_rows).tolist()  # type: ignore[union-attr]
            rows = self._logs["advantages"]
            for _ in range(min(len(shown), len(rows))):
                rows.pop()
            rows.extend(shown)

    def _roll_out(self, n_rows: int) -> Rollout:
        if self._chance_of_draw is not None:
            # starting the dataloader consumed random numbers that an uninterrupted run did not consume here
            self._chance_of_draw()
            self._chance_of_draw = None
        remote = self.lesson.endpoints if self.lesson else ()
        may_end = self.scorer.slow | self.fusion.slow or remote or self.episodes
        before = BeforeDraw(self.curriculum) if may_end and not self.ahead else None
        try:
            return self._heard((self.ahead or self.draws).roll_out(n_rows))
        except GraderGoneError as error:
            if before is not None or self.ahead:
                self._save_before(before)
            raise self.run.ended_by(error) if self.run else error from None

    def _heard(self, rollout: Rollout) -> Rollout:
        """Show what rewards told of each completion; add it to the rows, and what teachers behind endpoints say."""
        rows = list(rollout.rows.values())
        told = self.extra.flush(rows) if self.extra.columns else {}
        for column, values in told.items():
            self._log_completion_extra(column, values)
        rows = [
            c if said is None else replace(c, feedback=str(said))
            for c, said in zip(rows, told.get(FEEDBACK, [None] * len(rows)), strict=True)
        ]
        rows = self.distil.teachers.heard(rows) if self.distil else rows
        return replace(rollout, rows=dict(zip(rollout.rows, rows, strict=True)))

    @contextmanager
    def chance_as_saved(self) -> Iterator[None]:
        """Go on from the random numbers of the checkpoint meanwhile; the first draw, from those that this ends with."""
        if self._chance_of_draw is not None:
            self._chance_of_draw()
        yield
        self._chance_of_draw = Chance().restore

    def _save_before(self, draw: BeforeDraw | None) -> None:
        """Leave a checkpoint of the run as it was before a draw that came to nothing; collective over ranks.

        None: it is so, as nothing was taken in of a draw that was generated ahead.
        """
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{step}"
        if step == 0 or folder in whole_checkpoints(folder.parent):  # the run goes on from there by itself
            return
        if draw is not None:
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

    # --- what TRL asks for while it scores: finished already ----------------------------------------------------------

    def _tokenize_prompts(self, prompts: list) -> tuple:
        """Hand over the token ids: chat-template arguments differ by domain, TRL's are global."""
        return [c.prompt.ids for c in self._finished.rows.values()], None, {}

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple:
        """Hand over the completions. Relies on TRL calling it once a draw, since its loop over tools is ours."""
        completions = list(self._finished.rows.values())
        logps = None if any(c.logps is None for c in completions) else [c.logps for c in completions]
        return [c.ids for c in completions], logps

    def _play(self, prompts: list, trainer: Any) -> dict[str, Any]:
        """Hand over what a script's function has returned: TRL asks here in its place."""
        return as_returned(list(self._finished.rows.values()))

    def _tool_call_loop(self, prompts: list, prompt_ids: list, ids: list, completions: list, logps: Any, *rest: Any):
        """Hand over which tokens the policy wrote, and what was said; all tools have answered."""
        rows = list(self._finished.rows.values())
        masks = [[1] * len(row.ids) if row.tool_mask is None else list(row.tool_mask) for row in rows]
        said = [list(r.episode.messages) if r.episode else own for r, own in zip(rows, completions, strict=True)]
        acted = [row.episode for row in rows if row.episode]
        calls, failures = sum(e.calls for e in acted), sum(f != "malformed_calls" for e in acted for f in e.failures)
        return masks, said, ids, logps, calls, failures, [[] for _ in rows]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand over the rewards of all ranks, [B_global, 1]; NaN where a grader failed, which TRL leaves out."""
        rewards = [[float("nan") if r is None else r] for r in self._finished.rewards]
        return torch.tensor(rewards, dtype=torch.float32, device=self.accelerator.device)

    @property
    def _finished(self) -> Rollout:
        if self._rollout is None:
            raise RuntimeError("TRL asked for completions outside a draw")
        return self._rollout

    # --- entropy by domain --------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, compute_entropy: bool = False, **kwargs: Any):
        """Let TRL's first no-grad pass over a draw also return entropies, which it computes in the same kernel."""
        is_old_pass = model is self.model and not torch.is_grad_enabled() and self._row_entropy is None
        logps, entropy, aux_loss = super()._get_per_token_logps_and_entropies(
            model, *args, compute_entropy=compute_entropy or is_old_pass, **kwargs
        )
        if is_old_pass:
            self._row_entropy, self._row_logps = entropy, logps
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
        bonus = self.entropy.bonus(entropy, own_mask(inputs), inputs[ROW_COEFFICIENT])
        return loss - bonus / self.current_gradient_accumulation_steps

    def _domain_entropy(
        self, output: Mapping[str, Any], groups: Sequence[Group]
    ) -> tuple[dict[str, tuple[float, float]], Counter[str]]:
        """Return summed token entropy (nats) and token count by domain, and by skill, over all rows of all ranks.

        `groups` [B] are those of this rank's rows. Second, by domain, how many completions of replaced groups it leaves
        out. Always the policy's own entropy at the run's temperature, whatever sampling cuts off. One reduction of a fixed
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
        skills, own = self.data.skills, own_mask(output)
        names = [*self.data.names, *sorted(set(skills.values()))]
        owners = [(row, g.domain) for row, g in enumerate(groups)]
        owners += [(row, s) for row, g in enumerate(groups) if (s := skills.get((g.domain, g.prompt_id)))]
        rows = [row for row, _ in owners]
        sums = sums_by_owner(entropy[rows], own[rows], [names.index(name) for _, name in owners], n=len(names))
        totals = self.accelerator.reduce(sums, reduction="sum").tolist()  # type: ignore[union-attr]
        found = {name: (total, tokens) for name, (total, tokens) in zip(names, totals, strict=True)}
        unmeasured: Counter[str] = Counter()
        # groups that a refill replaced get no forward pass: minus the log-probability of what was sampled is as large
        # in the mean, and leaving them out would hide the very groups where collapse shows first
        # (with `top_p` and its like it is of the truncated distribution, which has less entropy)
        is_the_policys = self.policy.sampling.is_the_policys
        for group in self._finished.discarded:
            for surprisal, length in zip(group.surprisals, group.lengths, strict=True):
                if surprisal is None or not is_the_policys:
                    unmeasured[group.domain] += 1
                    continue
                for name in filter(None, (group.domain, skills.get((group.domain, group.prompt_id)))):
                    total, tokens = found[name]
                    found[name] = (total + surprisal, tokens + length)
        return {name: (total, tokens) for name, (total, tokens) in found.items() if tokens}, unmeasured

    def _entropy_by_turn(
        self, output: Mapping[str, Any], groups: Sequence[Group]
    ) -> dict[str, list[tuple[float, float]]]:
        """Return summed token entropy (nats) and token count of each turn, by domain that acts, over all ranks."""
        acting = sorted(self.data.acting)
        if not acting:
            return {}
        rows = [row for row, g in enumerate(groups) if g.domain in acting]
        entropy, turns = self._row_entropy[rows], turns_of(own_mask(output))[rows].clamp(max=TURNS)  # type: ignore[index]
        owners = [acting.index(groups[row].domain) for row in rows]
        sums = [sums_by_owner(entropy, turns == n, owners, n=len(acting)) for n in range(1, TURNS + 1)]
        totals = self.accelerator.reduce(torch.stack(sums, dim=1), reduction="sum").tolist()  # type: ignore[union-attr]
        return {name: [(nats, tokens) for nats, tokens in of] for name, of in zip(acting, totals, strict=True)}

    # --- held-out evaluation ------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the policy as it is now; return and log `eval_heldout/<domain>/<metric>`, as TRL does its own metrics.

        TRL's trackers hear of it, a run does not: its own evaluations are at its steps. Another data set, or a dict of them,
        is evaluated as by TRL, under TRL's names (`eval_loss`, `eval_reward`); a column `domain` says whose reward grades a
        row, where there are several.
        """
        if eval_dataset is not None:
            with self.run.aside() if self.run else nullcontext():
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not self.data.heldout:
            raise ValueError("evaluate() of a trainer without held-out rows: give eval_dataset, here or to the trainer")
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # what TRL itself samples has no seeds
            result = self.evaluator.run()
        published = result.on("report")
        answers = {name: published.read(name) for name in published.answers}
        trained = self.run.recorder.practised_last() if self.run else ()
        logged = self.evaluator.flush_logged()
        found = heldout_metrics(published, answers, trained=trained, skills=self.data.skills)
        found |= grader_failures(result) | logged
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        is_training = self.model.training
        self.model.eval()  # by which TRL tells the logs of an evaluation
        with self.run.aside() if self.run else nullcontext():
            super().log(metrics)
        self.model.train(is_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- steps that must not be taken ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Check that the loss of every micro-batch is finite."""
        loss = super().training_step(*args, **kwargs)
        self.finite.see_loss(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Leave out a step that is not finite. Relies on Transformers asking for the norm just before the step."""
        return norm_of_step(self, super()._get_grad_norm(model, grad_norm=grad_norm), self._buffered_inputs)

    # --- the run, logs and checkpoints --------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **given: Any) -> Any:
        """Train as TRL does. With `run`, go on from its newest checkpoint if asked to, and leave its folder complete.

        A signal that ends a run raises Interrupted, a SystemExit, once its checkpoint is saved.
        """
        if self.advantages.settings.sft is not None:
            raise ValueError(
                "algorithm sft: this trainer samples and evaluates; trainer.sft.trainer:DomainSFTTrainer trains"
            )
        with closing(self.episodes) if self.episodes else nullcontext(), self._landed():
            if self.run is None:
                return super().train(resume_from_checkpoint, **given)
            return self.run.led(super().train, resume_from_checkpoint, **given)

    @contextmanager
    def _landed(self) -> Iterator[None]:
        """Leave no draw in flight; one that a signal ends waits for them while it has the time."""
        try:
            yield
        finally:
            if self.ahead:
                self.ahead.close(self.run.stopper.left_s if self.run else None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics beside TRL's, so that one step is one line; an evaluation ends no step."""
        if not self.model.training:
            super().log(logs, start_time)
            return
        if "train_runtime" not in logs:  # the summary that Transformers logs once at the end
            for name, value in self.curriculum.metrics().items():
                owner, metric = name.rsplit("/", 1)
                logs[key("curriculum", metric, owner)] = value
            logs.update(self.entropy.metrics())
            logs.update(defined(self.shortcuts.flush()))
        logs.update(self.meter.flush())
        logs.update(self.distil.flush() if self.distil else {})
        logs.update(self.own_best.flush() if self.curriculum.recoveries.begun else {})
        logs.update(self.scorer.logged.flush("domain", gather_object))
        logs.update(faults_of(self))
        logs.update(self.ahead.flush() if self.ahead and "train_runtime" not in logs else {})
        logs.update(self.pending_metrics)
        self.pending_metrics = {}
        super().log(logs, start_time)
        if self.run is None and self.accelerator.is_main_process:
            numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            for alarm in self.signals.see(self.state.global_step, numbers):
                warn(alarm)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the ledgers beside the weights, last: their file marks the checkpoint as whole, on every rank."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.ahead and self.run and not self.run.has_time_to_save(self.ahead.wait):
            return
        with saved_whole(self, folder, **self._remembering):
            super()._save_checkpoint(model, trial)
            if self.ahead:
                self.ahead.save(folder)

    @property
    def _remembering(self) -> dict[str, Any]:
        """What has a state of its own beside the curriculum's."""
        states: dict[str, Any] = {"entropy": self.entropy, "shortcuts": self.shortcuts}
        states |= {"distil": self.distil} if self.distil else {}
        if self.run is None:
            return states | {"signals": self.signals}
        return states | {"owed": self.run.owed, "signals": self.run.signals}

    def _run_epoch(self, **kwargs: Any) -> None:
        """Take no step where all were taken, or a guardrail stopped the run before: Transformers looks only after one."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load all weights. Relies on Transformers loading, of what is on disk, what is called so in memory alone."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # which keeps the names of memory
            load_converted(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the ledgers with the optimizer: before the first draw. Relies on Transformers calling it on resume."""
        name_cpu(self.args)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_ledgers(Path(checkpoint), self.curriculum, **self._remembering)
            if self.ahead:
                self.ahead.load(Path(checkpoint))
            self._chance_of_draw = partial(self._load_rng_state, checkpoint)
