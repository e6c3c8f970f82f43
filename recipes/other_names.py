"""Names that other trainers give to settings, and what they are called here.

Only unknown keys are looked up here, so an entry whose name becomes a setting of ours goes silent.
"""

from __future__ import annotations

NOT_HERE = "has no counterpart here"

TRL: dict[str, tuple[tuple[str, ...], str]] = {
    # name -> the settings of ours that the answer names, and the answer
    "num_generations": (
        ("rollouts_per_prompt", "budget_min", "budget_max"),
        "rollouts_per_prompt (a mean: allocators give prompts more or fewer, from budget_min to "
        "budget_max)",
    ),
    "num_generations_eval": (("eval_rollouts_per_prompt",), "eval_rollouts_per_prompt"),
    "steps_per_generation": (
        ("updates_per_step",),
        "updates_per_step, optimizer updates on one collection of rollouts",
    ),
    "loss_type": (
        ("loss", "length_weight"),
        "loss; bnpo is loss: grpo with length_weight: token_mean",
    ),
    "importance_sampling_level": (
        ("loss",),
        "loss: gspo for sequence, another loss for token",
    ),
    "use_vllm": (("engine",), "engine: vllm (false is engine: transformers)"),
    "vllm_model_impl": ((), NOT_HERE),
    "vllm_structured_outputs_regex": (
        (),
        "not offered: the trainer would not know the probabilities that the pattern leaves",
    ),
    "vllm_importance_sampling_correction": (
        ("importance_correction",),
        "importance_correction: token_truncate, token_mask, sequence_truncate, sequence_mask (with vllm "
        "the default) or none",
    ),
    "vllm_importance_sampling_mode": (("importance_correction",), "importance_correction"),
    "vllm_importance_sampling_clip_max": (("importance_cap",), "importance_cap"),
    "vllm_importance_sampling_cap": (("importance_cap",), "importance_cap"),
    "vllm_importance_sampling_clip_min": (("importance_floor",), "importance_floor"),
    "off_policy_mask_threshold": (
        ("importance_correction", "importance_cap"),
        "not offered by this measure; importance_correction: sequence_mask with importance_cap leaves "
        "out rows by their ratio",
    ),
    "use_bias_correction_kl": (("kl",), "kl: k3_weighted (the default) for true, kl: k3 for false"),
    "cast_lm_head_to_fp32": (("bf16",), "not offered: write bf16: false, or dtype: float32"),
    "disable_dropout": ((), "not needed: dropout is always off"),
    "ds3_gather_for_generation": ((), "not needed: sharded weights are always gathered"),
    "shuffle_dataset": (
        ("selector", "seed"),
        "not needed: selector: uniform visits the prompts in an order drawn by seed, epoch by epoch",
    ),
    "pad_to_multiple_of": ((), NOT_HERE),
    "cache_implementation": ((), "not offered: the engine has a cache of its own"),
    "router_aux_loss_coef": ((), "not offered: there is no auxiliary loss of routers"),
    "use_transformers_continuous_batching": (
        ("generation_batch_size",),
        "not needed: finished rollouts leave the batch; generation_batch_size bounds it",
    ),
    "use_transformers_paged": ((), NOT_HERE),
    "transformers_continuous_batching_config": ((), NOT_HERE),
    "max_tool_calling_iterations": ((), "not offered: no tool is run during a rollout"),
    "log_completions": (
        ("completions_every",),
        "completions_every, the steps between two tables (true is completions_every: 1)",
    ),
    "num_completions_to_print": (("completions_rows",), "completions_rows"),
    "log_unique_prompts": (("completions_rows",), f"{NOT_HERE}; see completions_rows"),
    "wandb_log_unique_prompts": (("completions_rows",), f"{NOT_HERE}; see completions_rows"),
    "log_completions_hub_repo": ((), "not offered: tables go to the run folder and the trackers"),
    "log_multimodal": ((), NOT_HERE),
    "use_adaptive_entropy": (("entropy_coef",), "not offered: entropy_coef stays as it is written"),
    "entropy_coef_min": (("entropy_coef",), "not offered: entropy_coef stays as it is written"),
    "entropy_coef_max": (("entropy_coef",), "not offered: entropy_coef stays as it is written"),
    "entropy_coef_delta": (("entropy_coef",), "not offered: entropy_coef stays as it is written"),
    "entropy_target": (("entropy_coef",), "not offered: entropy_coef stays as it is written"),
    **{
        name: (("loss",), "not offered: loss: sapo has the published temperatures")
        for name in ("sapo_temperature_neg", "sapo_temperature_pos")
    },
    **{
        name: (("loss",), "not offered: loss: vespo has the published constants")
        for name in ("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg")
    },
    "model_init_kwargs": (
        ("dtype", "attn_implementation"),
        "not offered: write dtype and attn_implementation, or give RolloutTrainer a model",
    ),
    # of its scripts, and names of earlier versions
    "reward_funcs": (("rewards",), "rewards, a list of names or path/to/file.py:function"),
    "reward_model_name_or_path": (("rewards",), "rewards"),
    "dataset_train_split": (("dataset_split",), "dataset_split"),
    "dataset_test_split": (("validation_split",), "validation_split, a split of validation_name"),
    "dataset_streaming": ((), "not offered: the planner knows all prompts"),
    "ignore_bias_buffers": ((), NOT_HERE),
    "torch_dtype": (("dtype",), "dtype"),
    "use_liger_loss": (("fused_logprobs",), "fused_logprobs"),
    "max_new_tokens": (("max_completion_length",), "max_completion_length"),
}
"""Of TRL's `GRPOConfig` and scripts."""

