"""What becomes of each argument of TRL's GRPOTrainer and of each field of its GRPOConfig: heard as TRL hears it, heard with
a difference, or refused in words.

Nothing is silently ignored. The reference prints these tables, `refuse_unheard` acts by them, and a test fails for a name
that is in none. Imports no torch: a recipe is checked by them as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

Where = Literal["always", "run", "ours", "transformers", "trl"]
"""`run`: where a trainer keeps a run folder; else by what samples: an engine of ours, TRL by Transformers, TRL's vLLM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unheard:
    """Where a field would not be heard, and why; its other values are refused there."""

    allowed: tuple[Any, ...]
    """Values that ask for nothing, TRL's default first."""
    why: str
    where: tuple[Where, ...] = ("always",)


HEARD = frozenset(
    """
    accelerator_config adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices beta bf16 bf16_full_eval
    cast_lm_head_to_fp32 dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed delta disable_dropout
    disable_tqdm do_eval do_predict do_train entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon
    epsilon_high fp16 fp16_full_eval fsdp fsdp_config full_determinism generation_batch_size gradient_accumulation_steps
    gradient_checkpointing gradient_checkpointing_kwargs hub_always_push hub_model_id hub_private_repo hub_revision
    hub_strategy hub_token importance_sampling_level include_num_input_tokens_seen learning_rate liger_kernel_config
    local_rank log_completions_hub_repo log_level log_level_replica log_multimodal log_on_each_node log_unique_prompts
    logging_first_step logging_nan_inf_filter logging_steps logging_strategy loss_type lr_scheduler_kwargs lr_scheduler_type
    mask_truncated_completions max_grad_norm max_tool_calling_iterations min_p neftune_noise_alpha
    num_completions_to_print num_generations num_iterations off_policy_mask_threshold optim optim_args optim_target_modules
    pad_to_multiple_of parallelism_config per_device_train_batch_size project push_to_hub ref_model_mixup_alpha
    ref_model_sync_steps repetition_penalty report_to restore_callback_states_from_checkpoint resume_from_checkpoint
    router_aux_loss_coef run_name sapo_temperature_neg sapo_temperature_pos save_on_each_node skip_memory_metrics
    steps_per_generation sync_ref_model temperature tf32 top_entropy_quantile top_k top_p torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id trust_remote_code
    use_bias_correction_kl use_cache use_cpu vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos warmup_steps
    weight_decay
    """.split()  # noqa: SIM905
)
"""Handed over untouched: TRL, Transformers and whatever samples do with it what they do without us."""

_COEFFICIENT = "refused beside an entropy `control` of ours"
DIFFERS = {
    "chat_template_kwargs": "arguments that a domain's own `chat_template_kwargs` do not say",
    "entropy_coef": _COEFFICIENT,
    "eval_on_start": "with `run` there always is an evaluation before the first step",
    "eval_steps": "of held-out rows, all domains at once; with `run` also without `eval_strategy`",
    "eval_strategy": "of held-out rows; with `run`, 'steps' or 'no', and the first and last evaluation in any case",
    "generation_kwargs": "by an engine of ours: fields of vLLM's SamplingParams (`stop`, `bad_words`, ..), for held-out "
    "samples as well, and what ends at a `stop` counts as cut off, as in TRL; `n`, `seed`, `max_tokens` and how tokens are "
    "returned are the engine's own and refused; without vLLM, fields of Transformers' GenerationConfig, others refused",
    "ignore_data_skip": "always true: slots hold no data, and where the curriculum was is restored",
    "log_completions": "the column of rewards is called `domain`",
    "max_completion_length": "the most; a domain may have less",
    "max_steps": "as in TRL; a draw that the last step cuts is drawn whole",
    "model_init_kwargs": "`use_kernels` is refused where no GPU, or no package `kernels`, could run them",
    "num_generations_eval": "samples of each held-out item, as `evaluation.samples`; refused where both are said and differ",
    "num_train_epochs": "over the training prompts of all domains together",
    "output_dir": "with `run`, checkpoints stand in the run's folder instead",
    "per_device_eval_batch_size": "rows of a forward pass over held-out samples; the engine batches by itself",
    "save_steps": "with `run`, TRL's default counts as not given: as often as evaluations",
    "save_strategy": "with `run`, 'steps' or 'no'; 'no' saves as often as evaluations",
    "save_total_limit": "with `run`, the newest; the best by worst domain is kept as well",
    "scale_rewards": "in domains whose advantages are `group`; `mean_only` divides by nothing",
    "seed": "of every completion as well, by its prompt",
    "use_adaptive_entropy": _COEFFICIENT,
    "use_liger_kernel": _COEFFICIENT,
    "use_vllm": "TRL's own engine samples in place of ours: no seeds a completion, no greedy evaluation",
    "vllm_enable_sleep_mode": "by the engine in this process; the Ray engine refuses it",
    "vllm_gpu_memory_utilization": "also by our engines",
    "vllm_importance_sampling_cap": "also with our engines",
    "vllm_importance_sampling_clip_max": "also with our engines",
    "vllm_importance_sampling_clip_min": "also with our engines",
    "vllm_importance_sampling_correction": "also with our engines",
    "vllm_importance_sampling_mode": "also with our engines",
    "vllm_max_model_length": "also by our engines",
    "vllm_model_impl": "also by our engines",
    "vllm_structured_outputs_regex": "also by our engines, for held-out samples as well",
}
"""Fields that are heard, and what is different with us."""

