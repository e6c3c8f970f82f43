"""Settings that need another one, and those that never act: said where they are given in vain."""

import warnings
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import ModelConfig

from recipes.arguments import RecipeArguments
from recipes.config import parse, peek
from rl.config.diffusion import DenoisingConfig
from rl.config.settings import RolloutConfig
from rl.config.settings_act import (
    ACTS,
    ACTS_DENOISING,
    ALWAYS,
    ALWAYS_DENOISING,
    NEVER,
    idle_settings,
)
from tests import tiny

FILES = sorted((Path(__file__).resolve().parents[3] / "recipes").rglob("*.yaml"))
FILES = [path for path in FILES if path.parent.name != "accelerate"]


def names(kind):
    return {f.name for f in fields(kind)}


def test_every_setting_has_its_place():
    placed = {*ALWAYS, *ACTS, *NEVER}
    assert names(RolloutConfig) - placed == set(), "put new settings into rl/config/settings_act.py"
    assert not set(ALWAYS) & {*ACTS, *NEVER} and not {*ACTS} & {*NEVER}
    assert set(NEVER) <= names(TrainingArguments)
    assert set(ACTS_DENOISING) <= names(DenoisingConfig)
    own = names(DenoisingConfig) - names(RolloutConfig)
    assert own - {*ALWAYS_DENOISING, *ACTS_DENOISING} == set()


# For each setting a value that differs from its default, without what it needs.
ALONE = {
    "selection_score": "variance",
    "selection_candidates": 8,
    "selection_target": 0.3,
    "selection_column": "rate",
    "selection_gamma": 1.0,
    "band_low": 0.1,
    "band_high": 0.9,
    "band_short": "raise",
    "allocation_scale": "plug_in_std",
    "budget_max": 40,
    "gvm_alpha": 0.5,
    "gvm_beta": 3.0,
    "pilot_use": "discard",
    "stopping_wave": 3,
    "stopping_needed": 2,
    "stopping_threshold": 0.9,
    "stopping_rho": 0.3,
    "refill_max_draws": 8,
    "refill_wave": 8,
    "refill_at_cap": "pad",
    "refill_max_age": 2,
    "posterior_decay_chosen": 0.5,
    "posterior_decay_rest": 0.5,
    "row_fraction_final": 0.5,
    "row_fraction_initial": 0.5,
    "rows_per_prompt": 3,
    "weight_rows": "drawn",
    "token_fraction_initial": 0.5,
    "token_fraction_final": 0.5,
    "token_scope": "response",
    "token_denominator": "kept_rows",
    "hapo_quantile": 0.5,
    "vllm_mode": "server",
    "vllm_server_timeout": 9.0,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 99,
    "vllm_enable_sleep_mode": True,
    "stratum_alpha": 0.2,
    "stratum_fallback": "group",
    "kl": "k2",
    "importance_cap": 3.5,
    "importance_floor": 0.5,
    "log_floor": 0.2,
    "completions_rows": 3,
    "warmup_steps": 5,
    "num_train_epochs": 2,
    "eval_steps": 2,
    "save_steps": 7,
    "save_total_limit": 3,
    "eval_delay": 3,
    "hub_model_id": "me/it",
    "optim_target_modules": "all",
    "label_smoothing_factor": 0.1,
    "dataloader_num_workers": 2,
    "data_seed": 4,
    "hapo_sign": "released",
    "vllm_server_port": 99,
    "vllm_group_port": 99,
    "vllm_server_host": "far",
    "vllm_tensor_parallel_size": 2,
    "kl_ratio": "token",
    "load_best_model_at_end": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 9,
    "per_device_eval_batch_size": 3,
    "torch_empty_cache_steps": 3,
}


@pytest.mark.parametrize("name", ALONE)
def test_a_setting_that_needs_another_is_warned_about_without_it(tmp_path, name):
    with pytest.warns(UserWarning, match=f"^{name}=.* has no effect: ") as told:
        config = tiny.config(tmp_path, trainer="grpo", allocator="uniform", **{name: ALONE[name]})
    told = [warning for warning in told if "has no effect" in str(warning.message)]
    needs = str(told[0].message).split("has no effect: ")[1]
    if name in ACTS:  # the other setting is named
        assert any(other in needs for other in names(RolloutConfig) - {name})
    assert list(idle_settings(config, ACTS)) == [name]


@pytest.mark.parametrize(
    "settings",
    [
        {"selector": "band", "band_low": 0.1, "posterior_decay_rest": 0.9},
        {"stopping": "early_unbiased", "stopping_wave": 3, "stopping_rho": 0.3},
        {"refill": True, "refill_max_draws": 9},
        {"allocator": "gvm", "gvm_alpha": 0.5, "budget_max": 40},
        {"beta": 0.1, "kl": "k2"},
        {"lr_scheduler_type": "linear", "warmup_steps": 5},
        {"loss": "hapo", "hapo_quantile": 0.5},
        {"down_sampling": "half", "rows_per_prompt": 2, "weight_rows": "drawn"},
        {"selection_score": "vade", "band_low": 0.3, "budget_min": 1, "stopping_needed": 1},
        {"remove_unused_columns": False, "do_train": True},
    ],
)
def test_nothing_is_said_where_it_acts_or_is_the_default(tmp_path, settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has no effect")
        given = {"trainer": "grpo", "allocator": "uniform"} | settings
        again = tiny.config(tmp_path, **given)
    assert idle_settings(again, ACTS) == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_recipe_sets_what_does_not_act(path):
    words = ["--config", str(path)]
    diffusion = peek("policy", words) == "diffusion"
    kind = DenoisingConfig if diffusion else RolloutConfig
    words += ["--use_cpu", "true", "--report_to", "none"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has no effect")
        parse((RecipeArguments, kind, ModelConfig), words)
