"""Every setting of a run, documented once and validated together.

`RolloutConfig` adds to `transformers.TrainingArguments` what decides where rollouts go and how they
train. Methods are named in YAML and looked up in the plain tables below; a method is added by one
entry here. `trainer: grpo | raft | raft++` is a preset: it fills the fields left unset, nothing more.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
from transformers import TrainingArguments

from rl import advantages, losses
from samplers import allocation

ADVANTAGES: dict[str, Callable] = {
    "leave_one_out": advantages.leave_one_out,
    "grpo": advantages.grpo,
    "centred": advantages.centred,
    "raft": advantages.raft,
}
LOSSES: dict[str, Callable] = {
    "raft": losses.raft,
    "raft_pp": losses.raft_pp,
    "grpo": losses.clipped_surrogate,
    "dapo": losses.clipped_surrogate,
}
ALLOCATORS: dict[str, tuple[Callable, Callable]] = {
    # name -> (integer solver, posterior scale); `gvm` binds its alpha and beta in `allocator_of`.
    "uniform": (allocation.uniform, allocation.posterior_std),
    "neyman": (allocation.neyman, allocation.posterior_std),
    "leave_one_out": (allocation.leave_one_out, allocation.posterior_std),
    "gvm": (allocation.neyman, allocation.gvm),
}
SELECTORS = ("uniform",)
OBJECTIVES = ("mean", "log", "em", "flat")
LENGTH_WEIGHTS = ("row_mean", "token_sum", "token_mean")

DECISIVE = (
    *("seed", "selector", "prompts_per_step", "rollouts_per_prompt", "allocator"),
    *("budget_min", "budget_max", "gvm_alpha", "gvm_beta", "gvm_gradient_norm"),
    *("pilot_rollouts", "pilot_estimate", "pilot_use", "success_above"),
    *("posterior_decay_chosen", "posterior_decay_rest"),
    *("temperature", "top_p", "top_k", "min_p", "max_completion_length", "stop"),
    *("max_prompt_length", "overlong_prompts", "reward_weights"),
)

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {
        "advantage": "grpo",
        "loss": "grpo",
        "objective": "mean",
        "length_weight": "row_mean",
        "epsilon_high": 0.2,
    },
    "raft": {
        "advantage": "raft",
        "loss": "raft",
        "objective": "em",
        "length_weight": "row_mean",
        "epsilon_high": 0.2,
    },
    "raft++": {
        "advantage": "raft",
        "loss": "raft_pp",
        "objective": "em",
        "length_weight": "row_mean",
        "epsilon_high": 0.2,
    },
}
LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "dapo": {"length_weight": "token_mean", "epsilon_high": 0.28},
}


def _setting(default: Any, text: str) -> Any:
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
    trainer: str = _setting(
        "raft++", "Preset for advantage, loss, objective: grpo, raft or raft++."
    )
    selector: str = _setting("uniform", "Which prompts are rolled out: uniform.")
    prompts_per_step: int = _setting(32, "Prompts of one step.")
    rollouts_per_prompt: int = _setting(
        8,
        "Mean rollouts per prompt; a step generates prompts_per_step times as many, pilots included.",
    )
    allocator: str = _setting(
        "uniform", "How many rollouts each prompt gets: uniform, neyman, leave_one_out or gvm."
    )
    budget_min: int | None = _setting(
        None, "Fewest rollouts of a prompt. Default: 2 for leave_one_out, else 1."
    )
    budget_max: int | None = _setting(None, "Most rollouts of a prompt. Default: no cap.")
    gvm_alpha: float = _setting(1e-3, "GVM's regulariser alpha (0: none).")
    gvm_beta: float = _setting(2.0, "GVM's exponent beta.")
    gvm_gradient_norm: str = _setting(
        "none",
        "Gradient norms in the GVM rule: none, mean (of norms, Algorithm 2) or rms (the definition); "
        "measured at the lm_head on accepted rollouts, used from the next step on.",
    )
    pilot_rollouts: int = _setting(0, "Rollouts of every prompt before the rest is allocated.")
    pilot_estimate: str = _setting(
        "posterior",
        "What the second round is allocated by: posterior (all that is known) or pilot (this step's "
        "pilots alone, as published).",
    )
    pilot_use: str = _setting(
        "pool", "pool: pilots are ordinary rollouts and train; discard: counted, not trained on."
    )
    posterior_decay_chosen: float = _setting(0.2, "Memory of a chosen prompt's counts, per step.")
    posterior_decay_rest: float = _setting(0.999, "Memory of the other prompts' counts, per step.")
    success_above: float | None = _setting(
        None,
        "A reward above this is a success for the posterior. Default: rewards lie in [0, 1] and "
        "count as fractions.",
    )

    # -- generation
    max_prompt_length: int | None = _setting(None, "Most tokens of a prompt. Default: no limit.")
    overlong_prompts: str = _setting(
        "error", "A longer prompt is an error, or all such are: truncate (keep the end), drop."
    )
    id_column: str | None = _setting(
        None, "Column that identifies a prompt. Default: a content hash."
    )
    max_completion_length: int = _setting(256, "Most tokens of a completion.")
    temperature: float = _setting(1.0, "Sampling temperature of training rollouts.")
    top_p: float = _setting(1.0, "Nucleus sampling: smallest set of at least this probability.")
    top_k: int = _setting(0, "Sample from the k likeliest tokens; 0: all.")
    min_p: float = _setting(0.0, "Drop tokens below this share of the likeliest one's probability.")
    stop: list[str] | None = _setting(None, "A completion ends when it contains one of these.")
    generation_batch_size: int = _setting(256, "Most rows decoded together on one process.")

    # -- reward
    reward_weights: list[float] | None = _setting(
        None, "One weight per reward function. Default: 1."
    )
    reward_timeout: float | None = _setting(60.0, "Seconds a call of a reward function may take.")
    reward_retries: int = _setting(0, "Calls repeated for reward functions marked remote.")
    max_failed_share: float = _setting(
        0.0, "Share of a step's rollouts whose reward may fail before the run stops."
    )

    # -- learning
    advantage: str | None = _setting(
        None, "leave_one_out, grpo, centred or raft. Default: the preset's."
    )
    loss: str | None = _setting(None, "raft, raft_pp, grpo or dapo. Default: the preset's.")
    objective: str | None = _setting(
        None,
        "Sum over prompts that is ascended whatever the budgets: mean (pass rate), log (its log), em "
        "(log, by accepted rollouts) or flat (every rollout equal). Default: the preset's.",
    )
    length_weight: str | None = _setting(
        None,
        "row_mean (1/length), token_sum (1/max_completion_length) or token_mean. Default: the loss's.",
    )
    epsilon: float = _setting(0.2, "Lower clip range of the ratio.")
    epsilon_high: float | None = _setting(None, "Upper clip range. Default: 0.2, dapo 0.28.")
    delta: float | None = _setting(
        None, "Dual clip: cap of the ratio where the advantage is negative."
    )
    updates_per_step: int = _setting(1, "Optimizer updates on one collection of rollouts.")
    log_floor: float = _setting(0.05, "Smallest pass rate the log objective divides by.")
    max_empty_steps: int = _setting(
        20, "Steps in a row without any training signal before the run stops."
    )

    # -- evaluation and tracking
    eval_rollouts_per_prompt: int = _setting(
        4,
        "Sampled rollouts per validation prompt at the training temperature, beside a greedy one.",
    )
    completions_every: int = _setting(0, "Steps between tables of completions; 0: none.")
    completions_rows: int = _setting(16, "Rows of a completions table.")
    if_run_exists: str = _setting(
        "error",
        "What to do when output_dir already holds a run and resume_from_checkpoint is not set: "
        "error, or resume (continue from its last whole checkpoint).",
    )

    # -- defaults of TrainingArguments that reinforcement learning wants otherwise
    learning_rate: float = _setting(1e-6, "The initial learning rate.")
    lr_scheduler_type: str = _setting("constant", "The learning-rate schedule.")
    weight_decay: float = _setting(0.0, "Weight decay.")
    logging_steps: float = _setting(1, "Steps between log lines.")
    logging_nan_inf_filter: bool = _setting(
        False, "A NaN loss stops the run; it is never averaged away."
    )
    bf16: bool | None = _setting(  # type: ignore[assignment]
        None, "bf16 autocast. Default: on a GPU that has it, yes; else no."
    )
    activation_checkpointing: bool | None = _setting(
        False, "Recompute activations in the backward pass: less memory, slower."
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = _has_bf16_gpu() and not self.use_cpu and not self.fp16
        _choice("trainer", self.trainer, PRESETS)
        preset = dict(PRESETS[self.trainer])
        loss = self.loss if self.loss is not None else preset["loss"]
        _choice("loss", loss, LOSSES)
        preset |= LOSS_DEFAULTS.get(loss, {})
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.budget_min is None:
            self.budget_min = 2 if self.allocator == "leave_one_out" else 1
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "pass_rate"
        _validate(self)
        super().__post_init__()

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts generated in one step, pilots included."""
        return self.prompts_per_step * self.rollouts_per_prompt

    def decisive_settings(self) -> dict[str, Any]:
        """Settings that decide which rollouts are made; a resumed run must share them."""
        return {name: getattr(self, name) for name in DECISIVE}