_LOOP = "held-out rows are evaluated by Polyphony, not by Transformers' loop"
_LABELS = "GRPO has no labels"
_BEST = "leave it out, the best checkpoint by worst domain is kept"
_CONTINUOUS = "it belongs to engine='transformers' without use_vllm"
_SERVER = "it belongs to TRL's own engine, use_vllm=True"
_NO_VLLM = "no vLLM samples under engine='transformers'"

UNHEARD: dict[str, tuple[Unheard, ...]] = {
    "auto_find_batch_size": (
        Unheard(allowed=(False,), why="a draw holds whole groups, which a smaller batch would cut; TRL refuses it too"),
    ),
    "batch_eval_metrics": (Unheard(allowed=(False,), why=_LOOP),),
    "data_seed": (Unheard(allowed=(None,), why="prompts are drawn by `seed`"),),
    "eval_accumulation_steps": (Unheard(allowed=(None,), why=_LOOP),),
    "eval_do_concat_batches": (Unheard(allowed=(True,), why=_LOOP),),
    "eval_use_gather_object": (Unheard(allowed=(False,), why=_LOOP),),
    "include_for_metrics": (Unheard(allowed=([],), why=_LOOP),),
    "label_names": (Unheard(allowed=(None,), why=_LABELS),),
    "label_smoothing_factor": (Unheard(allowed=(0.0,), why=_LABELS),),
    "length_column_name": (Unheard(allowed=("length",), why="prompts are drawn by the curriculum, not by length"),),
    "multi_objective_aggregation": (
        Unheard(
            allowed=("sum_then_normalize",),
            why="a domain's reward is one number before it is normalised (`{name: weighted, parts: ..}` sums parts)",
        ),
    ),
    "prediction_loss_only": (Unheard(allowed=(False,), why=_LOOP),),
    "remove_unused_columns": (Unheard(allowed=(False, None), why="rewards get every column of a row"),),
    "reward_weights": (
        Unheard(
            allowed=(None,),
            why="a domain has one reward, which may be a list with weights; beside TRL's `reward_funcs` it is heard",
        ),
    ),
    "shuffle_dataset": (
        Unheard(
            allowed=(None, True), why="the curriculum says in which order prompts are drawn, and may draw them anew"
        ),
    ),
    "train_sampling_strategy": (Unheard(allowed=("random",), why="prompts are drawn by the curriculum"),),
    "enable_jit_checkpoint": (
        Unheard(allowed=(False,), where=("run",), why="a run saves a checkpoint at SIGTERM by itself"),
    ),
    "eval_delay": (Unheard(allowed=(0,), where=("run",), why="evaluations begin before the first step"),),
    "greater_is_better": (Unheard(allowed=(None,), where=("run",), why=_BEST),),
    "load_best_model_at_end": (Unheard(allowed=(False,), where=("run",), why=_BEST),),
    "metric_for_best_model": (Unheard(allowed=(None,), where=("run",), why=_BEST),),
    "save_only_model": (
        Unheard(allowed=(False,), where=("run",), why="a run goes on from its checkpoints, with the optimizer"),
    ),
    "cache_implementation": (Unheard(allowed=(None,), where=("ours", "trl"), why=_CONTINUOUS),),
    "ds3_gather_for_generation": (Unheard(allowed=(True,), where=("ours", "trl"), why=_CONTINUOUS),),
    "transformers_continuous_batching_config": (Unheard(allowed=(None,), where=("ours", "trl"), why=_CONTINUOUS),),
    "use_transformers_continuous_batching": (Unheard(allowed=(False,), where=("ours", "trl"), why=_CONTINUOUS),),
    "use_transformers_paged": (Unheard(allowed=(False,), where=("ours", "trl"), why=_CONTINUOUS),),
    "vllm_enable_sleep_mode": (Unheard(allowed=(False,), where=("transformers",), why=_NO_VLLM),),
    "vllm_gpu_memory_utilization": (Unheard(allowed=(0.3,), where=("transformers",), why=_NO_VLLM),),
    "vllm_importance_sampling_cap": (Unheard(allowed=(None,), where=("transformers",), why=_NO_VLLM),),
    "vllm_importance_sampling_clip_max": (Unheard(allowed=(3.0,), where=("transformers",), why=_NO_VLLM),),
    "vllm_importance_sampling_clip_min": (Unheard(allowed=(None,), where=("transformers",), why=_NO_VLLM),),
    "vllm_importance_sampling_correction": (Unheard(allowed=(True,), where=("transformers",), why=_NO_VLLM),),
    "vllm_importance_sampling_mode": (Unheard(allowed=("sequence_mask",), where=("transformers",), why=_NO_VLLM),),
    "vllm_max_model_length": (Unheard(allowed=(None,), where=("transformers",), why=_NO_VLLM),),
    "vllm_model_impl": (Unheard(allowed=("vllm",), where=("transformers",), why=_NO_VLLM),),
    "vllm_structured_outputs_regex": (Unheard(allowed=(None,), where=("transformers",), why=_NO_VLLM),),
}
_TRL_SERVER: dict[str, Any] = {
    "vllm_group_port": 51216,
    "vllm_mode": "colocate",
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_tensor_parallel_size": 1,
}
UNHEARD |= {
    name: (
        Unheard(allowed=(default,), where=("ours",), why=_SERVER),
        Unheard(allowed=(default,), where=("transformers",), why=_NO_VLLM),
    )
    for name, default in _TRL_SERVER.items()
}
"""Fields that are refused where they would not be heard."""

