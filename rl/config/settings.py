"""Every setting of a run, documented once and validated together.

`RolloutConfig` adds to `transformers.TrainingArguments` what decides where rollouts go and how they
train. Methods are named in YAML and looked up in the plain tables of `rl/config/methods.py`; a method is
added by one entry there. `trainer: grpo | raft | raft++` is a preset: it fills the fields left unset,
nothing more.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from rl.config.checks import as_mapping, validate
from rl.config.generation_kwargs import apply_generation_kwargs
from rl.config.methods import (
    PRESETS,
    STOPPINGS,
    default_correction,
    least_budget,
    method_of,
    preset_advantage,
)
from rl.config.own import choice
from rl.config.settings_act import warn_of_idle
from samplers.allocation import align_total

DECISIVE = (
    *("seed", "selector", "selection_score", "selection_candidates", "selection_target"),
    *("selection_column", "selection_gamma", "band_low", "band_high", "band_short"),
    *("prompts_per_step", "rollouts_per_prompt", "rollouts_multiple_of", "allocator"),
    *("allocation_scale", "budget_min", "budget_max"),
    *("gvm_alpha", "gvm_beta", "gvm_gradient_norm"),
    *("pilot_rollouts", "pilot_estimate", "pilot_use", "success_above"),
    *("stopping", "stopping_wave", "stopping_needed", "stopping_threshold", "stopping_rho"),
    *("refill", "refill_max_draws", "refill_wave", "refill_at_cap", "refill_max_age"),
    *("posterior_decay_chosen", "posterior_decay_rest"),
    *(
        "temperature",
        "adaptive_temperature_tau",
        "hapo_quantile",
        "hapo_sign",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_completion_length",
        "stop",
    ),
    *("max_prompt_length", "overlong_prompts", "duplicates", "chat_template_kwargs"),
    *("reward_weights", "skip_special_tokens"),
)
"""Settings that decide which rollouts are made; a resumed run must share them."""


def setting(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class RolloutConfig(TrainingArguments):
    """Settings of one run; each is documented at its field (`--help` prints them).

    Fields of `TrainingArguments` keep their meaning, with these readings: one step is one collection
    of rollouts with `updates_per_step` optimizer updates; `per_device_train_batch_size` is the rows
    of a micro-batch and changes speed and memory, never the update; gradient accumulation is
    internal, so `gradient_accumulation_steps` must stay 1.

    Raises:
        ValueError: for an unknown method name (with the nearest one), an impossible budget or a
            setting out of range, before anything is loaded.
    """

    # -- where rollouts go
    trainer: str = setting("raft++", "Preset for advantage, loss, objective: grpo, raft or raft++.")
    selector: str = setting(
        "uniform",
        "Which prompts are rolled out: uniform (by epoch), vade (Thompson draws of the pass rate), "
        "mopps, posterior_mean, band (posterior mean in a band), static_band, diverse.",
    )
    selection_score: str = setting(
        "vade", "What vade, posterior_mean and diverse prefer: vade p(1-p)^2 or variance p(1-p)."
    )
    selection_candidates: int | None = setting(
        None, "Candidates drawn per chosen prompt, for vade, mopps, diverse. Default: all prompts."
    )
    selection_target: float = setting(0.5, "Pass rate that mopps wants its draws near to.")
    selection_column: str | None = setting(
        None,
        "Column of the data set: pass rates of the starting policy for static_band, embeddings for "
        "diverse.",
    )
    selection_gamma: float | None = setting(
        None,
        "Weight of diverse's distances, in score per distance; no default fits all embeddings.",
    )
    band_low: float = setting(0.3, "Lower end of the band.")
    band_high: float = setting(0.7, "Upper end of the band.")
    band_short: str = setting(
        "nearest", "If the band holds too few prompts: raise, nearest (to the band) or uniform."
    )
    prompts_per_step: int = setting(
        32, "Prompts of one step; with refill, groups that carry gradient."
    )
    rollouts_per_prompt: int = setting(
        8,
        "Mean rollouts per prompt; a step generates prompts_per_step times as many, pilots included. "
        "With a stopping rule the most, on average.",
    )
    rollouts_multiple_of: int = setting(
        1,
        "The rollouts of a step are rounded down to a multiple of this before they are allocated.",
    )
    allocator: str = setting(
        "uniform",
        "How many rollouts each prompt gets: uniform, neyman, cost_aware (neyman, fewer where rollouts "
        "are long), leave_one_out, dr_grpo, gvm, log, accepted, reinforce_ada, knapsack, "
        "knapsack_posterior or knapsack_released (what is spare explores prompts that never passed). "
        "All but uniform give prompts different budgets, which change what is ascended with some "
        "advantages (see there): then advantage is leave_one_out where none is written, and a warning "
        "says what budgets change.",
    )
    allocation_scale: str = setting(
        "posterior_std",
        "The reward's std as neyman, cost_aware, leave_one_out and dr_grpo see it: posterior_std, "
        "plug_in_std, mean_std or thompson_std.",
    )
    budget_min: int | None = setting(
        None,
        "Fewest rollouts of a prompt. Default: 3 for dr_grpo, 2 for leave_one_out, knapsack and "
        "wherever the advantage compares the rollouts of a prompt, of which one alone would weigh "
        "nothing; else 1.",
    )
    budget_max: int | None = setting(None, "Most rollouts of a prompt. Default: no cap.")
    gvm_alpha: float = setting(1e-3, "GVM's regulariser alpha (0: none, by pilots only).")
    gvm_beta: float = setting(2.0, "GVM's exponent beta, at least 2.")
    gvm_gradient_norm: str = setting(
        "none",
        "Gradient norms in the GVM rule: none, mean (of norms, Algorithm 2) or rms (the definition); "
        "measured at the lm_head on accepted rollouts. Those of pilots act in the step they are of, as "
        "published, if pilot_use is discard; all others from the next step on, as budgets that depend "
        "on rollouts that train would turn the gradient.",
    )
    pilot_rollouts: int = setting(0, "Rollouts of every prompt before the rest is allocated.")
    pilot_estimate: str = setting(
        "posterior",
        "What the second round is allocated by: posterior (all that is known) or pilot (this step's "
        "pilots alone, as published).",
    )
    pilot_use: str = setting(
        "pool", "pool: pilots are ordinary rollouts and train; discard: counted, not trained on."
    )
    stopping: str = setting(
        "none",
        "When a group ends before its budget: none, positive (enough passed), balanced (enough "
        "passed and failed), early (unlikely to become mixed), early_unbiased (the same, some by "
        "lot only). All but the last change the objective.",
    )
    stopping_wave: int | None = setting(
        None, "Rollouts of a prompt between two looks of the stopping rule."
    )
    stopping_needed: int | None = setting(
        None, "Passes that positive waits for (default 1); rows that balanced can keep (default 4)."
    )
    stopping_threshold: float = setting(
        0.5, "early and early_unbiased stop a group less likely than this to become mixed."
    )
    stopping_rho: float = setting(
        0.5, "early_unbiased: chance that a group goes on all the same, and weighs 1/rho."
    )
    refill: bool = setting(
        False, "Draw more prompts until prompts_per_step groups are mixed (DAPO's filter)."
    )
    refill_max_draws: int = setting(
        4, "Groups drawn for each group wanted, at most; those of the buffer are not drawn again."
    )
    refill_wave: int | None = setting(
        None,
        "Prompts of a wave at least; more than are missing means fewer waves and a surplus. Default: "
        "as many as are missing.",
    )
    refill_at_cap: str = setting(
        "partial",
        "If groups are still missing: raise, partial (fewer, and divide by fewer) or pad (fewer, and "
        "divide by all).",
    )
    refill_max_age: int = setting(
        0, "Steps for which surplus mixed groups wait to be trained on; 0: they are dropped."
    )
    posterior_decay_chosen: float = setting(0.2, "Memory of a chosen prompt's counts, per step.")
    posterior_decay_rest: float = setting(0.999, "Memory of the other prompts' counts, per step.")
    success_above: float | None = setting(
        None,
        "A reward above this is a success of 1, any other of 0: for the posterior, pass rates and "
        "what a group is called. Default: a reward's share of full marks, the sum of the positive "
        "reward weights; from the first reward outside [0, full marks] on, whether it is above the "
        "mean of the rewards of all earlier steps.",
    )

    # -- which rows train
    down_sampling: str = setting(
        "none",
        "Rows that train: none (all), d3s (largest variance of advantages in the batch), "
        "d3s_two_stage, max_variance (of advantages, per prompt), pods (of rewards, per prompt, "
        "compared anew), half, balanced (Reinforce-Ada).",
    )
    row_fraction_initial: float = setting(
        0.25, "Share of rows d3s keeps at the start; project default, not from the paper."
    )
    row_fraction_final: float = setting(1.0, "Share of rows d3s keeps at the end.")
    rows_per_prompt: int | None = setting(
        None, "Rows of a prompt that max_variance, pods, half and balanced keep."
    )
    weight_rows: str = setting(
        "trained",
        "A prompt's weight is shared by its rows that reach the loss (trained) or by all drawn ones "
        "(drawn), which makes prompts with dropped rows count less.",
    )
    token_selection: str = setting(
        "none",
        "Tokens of these rows that train: none (all), d3s (largest |advantage| x entropy) or entropy.",
    )
    token_fraction_initial: float = setting(
        0.2, "Share of tokens at the start; project default, not from the paper."
    )
    token_fraction_final: float = setting(1.0, "Share of tokens at the end.")
    token_scope: str = setting(
        "batch", "The share is one of the batch, or of each response (then |advantage| has no say)."
    )
    token_denominator: str = setting(
        "kept_tokens",
        "What the loss is divided by after tokens were left out: kept_tokens, kept_row_tokens, "
        "original_tokens or kept_rows.",
    )
    top_entropy_quantile: float = setting(
        1.0,
        "Share of tokens, those of highest entropy, that stay in the policy's loss, as in TRL: over "
        "what all are divided by, and with the KL at every token. Published 0.2; 1: all.",
    )
    mask_truncated_completions: bool = setting(
        False,
        "Leave completions that hit max_completion_length out of the loss. They stay in the comparison "
        "with the others, whose weights do not change; token_mean divides by the tokens of the others.",
    )

    # -- generation
    max_prompt_length: int | None = setting(None, "Most tokens of a prompt. Default: no limit.")
    overlong_prompts: str = setting(
        "error", "A longer prompt is an error, or all such are: truncate (keep the end), drop."
    )
    id_column: str | None = setting(
        None, "Column that identifies a prompt. Default: a content hash."
    )
    duplicates: str = setting(
        "error",
        "Rows that repeat prompt and reference answer are an error, or all are: drop (one stays), keep "
        "(each is a prompt of its own).",
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Arguments of the chat template, such as {enable_thinking: false}; on the command line as JSON. "
        "A column of this name in the data wins.",
    )
    max_completion_length: int = setting(256, "Most tokens of a completion.")
    temperature: float = setting(1.0, "Sampling temperature of training rollouts.")
    top_p: float = setting(1.0, "Nucleus sampling: smallest set of at least this probability.")
    top_k: int = setting(0, "Sample from the k likeliest tokens; 0: all.")
    min_p: float = setting(0.0, "Drop tokens below this share of the likeliest one's probability.")
    repetition_penalty: float = setting(
        1.0,
        "Divides positive logits of tokens seen before and multiplies negative ones. Like top_k it "
        "decides what is drawn; log-probabilities and the update are those of the policy without it.",
    )
    generation_kwargs: dict[str, Any] | str | None = setting(
        None,
        "TRL's: keys of transformers or vLLM become the settings of their meaning (max_new_tokens: "
        "max_completion_length, ...) or are refused.",
    )
    stop: list[str] | None = setting(None, "A completion ends when it contains one of these.")
    adaptive_temperature_tau: float = setting(
        0.0,
        "HAPO: tokens of high entropy are drawn hotter and others colder by up to this share of the "
        "temperature; entropies are judged by those of the step before. 0: off; published 0.1.",
    )
    hapo_quantile: float = setting(0.8, "HAPO: quantile of log entropies where nothing changes.")
    hapo_sign: str = setting(
        "signed",
        "HAPO: tokens of low entropy count as far below the quantile (signed, as in the paper), or as "
        "far from it as those of high entropy (released: its code loses the sign, and draws both "
        "hotter).",
    )
    generation_batch_size: int = setting(256, "Most rows decoded together on one process.")
    engine: str = setting(
        "transformers", "transformers (the model that trains generates) or vllm (needs a GPU)."
    )
    vllm_mode: str = setting(
        "colocate", "colocate (a vLLM beside each process, on its GPU) or server (one apart)."
    )
    vllm_server_base_url: str | None = setting(
        None,
        "Address of the vLLM server. Default: http://, vllm_server_host and vllm_server_port.",
    )
    vllm_server_host: str = setting("localhost", "Host of the vLLM server.")
    vllm_server_port: int = setting(8000, "Port of the vLLM server.")
    vllm_group_port: int = setting(
        51216, "Free port of this machine, over which weights go to the vLLM server."
    )
    vllm_tensor_parallel_size: int = setting(
        1,
        "Processes that share one colocated vLLM, each holding a part of its weights; it divides their "
        "number. A server gets --tensor-parallel-size when it is started.",
    )
    vllm_server_timeout: float = setting(240.0, "Seconds to wait for the server to come up.")
    vllm_gpu_memory_utilization: float = setting(
        0.3, "Share of the GPU's memory that a colocated vLLM takes."
    )
    vllm_max_model_length: int | None = setting(
        None, "Prompt and completion of a colocated vLLM, in tokens. Default: the model's."
    )
    vllm_enable_sleep_mode: bool = setting(
        False, "A colocated vLLM gives its memory back while the trainer updates."
    )

    # -- reward
    reward_weights: list[float] | None = setting(
        None, "One weight per reward function. Default: 1."
    )
    reward_timeout: float | None = setting(
        60.0,
        "Seconds a call of a reward function may take. It is interrupted also where it holds the "
        "interpreter; code that runs what the policy wrote needs `isolated = True` on the function.",
    )
    skip_special_tokens: bool = setting(
        True,
        "Leave special tokens out of the texts that rewards, validation and tables get, as TRL does; "
        "nothing else is changed in them.",
    )
    reward_retries: int = setting(0, "Calls repeated for reward functions marked remote.")
    max_failed_share: float = setting(
        0.0, "Share of a step's rollouts whose reward may fail before the run stops."
    )

    # -- learning
    advantage: str | None = setting(
        None,
        "leave_one_out, grpo, centred, raft, batch_whitened, batch_whitened_tokens, batch_scaled, "
        "stratified or token_level. Under leave_one_out (from 2 rollouts of a prompt on), raft and "
        "batch_whitened a prompt's weight does not depend on its budget; under the others it does. "
        "Default: the preset's, dr_grpo and hapo bring theirs; leave_one_out in the place of grpo and "
        "centred where budgets differ.",
    )
    scale_rewards: str | None = setting(
        None,
        "advantage grpo divides by the std of the prompt's rewards (group, the default; or true), of "
        "all rewards of the step (batch), or by nothing (none, which is advantage centred; or false).",
    )
    std_correction: int = setting(
        1,
        "The stds of grpo, stratified and batch_*: 1 for the unbiased std (TRL, verl, PODS), 0 for the "
        "population std.",
    )
    std_eps: float = setting(1e-4, "Added to these stds (TRL, PODS; verl 1e-6).")
    multi_objective_aggregation: str = setting(
        "sum_then_normalize",
        "Several rewards are weighted and summed, then compared (sum_then_normalize); or each is "
        "compared within the prompt by itself, and the weighted sum divided by its std over the step "
        "(normalize_then_sum, GDPO; with advantage grpo).",
    )
    stratum_alpha: float = setting(
        0.6,
        "stratified: share of the comparison within the stratum; the rest is within the prompt.",
    )
    stratum_fallback: str = setting(
        "blend",
        "stratified: strata of one get no advantage of their own (blend) or grpo's (group).",
    )
    loss: str | None = setting(
        None,
        "raft, raft_pp, grpo, dapo, dr_grpo, cispo, sapo, gspo, gspo_token, luspo, vespo, rloo or "
        "hapo. Default: the preset's.",
    )
    objective: str | None = setting(
        None,
        "Sum over prompts that is ascended: mean (pass rate), log (its log), em (log, by accepted "
        "rollouts) or flat (every rollout equal, so what the budgets make of it). Budgets do not change "
        "mean and log under an advantage that does not depend on them (see there), and do change em: a "
        "prompt without an accepted rollout is not in it. Default: the preset's.",
    )
    length_weight: str | None = setting(
        None,
        "row_mean (1/length), token_sum (1/max_completion_length), token_mean or row_sum (a row counts "
        "by its length). Default: the loss's.",
    )
    epsilon: float | None = setting(
        None, "Lower clip range of the ratio. Default: 0.2; 3e-4 for ratios of whole rows (gspo)."
    )
    epsilon_high: float | None = setting(
        None, "Upper clip range. Default: 0.2; dapo 0.28; gspo 4e-4."
    )
    delta: float | None = setting(
        None, "Dual clip: cap of the ratio where the advantage is negative."
    )
    ratio_cap: float = setting(5.0, "cispo: largest ratio that a gradient is multiplied by.")
    beta: float = setting(0.0, "Weight of the KL to the policy before training; 0: no reference.")
    kl: str = setting(
        "k3_weighted", "Estimate of the KL as a loss: k2, k3 (GRPO) or k3_weighted (by the ratio)."
    )
    kl_rows: str = setting(
        "trained",
        "Rows that the KL covers: trained (those with an advantage) or all (as in TRL: also those of "
        "groups that pass or fail as one). Its mean is over the rows that it covers.",
    )
    kl_ratio: str | None = setting(
        None,
        "The ratio of k3_weighted: token, or sequence (the mean over a row). Default: the loss's, as in "
        "TRL: sequence for gspo, gspo_token and luspo, else token, with which alone it is the KL's.",
    )
    sync_ref_model: bool = setting(
        False,
        "Move the policy that the KL holds to towards the one that trains, now and then (TR-DPO).",
    )
    ref_model_mixup_alpha: float = setting(
        0.6, "sync_ref_model: share of the trained weights in the new ones; the rest are the old."
    )
    ref_model_sync_steps: int = setting(512, "sync_ref_model: steps between two such moves.")
    entropy_coef: float = setting(
        0.0,
        "Reward of the mean entropy per token in the loss, over the rows that are in it, those without "
        "an advantage included; negative: a penalty.",
    )
    reward_kl: float = setting(
        0.0,
        "Weight of the summed log-ratio to the policy before training, subtracted from each reward.",
    )
    old_logprobs: str = setting(
        "engine",
        "What ratios compare with: the log-probabilities the engine recorded, or the trainer's own, "
        "recomputed before the first update.",
    )
    importance_correction: str | None = setting(
        None,
        "Weights for an engine that differs from the trainer (another library, precision): none, "
        "token_truncate, token_mask, sequence_truncate or sequence_mask. Implies old_logprobs: "
        "trainer. Default: sequence_mask with engine vllm (token_truncate for loss vespo), but none "
        "where top_k, top_p or min_p are set; else none.",
    )
    importance_cap: float | None = setting(
        None, "Largest ratio trainer / engine that counts in full. Default: 3, as in TRL."
    )
    importance_floor: float | None = setting(None, "Smallest one. Default: none.")
    max_mismatch: float | None = setting(
        None,
        "Largest mean |log-probability of the trainer - of the engine| before a step's first update, in "
        "nats per token (diffusion: per element of a latent); above it the run stops, or warns with "
        "importance_correction. Default: 1e-3 in float32, else 0.05. inf: no limit.",
    )
    updates_per_step: int = setting(
        1, "Optimizer updates on one collection of rollouts; each takes its part of the rows."
    )
    num_iterations: int = setting(1, "Times that every row is trained on.")
    micro_batch_tokens: int | None = setting(
        None,
        "Tokens of a micro-batch, padding included, instead of per_device_train_batch_size rows.",
    )
    fused_logprobs: bool | None = setting(
        None,
        "Compute log-probabilities without ever holding the logits. Default: for vocabularies of "
        "16,384 tokens and more.",
    )
    log_floor: float = setting(0.05, "Smallest pass rate the log objective divides by.")
    max_generated_tokens: int | None = setting(
        None,
        "End the run after the step in which so many tokens have been generated, whatever became of "
        "them; schedules of d3s follow it. Default: max_steps alone.",
    )
    max_empty_steps: int = setting(
        20, "Steps in a row without any training signal before the run stops."
    )

    # -- evaluation and tracking
    eval_rollouts_per_prompt: int = setting(
        4,
        "Sampled rollouts per validation prompt at the training temperature, beside a greedy one.",
    )
    completions_every: int = setting(0, "Steps between tables of completions; 0: none.")
    completions_rows: int = setting(16, "Rows of a completions table.")
    if_run_exists: str = setting(
        "error",
        "What to do when output_dir already holds a run and resume_from_checkpoint is not set: "
        "error, or resume (continue from its last whole checkpoint if model, data, rewards and "
        "settings are the same, longer runs included; else an error).",
    )

    # -- defaults of TrainingArguments that reinforcement learning wants otherwise
    learning_rate: float = setting(1e-6, "The initial learning rate.")
    lr_scheduler_type: str = setting("constant", "The learning-rate schedule.")
    weight_decay: float = setting(0.0, "Weight decay.")
    logging_steps: float = setting(1, "Steps between log lines.")
    logging_nan_inf_filter: bool = setting(
        False, "A NaN loss stops the run; it is never averaged away."
    )
    bf16: bool | None = setting(  # type: ignore[assignment]
        None, "bf16 autocast. Default: on a GPU that has it, yes; else no."
    )
    activation_checkpointing: bool | None = setting(
        None,
        "Recompute activations in the backward pass: less memory, slower. gradient_checkpointing, its "
        "older name, is the same.",
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.bf16 = gpu and not self.use_cpu and not self.fp16
        for name in ("chat_template_kwargs", "generation_kwargs"):
            setattr(self, name, as_mapping(name, getattr(self, name)))
        apply_generation_kwargs(self)
        for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
            if getattr(self, name) is None:  # the base class would do the same, and warn
                setattr(self, name, getattr(self, name.replace("activation", "gradient")))
        choice("trainer", self.trainer, PRESETS)
        preset = dict(PRESETS[self.trainer].defaults)
        if self.loss is None:
            self.loss = preset["loss"]
        preset |= {"epsilon": 0.2} | method_of(self, "loss").defaults
        if self.advantage is None:
            self.advantage = preset_advantage(self, preset["advantage"])
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.budget_min is None:
            self.budget_min = least_budget(self)
        if self.importance_correction is None:
            self.importance_correction = default_correction(self)
        if self.stopping_needed is None:
            known = STOPPINGS.get(self.stopping, STOPPINGS["none"])
            self.stopping_needed = known.defaults.get("stopping_needed", 1)
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "pass_rate"
        validate(self)
        warn_of_idle(self)
        try:
            super().__post_init__()
        except TypeError as error:  # of a mapping's keys, such as those of accelerator_config
            raise ValueError(str(error)) from error
        checkpointing: Any = self.activation_checkpointing_kwargs or {}
        reentrant = dict(checkpointing).get("use_reentrant", False)
        may_look = self.activation_checkpointing and not reentrant
        if may_look and self.ddp_find_unused_parameters is None:
            # The base class says no, for the sake of checkpointing that is reentrant. DDP would then end
            # at the second step of a model with weights that get no gradient, as a vision tower beside
            # text.
            self.ddp_find_unused_parameters = True

    @property
    def vllm_address(self) -> str:
        """Where the vLLM server is."""
        return (
            self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
        )

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts generated in one step, pilots included."""
        return align_total(
            self.prompts_per_step * self.rollouts_per_prompt, self.rollouts_multiple_of
        )

    def to_dict(self) -> dict[str, Any]:
        """As of the base class; for trackers also `of_run`, what the run is made of besides."""
        return super().to_dict() | getattr(self, "of_run", {})

    def decisive_settings(self) -> dict[str, Any]:
        """Settings that decide which rollouts are made; a resumed run must share them."""
        return {name: getattr(self, name) for name in DECISIVE}
