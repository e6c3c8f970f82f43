"""Settings that contradict each other are refused before anything is generated, and only these."""

from dataclasses import replace

import pytest
import torch

from rl.config.language import RolloutConfig
from rl.config.language_checks import CLIPS
from rl.config.methods import ADVANTAGES, LOSSES, PRESETS
from tests import tiny

WHITENED_TOKENS = {"advantage": "batch_whitened_tokens", "reward_kl": 0.1, "trainer": "grpo"}


def config(**settings):
    return RolloutConfig(output_dir="unused", use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            WHITENED_TOKENS | {"down_sampling": "pods", "rows_per_prompt": 4},
            "'pods' computes the advantages.*'batch_whitened_tokens' would be ignored",
        ),
        (
            {"trainer": "grpo", "down_sampling": "pods", "rows_per_prompt": 1},
            "compares the rows it keeps.*rows_per_prompt of at least 2, got 1",
        ),
        (
            {"objective": "mean", "advantage": "grpo"},
            "'raft_pp' has no negative signal, which advantage 'grpo' has: write advantage: raft",
        ),
        *(
            (
                WHITENED_TOKENS | {"loss": loss},
                f"loss '{loss}' has one ratio per row.*'batch_whitened_tokens' differ by token",
            )
            for loss in ("gspo", "luspo", "rloo")
        ),
        (
            {"refill": True, "refill_max_age": 2, "old_logprobs": "trainer"},
            "old_logprobs: trainer forgets.*refill_max_age=2 steps: write importance_correction",
        ),
        ({"reward_weights": [1.0, float("nan")]}, "must be finite numbers, got .*nan"),
        ({"reward_weights": [float("inf")]}, "must be finite numbers, got .*inf"),
        ({"reward_weights": ["1"]}, "must be finite numbers, got .*'1'"),
        ({"reward_weights": [0.0, 0.0]}, r"must not all be 0, got \[0.0, 0.0\]"),
        ({"prompts_per_step": 2.5}, r"prompts_per_step must be a whole number, got 2.5 \(float\)"),
        ({"top_k": 1.5}, r"top_k must be a whole number, got 1.5 \(float\)"),
        ({"max_steps": 2.5}, r"max_steps must be a whole number, got 2.5"),
        ({"budget_max": "9"}, "budget_max must be a whole number or None, got '9'"),
        ({"prompts_per_step": None}, "prompts_per_step must be a whole number, got None"),
        ({"temperature": "1e-5"}, r"temperature must be a number, got '1e-5' \(str\)"),
    ],
)
def test_a_contradiction_is_told_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer": "grpo", "advantage": "token_level", "loss": "gspo"},
        {"trainer": "grpo", "advantage": "token_level", "down_sampling": "pods"}
        | {"rows_per_prompt": 2},
        WHITENED_TOKENS | {"loss": "gspo_token"},
        {"trainer": "raft", "objective": "mean", "advantage": "grpo"},
        {"refill": True, "refill_max_age": 2},
        {"refill": True, "refill_max_age": 2, "importance_correction": "token_truncate"},
        {"old_logprobs": "trainer"},
        {"refill": True, "refill_max_age": 2, "old_logprobs": "trainer"}
        | {"importance_correction": "token_truncate"},
        {"reward_weights": [0.0, -1.0]},
        {"rollouts_per_prompt": 1},
        {"rollouts_per_prompt": 1, "trainer": "grpo", "advantage": "batch_whitened"},
        {"rollouts_per_prompt": 1, "trainer": "grpo", "allocator": "gvm", "budget_min": 0},
        {"top_k": 3, "temperature": 1, "budget_max": None},
    ],
)
def test_what_works_is_not_refused(settings):
    config(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("advantage", sorted({*ADVANTAGES} - {"batch_whitened_tokens"}))
def test_raft_pp_takes_the_advantages_that_are_never_negative(tmp_path, advantage):
    settings = {"trainer": "raft", "objective": "mean", "advantage": advantage, "max_steps": 1}
    made = tiny.trainer(tmp_path, reward=tiny.small_digit, **settings)
    least = []
    inner = made.objective.advantage
    watched = lambda *a: least.append(inner(*a)) or least[-1]  # noqa: E731
    made.objective = replace(made.objective, advantage=watched)
    made.train()
    assert bool((least[0] < 0).any()) == (not ADVANTAGES[advantage].never_negative)
    assert (least[0].ndim == 2) == ADVANTAGES[advantage].per_token


@pytest.mark.parametrize("advantage", sorted({*ADVANTAGES} - {"batch_whitened_tokens"}))
def test_one_rollout_of_each_prompt_is_refused_where_it_has_nothing_to_be_compared_with(advantage):
    settings = {"trainer": "grpo", "advantage": advantage, "rollouts_per_prompt": 1}
    if not ADVANTAGES[advantage].within_group:
        config(**settings)
        return
    for more in (
        {},
        {"allocator": "gvm"},
        {"budget_min": 0},
        {"budget_min": 0, "budget_max": 1, "allocator": "gvm"},
    ):
        with pytest.raises(ValueError, match=f"'{advantage}' compares the rollouts of a prompt"):
            config(**settings, **more)


@pytest.mark.parametrize("advantage", sorted({*ADVANTAGES} - {"batch_whitened_tokens"}))
def test_a_lone_rollout_has_no_advantage_within_its_group(advantage):
    method = ADVANTAGES[advantage]
    more = [torch.ones(2, dtype=torch.int64) for _ in method.columns]
    more += [torch.ones(2)] * 2 * method.reads_posterior
    advantage_N = method.function(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), *more)
    assert bool((advantage_N == 0).all()) == method.within_group


