"""The fields of TRL 1.16's GRPOConfig, committed so that a recipe is checked without importing TRL.

A contract test compares the list with the installed TRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from polyphony.curricula.declarations import MOST, near

OURS = {
    "output_dir": "--out",
    "resume_from_checkpoint": "--resume",
    "eval_strategy": "eval.every",
    "eval_steps": "eval.every",
    "eval_on_start": "eval.every",
    "do_eval": "eval.every",
    "num_generations_eval": "eval.samples",
    "save_strategy": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "save_only_model": "checkpoint.every",
    "load_best_model_at_end": "checkpoint.keep (the best by worst domain is always kept)",
    "metric_for_best_model": "checkpoint.keep (the best by worst domain is always kept)",
    "ignore_data_skip": "nothing (slots make it true)",
    "shuffle_dataset": "curriculum.scheduler",
    "train_sampling_strategy": "curriculum.scheduler",
    "reward_weights": "domains.<name>.reward",
    "chat_template_kwargs": "domains.<name>.chat_template_kwargs",
}
"""Fields that a recipe sets elsewhere, and where."""

GROUP_SIZE = 8
"""Completions a group where the recipe does not say: the default of `num_generations`."""

_WHOLE = """
    data_seed? dataloader_num_workers dataloader_prefetch_factor? ddp_bucket_cap_mb? ddp_timeout
    eval_accumulation_steps? generation_batch_size? gradient_accumulation_steps local_rank
    max_completion_length? max_steps max_tool_calling_iterations? num_completions_to_print? num_generations?
    num_generations_eval? num_iterations per_device_eval_batch_size per_device_train_batch_size
    ref_model_sync_steps save_total_limit? seed steps_per_generation? top_k torch_empty_cache_steps?
    vllm_group_port vllm_max_model_length? vllm_server_port vllm_tensor_parallel_size
"""
_REAL = """
    adam_beta1 adam_beta2 adam_epsilon beta delta? entropy_coef entropy_coef_delta entropy_coef_max
    entropy_coef_min entropy_target epsilon epsilon_high? eval_delay eval_steps? label_smoothing_factor
    learning_rate logging_steps max_grad_norm min_p? neftune_noise_alpha? num_train_epochs
    off_policy_mask_threshold? ref_model_mixup_alpha repetition_penalty router_aux_loss_coef?
    sapo_temperature_neg sapo_temperature_pos save_steps temperature top_entropy_quantile top_p vespo_k_neg
    vespo_k_pos vespo_lambda_neg vespo_lambda_pos vllm_gpu_memory_utilization vllm_importance_sampling_cap?
    vllm_importance_sampling_clip_max? vllm_importance_sampling_clip_min? vllm_server_timeout warmup_steps
    weight_decay
"""
_TRUTH = """
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16? bf16_full_eval
    cast_lm_head_to_fp32 dataloader_drop_last dataloader_in_order dataloader_persistent_workers
    dataloader_pin_memory ddp_broadcast_buffers? ddp_find_unused_parameters? ddp_static_graph? disable_dropout
    disable_tqdm? do_eval do_predict do_train ds3_gather_for_generation enable_jit_checkpoint
    eval_do_concat_batches eval_on_start eval_use_gather_object fp16 fp16_full_eval full_determinism
    gradient_checkpointing greater_is_better? hub_always_push hub_private_repo? ignore_data_skip
    load_best_model_at_end log_completions log_multimodal log_on_each_node log_unique_prompts logging_first_step
    logging_nan_inf_filter mask_truncated_completions prediction_loss_only push_to_hub remove_unused_columns?
    restore_callback_states_from_checkpoint save_on_each_node save_only_model shuffle_dataset?
    skip_memory_metrics sync_ref_model tf32? torch_compile trust_remote_code use_adaptive_entropy
    use_bias_correction_kl use_cache use_cpu use_liger_kernel use_transformers_continuous_batching
    use_transformers_paged use_vllm vllm_enable_sleep_mode vllm_importance_sampling_correction