OF_TRAINER = {
    "model": "as by TRL: a name, a folder, or a model that is loaded",
    "reward_funcs": "a function, a model or its name, or a list of them: the reward of every domain of `train_dataset`, "
    "weighted by `args.reward_weights`; what says None of a row is left out of its sum; each part is logged as "
    "`domain/<d>/logged/<name>`, their sum as TRL's `reward` and `rewards/domain/mean`",
    "args": "see below; left out, as TRL makes them, without bf16 where there is no accelerator. May stand second, as in "
    "`DomainGRPOTrainer(model, args, domains=[..])`",
    "train_dataset": "its column `domain` says each row's domain; without one all are of one domain, `domain_name` "
    "(`default`). Of a stream the first 10,000 rows are read, or as many as `max_steps` draw where that is more; a list of "
    "rows is taken as well. Text is asked as it stands. Rows that repeat a held-out one are left out, and it is said",
    "eval_dataset": "held-out rows, by a column `domain` or as a dict, a domain each; one without training rows is watched. "
    "Beside it a domain that is trained alone gives up no rows, and is not evaluated where it has none there (refused with "
    "`run`); of several, one that it has no rows of does. "
    "Without it nothing is held out, unless `run` or `eval_strategy` evaluate: then 16 to 256 rows of each domain, a tenth "
    "(at most half) by their prompts, the same at every start, and it is said. Scores outside [0, 1] are mapped by a "
    "function's attribute `range`; without that they are cut, and it is said, or with `run` refused",
    "processing_class": "a tokenizer; a processor of images is refused",
    "reward_processing_classes": "the tokenizers of reward models, one for each reward function",
    "callbacks": "as by TRL",
    "optimizers": "as by TRL",
    "quantization_config": "with `engine: transformers` or `use_vllm`, as is a policy that is quantized on disk, loaded so, "
    "or so by `model_init_kwargs`; refused with an engine of ours, which would sample from weights that are not quantized, "
    "and with `run`, whose `final/` is merged",
    "peft_config": "as by TRL, merged for an engine of ours at each sync; what cannot be merged is refused",
    "tools": "of every domain of `train_dataset`",
    "rollout_func": "as by TRL, for one domain that is trained: it samples in the place of `engine`, held-out rows too, and "
    "what it returns beside tokens and `env_mask` goes to the rewards. Refused beside several such domains, an engine of "
    "ours, `pool`, `tools`, `environment_factory`, teachers and greedy evaluation. Completions have no seeds, and what it "
    "samples with is not checked to follow the weights, but for TRL's engine (`use_vllm`) with `run`",
    "environment_factory": "of every domain of `train_dataset`; a dict by the column `environment`, a domain each where "
    "there is no column `domain`. Without `train_dataset`, `reset` gives the prompts of as many rows as `max_steps` draw",
}
"""Arguments of TRL's GRPOTrainer, in its order, and what becomes of each."""