TRANSFORMERS: dict[str, tuple[tuple[str, ...], str]] = {
    "evaluation_strategy": (("eval_strategy",), "eval_strategy"),
    "warmup_ratio": (("warmup_steps",), "warmup_steps, where a number below 1 is a share"),
    "no_cuda": (("use_cpu",), "use_cpu"),
    "overwrite_output_dir": (("if_run_exists",), "if_run_exists, or another output_dir"),
    "group_by_length": ((), "not offered: the planner decides what a step trains on"),
    "logging_dir": (("output_dir",), "output_dir, which holds all logs of a run"),
    "batch_size": (
        ("prompts_per_step", "per_device_train_batch_size"),
        "prompts_per_step, or per_device_train_batch_size for the rows of a micro-batch",
    ),
    "lr": (("learning_rate",), "learning_rate"),
    "model": (("model_name_or_path",), "model_name_or_path"),
    "dataset": (("dataset_name",), "dataset_name"),
    "reward": (("rewards",), "rewards"),
}
"""Of earlier versions of transformers, and short forms."""

OTHERS: dict[str, tuple[tuple[str, ...], str]] = {
    # verl, by the last part of the name
    "n": (("rollouts_per_prompt",), "rollouts_per_prompt"),
    "train_batch_size": (("prompts_per_step",), "prompts_per_step"),
    "ppo_mini_batch_size": (("updates_per_step",), "updates_per_step, the number of mini-batches"),
    "ppo_micro_batch_size_per_gpu": (
        ("per_device_train_batch_size",),
        "per_device_train_batch_size",
    ),
    "ppo_max_token_len_per_gpu": (("micro_batch_tokens",), "micro_batch_tokens"),
    "ppo_epochs": (("num_iterations",), "num_iterations"),
    "max_response_length": (("max_completion_length",), "max_completion_length"),
    "clip_ratio": (("epsilon", "epsilon_high"), "epsilon and epsilon_high"),
    "clip_ratio_low": (("epsilon",), "epsilon"),
    "clip_ratio_high": (("epsilon_high",), "epsilon_high"),
    "clip_ratio_c": (("delta",), "delta"),
    "kl_loss_coef": (("beta",), "beta"),
    "kl_coef": (("reward_kl",), "reward_kl"),
    "kl_loss_type": (("kl",), "kl"),
    "adv_estimator": (("advantage",), "advantage"),
    "norm_adv_by_std_in_grpo": (("scale_rewards",), "scale_rewards"),
    "loss_agg_mode": (("length_weight",), "length_weight"),
    "total_epochs": (("num_train_epochs",), "num_train_epochs"),
    "total_training_steps": (("max_steps",), "max_steps"),
    "test_freq": (("eval_steps",), "eval_steps"),
    "save_freq": (("save_steps",), "save_steps"),
    "filter_groups": (("refill",), "refill"),
    "gpu_memory_utilization": (("vllm_gpu_memory_utilization",), "vllm_gpu_memory_utilization"),
    "train_files": (("dataset_name",), "dataset_name"),
    "val_files": (("validation_name",), "validation_name"),
    "prompt_key": (("prompt_column",), "prompt_column"),
    # OpenRLHF
    "n_samples_per_prompt": (("rollouts_per_prompt",), "rollouts_per_prompt"),
    "rollout_batch_size": (("prompts_per_step",), "prompts_per_step"),
    "micro_rollout_batch_size": (("generation_batch_size",), "generation_batch_size"),
    "micro_train_batch_size": (("per_device_train_batch_size",), "per_device_train_batch_size"),
    "generate_max_len": (("max_completion_length",), "max_completion_length"),
    "prompt_max_len": (("max_prompt_length",), "max_prompt_length"),
    "init_kl_coef": (("reward_kl", "beta"), "reward_kl, or beta for a loss"),
    "actor_learning_rate": (("learning_rate",), "learning_rate"),
    "eps_clip": (("epsilon", "epsilon_high"), "epsilon and epsilon_high"),
    "advantage_estimator": (("advantage",), "advantage"),
    "dynamic_filtering": (("refill",), "refill"),
    "pretrain": (("model_name_or_path",), "model_name_or_path"),
    "prompt_data": (("dataset_name",), "dataset_name"),
    "input_key": (("prompt_column",), "prompt_column"),
    "label_key": (("answer_column",), "answer_column"),
    "apply_chat_template": (("conversational",), "conversational"),
    "reward_pretrain": (("rewards",), "rewards"),
    "remote_rm_url": (("rewards",), "rewards"),
}
"""Of verl and OpenRLHF."""

FORMER: dict[str, tuple[tuple[str, ...], str]] = {
    "stopping_wave": (("stopping_round_size",), "stopping_round_size"),
    "refill_wave": (("refill_min_prompts",), "refill_min_prompts"),
}
"""What settings of ours were called before."""


def other_name(name: str) -> str | None:
    """What to write for a setting of another trainer, as the end of a sentence; None if unknown.

    Args:
        name: as it was written; of a dotted name such as actor_rollout_ref.rollout.n its end counts.
    """
    last = name.rsplit(".", 1)[-1]
    for whose, names in (
        ("TRL", TRL),
        ("transformers", TRANSFORMERS),
        ("verl or OpenRLHF", OTHERS),
        ("", FORMER),
    ):
        if last in names:
            answer = names[last][1]
            of = last if names in (TRANSFORMERS, FORMER) else f"{whose}'s {last}"
            if answer.startswith(NOT_HERE):
                return f"{of} {answer}"
            return f"{of} is {answer}" if answer.startswith("not ") else f"for {of} write {answer}"
    return None