def test_refill_wants_mixed_groups_whatever_the_advantage():
    with pytest.raises(ValueError, match="refill compares.*rollouts_per_prompt of at least 2$"):
        config(refill=True, rollouts_per_prompt=1)


def test_a_diffusion_run_of_one_sample_may_look_at_earlier_steps():
    from rl.config.diffusion import DenoisingConfig

    settings = {"plan": {"num_steps": 2, "rule": "ddim", "level": 1.0}, "rollouts_per_prompt": 1}
    settings |= {"output_dir": "unused", "use_cpu": True, "report_to": "none"}
    assert DenoisingConfig(**settings, baseline="history").rollouts_per_prompt == 1
    with pytest.raises(ValueError, match="baseline 'prompt' compares.*or baseline: history"):
        DenoisingConfig(**settings)


# Clips that a loss does not take


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_that_was_set_is_taken_or_refused(loss, name):
    advantage = "raft" if loss.startswith("raft") else "grpo"
    settings = {"trainer": "grpo", "advantage": advantage, "loss": loss, name: 2.5}
    if name in LOSSES[loss].settings:
        assert getattr(config(**settings), name) == 2.5
        return
    with pytest.raises(
        ValueError, match=rf"{name}=2.5 has no effect on loss '{loss}'.*leave {name}"
    ):
        config(**settings)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("trainer", sorted(PRESETS))
def test_what_a_preset_or_a_loss_brings_is_never_refused(trainer, loss):
    advantage = LOSSES[loss].defaults.get("advantage", "raft")
    found = config(trainer=trainer, loss=loss, objective="mean", advantage=advantage)
    assert found.loss == loss


# Rewards that could not be told apart


def test_two_rewards_of_one_name_are_refused_before_any_rollout(tmp_path):
    def first_digit(**_):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="two reward functions are called 'first_digit'"):
        tiny.trainer(tmp_path, reward=[tiny.first_digit, first_digit])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gvm_beta": 1.5}, "gvm_beta must be at least 2, got 1.5"),
        ({"gvm_alpha": 0.0}, "gvm_alpha must be positive under a posterior"),
    ],
)
def test_gvms_numbers_are_refused_before_a_rollout(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, allocator="gvm", **settings)
    tiny.config(tmp_path, allocator="uniform", **settings)
