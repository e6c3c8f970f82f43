"""Declarations: every setting is classified, and one that is given in vain is warned about."""

import warnings
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import ModelConfig

from recipes.arguments import RecipeArguments
from recipes.config import parse, peek
from rl.config.declare import DECIDES, setting
from rl.config.declared import choices_of, decides, declared, idle_settings
from rl.config.diffusion import DenoisingConfig
from rl.config.inherited import GROUPS, INHERITED, NEVER, ONLY, TRAINER
from rl.config.language import RolloutConfig
from rl.config.methods import METHODS, OWN_STAGES
from rl.config.settings import STAGES
from tests import tiny

FILES = sorted((Path(__file__).resolve().parents[3] / "recipes").rglob("*.yaml"))
FILES = [p for p in FILES if p.parent.name != "accelerate" and p.name[0] != "_"]


def names(kind):
    return {f.name for f in fields(kind)}


KINDS = [RolloutConfig, DenoisingConfig]


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_classified(kind):
    own = {f.name for f in fields(kind)} - {f.name for f in fields(TrainingArguments)}
    for each in fields(kind):
        found = declared(each)  # a KeyError names one that is not
        assert found.decides in DECIDES and found.stage in (*STAGES, TRAINER), each.name
        assert each.metadata["help"], each.name
        assert not (each.name in own and each.name in INHERITED), each.name


def test_lists_of_inherited_settings_name_each_once_and_only_what_exists():
    listed = [name for names in GROUPS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert {*listed} <= names(TrainingArguments) and {*NEVER} | {*ONLY} <= {*listed}


def test_a_setting_that_decides_nothing_known_is_refused():
    with pytest.raises(ValueError, match="decides must be one of rollouts, .*got 'things'"):
        setting(1, "One.", stage="the run", decides="things")


def test_what_makes_rollouts_is_shared_by_a_resumed_run_and_speed_is_not():
    shared = decides(RolloutConfig, "rollouts")
    assert {"engine", "selector", "gvm_beta", "temperature", "seed", "refill"} <= {*shared}
    free = {"generation_batch_size", "micro_batch_tokens", "vllm_mode", "output_dir", "beta"}
    assert not free & {*shared}
    assert "log_floor" in decides(RolloutConfig, "training")  # not a log line's


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_name_a_method_have_its_records_as_choices(kind):
    for each in fields(kind):
        known = choices_of(kind, each)
        if each.name in METHODS and not declared(each).choices:
            assert known and {*known} <= {*METHODS[each.name]}
        if kind is RolloutConfig and each.name in OWN_STAGES:
            assert known == tuple(METHODS[each.name])


def test_a_method_that_language_models_alone_have_is_no_choice_of_a_diffusion_model():
    field = DenoisingConfig.__dataclass_fields__["down_sampling"]
    assert "pods" in choices_of(RolloutConfig, field)
    assert "pods" not in choices_of(DenoisingConfig, field)


def test_every_setting_that_a_record_names_exists_and_its_parameter_too():
    known = names(RolloutConfig) | names(DenoisingConfig)
    for stage, methods in METHODS.items():
        assert stage in known
        for method in methods.values():
            named = {*method.settings, *method.needs, *method.fits, *method.defaults}
            assert named <= known, (stage, method.name)
            assert method.help.endswith("."), (stage, method.name)


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
    "stopping_round_size": 3,
    "stopping_needed": 2,
    "stopping_threshold": 0.9,
    "stopping_rho": 0.3,
    "refill_max_draws": 8,
    "refill_min_prompts": 8,
    "refill_at_cap": "pad",
    "refill_max_age": 2,
    "posterior_decay_chosen": 0.5,
    "posterior_decay_rest": 0.5,
    "posterior_prior": "pooled",
    "posterior_prior_column": ["level"],
    "posterior_kappa": 3.0,
    "posterior_prior_components": 3,
    "posterior_prior_penalty": 3.0,
    "uniform_share": 0.5,
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
    if name not in NEVER:  # the other setting is named
        assert any(other in needs for other in names(RolloutConfig) - {name})
    assert list(idle_settings(config)) == [name]


@pytest.mark.parametrize(
    "settings",
    [
        {"selector": "band", "band_low": 0.1, "posterior_decay_rest": 0.9},
        {"stopping": "early_unbiased", "stopping_round_size": 3, "stopping_rho": 0.3},
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
    assert idle_settings(again) == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_recipe_sets_what_does_not_act(path):
    words = ["--config", str(path)]
    diffusion = peek("policy", words) == "diffusion"
    kind = DenoisingConfig if diffusion else RolloutConfig
    words += ["--use_cpu", "true", "--report_to", "none"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has no effect")
        parse((RecipeArguments, kind, ModelConfig), words)