def allocator_of(config: RolloutConfig) -> tuple[Callable, Callable]:
    """The integer solver and the scale function (a_P, b_P) -> std_P named by `config`."""
    solve, scale = ALLOCATORS[config.allocator]
    if config.allocator == "gvm":
        plug_in = config.pilot_rollouts > 0 and config.pilot_estimate == "pilot"
        scale = allocation.gvm_plug_in if plug_in else allocation.gvm
        scale = partial(scale, alpha=config.gvm_alpha, beta=config.gvm_beta)
    return solve, scale


def loss_of(config: RolloutConfig) -> Callable:
    """The loss named by `config`, its clip ranges bound."""
    if config.loss == "raft":
        return losses.raft
    clip: dict[str, Any] = {"epsilon_low": config.epsilon, "epsilon_high": config.epsilon_high}
    if config.loss == "raft_pp":
        return partial(losses.raft_pp, **clip)
    return partial(losses.clipped_surrogate, **clip, dual_clip=config.delta)


def nearest(word: str, known: Any) -> str:
    """' Did you mean X?' for the known name nearest to `word`, or nothing."""
    close = get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _choice(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, known))}, got {value!r}."
            f"{nearest(str(value), known)}"
        )


def _has_bf16_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _at_least(config: RolloutConfig, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (np.isfinite(value) and value >= least):
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _validate(config: RolloutConfig) -> None:
    _choice("selector", config.selector, SELECTORS)
    _choice("allocator", config.allocator, ALLOCATORS)
    _choice("advantage", config.advantage, ADVANTAGES)
    _choice("objective", config.objective, OBJECTIVES)
    _choice("length_weight", config.length_weight, LENGTH_WEIGHTS)
    _choice("gvm_gradient_norm", config.gvm_gradient_norm, ("none", "mean", "rms"))
    _choice("pilot_estimate", config.pilot_estimate, ("posterior", "pilot"))
    if config.pilot_estimate == "pilot" and not config.pilot_rollouts:
        raise ValueError("pilot_estimate 'pilot' needs pilot_rollouts of at least 1, got 0")
    _choice("pilot_use", config.pilot_use, ("pool", "discard"))
    _choice("overlong_prompts", config.overlong_prompts, ("error", "truncate", "drop"))
    _choice("if_run_exists", config.if_run_exists, ("error", "resume"))
    _at_least(config, 1, "prompts_per_step", "rollouts_per_prompt", "max_completion_length")
    _at_least(config, 1, "generation_batch_size", "updates_per_step", "eval_rollouts_per_prompt")
    _at_least(config, 1, "max_prompt_length", "max_empty_steps", "gvm_beta", "completions_rows")
    _at_least(config, 0, "budget_min", "pilot_rollouts", "gvm_alpha", "top_k", "reward_retries")
    _at_least(config, 0, "temperature", "min_p", "epsilon", "epsilon_high", "completions_every")
    _at_least(config, 0, "posterior_decay_chosen", "posterior_decay_rest", "max_failed_share")
    _budgets(config)
    if config.temperature == 0:
        raise ValueError("temperature must be positive for training rollouts, got 0")
    for name in (
        "posterior_decay_chosen",
        "posterior_decay_rest",
        "top_p",
        "min_p",
        "max_failed_share",
    ):
        if getattr(config, name) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}")
    if not config.top_p > 0:
        raise ValueError(f"top_p must be positive, got {config.top_p}")
    if not 0 < config.log_floor <= 1:
        raise ValueError(f"log_floor must lie in (0, 1], got {config.log_floor}")
    if config.reward_timeout is not None and not config.reward_timeout > 0:
        raise ValueError(f"reward_timeout must be positive, got {config.reward_timeout}")
    cap = 1 + (config.epsilon_high or 0)
    if config.delta is not None and not config.delta > cap:
        raise ValueError(f"delta={config.delta} must exceed 1 + epsilon_high = {cap}")
    if config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size must stay off: its retry would find the planner already moved on; "
            "lower per_device_train_batch_size, which changes memory alone"
        )
    if config.fp16:
        raise ValueError(
            "fp16 is not supported: its gradient scaler fails on steps without training signal; "
            "write bf16: true, or neither"
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if str(getattr(config, name)).endswith("epoch"):
            raise ValueError(
                f"{name}: epoch has no meaning here, a run is counted in steps: write steps"
            )
    if config.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps must stay 1, got {config.gradient_accumulation_steps}: a "
            "step splits its rows into micro-batches of per_device_train_batch_size by itself"
        )
    if config.gvm_gradient_norm != "none" and config.allocator != "gvm":
        raise ValueError(
            f"gvm_gradient_norm={config.gvm_gradient_norm!r} needs allocator 'gvm', "
            f"got {config.allocator!r}"
        )
    if config.objective == "em" and config.advantage != "raft":
        raise ValueError(
            f"objective 'em' weights accepted rollouts and needs advantage 'raft', got "
            f"{config.advantage!r}; write objective: mean, log or flat, or advantage: raft"
        )


