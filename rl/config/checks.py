"""Refuse settings that do not fit each other, before anything is loaded.

What runs of every policy share; `rl/config/language_checks.py` and `rl/config/denoising_checks.py` have
the rest.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

import numpy as np
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from rl.config.budgets import compares_within_group, what_budgets_change
from rl.config.build import allocator_of
from rl.config.check_own import check_own
from rl.config.declared import choices_of, takes_own
from rl.config.diffusion_settings import DiffusionSettings
from rl.config.methods import Settings, method_of
from rl.config.own import choice, is_own, nearest

ALSO_BOOLEAN = ("scale_rewards",)
"""Settings with names of which some may be written as true or false, as TRL does."""


def check_choices(config: Settings) -> None:
    """Raise ValueError for the first setting that is none of its choices, naming the nearest.

    A function of the user's own is loaded here, before anything else is.
    """
    for setting in fields(config):
        name, value = setting.name, getattr(config, setting.name)
        known = choices_of(config, setting)
        may_be_left_out = value is None and setting.default in (None, MISSING)
        if not known or may_be_left_out or name in ALSO_BOOLEAN:
            continue
        own = takes_own(config, setting)
        if own and is_own(value):
            method_of(config, name)  # which loads it
        else:
            choice(name, value, known, " or path/to/file.py:function" if own else "")


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


def _numbers(config: Settings) -> None:
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


def _of_transformers(config: Settings) -> None:
    """Ranges of settings that TrainingArguments takes as they are."""
    at_least(config, 0, "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm")
    at_least(config, 0, "warmup_steps", "eval_delay")
    at_least(config, 1, "per_device_train_batch_size", "per_device_eval_batch_size")
    at_least(config, 1, "save_total_limit")
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


def at_least(config: Settings, least: float, *names: str) -> None:
    """Refuse settings below `least`, NaN or infinite; settings left out pass.

    Raises:
        ValueError: naming the first such setting.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (np.isfinite(value) and value >= least):
            raise ValueError(f"{name} must be at least {least}, got {value}")


def warn_of_budgets(config: Settings) -> None:
    """Warn where the objective depends on how many rollouts each prompt gets."""
    found = what_budgets_change(config)
    if not found:
        return
    diffusion = isinstance(config, DiffusionSettings)
    keeps = "baseline: leave_one_out" if diffusion else "advantage: leave_one_out (objective: mean)"
    warnings.warn(
        f"budgets change what objective {config.objective!r} ascends: {'; '.join(found)}. Budgets leave "
        f"it alone with allocator: uniform and stopping: none, or with {keeps} and budget_min of at "
        "least 2",
        stacklevel=2,
    )


def _fidelity(config: Settings) -> None:
    """Refuse noise in the update, and a limit of the mismatch that is none."""
    limit = config.max_mismatch
    if limit is not None and not limit >= 0:
        raise ValueError(f"max_mismatch must be at least 0 (inf: no limit), got {limit}")
    if config.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={config.neftune_noise_alpha} adds noise to embeddings in the update "
            "alone, which makes noise of every probability ratio: leave it out"
        )


