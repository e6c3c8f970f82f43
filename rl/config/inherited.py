"""Declarations of the fields that settings have from `transformers.TrainingArguments` as they are.

A field that a later version of transformers brings is in none of these lists, and the test that asks
every setting to be classified fails until it is.
"""

from __future__ import annotations

from rl.config.declare import (
    LENGTH,
    NOTHING,
    ROLLOUTS,
    TRAINING,
    Declaration,
    Only,
    on,
    plain,
)
from rl.config.settings import RUN, UPDATE, WATCH

TRAINER = "transformers' trainer"
"""The stage of what is not of the pipeline."""


def _strategy(name: str, value: str) -> Only:
    """Acts while a strategy of transformers, which may be an enumeration, has this value."""
    return Only(lambda c, _: plain(getattr(c, name)) == value, f"{name}: {value}")


_PUSHED = on("push_to_hub", "push_to_hub: true")
_LOADER = "the planner decides what a step trains on, and no data loader reads it"
_LABELS = "the loss is of rollouts, not of labels"
_EVALUATION = "validation rolls out: see eval_rollouts_per_prompt and generation_batch_size"

ONLY: dict[str, Only] = {
    "per_device_train_batch_size": Only(
        lambda c, _: getattr(c, "micro_batch_tokens", None) is None,
        "micro_batch_tokens: null, which counts tokens instead of rows",
    ),
    "num_train_epochs": Only(lambda c, _: c.max_steps < 1, "max_steps: -1"),
    "warmup_steps": Only(
        lambda c, _: plain(c.lr_scheduler_type) != "constant",
        "lr_scheduler_type: constant_with_warmup (constant, the default here, has no warm-up)",
    ),
    "optim_target_modules": Only(
        lambda c, _: any(word in str(plain(c.optim)) for word in ("galore", "apollo")),
        "optim with galore or apollo in its name",
    ),
    "eval_steps": _strategy("eval_strategy", "steps"),
    "eval_delay": _strategy("eval_strategy", "steps"),
    "save_steps": _strategy("save_strategy", "steps"),
    "save_total_limit": Only(
        lambda c, _: plain(c.save_strategy) != "no", "save_strategy: steps or best"
    ),
    "include_num_input_tokens_seen": Only(
        lambda *_: False,
        "a data loader of tokens; the ledger counts them here, see tokens_drawn",
        unset=(False,),  # what parsers make of its default, no
    ),
    "load_best_model_at_end": Only(
        lambda c, _: plain(c.eval_strategy) != "no" and plain(c.save_strategy) != "no",
        "eval_strategy: steps and save_strategy: steps",
    ),
    "liger_kernel_config": on("use_liger_kernel", "use_liger_kernel: true"),
    **dict.fromkeys(
        (
            *("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_always_push"),
            "hub_revision",
        ),
        _PUSHED,
    ),
}
"""Fields that act beside another setting alone."""

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
"""Field that does nothing here -> why."""

GROUPS: dict[tuple[str, str], tuple[str, ...]] = {
    (RUN, ROLLOUTS): ("seed",),
    (RUN, LENGTH): ("max_steps", "num_train_epochs"),
    (RUN, NOTHING): ("output_dir", "run_name", "resume_from_checkpoint"),
    (UPDATE, TRAINING): (
        *("lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    ),
    (UPDATE, NOTHING): ("per_device_train_batch_size",),
    (WATCH, NOTHING): (
        *("report_to", "eval_strategy", "eval_steps", "eval_on_start", "save_strategy"),
        *("save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
    ),
    (TRAINER, TRAINING): (
        *("gradient_accumulation_steps", "fp16", "tf32", "torch_compile", "torch_compile_backend"),
        *("torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "use_cache"),
        *("neftune_noise_alpha", "auto_find_batch_size", "ignore_data_skip", "full_determinism"),
        *(
            "use_cpu",
            "accelerator_config",
            "parallelism_config",
            "fsdp",
            "fsdp_config",
            "deepspeed",
        ),
        # what they ask for is always so: every column reaches the rewards
        *("remove_unused_columns", "debug"),
        *("average_tokens_across_devices", "label_smoothing_factor", "bf16_full_eval"),
        *("fp16_full_eval", "torch_empty_cache_steps", "prediction_loss_only"),
        *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("batch_eval_metrics", "data_seed", "label_names", "train_sampling_strategy"),
        "length_column_name",
    ),
    (TRAINER, NOTHING): (
        *("activation_checkpointing_kwargs", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "logging_strategy", "logging_first_step"),
        *("log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_delay"),
        *("save_only_model", "save_on_each_node", "enable_jit_checkpoint", "push_to_hub"),
        *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        *("hub_revision", "greater_is_better", "restore_callback_states_from_checkpoint"),
        # the base class turns it off by itself without a GPU
        "dataloader_pin_memory",
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_static_graph", "ddp_backend", "ddp_timeout", "skip_memory_metrics"),
        # a run always trains and validates
        *("do_train", "do_eval", "local_rank", "include_num_input_tokens_seen"),
        *("per_device_eval_batch_size", "include_for_metrics", "dataloader_drop_last"),
        *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
        *("dataloader_multiprocessing_context", "dataloader_in_order", "do_predict"),
    ),
}
"""(stage, what it decides) -> fields."""

INHERITED: dict[str, Declaration] = {
    name: Declaration(stage=stage, decides=decides, only=ONLY.get(name), never=NEVER.get(name, ""))
    for (stage, decides), names in GROUPS.items()
    for name in names
}
"""Every field of `TrainingArguments` that settings here do not declare anew."""