def _budgets(config: RolloutConfig) -> None:
    total, least = config.rollouts_per_prompt, config.budget_min
    assert least is not None
    if config.budget_max is not None and config.budget_max < max(least, 1):
        raise ValueError(
            f"budget_max={config.budget_max} is below budget_min={least}; every prompt needs a box"
        )
    if least > total:
        raise ValueError(
            f"budget_min={least} exceeds rollouts_per_prompt={total}: "
            f"{config.prompts_per_step} prompts cannot all get it; lower budget_min or raise "
            "rollouts_per_prompt"
        )
    if config.budget_max is not None and config.budget_max < total:
        raise ValueError(
            f"budget_max={config.budget_max} is below rollouts_per_prompt={total}: the step's "
            f"{config.rollouts_per_step} rollouts do not fit; raise budget_max"
        )
    if config.allocator == "leave_one_out" and least < 2:
        raise ValueError(f"allocator 'leave_one_out' needs budget_min >= 2, got {least}")
    if config.pilot_rollouts >= total and config.pilot_rollouts:
        raise ValueError(
            f"pilot_rollouts={config.pilot_rollouts} leaves nothing of rollouts_per_prompt={total} to "
            "allocate; pilots are part of the total"
        )
    if config.budget_max is not None and config.budget_max < config.pilot_rollouts:
        raise ValueError(
            f"budget_max={config.budget_max} is below pilot_rollouts={config.pilot_rollouts}"
        )