"""
_OTHER = """
    accelerator_config cache_implementation chat_template_kwargs dataloader_multiprocessing_context ddp_backend
    debug deepspeed eval_strategy fsdp fsdp_config generation_kwargs gradient_checkpointing_kwargs hub_model_id
    hub_revision hub_strategy hub_token importance_sampling_level include_for_metrics
    include_num_input_tokens_seen label_names length_column_name liger_kernel_config log_completions_hub_repo
    log_level log_level_replica logging_strategy loss_type lr_scheduler_kwargs lr_scheduler_type
    metric_for_best_model model_init_kwargs multi_objective_aggregation optim optim_args optim_target_modules
    output_dir pad_to_multiple_of parallelism_config project report_to resume_from_checkpoint reward_weights
    run_name save_strategy scale_rewards torch_compile_backend torch_compile_mode trackio_bucket_id
    trackio_space_id trackio_static_space_id train_sampling_strategy transformers_continuous_batching_config
    vllm_importance_sampling_mode vllm_mode vllm_model_impl vllm_server_base_url vllm_server_host
    vllm_structured_outputs_regex
"""

GRPO_KINDS: dict[str, tuple[str, bool]] = {
    name.rstrip("?"): (kind, name.endswith("?"))
    for kind, names in (("a whole number", _WHOLE), ("a finite number", _REAL), ("true or false", _TRUTH), ("", _OTHER))
    for name in names.split()
}
"""What each field takes, in words, and whether null as well; no words: left to TRL. `?` marks null in the lists."""

_MEANT = """
    learning_rate lr; num_train_epochs epochs num_epochs n_epochs; max_steps steps num_steps
    total_steps train_steps; per_device_train_batch_size batch_size train_batch_size mini_batch_size micro_batch_size bs
    per_gpu_train_batch_size per_device_batch_size; gradient_accumulation_steps ga grad_accum grad_accumulation_steps
    accumulation_steps gradient_accumulation; num_generations group_size n_samples rollout_n n num_samples num_rollouts;
    max_completion_length max_new_tokens max_tokens max_length response_length max_response_length; beta kl kl_coef kl_coeff
    kl_beta init_kl_coef; epsilon epsilon_low clip cliprange clip_range clip_ratio clip_eps clip_epsilon; epsilon_high
    clip_high clip_ratio_high; temperature temp; max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clipping;
    warmup_steps warmup warmup_ratio num_warmup_steps; weight_decay wd; lr_scheduler_type lr_scheduler schedule; optim
    optimizer; entropy_coef ent_coef entropy_bonus; use_cpu no_cuda; seed random_seed; vllm_max_model_length max_model_len
    vllm_max_model_len; vllm_gpu_memory_utilization gpu_memory_utilization vllm_gpu_memory; eval.every evaluation_strategy
    eval_every eval_interval; eval.samples eval_samples num_generations_eval; checkpoint.every save_every save_interval;
    checkpoint.keep save_total; domains.<name>.reward reward_funcs reward_func reward_fn reward_model;
    domains.<name>.reward.range range reward_range; domains.<name>.train
    train_dataset dataset dataset_name train_file; domains.<name>.heldout eval_dataset test_dataset eval_file;
    tracking.wandb.project wandb_project; lora peft_config peft lora_config; lora.r lora_r lora_rank; lora.alpha lora_alpha;
    domains.<name>.system_prompt system_prompt; scale_rewards normalize_rewards; model model_name_or_path model_name
    model_id; rollouts.tensor_parallel tensor_parallel_size; grpo.model_init_kwargs.use_kernels use_kernels hub_kernels
