"""Settings: presets, defaults and every refusal."""

import math

import pytest

from rl.config import checks as validation
from rl.config.build import allocator_of, loss_of
from rl.config.checks import _number_hints
from rl.config.language import RolloutConfig
from rl.objective import losses
from samplers import allocation
from tests import tiny


def config(**settings):
    return RolloutConfig(output_dir="unused", use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ("grpo", ("grpo", "grpo", "mean", "row_mean", 0.2)),
        ("raft", ("raft", "raft", "em", "row_mean", 0.2)),
        ("raft++", ("raft", "raft_pp", "em", "row_mean", 0.2)),
    ],
)
def test_a_preset_fills_what_is_unset(trainer, expected):
    found = config(trainer=trainer)
    names = ("advantage", "loss", "objective", "length_weight", "epsilon_high")
    assert tuple(getattr(found, name) for name in names) == expected


def test_what_is_set_wins_over_the_preset():
    found = config(trainer="grpo", advantage="leave_one_out", objective="log", epsilon_high=0.3)
    assert (found.advantage, found.objective, found.epsilon_high) == ("leave_one_out", "log", 0.3)
    assert found.loss == "grpo"


def test_dapo_brings_its_own_clip_and_length_rule():
    found = config(trainer="grpo", loss="dapo")
    assert (found.length_weight, found.epsilon_high) == ("token_mean", 0.28)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("grpo", (0.2, 0.2, "row_mean")),
        ("dr_grpo", (0.2, 0.2, "token_sum")),
        ("gspo", (3e-4, 4e-4, "row_mean")),
        ("cispo", (0.2, 0.2, "token_mean")),
    ],
)
def test_a_loss_brings_what_was_published_with_it(loss, expected):
    found = config(trainer="grpo", loss=loss)
    assert (found.epsilon, found.epsilon_high, found.length_weight) == expected
    if loss != "cispo":  # which does not clip, and refuses what would have no effect
        assert config(trainer="grpo", loss=loss, epsilon=0.1).epsilon == 0.1


def test_the_cap_of_cispo_is_its_own():
    found = loss_of(config(trainer="grpo", loss="cispo", ratio_cap=4.0))
    assert found.keywords == {"ratio_cap": 4.0}


@pytest.mark.parametrize(("multiple", "expected"), [(1, 256), (48, 240), (256, 256)])
def test_rollouts_are_aligned_before_they_are_allocated(multiple, expected):
    assert config(rollouts_multiple_of=multiple).rollouts_per_step == expected


def test_leave_one_out_needs_two_rollouts_by_default():
    assert config(allocator="leave_one_out").budget_min == 2
    assert config(allocator="gvm").budget_min == 1


def test_gvm_is_neyman_under_its_own_scale():
    solve, scale = allocator_of(config(allocator="gvm", gvm_alpha=0.01, gvm_beta=3.0))
    assert solve is allocation.neyman
    assert scale.func is allocation.gvm
    assert scale.keywords == {"alpha": 0.01, "beta": 3.0}


def test_gvm_by_the_pilots_alone_uses_the_published_formula():
    settings = {"allocator": "gvm", "pilot_rollouts": 2, "pilot_estimate": "pilot"}
    assert allocator_of(config(**settings))[1].func is allocation.gvm_plug_in


