"""What budgets do to the objective: the methods' records against exact enumeration, and what is said."""

import itertools
import warnings

import pytest
import torch

from rl.config.budgets import what_budgets_change
from rl.config.build import advantage_of
from rl.config.language import RolloutConfig
from rl.config.methods import ADVANTAGES, OBJECTIVES
from rl.objective import weights as step_weights
from rollouts.batch import TokenRollouts

pytestmark = pytest.mark.slow  # whole runs


def config(**settings):
    """A config, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = RolloutConfig(output_dir="unused", report_to="none", use_cpu=True, **settings)
    return made, [str(one.message) for one in caught if "budgets" in str(one.message)]


def shares(made, budgets, *, pass_rate=0.3):
    """Expected gradient of each of several equal prompts, over that of the first, by enumeration.

    The policy is a Bernoulli's logit and the reward its action, in rollouts of one token.
    """
    prompt_N = torch.repeat_interleave(torch.arange(len(budgets)), torch.tensor(budgets))
    advantage, total_P = advantage_of(made), torch.zeros(len(budgets), dtype=torch.float64)
    one_N1 = torch.ones(len(prompt_N), 1, dtype=torch.bool)
    for outcome in itertools.product((0.0, 1.0), repeat=len(prompt_N)):
        reward_N = torch.tensor(outcome, dtype=torch.float64)
        rollouts = TokenRollouts(
            prompt_N=prompt_N,
            mask_NT=one_N1,
            logprob_NT=torch.zeros(one_N1.shape),
            version=0,
            token_NT=one_N1.long(),
            truncated_N=~one_N1[:, 0],
            seed_N=torch.zeros_like(prompt_N),
            prompt_ids=((0,),) * len(budgets),
            reward_N=reward_N,
            reward_NF=reward_N[:, None],
        )
        advantage_N = advantage(rollouts).reshape(len(prompt_N), -1)[:, 0]
        weight_N = step_weights.objective_weight(
            made.objective,
            reward_N,
            prompt_N,
            num_prompts=len(budgets),
            pass_rate_P=torch.full((len(budgets),), pass_rate).double(),
        )
        chance = (reward_N * pass_rate + (1 - reward_N) * (1 - pass_rate)).prod()
        gradient_N = chance * weight_N * advantage_N * (reward_N - pass_rate)
        total_P.index_add_(0, prompt_N, gradient_N)
    return (total_P / total_P[0]).tolist()


UNEVEN = {"trainer": "grpo", "allocator": "neyman", "std_eps": 0.0}


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_an_advantage_is_said_to_depend_on_budgets_if_and_only_if_it_does(advantage):
    made, told = config(**UNEVEN, advantage=advantage)
    # Equal prompts; the third has a budget of its own so that no symmetry hides anything.
    ratios = shares(made, (6, 2, 3))
    depends = max(abs(r - 1) for r in ratios) > 0.02  # the std of a batch leaves 1 %
    assert depends == (ADVANTAGES[advantage].budgets is not None)
    assert depends == bool(told) == bool(what_budgets_change(made))
    if depends:
        assert f"advantage '{advantage}' weighs a prompt of n rollouts" in told[0]


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_scaled_otherwise_the_mean_still_depends_on_budgets(scale):
    made, told = config(**UNEVEN, scale_rewards=scale)
    assert shares(made, (2, 6))[1] == pytest.approx((5 / 6) / (1 / 2), abs=0.05)
    assert "(n - 1) / n" in told[0]


@pytest.mark.parametrize("objective", sorted({*OBJECTIVES} - {"flat"}))
def test_an_objective_is_said_to_depend_on_budgets_if_and_only_if_it_does(objective):
    made, told = config(trainer="raft", allocator="gvm", objective=objective)
    ratio = shares(made, (2, 6))[1]
    assert (abs(ratio - 1) > 1e-9) == bool(told) == (OBJECTIVES[objective].budgets is not None)
    if told:
        # 1 - (1 - p)^n of both budgets.
        assert ratio == pytest.approx((1 - 0.7**6) / (1 - 0.7**2), abs=1e-12)


def test_a_budget_of_one_has_no_gradient_and_is_not_the_default_where_rollouts_are_compared():
    made, told = config(**UNEVEN, advantage="leave_one_out", budget_min=1)
    assert shares(made, (6, 1))[1] == 0
    assert "budget_min=1 lets a prompt have one rollout, which has no advantage" in told[0]
    made, told = config(**UNEVEN, advantage="leave_one_out")
    assert made.budget_min == 2 and not told
    assert config(trainer="raft", allocator="neyman", objective="mean")[0].budget_min == 1
    assert config(trainer="grpo", allocator="uniform")[0].budget_min == 1
    assert config(**UNEVEN, budget_max=9, allocation_scale="plug_in_std")[0].budget_min == 2


def test_budgets_of_none_and_budgets_by_outcome_are_said():
    _, told = config(trainer="raft", objective="mean", allocator="gvm", budget_min=0)
    assert "budget_min=0 lets a prompt have no rollout" in told[0]
    in_rounds = {"stopping_round_size": 4, "advantage": "leave_one_out", "trainer": "grpo"}
    _, told = config(**in_rounds, stopping="positive")
    assert "stopping 'positive' ends groups by what they have earned" in told[0]
    assert not config(**in_rounds, stopping="early_unbiased")[1]
    pilots = {"pilot_rollouts": 2, "advantage": "leave_one_out"}
    assert "pilots that are pooled" in config(**UNEVEN, **pilots)[1][0]
    assert not config(**UNEVEN, **pilots, pilot_use="discard")[1]
    _, told = config(
        trainer="grpo", prompts_per_step=3, rollouts_per_prompt=5, rollouts_multiple_of=7
    )
    assert "budgets differ by rollouts_multiple_of=7" in told[0]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "gspo"])
@pytest.mark.parametrize(
    "uneven", [{"allocator": "gvm"}, {"stopping": "early_unbiased", "stopping_round_size": 4}]
)
def test_where_budgets_differ_the_default_advantage_keeps_the_objective_and_says_so(loss, uneven):
    made, told = config(trainer="grpo", loss=loss, **uneven)
    assert made.advantage == "leave_one_out"
    assert len(told) == 1 and "advantage is 'leave_one_out' here" in told[0]
    assert shares(made, (2, 6))[1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "advantage"),
    [
        ({"advantage": "grpo"}, "grpo"),
        ({"scale_rewards": True}, "grpo"),
        ({"scale_rewards": "false"}, "centred"),
        ({"loss": "dr_grpo", "scale_rewards": "group"}, "grpo"),
        ({"loss": "hapo"}, "token_level"),
        ({"down_sampling": "pods", "rows_per_prompt": 4}, "grpo"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "grpo"),
    ],
)
def test_an_advantage_that_was_asked_for_stays_with_a_warning(settings, advantage):
    made, told = config(trainer="grpo", allocator="gvm", **settings)
    assert made.advantage == advantage
    assert len(told) == 1 and "budgets differ by allocator 'gvm'" in told[0]


def test_flat_is_what_budgets_make_of_it_and_nothing_more_is_said():
    made, told = config(trainer="grpo", allocator="gvm", objective="flat")
    assert made.advantage == "grpo" and not told


@pytest.mark.parametrize("trainer", ["grpo", "raft", "raft++"])
def test_even_budgets_are_passed_over_in_silence(trainer):
    assert not config(trainer=trainer)[1]


def test_trls_ways_to_write_the_scale_are_understood_and_others_refused():
    from rl.config.methods import scale_of

    for given, scale in (
        *((None, "group"), ("group", "group"), (True, "group"), ("true", "group")),
        *(("batch", "batch"), ("none", "none"), (False, "none"), ("False", "none")),
    ):
        assert scale_of(config(trainer="grpo", scale_rewards=given)[0]) == scale
    for settings, message in (
        ({"scale_rewards": "both"}, "scale_rewards must be one of group, batch, none.*'both'"),
        ({"scale_rewards": "group", "advantage": "leave_one_out"}, "got advantage 'leave_one_out'"),
        ({"scale_rewards": "group", "trainer": "raft"}, "a setting of advantage 'grpo'"),
        ({"std_correction": 2}, "std_correction must be 0 or 1, got 2"),
        ({"std_eps": -1.0}, "std_eps must be at least 0"),
        (
            {"multi_objective_aggregation": "normalise"},
            "must be one of sum_then_normalize, normalize_then_sum",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "advantage": "centred"},
            "needs advantage: grpo, got 'centred'",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "reward_kl": 0.1},
            "needs reward_kl: 0.0, got 0.1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            config(**({"trainer": "grpo"} | settings))


def test_a_yaml_may_give_the_scale_as_trl_does(tmp_path):
    from recipes.config import parse

    for written, scale in (("false", False), ("batch", "batch"), ("none", "none")):
        (tmp_path / "a.yaml").write_text(
            f"trainer: grpo\nscale_rewards: {written}\nuse_cpu: true\nreport_to: none\n"
        )
        words = ["--config", str(tmp_path / "a.yaml"), "--output_dir", str(tmp_path)]
        assert parse((RolloutConfig,), words)[0].scale_rewards == scale
