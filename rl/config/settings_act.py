"""When each setting acts: one that needs another one is warned about where it is given without it.

Every field of `RolloutConfig` and `DenoisingConfig` is in one of three places: `ALWAYS`, a table of
`Acts` (which other setting it needs), or `NEVER` (a field of `TrainingArguments` that does nothing
here). `tests/rl/config/test_settings_act.py` walks the fields, so a new one has to be put in its place.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from rl.config.methods import METHODS, method_of


@dataclass(frozen=True)
class Acts:
    """The condition under which a setting acts."""

    when: Callable[[Any], bool]
    """Of the settings, whether it acts."""
    needs: str
    """What to write for it to act, naming the other setting."""
    unset: tuple[Any, ...] = ()
    """Values that count as not given, beside the default."""


def _is(name: str, *values: Any, unset: tuple[Any, ...] = ()) -> Acts:
    """Acts while setting `name` has one of these values."""
    words = " or ".join(str(value) for value in values)
    return Acts(lambda c: getattr(c, name) in values, f"{name}: {words}", unset)


def _not(name: str, value: Any, needs: str, unset: tuple[Any, ...] = ()) -> Acts:
    """Acts while setting `name` is anything but this value."""
    return Acts(lambda c: _plain(getattr(c, name)) != value, needs, unset)


def _on(name: str, needs: str) -> Acts:
    """Acts while setting `name` is on: neither None nor 0 nor False nor "none"."""
    return Acts(lambda c: getattr(c, name) not in (None, 0, False, "none"), needs)


def _reads_posterior(c: Any) -> bool:
    return c.stopping in ("early", "early_unbiased") or any(
        method_of(c, stage).reads_success for stage in ("selector", "allocator")
    )


def _drops_rows(c: Any) -> bool:
    return (
        c.down_sampling != "none"
        or c.pilot_use == "discard"
        or getattr(c, "branch_threshold", None) is not None
    )


def _strategy(name: str, value: str) -> Acts:
    """Acts while a strategy of transformers, which may be an enumeration, has this value."""
    return Acts(lambda c: _plain(getattr(c, name)) == value, f"{name}: {value}")


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


_BAND = _is("selector", "band", "static_band")
_GVM = _is("allocator", "gvm")
_D3S = _is("down_sampling", "d3s", "d3s_two_stage")
_TOKENS = _on("token_selection", "token_selection: d3s or entropy")
_REFILL = _on("refill", "refill: true")
_POSTERIOR = Acts(
    _reads_posterior,
    "a selector or allocator other than uniform, or stopping: early, that reads the posterior",
)
_CORRECTION = _on("importance_correction", "importance_correction other than none")
_COLOCATED = Acts(
    lambda c: c.engine == "vllm" and c.vllm_mode == "colocate",
    "engine: vllm with vllm_mode: colocate",
)
_SERVER = Acts(
    lambda c: c.engine == "vllm" and c.vllm_mode == "server", "engine: vllm with vllm_mode: server"
)
_BUDGETS = _not("allocator", "uniform", "an allocator other than uniform", unset=(1,))
_HAPO = Acts(
    lambda c: c.loss == "hapo" or bool(c.adaptive_temperature_tau),
    "loss: hapo, or adaptive_temperature_tau above 0",
)
_MOVING = _on("sync_ref_model", "sync_ref_model: true")
_STD = Acts(
    lambda c: any(
        "std_eps" in method_of(c, stage).settings
        for stage in ("advantage", "down_sampling", "multi_objective_aggregation")
    ),
    "an advantage that divides by a std, such as grpo",
)
_STRATIFIED = _is("advantage", "stratified")

ACTS: dict[str, Acts] = {
    # where rollouts go
    "selection_score": _is("selector", "vade", "posterior_mean", "diverse"),
    "selection_candidates": _is("selector", "vade", "mopps", "diverse"),
    "selection_target": _is("selector", "mopps"),
    "selection_column": _is(
        "selector", *(n for n, m in METHODS["selector"].items() if "selection_column" in m.needs)
    ),
    "selection_gamma": _is("selector", "diverse"),
    **dict.fromkeys(("band_low", "band_high", "band_short"), _BAND),
    "allocation_scale": _is("allocator", "neyman", "cost_aware", "leave_one_out", "dr_grpo"),
    **dict.fromkeys(("budget_min", "budget_max"), _BUDGETS),
    **dict.fromkeys(("gvm_alpha", "gvm_beta", "gvm_gradient_norm"), _GVM),
    **dict.fromkeys(
        ("pilot_estimate", "pilot_use"), _on("pilot_rollouts", "pilot_rollouts of at least 1")
    ),
    "stopping_wave": _on("stopping", "stopping other than none"),
    "stopping_needed": _is("stopping", "positive", "balanced", unset=(1,)),
    "stopping_threshold": _is("stopping", "early", "early_unbiased"),
    "stopping_rho": _is("stopping", "early_unbiased"),
    **dict.fromkeys(
        ("refill_max_draws", "refill_wave", "refill_at_cap", "refill_max_age"), _REFILL
    ),
    **dict.fromkeys(("posterior_decay_chosen", "posterior_decay_rest"), _POSTERIOR),
    # which rows train
    **dict.fromkeys(("row_fraction_initial", "row_fraction_final"), _D3S),
    "rows_per_prompt": _is(
        "down_sampling", *(n for n, m in METHODS["down_sampling"].items() if m.needs)
    ),
    "weight_rows": Acts(_drops_rows, "down_sampling, or another setting that drops rows"),
    **dict.fromkeys(
        ("token_fraction_initial", "token_fraction_final", "token_scope", "token_denominator"),
        _TOKENS,
    ),
    # generation
    **dict.fromkeys(("hapo_quantile", "hapo_sign"), _HAPO),
    "generation_batch_size": _is("engine", "transformers"),
    "vllm_mode": _is("engine", "vllm"),
    **dict.fromkeys(
        (
            *("vllm_server_base_url", "vllm_server_timeout", "vllm_server_host"),
            *("vllm_server_port", "vllm_group_port"),
        ),
        _SERVER,
    ),
    **dict.fromkeys(
        (
            *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_enable_sleep_mode"),
            "vllm_tensor_parallel_size",
        ),
        _COLOCATED,
    ),
    # learning
    **dict.fromkeys(("stratum_alpha", "stratum_fallback"), _STRATIFIED),
    **dict.fromkeys(("std_correction", "std_eps"), _STD),
    **dict.fromkeys(("kl", "kl_rows"), _on("beta", "beta above 0")),
    "kl_ratio": Acts(
        lambda c: bool(c.beta) and c.kl == "k3_weighted", "beta above 0 and kl: k3_weighted"
    ),
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), _MOVING),
    **dict.fromkeys(("importance_cap", "importance_floor"), _CORRECTION),
    "log_floor": _is("objective", "log"),
    "per_device_train_batch_size": Acts(
        lambda c: getattr(c, "micro_batch_tokens", None) is None,
        "micro_batch_tokens: null, which counts tokens instead of rows",
    ),
    "completions_rows": _on("completions_every", "completions_every of at least 1"),
    # of TrainingArguments
    "num_train_epochs": Acts(lambda c: c.max_steps < 1, "max_steps: -1"),
    "warmup_steps": _not(
        "lr_scheduler_type",
        "constant",
        "lr_scheduler_type: constant_with_warmup (constant, the default here, has no warm-up)",
    ),
    "optim_target_modules": Acts(
        lambda c: any(word in _plain(c.optim) for word in ("galore", "apollo")),
        "optim with galore or apollo in its name",
    ),
    "eval_steps": _strategy("eval_strategy", "steps"),
    "eval_delay": _strategy("eval_strategy", "steps"),
    "save_steps": _strategy("save_strategy", "steps"),
    "save_total_limit": Acts(
        lambda c: _plain(c.save_strategy) != "no", "save_strategy: steps or best"
    ),
    "logging_steps": _strategy("logging_strategy", "steps"),
    "include_num_input_tokens_seen": Acts(
        lambda _: False,
        "a data loader of tokens; the ledger counts them here, see tokens_drawn",
        unset=(False,),  # what parsers make of its default, no
    ),
    "load_best_model_at_end": Acts(
        lambda c: _plain(c.eval_strategy) != "no" and _plain(c.save_strategy) != "no",
        "eval_strategy: steps and save_strategy: steps",
    ),
    "liger_kernel_config": _on("use_liger_kernel", "use_liger_kernel: true"),
    **dict.fromkeys(
        (
            *("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_always_push"),
            "hub_revision",
        ),
        _on("push_to_hub", "push_to_hub: true"),
    ),
}
"""Setting of `RolloutConfig` -> when it acts."""

ACTS_DENOISING: dict[str, Acts] = {
    "history_steps": _is("baseline", "history", "buffer"),
    "sibling_within_share": _POSTERIOR,
    "kl": Acts(
        lambda _: False, "a language model; kl_reduction says which KL of a diffusion model"
    ),
}
"""The same for what `DenoisingConfig` adds, or uses otherwise."""

ALWAYS_DENOISING: tuple[str, ...] = (
    *("plan", "validation_steps", "max_evaluations", "guidance_scale", "height", "width"),
    *("baseline", "credit_scale", "advantage_clip", "branch_threshold", "logprob_reduction"),
    *("noise_weight", "ema_decay", "images_every", "shift", "shared_start_noise"),
    *("reward_device", "kl_reduction", "edge_weight"),
    *("negative_prompt", "negative_prompt_column", "pipeline_kwargs"),
)
"""Settings of `DenoisingConfig` that act whatever the others are, or are refused where they do not."""

_LOADER = "the planner decides what a step trains on, and no data loader reads it"
_LABELS = "the loss is of rollouts, not of labels"
_EVALUATION = "validation rolls out: see eval_rollouts_per_prompt and generation_batch_size"

NEVER: dict[str, str] = {
    "label_smoothing_factor": _LABELS,
    "label_names": _LABELS,
    "average_tokens_across_devices": "the loss's denominator is always that of all processes",
    "torch_empty_cache_steps": "the step is not the base class's",
    "data_seed": "seed decides all draws",
    "do_predict": "there is no prediction loop",
    "length_column_name": _LOADER,
    "train_sampling_strategy": _LOADER,
    **dict.fromkeys(
        (
            *("dataloader_drop_last", "dataloader_num_workers"),
            *("dataloader_persistent_workers", "dataloader_prefetch_factor"),
            *("dataloader_multiprocessing_context", "dataloader_in_order"),
        ),
        _LOADER,
    ),
    **dict.fromkeys(
        (
            *("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only"),
            *("eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics"),
            *("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
        ),
        _EVALUATION,
    ),
}
"""Field of `TrainingArguments` that does nothing here -> why."""

ALWAYS: tuple[str, ...] = (
    # where rollouts go
    *("trainer", "selector", "prompts_per_step", "rollouts_per_prompt", "rollouts_multiple_of"),
    *("allocator", "pilot_rollouts", "stopping", "refill", "success_above"),
    # which rows train
    *("down_sampling", "token_selection", "mask_truncated_completions"),
    # generation
    *("max_prompt_length", "overlong_prompts", "id_column", "duplicates", "chat_template_kwargs"),
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("generation_kwargs", "stop", "adaptive_temperature_tau", "engine", "skip_special_tokens"),
    # reward
    *("reward_weights", "reward_timeout", "reward_retries", "max_failed_share"),
    # learning; clips that a loss does not take are refused
    *("advantage", "loss", "objective", "length_weight", "epsilon", "epsilon_high", "delta"),
    *("scale_rewards", "multi_objective_aggregation", "sync_ref_model", "entropy_coef"),
    *("top_entropy_quantile", "ratio_cap", "beta", "reward_kl", "old_logprobs"),
    *("importance_correction", "max_mismatch"),
    *("updates_per_step", "num_iterations", "micro_batch_tokens", "fused_logprobs"),
    *("max_generated_tokens", "max_empty_steps"),
    # evaluation and tracking
    *("eval_rollouts_per_prompt", "completions_every", "if_run_exists"),
    # of TrainingArguments
    *("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "fp16", "tf32", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel"),
    *("neftune_noise_alpha", "auto_find_batch_size", "gradient_accumulation_steps", "use_cache"),
    *("logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("eval_strategy", "eval_on_start", "save_only_model", "save_strategy", "save_on_each_node"),
    *("enable_jit_checkpoint", "push_to_hub", "metric_for_best_model"),
    *("greater_is_better", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    *("full_determinism", "seed", "use_cpu", "accelerator_config", "parallelism_config"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed"),
    *("debug", "skip_memory_metrics", "resume_from_checkpoint", "local_rank"),
    # what they ask for is always so: every column reaches the rewards, and a run trains and validates
    *("remove_unused_columns", "do_train", "do_eval"),
    "dataloader_pin_memory",  # which the base class turns off by itself without a GPU
)
"""Settings that act whatever the others are or `rl/config/checks.py` refuses."""


def idle_settings(config: Any, table: Mapping[str, Acts]) -> dict[str, str]:
    """Settings that were given and do not act -> what they need, or why they never act.

    A value that equals the default counts as not given.
    """
    idle = {}
    for setting in fields(config):
        name, value = setting.name, getattr(config, setting.name)
        acts, never = table.get(name), NEVER.get(name) if table is ACTS else None
        if (acts is None and never is None) or _is_default(setting, value):
            continue
        if never is not None:
            idle[name] = never
        elif acts is not None and value not in acts.unset and not acts.when(config):
            idle[name] = f"it needs {acts.needs}"
    return idle


def warn_of_idle(config: Any, table: Mapping[str, Acts] = ACTS) -> None:
    """One warning for each setting of `config` that was given and has no effect, on one process."""
    if os.environ.get("RANK", "0") != "0":
        return
    for name, why in idle_settings(config, table).items():
        warnings.warn(f"{name}={getattr(config, name)!r} has no effect: {why}", stacklevel=4)


def _is_default(setting: Any, value: Any) -> bool:
    default = setting.default
    if setting.default_factory is not MISSING:
        default = setting.default_factory()
    return default is not MISSING and (value is default or value == default)
