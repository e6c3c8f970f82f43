"""Refuse settings of a language model's run that do not fit each other, before anything is loaded."""

from __future__ import annotations

import math
import warnings

import numpy as np

from rl.config.checks import at_least, check_needs, check_shared, warn_of_budgets
from rl.config.methods import OBJECTIVES, PRESETS, method_of, scale_of
from rl.config.own import is_own
from rl.config.settings import LanguageSettings
from rl.objective import advantages
from rl.objective.kl import kl_loss

CLIPS = ("epsilon", "epsilon_high", "delta", "ratio_cap")
"""Settings of clips, which a loss takes or does not."""


def check_language(config: LanguageSettings) -> None:
    """Raise ValueError for the first setting that is out of range or does not fit another."""
    kl_loss(config.kl)  # which says why k1 is none
    check_shared(config)
    if config.pilot_estimate == "pilot" and not config.pilot_rollouts:
        raise ValueError("pilot_estimate 'pilot' needs pilot_rollouts of at least 1, got 0")
    _engine(config)
    if not config.adaptive_temperature_tau < 1:
        raise ValueError(
            f"adaptive_temperature_tau must be below 1, got {config.adaptive_temperature_tau}"
        )
    advantage = method_of(config, "advantage")
    if config.reward_kl and advantage.never_negative:
        raise ValueError(
            "reward_kl makes rewards differ that are accepted alike: write another advantage than "
            f"{config.advantage}, or beta in its place"
        )
    if config.reward_kl and (advantage.binary or advantage.reads_posterior):
        raise ValueError(
            f"advantage {config.advantage!r} compares passes with failures, in which reward_kl has no "
            "place: write another advantage, or beta in its place"
        )
    if config.refill and advantage.reads_posterior:
        raise ValueError(
            f"refill replaces groups that are all alike, which train under advantage "
            f"{config.advantage!r}: leave refill out, or write advantage: leave_one_out"
        )
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
    at_least(config, 0, "importance_floor", "stratum_alpha", "reward_kl", "temperature", "min_p")
    at_least(config, 0, "adaptive_temperature_tau", "hapo_quantile", "pilot_rollouts", "top_k")
    at_least(config, 0, "completions_every", "refill_max_age", "verdict_every")
    at_least(config, 1, "micro_batch_tokens", "importance_cap", "ratio_cap", "completions_rows")
    at_least(config, 1, "max_completion_length", "max_prompt_length", "refill_max_draws")
    at_least(config, 1, "refill_min_prompts", "replay_steps", "replay_weight_max")
    if not 0 <= config.replay_share <= 0.5:
        raise ValueError(
            f"replay_share must lie in [0, 0.5], as every row is replayed at most once, got "
            f"{config.replay_share}; num_iterations trains on every row several times"
        )
    for name in ("top_p", "min_p", "importance_floor", "stratum_alpha", "hapo_quantile"):
        if (getattr(config, name) or 0) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}")
    if config.temperature == 0:
        raise ValueError("temperature must be positive for training rollouts, got 0")
    if not config.repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be positive, got {config.repetition_penalty}")
    if not config.top_p > 0:
        raise ValueError(f"top_p must be positive, got {config.top_p}")
    _scaling(config)
    _rows_and_tokens(config)
    _loss(config)
    _clips(config)
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
    objectives = advantage.fits.get("objective", (config.objective,))
    if config.objective not in objectives:
        raise ValueError(
            f"advantage {config.advantage!r} already ascends a log of the pass rate by itself, so that "
            f"objective {config.objective!r} would divide by pass rates twice: write objective: "
            f"{' or '.join(map(str, objectives))}"
        )
    # After the objective, whose message says more to whom changed only the advantage of a preset.
    loss = method_of(config, "loss")
    if loss.positive_only and not (advantage.never_negative or is_own(config.advantage)):
        raise ValueError(
            f"loss {config.loss!r} has no negative signal, which advantage {config.advantage!r} has: "
            "write advantage: raft, or loss: grpo"
        )
    warn_of_budgets(config)
    _starts(config)