ENGINES_OWN = ("detokenize", "flat_logprobs", "logprobs", "max_tokens", "n", "output_kind", "prompt_logprobs", "seed")
"""What `generation_kwargs` must leave to an engine of ours."""

GENERATION = frozenset(
    """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bad_words_ids
    begin_suppress_tokens bos_token_id cache_config cache_implementation compile_config constraints
    continuous_batching_config decoder_start_token_id disable_compile diversity_penalty do_sample dola_layers
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id guidance_scale is_assistant
    length_penalty low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens max_time min_length
    min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_logits output_scores pad_token_id penalty_alpha
    prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
    return_dict_in_generate sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind temperature
    token_healing top_h top_k top_p typical_p use_cache use_mtp watermarking_config
    """.split()  # noqa: SIM905
)
"""Fields of Transformers' GenerationConfig, which drops others without a word."""

NOT_WITH_TRANSFORMERS = {
    "num_return_sequences": "there is one completion a row",
    "return_dict_in_generate": "TRL takes the tokens alone",
    "stop_strings": "TRL hands over no tokenizer to find them with; an engine of ours hears `stop`",
}
"""What `generation_kwargs` must leave out where Transformers generates, and why."""


def complaints(
    value_of: Callable[[str], Any], *, sampler: Literal["ours", "transformers", "trl"], has_run: bool
) -> Iterator[tuple[str, str]]:
    """Yield the fields that would not be heard, each with what is wrong; `value_of` returns the value of a field."""
    places = {"always", sampler, *(("run",) if has_run else ())}
    for name, kinds in UNHEARD.items():
        for kind in kinds:
            if places.intersection(kind.where) and (value := value_of(name)) not in kind.allowed:
                yield name, f"{name}={value!r}{_WORDS[kind.where[0]]}: {kind.why}"
    given = value_of("generation_kwargs")
    for what in _of_generation(sorted(given) if isinstance(given, Mapping) else [], sampler):
        yield "generation_kwargs", f"generation_kwargs.{what}"


def _of_generation(names: list[str], sampler: str) -> Iterator[str]:
    if sampler == "ours":
        yield from (f"{name} with an engine of ours: it is the engine's own" for name in names if name in ENGINES_OWN)
    elif sampler == "transformers":
        unknown = dict.fromkeys(set(names) - GENERATION, "no field of Transformers' GenerationConfig")
        refused = unknown | NOT_WITH_TRANSFORMERS
        yield from (f"{name} without vLLM: {refused[name]}" for name in names if name in refused)


_WORDS = {
    "always": "",
    "run": " with run=",
    "ours": " without use_vllm",
    "transformers": " without vLLM",
    "trl": " with use_vllm",
}


def sampler_of(args: Any, engine: Any) -> Literal["ours", "transformers", "trl"]:
    """Return what samples. Raises ValueError for two at once."""
    if args.use_vllm and engine not in ("vllm", "transformers"):
        raise ValueError(f"engine={engine!r:.60} and use_vllm=True exclude each other; leave out one")
    return "trl" if args.use_vllm else "transformers" if engine == "transformers" else "ours"


def refuse_unsampled(engine: Any, args: Any, *, quantized: str | None, has_run: bool) -> None:
    """Raise ValueError for arguments of TRL's trainer that what samples would not hear.

    `quantized` says by what the policy is, None where it is not.
    """
    if quantized is not None and has_run:
        raise ValueError(f"{quantized} with run=: its final/ is merged, which quantized weights cannot be")
    if quantized is not None and sampler_of(args, engine) == "ours":
        raise ValueError(
            f"{quantized} with engine={engine!r:.60}: it would sample from weights that are not quantized; give "
            "engine='transformers', or use_vllm=True"
        )
    _refuse_no_kernels(args)


def _refuse_no_kernels(args: Any) -> None:
    """Raise ValueError for hub kernels where nothing could run them; on a CPU Transformers would leave them out unsaid."""
    given = args.model_init_kwargs if isinstance(args.model_init_kwargs, Mapping) else {}
    if not given.get("use_kernels"):
        return
    missing = "" if find_spec("kernels") else "the package kernels is not installed"
    if args.device.type == "cpu":
        missing = "kernels of the hub are for GPUs, and there is none here"
    if missing:
        raise ValueError(f"model_init_kwargs.use_kernels={given['use_kernels']!r}: {missing}; leave it out")


def refuse_unheard(args: Any, *, engine: Any, has_run: bool) -> None:
    """Raise ValueError naming every field of TRL's arguments that nothing would hear."""
    value_of = lambda name: getattr(args, name)  # noqa: E731
    if found := [what for _, what in complaints(value_of, sampler=sampler_of(args, engine), has_run=has_run)]:
        raise ValueError("; ".join(found))