"""
MEANT = {name: key for line in _MEANT.split(";") for key, *names in [line.split()] for name in names}
"""What others, or TRL once, call a key, and what it is here; one without a dot or of TRL stands in `grpo`."""

GONE = {
    "max_prompt_length": "TRL has it no more: no prompt is cut, one that does not fit into the context is refused",
    "truncate_prompt": "no prompt is cut, one that does not fit into the context is refused",
    "activation_offloading": "TRL has it for SFT, DPO, KTO and reward models, not for GRPO; gradient_checkpointing: true "
    "keeps less",
}
"""Fields that TRL once had, or has elsewhere, and that nothing stands for."""

_LIMITS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "above 0",
        lambda v: v > 0,
        """
        ddp_bucket_cap_mb ddp_timeout delta dataloader_prefetch_factor eval_accumulation_steps generation_batch_size
        gradient_accumulation_steps logging_steps max_completion_length num_generations num_iterations num_train_epochs
        off_policy_mask_threshold per_device_eval_batch_size per_device_train_batch_size ref_model_sync_steps
        repetition_penalty sapo_temperature_neg sapo_temperature_pos steps_per_generation temperature
        torch_empty_cache_steps vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_max_model_length
        vllm_server_timeout vllm_tensor_parallel_size
        """,
    ),
    (
        "at least 0",
        lambda v: v >= 0,
        """
        adam_epsilon beta data_seed dataloader_num_workers entropy_coef_delta entropy_target epsilon epsilon_high
        eval_delay max_grad_norm max_tool_calling_iterations neftune_noise_alpha num_completions_to_print
        router_aux_loss_coef seed vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
        vllm_importance_sampling_clip_min weight_decay
        """,
    ),
    (
        "in [0, 1]",
        lambda v: 0 <= v <= 1,
        "label_smoothing_factor learning_rate min_p ref_model_mixup_alpha top_entropy_quantile",
    ),
    ("at least 0, from 1 on a whole number", lambda v: 0 <= v < 1 or v == int(v) >= 1, "warmup_steps"),
    ("in (0, 1]", lambda v: 0 < v <= 1, "top_p vllm_gpu_memory_utilization"),
    ("in [0, 1)", lambda v: 0 <= v < 1, "adam_beta1 adam_beta2"),
    ("at least -1", lambda v: v >= -1, "local_rank top_k"),
    ("at least 1, or -1 for num_train_epochs", lambda v: v >= 1 or v == -1, "max_steps"),
    ("in 1..65535", lambda v: 1 <= v <= 65535, "vllm_group_port vllm_server_port"),
)
LIMITS = {name: (words, fits) for words, fits, names in _LIMITS for name in names.split()}
"""The range of each number that has one beside `MOST`, in words and as a test."""

ONE_OF = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "lr_scheduler_type": tuple(
        """
        linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt reduce_lr_on_plateau
        cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay greedy
        """.split()  # noqa: SIM905
    ),
}
"""What TRL tells apart only while it computes the first loss, and what Transformers says without the field's name."""

_SHAPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    (
        "a mapping or null",
        (dict,),
        """
        generation_kwargs gradient_checkpointing_kwargs liger_kernel_config lr_scheduler_kwargs model_init_kwargs
        transformers_continuous_batching_config
        """,
    ),
    ("a mapping, a file or null", (dict, str), "deepspeed fsdp_config"),
    (
        "text or null",
        (str,),
        """
        cache_implementation dataloader_multiprocessing_context ddp_backend hub_model_id hub_revision hub_strategy hub_token
        length_column_name log_completions_hub_repo log_level log_level_replica logging_strategy multi_objective_aggregation
        optim optim_args project run_name torch_compile_backend torch_compile_mode trackio_bucket_id trackio_space_id
        trackio_static_space_id vllm_importance_sampling_mode vllm_mode vllm_model_impl vllm_server_base_url
        vllm_server_host vllm_structured_outputs_regex
        """,
    ),
    (
        "text, a list of texts or null",
        (str, list),
        "debug include_for_metrics label_names optim_target_modules report_to",
    ),
    ("true, false, text, a list of texts or null", (bool, str, list), "fsdp"),
    ("a whole number or null", (int,), "pad_to_multiple_of"),
)
SHAPES = {name: (words, kinds) for words, kinds, names in _SHAPES for name in names.split()}
"""What else a field takes, in words and as types: TRL's own annotations are wider."""


def complaint(name: str, value: object) -> str | None:
    """Return what a field must be where `value` is not that, else None."""
    value = getattr(value, "value", value)  # Transformers' own defaults are members of enumerations
    if name in ONE_OF and not any(type(value) is type(one) and value == one for one in ONE_OF[name]):
        words = [str(one).lower() if isinstance(one, bool) else one for one in ONE_OF[name]]
        meant = near(value, words)
        return f"one of {', '.join(words)}{f' ({meant})' if meant else ''}"
    if name in SHAPES and value is not None and not _has_shape(value, SHAPES[name][1]):
        return SHAPES[name][0]
    kind, may_be_null = GRPO_KINDS[name]
    may_be_null = may_be_null and name != "num_generations"  # TRL's own type has it, and then divides by it
    if not kind or (value is None and may_be_null):
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits = {"a whole number": is_number and isinstance(value, int), "a finite number": is_number}
    if not fits.get(kind, isinstance(value, bool)):
        return f"{kind}{' or null' if may_be_null else ''}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if name in LIMITS and not LIMITS[name][1](value):
        return LIMITS[name][0]
    return f"at most {MOST:,}" if abs(value) > MOST else None


def _has_shape(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value is of one of the types, a list one of texts, a text not blank."""
    if isinstance(value, list):
        return list in kinds and all(isinstance(one, str) for one in value)
    if isinstance(value, str):
        return str in kinds and bool(value.strip() or not value)
    return type(value) in kinds