def _starts(config: LanguageSettings) -> None:
    """What starts fit with, and a warning of what they do to the objective."""
    check_needs(config, "starts")
    if not 0 <= config.starts_delta < 0.5:
        raise ValueError(f"starts_delta must lie in [0, 0.5), got {config.starts_delta}")
    if not 0 < config.starts_step < math.inf:
        raise ValueError(f"starts_step must be finite and above 0, got {config.starts_step}")
    for name in ("starts_until", "starts_fraction", "starts_max_fraction", "starts_plain_share"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(config, name)}")
    at_least(config, 0, "starts_memory_tokens")
    if method_of(config, "starts").function is None:
        return
    if config.gvm_gradient_norm != "none":
        raise ValueError(
            f"gvm_gradient_norm={config.gvm_gradient_norm!r} measures a prompt by its rollouts, some of "
            f"which have a start under starts: {config.starts}; write gvm_gradient_norm: none"
        )
    if config.engine == "vllm" and config.stop:
        raise ValueError(
            f"stop={config.stop} is looked for by vLLM in what it draws, and not across the end of a "
            f"start (starts: {config.starts}): write engine: transformers, or leave stop out"
        )
    warnings.warn(
        f"starts: {config.starts} changes what is ascended: the mean reward over prompts and the starts "
        "chosen for them, which is that over prompts on visits without a start (some "
        f"{config.starts_plain_share:.0%} of each prompt's at least). Compare runs by eval_pass_rate, "
        "which never has a start, and at equal ledger_total/tokens_processed, which counts starts",
        stacklevel=2,
    )


def _rows_and_tokens(config: LanguageSettings) -> None:
    for name in ("token_fraction_initial", "token_fraction_final"):
        if not 0 < getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {getattr(config, name)}")
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
    if config.stopping != "none" and config.pilot_rollouts:
        raise ValueError("a stopping rule has rounds of its own: write pilot_rollouts: 0")
    advantage, again = method_of(config, "advantage"), method_of(config, "down_sampling")
    again = getattr(again, "compares_again", False)
    if again and advantage.never_negative:
        raise ValueError(
            "down_sampling 'pods' compares the rows it keeps by their std: write trainer: grpo, or "
            "down_sampling: balanced"
        )
    if again and (advantage.binary or advantage.reads_posterior):
        raise ValueError(
            f"down_sampling 'pods' compares the rows it keeps by their std, so that advantage "
            f"{config.advantage!r} would be ignored: write advantage: grpo, or down_sampling: balanced"
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
    rollouts = config.rollouts_per_step
    if config.refill and rollouts % config.prompts_per_step:
        raise ValueError(
            f"refill asks for parts of a step, but {rollouts} rollouts do not divide "
            f"among {config.prompts_per_step} prompts; write another rollouts_multiple_of"
        )


def _engine(config: LanguageSettings) -> None:
    if not 0 < config.vllm_gpu_memory_utilization <= 1:
        raise ValueError(
            f"vllm_gpu_memory_utilization must be above 0 and at most 1, "
            f"got {config.vllm_gpu_memory_utilization}"
        )
    at_least(config, 0, "vllm_server_timeout")
    at_least(config, 1, "vllm_server_port", "vllm_group_port", "vllm_tensor_parallel_size")
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
    at_least(config, 2, "vllm_max_model_length")
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


def _reference(config: LanguageSettings) -> None:
    """What moving the reference fits with."""
    at_least(config, 1, "ref_model_sync_steps")
    if not 0 < config.ref_model_mixup_alpha <= 1:
        raise ValueError(
            f"ref_model_mixup_alpha must be above 0 and at most 1, got {config.ref_model_mixup_alpha}"
        )
    if config.sync_ref_model and not (config.beta or config.reward_kl):
        raise ValueError(
            "sync_ref_model moves the policy that a KL holds to, and there is no KL: write beta above "
            "0, or leave it out"
        )


def _scaling(config: LanguageSettings) -> None:
    """How rewards become advantages: what `scale_rewards` and its kin fit with."""
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
    at_least(config, 0, "std_eps")
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


def _loss(config: LanguageSettings) -> None:
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


def _clips(config: LanguageSettings) -> None:
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