def check_shared(config: Settings) -> None:
    """Raise ValueError for the first setting that is out of range or does not fit another."""
    _fidelity(config)
    _numbers(config)
    _of_transformers(config)
    check_choices(config)
    if config.allocator == "gvm" and config.gvm_beta < 2:
        raise ValueError(f"gvm_beta must be at least 2, got {config.gvm_beta}")
    if config.allocator == "gvm" and config.pilot_estimate == "posterior" and not config.gvm_alpha:
        raise ValueError(
            "gvm_alpha must be positive under a posterior, where 1 / p has no mean: got 0; write "
            "pilot_estimate: pilot for the rule without it"
        )
    at_least(config, 1, "max_generated_tokens", "num_iterations", "updates_per_step")
    at_least(config, 1, "prompts_per_step", "rollouts_per_prompt", "generation_batch_size")
    at_least(config, 1, "eval_rollouts_per_prompt", "max_empty_steps", "gvm_beta")
    at_least(config, 0, "beta", "budget_min", "gvm_alpha", "reward_retries")
    at_least(config, 0, "epsilon", "epsilon_high", "max_failed_share")
    at_least(config, 0, "posterior_decay_chosen", "posterior_decay_rest")
    at_least(config, 0, "posterior_prior_decay", "uniform_share")
    at_least(config, 1, "posterior_prior_components")
    for name in (
        *("posterior_decay_chosen", "posterior_decay_rest", "max_failed_share"),
        *("posterior_prior_decay", "uniform_share"),
    ):
        if getattr(config, name) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}")
    for name in ("posterior_kappa", "posterior_prior_penalty"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 < config.log_floor <= 1:
        raise ValueError(f"log_floor must lie in (0, 1], got {config.log_floor}")
    if config.reward_timeout is not None and not config.reward_timeout > 0:
        raise ValueError(f"reward_timeout must be positive, got {config.reward_timeout}")
    check_own(config)
    _selection(config)
    _stopping_and_rows(config)
    _rewards(config)
    _budgets(config)
    cap = 1 + (config.epsilon_high or 0)
    if config.delta is not None and not config.delta > cap:
        raise ValueError(f"delta={config.delta} must exceed 1 + epsilon_high = {cap}")
    _unsupported(config)


def _unsupported(config: Settings) -> None:
    """Refuse what transformers offers and a run here cannot do."""
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


def check_needs(config: Settings, stage: str) -> None:
    """Refuse a method without a setting that it cannot do without."""
    for name in method_of(config, stage).needs:
        if getattr(config, name) is None:
            what = type(config).__dataclass_fields__[name].metadata["help"].partition(".")[0]
            raise ValueError(
                f"{stage} {getattr(config, stage)!r} needs {name}: {what[0].lower()}{what[1:]}"
            )


def _stopping_and_rows(config: Settings) -> None:
    at_least(config, 1, "stopping_round_size", "stopping_needed", "rows_per_prompt")
    at_least(config, 0, "stopping_threshold")
    for name in ("stopping_threshold", "stopping_rho"):
        if getattr(config, name) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}")
    for name in ("stopping_rho", "row_fraction_initial", "row_fraction_final"):
        if not 0 < getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {getattr(config, name)}")
    check_needs(config, "stopping")
    if config.stopping != "none" and config.stopping_round_size is None:  # a rule of the user's own
        raise ValueError(
            f"stopping {config.stopping!r} needs stopping_round_size, as every rule does"
        )
    if config.stopping == "balanced" and (config.stopping_needed or 0) < 2:
        raise ValueError(
            f"stopping 'balanced' needs stopping_needed of at least 2, got {config.stopping_needed}"
        )
    check_needs(config, "down_sampling")
    _ = config.rollouts_per_step  # a ValueError, if the multiple leaves nothing


def _rewards(config: Settings) -> None:
    weights = config.reward_weights
    if weights is None:
        return
    if not all(isinstance(weight, Real) and np.isfinite(weight) for weight in weights):
        raise ValueError(f"reward_weights must be finite numbers, got {weights}")
    if not any(weights):
        raise ValueError(
            f"reward_weights must not all be 0, got {weights}: no reward would be left to learn from"
        )


def _selection(config: Settings) -> None:
    at_least(config, 1, "selection_candidates", "rollouts_multiple_of")
    _retirement(config)
    at_least(config, 0, "selection_gamma", "selection_target", "band_low")
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
    check_needs(config, "selector")
    check_needs(config, "posterior_prior")


def _retirement(config: Settings) -> None:
    """Ranges of what makes prompts leave the pool, and a mean that no prompt can reach."""
    above, explore = config.retire_above, config.greso_explore
    if not 0 <= config.retire_share <= 1:
        raise ValueError(f"retire_share must lie in [0, 1], got {config.retire_share}")
    if explore is not None and not 0 < explore <= 1:
        raise ValueError(f"greso_explore must be above 0 and at most 1, got {explore}")
    if above is None:
        return
    if not 0 < above < 1:
        raise ValueError(f"retire_above must lie in (0, 1), got {above}")
    decay = config.posterior_decay_chosen
    if config.allocator != "uniform" or decay == 1 or config.posterior_prior != "flat":
        return
    passes = config.rollouts_per_prompt / (1 - decay)  # remembered of a prompt that always passes
    if (passes + 1) / (passes + 2) < above:
        warnings.warn(
            f"retire_above={above} is never reached: with rollouts_per_prompt="
            f"{config.rollouts_per_prompt} and posterior_decay_chosen={decay} a prompt that always "
            f"passes has a posterior mean of at most {(passes + 1) / (passes + 2):.2f}; write a larger "
            "posterior_decay_chosen, or a lower retire_above",
            stacklevel=2,
        )


def _budgets(config: Settings) -> None:
    total, least = config.rollouts_per_prompt, config.budget_min
    assert least is not None
    if config.budget_max is not None and config.budget_max < max(least, 1):
        raise ValueError(
            f"budget_max={config.budget_max} is below budget_min={least}: raise budget_max or lower "
            "budget_min"
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
        if isinstance(config, DiffusionSettings):
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