def test_losses_get_their_clip_ranges():
    assert loss_of(config(trainer="raft")) is losses.raft
    found = loss_of(config(trainer="grpo", epsilon=0.1, epsilon_high=0.3, delta=5.0))
    assert found.func is losses.clipped_surrogate
    assert found.keywords == {"epsilon_low": 0.1, "epsilon_high": 0.3, "dual_clip": 5.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer": "gpro"}, "trainer must be one of grpo, raft, raft.*'gpro'.*'grpo'"),
        ({"allocator": "gmv"}, "allocator must be one of .*'gmv'.*'gvm'"),
        ({"selector": "random"}, "selector must be one of uniform"),
        ({"advantage": "groop"}, "advantage must be one of"),
        ({"loss": "raftpp"}, "loss must be one of.*'raft_pp'"),
        ({"objective": "means"}, "objective must be one of.*'mean'"),
        ({"prompts_per_step": 0}, "prompts_per_step must be at least 1, got 0"),
        ({"rollouts_per_prompt": -3}, "rollouts_per_prompt must be at least 1, got -3"),
        ({"budget_min": 9}, "budget_min=9 exceeds rollouts_per_prompt=8"),
        ({"budget_max": 4}, "budget_max=4 is below rollouts_per_prompt=8"),
        ({"budget_min": 4, "budget_max": 2}, "budget_max=2 is below budget_min=4"),
        ({"pilot_rollouts": 9}, "pilot_rollouts=9 leaves nothing of rollouts_per_prompt=8"),
        ({"allocator": "leave_one_out", "budget_min": 1}, "needs budget_min >= 2, got 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be finite, got nan"),
        ({"top_p": 1.5}, "top_p must be at most 1, got 1.5"),
        ({"top_p": 0.0}, "top_p must be positive"),
        ({"posterior_decay_chosen": 1.2}, "posterior_decay_chosen must be at most 1"),
        ({"log_floor": 0.0}, "log_floor must lie in"),
        ({"delta": 1.1}, "delta=1.1 must exceed 1 \\+ epsilon_high = 1.2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must stay 1, got 2"),
        ({"gvm_gradient_norm": "mean"}, "needs allocator 'gvm', got 'uniform'"),
        ({"trainer": "grpo", "objective": "em"}, "needs advantage 'raft', got 'grpo'"),
        ({"reward_timeout": 0.0}, "reward_timeout must be positive"),
        ({"fp16": True}, "fp16 is not supported.*bf16"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must stay off"),
        ({"save_strategy": "epoch"}, "save_strategy: epoch has no meaning here.*write steps"),
        ({"overlong_prompts": "cut"}, "overlong_prompts must be one of error, truncate, drop"),
        (
            {"selector": "static_band"},
            "needs selection_column, the data set's column of pass rates",
        ),
        (
            {"selector": "diverse", "selection_column": "x"},
            "needs selection_gamma: weight of diverse",
        ),
        ({"selection_score": "vad"}, "selection_score must be one of .*'vad'.*'vade'"),
        ({"band_low": 0.8}, "0 <= band_low <= band_high <= 1, got 0.8 and 0.7"),
        ({"band_short": "wait"}, "band_short must be one of raise, nearest, uniform"),
        ({"selection_candidates": 0}, "selection_candidates must be at least 1, got 0"),
        ({"allocation_scale": "std"}, "allocation_scale must be one of"),
        ({"allocator": "dr_grpo", "budget_min": 2}, "'dr_grpo' needs budget_min >= 3, got 2"),
        (
            {
                "allocator": "knapsack_posterior",
                "pilot_rollouts": 2,
                "pilot_estimate": "pilot",
            },
            "'knapsack_posterior' reads the posterior itself",
        ),
        ({"rollouts_multiple_of": 300}, "no positive multiple of multiple=300 fits into total=256"),
        ({"stopping": "erly"}, "stopping must be one of .*'erly'.*'early'"),
        ({"stopping": "early"}, "'early' needs stopping_round_size"),
        (
            {"stopping": "early", "stopping_round_size": 4, "pilot_rollouts": 2},
            "has rounds of its own: write pilot_rollouts: 0",
        ),
        (
            {"stopping": "balanced", "stopping_round_size": 4, "stopping_needed": 1},
            "needs stopping_needed of at least 2, got 1",
        ),
        ({"stopping_threshold": 1.5}, "stopping_threshold must be at most 1, got 1.5"),
        ({"stopping_rho": 0.0}, "stopping_rho must lie in"),
        ({"down_sampling": "pods", "trainer": "grpo"}, "'pods' needs rows_per_prompt"),
        (
            {"down_sampling": "pods", "rows_per_prompt": 4},
            "compares the rows it keeps by their std",
        ),
        ({"row_fraction_initial": 0.0}, "row_fraction_initial must lie in"),
        ({"weight_rows": "all"}, "weight_rows must be one of trained, drawn"),
        ({"refill_at_cap": "stop"}, "refill_at_cap must be one of raise, partial, pad"),
        (
            {"refill": True, "rollouts_multiple_of": 100},
            "200 rollouts do not divide among 32 prompts",
        ),
        ({"kl": "k1"}, "k1 cannot be a loss: its expected gradient"),
        ({"kl": "k4"}, "the KL loss must be one of k2, k3, k3_weighted, got 'k4'"),
        ({"beta": -1.0}, "beta must be at least 0, got -1.0"),
        ({"reward_kl": 0.1}, "makes rewards differ that are accepted alike"),
        ({"importance_correction": "token"}, "importance_correction must be one of none, token_"),
        ({"importance_floor": 2.0}, "importance_floor must be at most 1, got 2.0"),
        ({"old_logprobs": "old"}, "old_logprobs must be one of engine, trainer"),
        ({"token_selection": "top"}, "token_selection must be one of none, d3s, entropy"),
        ({"token_scope": "row"}, "token_scope must be one of batch, response"),
        ({"token_denominator": "tokens"}, "token_denominator must be one of kept_tokens"),
        ({"token_fraction_final": 0.0}, "token_fraction_final must lie in"),
        (
            {"trainer": "grpo", "loss": "gspo", "token_selection": "d3s"},
            "'gspo' has one ratio per row.*token_selection='d3s' weighs tokens; .*gspo_token",
        ),
        (
            {"trainer": "grpo", "loss": "rloo", "importance_correction": "token_mask"},
            "importance_correction='token_mask' weighs tokens",
        ),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1, got 0"),
        ({"stratum_alpha": 1.5}, "stratum_alpha must be at most 1, got 1.5"),
        ({"max_generated_tokens": 0}, "max_generated_tokens must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_every_field_has_a_help_text():
    from dataclasses import fields

    assert all(f.metadata.get("help") for f in fields(RolloutConfig) if f.init)


# Numbers that are none, and ranges of the base class's settings


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_number_is_finite(tmp_path, value):
    for name in set(_number_hints(RolloutConfig)) - {"max_mismatch", "neftune_noise_alpha"}:
        with pytest.raises(ValueError, match=f"{name} must be finite, got {value}"):
            tiny.config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"save_steps": 0, "save_strategy": "steps"},
            "save_steps must be positive, got 0; .*save_st",
        ),
        ({"logging_steps": 0}, "logging_steps must be positive, got 0"),
        ({"eval_steps": -1, "eval_strategy": "steps"}, "eval_steps must be positive, got -1"),
        ({"learning_rate": -1e-6}, "learning_rate must be at least 0, got -1e-06"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must lie in \[0, 1\), got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, got 0"),
        ({"max_steps": -2}, "max_steps must be at least 1, or -1"),
        ({"max_steps": -1, "num_train_epochs": -1.0}, "num_train_epochs must be positive"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        (
            {"metric_for_best_model": "nope"},
            "metric_for_best_model must be one of pass_rate, .*'nope'",
        ),
        ({"metric_for_best_model": "eval_loss"}, "metric_for_best_model must be one of"),
        ({"metric_for_best_model": "eval_pas_rate"}, "Did you mean 'pass_rate'?"),
    ],
)
def test_settings_of_the_base_class_have_ranges_too(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **settings)


@pytest.mark.parametrize(
    "metric", ["pass_rate", "eval_pass_rate", "eval_hard_pass_rate", "reward", "rewards/f1/mean"]
)
def test_metrics_of_validation_choose_the_best_model(tmp_path, metric):
    assert tiny.config(tmp_path, metric_for_best_model=metric).metric_for_best_model == metric


def test_a_tracker_that_is_not_installed_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(ValueError, match="report_to: mlflow needs a package that is not installed"):
        tiny.config(tmp_path, report_to=["wandb", "mlflow"])
