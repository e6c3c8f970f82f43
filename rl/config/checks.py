"""Whether the settings of a run fit each other: told before anything is loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from rl.config.methods import (
    ADVANTAGES,
    AGGREGATIONS,
    ALLOCATORS,
    DOWN_SAMPLERS,
    OBJECTIVES,
    OWN,
    PILOT_USES,
    PRESETS,
    SCALES,
    SELECTORS,
    STOPPINGS,
    TOKEN_SELECTIONS,
    allocator_of,
    compares_within_group,
    method_of,
    scale_of,
    what_budgets_change,
)
from rl.config.own import choice, is_own, nearest
from rl.objective import advantages
from rl.objective.advantages import FALLBACKS
from rl.objective.kl import kl_loss
from rl.objective.token_selection import SCOPES
from rl.objective.weights import DENOMINATORS, LENGTH_RULES
from samplers.selection.scores import SCORES

if TYPE_CHECKING:
    from rl.config.settings import RolloutConfig


IMPORTANCE_CORRECTIONS = (
    "none",
    *("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
)

CLIPS = ("epsilon", "epsilon_high", "delta", "ratio_cap")
"""Settings of clips, which a loss takes or does not."""


def named(config: RolloutConfig, stage: str, known: Any) -> None:
    """Raise ValueError unless setting `stage` names one of our methods, or a function of a file."""
    value = getattr(config, stage)
    if stage in OWN and is_own(value):
        method_of(config, stage)  # which loads it
        return
    choice(stage, value, known, " or path/to/file.py:function" if stage in OWN else "")


def as_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """The mapping that a setting holds, also as JSON from the command line; None if it is empty.

    Raises:
        ValueError: if it is neither, or holds what JSON does not express.
    """
    read = value
    try:
        if isinstance(value, str):
            read = json.loads(value)
        if isinstance(read, Mapping):
            return json.loads(json.dumps(dict(read))) or None  # as a checkpoint gives it back
    except (TypeError, ValueError, RecursionError):
        read = value
    if read is None:
        return None
    raise ValueError(
        f"{name} must be a mapping of names to plain values, on the command line as JSON such as "
        f"'{{\"name\": false}}', got {value!r}"
    )


def _numbers(config: RolloutConfig) -> None:
    """Refuse 2.5 where a whole number is wanted, text or nothing where a number is, NaN and infinity."""
    for name, hint in _number_hints(type(config)).items():
        kinds = get_args(hint) or (hint,)
        wanted = Integral if float not in kinds else Real
        value = getattr(config, name)
        if isinstance(value, Real) and not np.isfinite(float(value)) and name != "max_mismatch":
            raise ValueError(f"{name} must be finite, got {value}")
        if isinstance(value, wanted) or (value is None and type(None) in kinds):
            continue
        if name in OF_TRANSFORMERS and value is None:
            continue  # its own defaults
        what = ("a number" if float in kinds else "a whole number") + " or None" * (len(kinds) > 1)
        raise ValueError(f"{name} must be {what}, got {value!r} ({type(value).__name__})")


OF_TRANSFORMERS = {*TrainingArguments.__dataclass_fields__} - {
    "max_steps",
    "seed",
    "per_device_train_batch_size",
}
"""Fields of TrainingArguments, without the three that count most."""


def _number_hints(kind: type) -> dict[str, Any]:
    """The types of those settings that are numbers."""
    numbers = ({int}, {float}, {int, float}, {int, type(None)}, {float, type(None)})
    # Of the class, not of `fields`: parsers of command lines rewrite the types in there.
    hints = get_type_hints(kind)
    return {
        f.name: hints[f.name]
        for f in fields(kind)
        if set(get_args(hints[f.name]) or (hints[f.name],)) in numbers
    }


def _of_transformers(config: RolloutConfig) -> None:
    """Ranges of settings that TrainingArguments takes as they are."""
    _at_least(config, 0, "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm")
    _at_least(config, 0, "warmup_steps", "eval_delay")
    _at_least(config, 1, "per_device_train_batch_size", "per_device_eval_batch_size")
    _at_least(config, 1, "save_total_limit")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(
            f"max_steps must be at least 1, or -1 to go by num_train_epochs, got {config.max_steps}"
        )
    if config.max_steps < 1 and not config.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs must be positive, got {config.num_train_epochs}")
    for what in ("logging", "eval", "save"):
        steps, strategy = getattr(config, f"{what}_steps"), getattr(config, f"{what}_strategy")
        if steps is not None and steps <= 0 and str(getattr(strategy, "value", strategy)) != "no":
            raise ValueError(
                f"{what}_steps must be positive, got {steps}; to turn it off write "
                f"{what}_strategy: 'no'"
            )
    given = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    for name in given:
        known = name in INTEGRATION_TO_CALLBACK and name not in ("flyte", "kubeflow")
        if known and name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: {name} needs a package that is not installed")
    metric = config.metric_for_best_model
    if metric is not None and "/" not in metric:  # with one, of a reward function
        name = metric.removeprefix("eval_")
        if not any(name == known or name.endswith(f"_{known}") for known in VALIDATION_METRICS):
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(VALIDATION_METRICS)}, got "
                f"{metric!r}.{nearest(name, VALIDATION_METRICS)}"
            )


VALIDATION_METRICS = (
    *("pass_rate", "greedy_accuracy", "deterministic_accuracy", "reward", "mean_length"),
    "pass_rate_se",
)
"""What validation measures of a set; its name may stand in front. See `rl.stages.validate`."""


def _at_least(config: RolloutConfig, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (np.isfinite(value) and value >= least):
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _engine(config: RolloutConfig) -> None:
    choice("engine", config.engine, ("transformers", "vllm"))
    choice("vllm_mode", config.vllm_mode, ("colocate", "server"))
    if not 0 < config.vllm_gpu_memory_utilization <= 1:
        raise ValueError(
            f"vllm_gpu_memory_utilization must be above 0 and at most 1, "
            f"got {config.vllm_gpu_memory_utilization}"
        )
    _at_least(config, 0, "vllm_server_timeout")
    _at_least(config, 1, "vllm_server_port", "vllm_group_port", "vllm_tensor_parallel_size")
    elsewhere = (config.vllm_server_host, config.vllm_server_port) != ("localhost", 8000)
    if config.vllm_server_base_url is not None and elsewhere:
        raise ValueError(
            f"vllm_server_base_url={config.vllm_server_base_url!r} has host and port of its own: leave "
            "it out, or vllm_server_host and vllm_server_port"
        )
    if config.vllm_tensor_parallel_size > 1 and config.vllm_mode == "server":
        raise ValueError(
            f"vllm_tensor_parallel_size={config.vllm_tensor_parallel_size} is for vllm_mode: colocate; "
            "start the server with --tensor-parallel-size"
        )
    _at_least(config, 2, "vllm_max_model_length")
    if config.engine != "vllm":
        return
    if config.adaptive_temperature_tau:
        raise ValueError(
            f"adaptive_temperature_tau={config.adaptive_temperature_tau} needs engine: transformers"
        )
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    filters = {name: getattr(config, name) for name in off}
    if filters != off and config.old_logprobs != "trainer":
        raise ValueError(
            f"vLLM's log-probabilities come after {filters}: turn these off, or write "
            "old_logprobs: trainer"
        )


def _fidelity(config: RolloutConfig) -> None:
    """Refuse noise in the update, and a limit of the mismatch that is none."""
    limit = config.max_mismatch
    if limit is not None and not limit >= 0:
        raise ValueError(f"max_mismatch must be at least 0 (inf: no limit), got {limit}")
    if config.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={config.neftune_noise_alpha} adds noise to embeddings in the update "
            "alone, which makes noise of every probability ratio: leave it out"
        )


def validate(config: RolloutConfig) -> None:
    """Raise ValueError for the first setting that is out of range or does not fit another."""
    _fidelity(config)
    _numbers(config)
    _of_transformers(config)
    named(config, "allocator", ALLOCATORS)
    named(config, "advantage", ADVANTAGES)
    choice("objective", config.objective, OBJECTIVES)
    choice("length_weight", config.length_weight, LENGTH_RULES)
    choice("gvm_gradient_norm", config.gvm_gradient_norm, ("none", "mean", "rms"))
    choice("pilot_estimate", config.pilot_estimate, ("posterior", "pilot"))
    if config.pilot_estimate == "pilot" and not config.pilot_rollouts:
        raise ValueError("pilot_estimate 'pilot' needs pilot_rollouts of at least 1, got 0")
    choice("pilot_use", config.pilot_use, PILOT_USES)
    choice("overlong_prompts", config.overlong_prompts, ("error", "truncate", "drop"))
    choice("duplicates", config.duplicates, ("error", "drop", "keep"))
    choice("old_logprobs", config.old_logprobs, ("engine", "trainer"))
    choice("importance_correction", config.importance_correction, IMPORTANCE_CORRECTIONS)
    _engine(config)
    kl_loss(config.kl)
    if not config.adaptive_temperature_tau < 1:
        raise ValueError(
            f"adaptive_temperature_tau must be below 1, got {config.adaptive_temperature_tau}"
        )
    advantage, loss = method_of(config, "advantage"), method_of(config, "loss")
    if config.reward_kl and advantage.never_negative:
        raise ValueError(
            f"reward_kl makes rewards differ that are accepted alike: write another advantage than "
            f"{config.advantage}, or beta in its place"
        )
    if config.allocator == "gvm" and config.gvm_beta < 2:
        raise ValueError(f"gvm_beta must be at least 2, got {config.gvm_beta}")
    if config.allocator == "gvm" and config.pilot_estimate == "posterior" and not config.gvm_alpha:
        raise ValueError(
            "gvm_alpha must be positive under a posterior, where 1 / p has no mean: got 0; write "
            "pilot_estimate: pilot for the rule without it"
        )
    choice("stratum_fallback", config.stratum_fallback, FALLBACKS)
    choice("hapo_sign", config.hapo_sign, ("signed", "released"))
    choice("kl_ratio", config.kl_ratio, (None, "token", "sequence"))
    choice("kl_rows", config.kl_rows, ("trained", "all"))
    _reference(config)
    if not np.isfinite(config.entropy_coef):
        raise ValueError(f"entropy_coef must be finite, got {config.entropy_coef}")
    if not 0 <= config.top_entropy_quantile <= 1:
        raise ValueError(
            f"top_entropy_quantile must lie in [0, 1], got {config.top_entropy_quantile}"
        )
    if config.top_entropy_quantile < 1 and config.token_selection != "none":
        raise ValueError(
            f"top_entropy_quantile={config.top_entropy_quantile} and token_selection "
            f"{config.token_selection!r} both choose tokens: write one"
        )
    _at_least(config, 1, "max_generated_tokens")
    _at_least(config, 0, "beta", "importance_floor", "stratum_alpha", "reward_kl")
    _at_least(config, 0, "adaptive_temperature_tau", "hapo_quantile")
    _at_least(config, 1, "num_iterations", "micro_batch_tokens", "importance_cap", "ratio_cap")
    choice("if_run_exists", config.if_run_exists, ("error", "resume"))
    _at_least(config, 1, "prompts_per_step", "rollouts_per_prompt", "max_completion_length")
    _at_least(config, 1, "generation_batch_size", "updates_per_step", "eval_rollouts_per_prompt")
    _at_least(config, 1, "max_prompt_length", "max_empty_steps", "gvm_beta", "completions_rows")
    _at_least(config, 0, "budget_min", "pilot_rollouts", "gvm_alpha", "top_k", "reward_retries")
    _at_least(config, 0, "temperature", "min_p", "epsilon", "epsilon_high", "completions_every")
    _at_least(config, 0, "posterior_decay_chosen", "posterior_decay_rest", "max_failed_share")
    _scaling(config)
    _selection(config)
    _stopping_and_rows(config)
    _loss(config)
    _rewards(config)
    _budgets(config)
    if config.temperature == 0:
        raise ValueError("temperature must be positive for training rollouts, got 0")
    for name in (
        "posterior_decay_chosen",
        "posterior_decay_rest",
        "top_p",
        "min_p",
        "max_failed_share",
        "importance_floor",
        "stratum_alpha",
        "hapo_quantile",
    ):
        if (getattr(config, name) or 0) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}")
    if not config.repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be positive, got {config.repetition_penalty}")
    if not config.top_p > 0:
        raise ValueError(f"top_p must be positive, got {config.top_p}")
    if not 0 < config.log_floor <= 1:
        raise ValueError(f"log_floor must lie in (0, 1], got {config.log_floor}")
    if config.reward_timeout is not None and not config.reward_timeout > 0:
        raise ValueError(f"reward_timeout must be positive, got {config.reward_timeout}")
    cap = 1 + (config.epsilon_high or 0)
    if config.delta is not None and not config.delta > cap:
        raise ValueError(f"delta={config.delta} must exceed 1 + epsilon_high = {cap}")
    _clips(config)
    if config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size must stay off: its retry would find the planner already moved on; "
            "lower per_device_train_batch_size, which changes memory alone"
        )
    if config.fp16:
        raise ValueError(
            "fp16 is not supported: its gradient scaler makes infinite gradients on purpose, at which a "
            "run stops here, and fails on steps without training signal; write bf16: true, or neither"
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
    if config.gvm_gradient_norm != "none" and config.pilot_rollouts and config.pilot_use == "pool":
        warnings.warn(
            f"gvm_gradient_norm: {config.gvm_gradient_norm} counts from the next step on, because "
            "pilots that train must not decide budgets by what they are; Algorithm 2 of GVM, where "
            "norms of pilots act in their own step, is pilot_use: discard",
            stacklevel=2,
        )
    if config.advantage not in OBJECTIVES[config.objective or ""].fits.get(
        "advantage", (config.advantage,)
    ):
        raise ValueError(
            f"objective {config.objective!r} weights accepted rollouts and needs advantage 'raft', got "
            f"{config.advantage!r}; write objective: mean, log or flat, or advantage: raft"
        )
    # After the objective, whose message says more to whom changed only the advantage of a preset.
    if loss.positive_only and not (advantage.never_negative or is_own(config.advantage)):
        raise ValueError(
            f"loss {config.loss!r} has no negative signal, which advantage {config.advantage!r} has: "
            "write advantage: raft, or loss: grpo"
        )
    _objective(config)


def _reference(config: RolloutConfig) -> None:
    """What moving the reference fits with."""
    _at_least(config, 1, "ref_model_sync_steps")
    if not 0 < config.ref_model_mixup_alpha <= 1:
        raise ValueError(
            f"ref_model_mixup_alpha must be above 0 and at most 1, got {config.ref_model_mixup_alpha}"
        )
    if hasattr(config, "baseline"):  # a diffusion model's, which cannot move
        return
    if config.sync_ref_model and not (config.beta or config.reward_kl):
        raise ValueError(
            "sync_ref_model moves the policy that a KL holds to, and there is no KL: write beta above "
            "0, or leave it out"
        )


def _scaling(config: RolloutConfig) -> None:
    """How rewards become advantages: what `scale_rewards` and its kin fit with."""
    if hasattr(config, "baseline"):  # a diffusion model's, which refuses all of them
        return
    scale = scale_of(config)
    if scale not in advantages.SCALES:
        raise ValueError(
            f"scale_rewards must be one of {', '.join(advantages.SCALES)} (or true for group, false for "
            f"none), got {config.scale_rewards!r}"
        )
    fits = config.advantage == "grpo" or (config.advantage == "centred" and scale == "none")
    if config.scale_rewards is not None and not fits:
        raise ValueError(
            f"scale_rewards={config.scale_rewards!r} is a setting of advantage 'grpo', got advantage "
            f"{config.advantage!r}: leave one of the two out"
        )
    if config.std_correction not in (0, 1):
        raise ValueError(f"std_correction must be 0 or 1, got {config.std_correction}")
    _at_least(config, 0, "std_eps")
    choice("multi_objective_aggregation", config.multi_objective_aggregation, AGGREGATIONS)
    if config.multi_objective_aggregation == "sum_then_normalize":
        return
    for name, value, wanted in (
        ("advantage", config.advantage, "grpo"),
        ("scale_rewards", scale, "group"),
        ("reward_kl", config.reward_kl, 0.0),
        ("down_sampling", "pods" if config.down_sampling == "pods" else "none", "none"),
    ):
        if value != wanted:
            raise ValueError(
                f"multi_objective_aggregation 'normalize_then_sum' compares each reward by itself and "
                f"needs {name}: {wanted}, got {value!r}"
            )


def _objective(config: RolloutConfig) -> None:
    """Warn where the objective depends on how many rollouts each prompt gets."""
    found = what_budgets_change(config)
    if not found:
        return
    diffusion = hasattr(config, "baseline")
    keeps = "baseline: leave_one_out" if diffusion else "advantage: leave_one_out (objective: mean)"
    warnings.warn(
        f"budgets change what objective {config.objective!r} ascends: {'; '.join(found)}. Budgets leave "
        f"it alone with allocator: uniform and stopping: none, or with {keeps} and budget_min of at "
        "least 2",
        stacklevel=2,
    )


def _loss(config: RolloutConfig) -> None:
    """What the loss cannot take, and ratios that compare with the wrong policy."""
    assert config.loss is not None
    loss, advantage = method_of(config, "loss"), method_of(config, "advantage")
    if loss.one_ratio_per_row and advantage.per_token and config.reward_kl:
        raise ValueError(
            f"loss {config.loss!r} has one ratio per row, so that advantages must be constant in it, "
            f"but those of advantage {config.advantage!r} differ by token; write loss: gspo_token, or "
            "advantage: batch_whitened"
        )
    if (
        config.refill_max_age
        and config.old_logprobs == "trainer"
        and config.importance_correction == "none"
    ):
        raise ValueError(
            f"old_logprobs: trainer forgets which policy made the groups that wait "
            f"refill_max_age={config.refill_max_age} steps: write importance_correction: "
            "token_truncate, old_logprobs: engine or refill_max_age: 0"
        )


def _clips(config: RolloutConfig) -> None:
    """Refuse a clip that differs from the default, so was set, and that the loss does not take."""
    assert config.loss is not None
    loss = method_of(config, "loss")
    unset = {"epsilon": 0.2, "delta": None, "ratio_cap": 5.0}
    unset |= PRESETS[config.trainer].defaults | loss.defaults
    for name in CLIPS:
        value = getattr(config, name)
        if name not in loss.settings and value != unset[name]:
            known = [clip for clip in CLIPS if clip in loss.settings]
            raise ValueError(
                f"{name}={value} has no effect on loss {config.loss!r}, which takes "
                f"{' and '.join(known) or 'no clip'}: leave {name} out, or write another loss"
            )


def _rewards(config: RolloutConfig) -> None:
    weights = config.reward_weights
    if weights is None:
        return
    if not all(isinstance(weight, Real) and np.isfinite(weight) for weight in weights):
        raise ValueError(f"reward_weights must be finite numbers, got {weights}")
    if not any(weights):
        raise ValueError(
            f"reward_weights must not all be 0, got {weights}: no reward would be left to learn from"
        )


def _selection(config: RolloutConfig) -> None:
    named(config, "selector", SELECTORS)
    choice("selection_score", config.selection_score, SCORES)
    choice("allocation_scale", config.allocation_scale, SCALES)
    choice("band_short", config.band_short, ("raise", "nearest", "uniform"))
    _at_least(config, 1, "selection_candidates", "rollouts_multiple_of")
    _at_least(config, 0, "selection_gamma", "selection_target", "band_low")
    if not config.band_low <= config.band_high <= 1:
        raise ValueError(
            f"the band must have 0 <= band_low <= band_high <= 1, got {config.band_low} and "
            f"{config.band_high}"
        )
    selector = method_of(config, "selector")
    if "selection_column" in selector.needs and config.selection_column is None:
        raise ValueError(
            f"selector {config.selector!r} needs selection_column, the data set's column of "
            f"{selector.column}"
        )
    _needs(config, "selector")


def _needs(config: RolloutConfig, stage: str) -> None:
    """Refuse a method without a setting that it cannot do without."""
    for name in method_of(config, stage).needs:
        if getattr(config, name) is None:
            help_ = type(config).__dataclass_fields__[name].metadata["help"]
            what = help_.partition(".")[0]
            raise ValueError(
                f"{stage} {getattr(config, stage)!r} needs {name}: {what[0].lower()}{what[1:]}"
            )


def _stopping_and_rows(config: RolloutConfig) -> None:
    named(config, "stopping", STOPPINGS)
    named(config, "down_sampling", DOWN_SAMPLERS)
    choice("weight_rows", config.weight_rows, ("trained", "drawn"))
    choice("refill_at_cap", config.refill_at_cap, ("raise", "partial", "pad"))
    _at_least(config, 1, "stopping_wave", "stopping_needed", "rows_per_prompt", "refill_max_draws")
    _at_least(config, 1, "refill_wave")
    _at_least(config, 0, "stopping_threshold", "refill_max_age")
    for name in ("stopping_threshold", "stopping_rho"):
        if getattr(config, name) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}")
    shares = [
        f"{what}_fraction_{when}" for what in ("row", "token") for when in ("initial", "final")
    ]
    for name in ("stopping_rho", *shares):
        if not 0 < getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {getattr(config, name)}")
    named(config, "token_selection", TOKEN_SELECTIONS)
    choice("token_scope", config.token_scope, SCOPES)
    choice("token_denominator", config.token_denominator, DENOMINATORS)
    varies = "token_selection" if config.token_selection != "none" else ""
    varies = varies or "top_entropy_quantile" * (config.top_entropy_quantile < 1)
    varies = varies or "importance_correction" * str(config.importance_correction).startswith(
        "token"
    )
    if method_of(config, "loss").one_ratio_per_row and varies:
        raise ValueError(
            f"loss {config.loss!r} has one ratio per row, so that weights must be constant in it, but "
            f"{varies}={getattr(config, varies)!r} weighs tokens; write loss: gspo_token"
        )
    _needs(config, "stopping")
    if config.stopping != "none" and config.stopping_wave is None:
        raise ValueError(f"stopping {config.stopping!r} needs stopping_wave, as every rule does")
    if config.stopping != "none" and config.pilot_rollouts:
        raise ValueError("a stopping rule has waves of its own: write pilot_rollouts: 0")
    if config.stopping == "balanced" and (config.stopping_needed or 0) < 2:
        raise ValueError(
            f"stopping 'balanced' needs stopping_needed of at least 2, got {config.stopping_needed}"
        )
    _needs(config, "down_sampling")
    advantage, again = method_of(config, "advantage"), method_of(config, "down_sampling")
    again = getattr(again, "compares_again", False)
    if again and advantage.never_negative:
        raise ValueError(
            "down_sampling 'pods' compares the rows it keeps by their std: write trainer: grpo, or "
            "down_sampling: balanced"
        )
    if again and advantage.per_token:
        raise ValueError(
            f"down_sampling 'pods' computes the advantages of the rows it keeps anew, so that "
            f"advantage {config.advantage!r} would be ignored: write advantage: grpo, or another "
            "down_sampling"
        )
    if again and config.rows_per_prompt == 1:
        raise ValueError(
            "down_sampling 'pods' compares the rows it keeps, and one has nothing to be compared "
            "with: write rows_per_prompt of at least 2, got 1"
        )
    rollouts = config.rollouts_per_step  # or a ValueError, if the multiple leaves nothing
    if config.refill and rollouts % config.prompts_per_step:
        raise ValueError(
            f"refill asks for parts of a step, but {rollouts} rollouts do not divide "
            f"among {config.prompts_per_step} prompts; write another rollouts_multiple_of"
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
    never_two = least >= 1 or config.budget_max == 1 or config.allocator == "uniform"
    if total == 1 and never_two and (config.refill or compares_within_group(config)):
        what = "refill" if config.refill else f"advantage {config.advantage!r}"
        instead = "advantage: batch_whitened or raft"
        if hasattr(config, "baseline"):
            what, instead = "baseline 'prompt'", "baseline: history"
        raise ValueError(
            f"{what} compares the rollouts of a prompt, and rollouts_per_prompt=1 gives every prompt "
            "one: write rollouts_per_prompt of at least 2"
            + ("" if config.refill else f", or {instead}")
        )
    lowest = method_of(config, "allocator").minimum
    if least < lowest:
        raise ValueError(
            f"allocator {config.allocator!r} needs budget_min >= {lowest}, got {least}"
        )
    _, scale = allocator_of(config)
    if scale is None and (config.pilot_estimate == "pilot" or config.gvm_gradient_norm != "none"):
        raise ValueError(
            f"allocator {config.allocator!r} reads the posterior itself: write pilot_estimate: "
            "posterior and gvm_gradient_norm: none, or allocator: knapsack"
        )
    if config.pilot_rollouts >= total and config.pilot_rollouts:
        raise ValueError(
            f"pilot_rollouts={config.pilot_rollouts} leaves nothing of rollouts_per_prompt={total} to "
            "allocate; pilots are part of the total"
        )
    if config.budget_max is not None and config.budget_max < config.pilot_rollouts:
        raise ValueError(
            f"budget_max={config.budget_max} is below pilot_rollouts={config.pilot_rollouts}"
        )
