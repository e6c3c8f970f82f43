"""Settings of a diffusion run: what is refused, with which words, and what is filled in."""

import json
from dataclasses import fields
from datetime import date

import pytest
import torch
import yaml

from rl.config.denoising_plans import plan_at
from rl.config.diffusion import CREDITS, DenoisingConfig
from rl.config.language import RolloutConfig
from rl.config.methods import BASELINES
from rl.policies.diffusion import decision_weights, validations_of
from tests import tiny_denoising as tiny

WITHIN_BRANCH = [name for name, method in BASELINES.items() if method.within == "branch"]


def names(kind):
    return [f.name for f in fields(kind)]


def config(**settings):
    return tiny.config("unused", **settings)


# What is filled in


def test_it_is_a_clipped_surrogate_of_centred_rewards():
    made = config()
    assert (made.loss, made.objective) == ("grpo", "mean")
    assert (made.length_weight, made.epsilon, made.epsilon_high) == ("row_mean", 0.2, 0.2)


def test_the_kl_goes_with_the_log_probabilities_unless_it_is_named():
    assert config(beta=0.1).kl_reduction == "sum"
    assert config(beta=0.1, logprob_reduction="mean").kl_reduction == "mean"
    flow = {"num_steps": 4, "rule": "flow_sde", "level": 0.7}
    assert config(beta=0.1, plan=flow, kl_reduction="flow_grpo").kl_reduction == "flow_grpo"
    with pytest.raises(
        ValueError, match="kl_reduction 'flow_grpo' divides by .* rule ddim has none"
    ):
        config(beta=0.1, kl_reduction="flow_grpo")
    with pytest.raises(ValueError, match="kl_reduction must be one of sum, mean, flow_grpo, got"):
        config(beta=0.1, kl_reduction="max")
    with pytest.warns(UserWarning, match="kl_reduction='mean' has no effect with beta: 0"):
        config(kl_reduction="mean")


def test_what_is_written_is_kept():
    made = config(objective="flat", length_weight="row_sum", epsilon=1e-4, budget_min=0)
    assert (made.objective, made.length_weight) == ("flat", "row_sum")
    assert (made.epsilon, made.epsilon_high, made.budget_min) == (1e-4, 0.2, 0)
    assert all(config(baseline=name).baseline == name for name in BASELINES)


@pytest.mark.parametrize(
    ("allocator", "branches"), [("leave_one_out", 2), ("dr_grpo", 3), ("knapsack", 2)]
)
def test_allocators_that_compare_want_so_many_branches(allocator, branches):
    assert config(allocator=allocator, rollouts_per_prompt=9).budget_min == 3 * branches
    message = f"allocator '{allocator}' needs at least {branches} branches of 3 for every prompt"
    with pytest.raises(ValueError, match=f"{message}, got budget_min={3 * branches - 1} and"):
        config(allocator=allocator, rollouts_per_prompt=12, budget_min=3 * branches - 1)
    with pytest.raises(ValueError, match=f"{message}, got budget_min=.* rollouts_per_prompt=3"):
        config(allocator=allocator, rollouts_per_prompt=3)


# The plan


def test_a_plan_is_a_mapping_or_its_json():
    made = config(plan=json.dumps(tiny.BRANCHED))
    assert made.plan == tiny.BRANCHED and made.leaves_per_branch == 3
    assert made.step_plan(0) == plan_at(tiny.BRANCHED, 0, num_train_steps=2)
    assert made.step_plan(0).trained == (0, 1, 2) and made.step_plan(0).splits == ((1, 3),)
    tuples = tiny.CHAIN | {"branch": {"at": (1,), "children": 3}}
    assert config(plan=tuples).decisive_settings() == config(plan=tiny.BRANCHED).decisive_settings()
    again = DenoisingConfig(**{f.name: getattr(made, f.name) for f in fields(made) if f.init})
    assert again.plan == made.plan and again.budget_min == made.budget_min


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            None,
            r"plan must be a mapping such as \{num_steps: 20, rule: ddim, level: 1.0\}, got None",
        ),
        ("[1]", r"plan must be a mapping such as .*, got \[1\]"),
        ("num_steps: 4", "plan must be a mapping or JSON, got 'num_steps: 4'"),
        (
            tiny.CHAIN | {"steps": 4},
            "plan has no setting 'steps', there are num_steps, rule, level",
        ),
        ({"num_steps": 4}, "plan needs rule, level, got"),
        (tiny.CHAIN | {"rule": "ddpm"}, "rule must be one of .*, got 'ddpm'"),
        (tiny.CHAIN | {"rule": ["ddim"]}, r"rule must be one of .*, got \['ddim'\]"),
        (tiny.CHAIN | {"last_edge": True}, "last_edge must be one of .*, got True"),
        (
            tiny.CHAIN | {"trained": {"schedule": ["all_steps"]}},
            r"trained.schedule must be one of .*, got \['all_steps'\]",
        ),
        (tiny.CHAIN | {"level": 1.5}, "level of ddim must be between 0 and 1, got 1.5"),
        (
            tiny.CHAIN | {"level": date(2026, 1, 2)},
            "plan must hold numbers, names and lists alone, got .*2026.*date is not JSON",
        ),
    ],
)
def test_a_plan_that_is_none_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        config(plan=plan)


def test_schedules_spread_over_the_steps_of_the_run_and_then_stay():
    plan = tiny.CHAIN | {"last_edge": "trained"}
    plan |= {"trained": {"schedule": "backward_progressive", "first": 2, "last": 4}}
    made = config(plan=plan, max_steps=6)
    trained = [len(made.step_plan(step).trained) for step in range(9)]
    assert trained == [2, 2, 3, 3, 4, 4, 4, 4, 4]
    with pytest.raises(ValueError, match="stages must be at least 3, one for each length"):
        config(plan=plan, max_steps=2)


@pytest.mark.parametrize(
    "trained",
    [
        {"schedule": "backward_progressive", "first": 2, "last": 4},
        {"schedule": "sliding_window", "size": 1},
    ],
)
def test_a_schedule_needs_the_number_of_steps(trained):
    """Epochs are known once the prompts are read, and nobody wrote stages."""
    plan = tiny.CHAIN | {"trained": trained}
    message = (
        "plan.trained=.* changes from step to step, .* write max_steps in the place of num_train"
    )
    with pytest.raises(ValueError, match=message):
        config(plan=plan, max_steps=-1)
    same = tiny.CHAIN | {"trained": {"schedule": "last_steps", "last": 3}}
    assert config(plan=same, max_steps=-1).step_plan(5).trained == (1, 2)


def test_every_plan_of_a_run_is_at_hand():
    plan = tiny.CHAIN | {"stochastic": {"schedule": "sliding_window", "size": 2, "every": 2}}
    found = config(plan=plan, max_steps=5).step_plans()
    assert [plan.stochastic for plan in found] == [(0, 1), (1, 2), (2, 3)]


def test_a_plan_that_fails_at_a_later_step_is_refused_at_once():
    """The window of noise leaves the edge at which the chain branches."""
    sliding = {"schedule": "sliding_window", "size": 2, "every": 1}
    plan = tiny.BRANCHED | {"stochastic": sliding}
    config(plan=plan | {"branch": {"at": "stochastic_start", "children": 3}}, max_steps=3)
    config(plan=plan, max_steps=2)
    with pytest.raises(ValueError, match=r"splits need edges that draw noise, but \[1\] are not"):
        config(plan=plan, max_steps=3)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": "mean"}, "baseline must be one of prompt, history, .*, got 'mean'"),
        ({"credit_scale": "std"}, "credit_scale must be one of none, prompt, batch, got 'std'"),
        ({"logprob_reduction": "max"}, "logprob_reduction must be one of sum, mean, got 'max'"),
        ({"noise_weight": "var"}, "noise_weight must be one of none, std, got 'var'"),
        ({"loss": "dapo"}, "loss must be one of grpo, got 'dapo'"),
        ({"length_weight": "token_sum"}, "length_weight must be one of row_mean, row_sum, got"),
        ({"sibling_within_share": 1.5}, r"sibling_within_share must lie in \[0.0, 1.0\], got 1.5"),
        ({"ema_decay": -0.1}, r"ema_decay must lie in \[0.0, 1.0\], got -0.1"),
        (
            {
                "ema_decay": 0.9,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "save_strategy": "steps",
                "eval_steps": 2,
                "save_steps": 2,
            },
            "load_best_model_at_end brings back weights that train",
        ),
        ({"ema_decay": 1.0}, "ema_decay must be below 1: an average with decay 1 never moves"),
        ({"guidance_scale": -1.0}, r"guidance_scale must lie in \[0.0, inf\], got -1.0"),
        ({"branch_threshold": -0.5}, r"branch_threshold must lie in \[0.0, inf\], got -0.5"),
        ({"branch_threshold": float("nan")}, "branch_threshold must be finite, got nan"),
        ({"images_every": -1}, r"images_every must lie in \[0, inf\], got -1"),
        ({"history_steps": -1}, r"history_steps must lie in \[0, inf\], got -1"),
        ({"max_evaluations": 0}, r"max_evaluations must lie in \[1, inf\], got 0"),
        ({"advantage_clip": 0.0}, "advantage_clip must be positive or null, got 0.0"),
        ({"validation_steps": 0}, "validation_steps must be at least 1, got 0"),
        ({"validation_steps": 1.5}, "validation_steps must be a whole number or None, got 1.5"),
        ({"history_steps": 2.5}, "history_steps must be a whole number, got 2.5"),
        ({"max_evaluations": 1.5}, "max_evaluations must be a whole number or None, got 1.5"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number or None, got '5'"),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size must be at least 1, got 0",
        ),
        ({"height": 0}, "height must be at least 1, got 0"),
        (
            {"baseline": "buffer", "history_steps": 1},
            "history_steps must be at least 2 for baseline 'buffer', .* got 1",
        ),
        (
            {"baseline": "history", "credit_scale": "batch"},
            "baseline 'history' is in units of .* write credit_scale: none, got 'batch'",
        ),
        (
            {"baseline": "buffer", "credit_scale": "prompt"},
            "baseline 'buffer' is in units of .* write credit_scale: none, got 'prompt'",
        ),
        ({"down_sampling": "pods", "rows_per_prompt": 2}, "down_sampling must be one of none, d3s"),
        ({"objective": "em"}, "objective must be one of mean, log, flat, got 'em'"),
        (
            {"down_sampling": "max_variance", "rows_per_prompt": 2, "branch_threshold": 0.5},
            "down_sampling='max_variance' and branch_threshold=0.5 both choose the rows",
        ),
        ({"rollouts_per_prompt": 4}, "rollouts_per_prompt=4 must be a multiple of the 3 leaves"),
        ({"rollouts_multiple_of": 5}, "rollouts_per_step=10 must be a multiple of the 3 leaves"),
        (
            {"stopping": "positive", "stopping_round_size": 2},
            "stopping_round_size=2 must be a multiple of the 3 leaves of a branch",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


# What could never learn


def test_scales_of_credits_have_a_default_that_fits():
    assert config().credit_scale == config(baseline="siblings").credit_scale == "batch"
    assert config(baseline="history").credit_scale == "none"
    assert config(baseline="buffer", credit_scale="none").credit_scale == "none"


@pytest.mark.parametrize("baseline", WITHIN_BRANCH)
def test_samples_of_a_branch_are_compared_only_where_there_are_branches(baseline):
    message = f"baseline '{baseline}' compares the samples of a branch, but plan does not branch"
    for plan in (tiny.CHAIN, tiny.CHAIN | {"branch": {"at": [1], "children": 1}}):
        with pytest.raises(ValueError, match=f"{message}.* in plan, or baseline: prompt"):
            config(plan=plan, baseline=baseline)
    assert config(baseline=baseline).baseline == baseline


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_best_of_a_branch_needs_branches(threshold):
    message = (
        f"branch_threshold={threshold} compares .* does not branch.* or branch_threshold: null"
    )
    with pytest.raises(ValueError, match=message):
        config(plan=tiny.CHAIN, branch_threshold=threshold)


@pytest.mark.parametrize("clip", [0.3, 0.5])
def test_a_clip_leaves_differences_above_the_threshold(clip):
    message = f"advantage_clip={clip} cuts off all that branch_threshold=0.5 lets train"
    with pytest.raises(ValueError, match=message):
        config(branch_threshold=0.5, advantage_clip=clip)
    for settings in ({"branch_threshold": 0.0}, {"branch_threshold": 0.29}, {}):
        assert config(advantage_clip=0.3, **settings).advantage_clip == 0.3
    assert config(branch_threshold=0.5, advantage_clip=None).advantage_clip is None


def plan_of(at, trained, **more):
    return tiny.CHAIN | {"branch": {"at": at, "children": 3}, "trained": trained} | more


@pytest.mark.parametrize(
    ("baseline", "rollouts"),
    [("siblings", 6), ("branch", 6), ("prompt", 3), ("leave_one_out", 3), ("depth", 3)],
)
def test_no_edge_is_trained_where_compared_samples_differ(baseline, rollouts):
    """Edge 3, the last, is untrained by default; shared edges teach nothing."""
    settings = {"baseline": baseline, "rollouts_per_prompt": rollouts}
    message = (
        rf"baseline '{baseline}'.* branches, and plan trains none: it branches at \[3\] and trains"
    )
    with pytest.raises(ValueError, match=rf"{message} \(0, 1, 2\); write .* last_edge: trained"):
        config(plan=plan_of([3], "all_steps"), **settings)
    assert config(plan=plan_of([3], "all_steps", last_edge="trained"), **settings)
    assert config(plan=plan_of([2], "all_steps"), **settings)
    if rollouts == 3:  # two roots of a prompt do differ
        assert config(plan=plan_of([3], "all_steps"), **(settings | {"rollouts_per_prompt": 6}))
    # The first window ends before the split, the last does not.
    window = {"schedule": "sliding_window", "size": 2, "every": 1}
    with pytest.raises(ValueError, match=r"it branches at \[2\] and trains \(0, 1\)"):
        config(plan=plan_of([2], window), max_steps=1, **settings)
    assert config(plan=plan_of([2], window), max_steps=2, **settings)


def test_the_parents_value_teaches_at_splits_alone():
    last = {"schedule": "last_steps", "last": 2}
    with pytest.raises(ValueError, match=r"'parent' learns at an edge that branches, .* at \[1\]"):
        config(plan=plan_of([1], last), baseline="parent")
    assert config(plan=plan_of([1], last), baseline="branch")
    assert config(plan=plan_of([2], last), baseline="parent")


@pytest.mark.parametrize("baseline", ["prompt", "leave_one_out", "depth"])
def test_a_lone_sample_is_compared_with_nothing(baseline):
    settings = {"plan": tiny.CHAIN, "rollouts_per_prompt": 1}
    with pytest.raises(ValueError, match=f"baseline '{baseline}' compares .*rollouts_per_prompt=1"):
        config(baseline=baseline, **settings)
    with pytest.raises(ValueError, match="baseline 'history' compares .*history_steps above 0"):
        config(baseline="history", history_steps=0, **settings)
    assert config(baseline="history", **settings).rollouts_per_prompt == 1
    assert config(baseline="buffer", **settings).rollouts_per_prompt == 1


@pytest.mark.parametrize(
    ("drops", "what"),
    [
        ({"branch_threshold": 0.0}, "branch_threshold=0.0"),
        ({"down_sampling": "max_variance", "rows_per_prompt": 2}, "down_sampling='max_variance'"),
    ],
)
def test_dropped_siblings_do_not_train_the_edges_they_shared(drops, what):
    message = f"baseline 'siblings' cancels .* unless {what} drops .* trains edge 0 before .* at 1"
    with pytest.raises(ValueError, match=message):
        config(baseline="siblings", **drops)
    assert config(baseline="siblings").baseline == "siblings"  # all stay, and cancel
    assert config(baseline="branch", **drops).baseline == "branch"  # exactly 0 there
    progressive = {"schedule": "backward_progressive", "first": 2, "last": 4}
    assert config(
        plan=plan_of("trained_start", progressive), baseline="siblings", max_steps=3, **drops
    )
    with pytest.raises(ValueError, match="trains edge 1 before it branches at 2"):
        config(plan=plan_of([2], progressive), baseline="siblings", max_steps=3, **drops)


@pytest.mark.parametrize("baseline", CREDITS)
def test_credits_of_a_tree_need_every_reward(baseline):
    with pytest.raises(ValueError, match=f"baseline '{baseline}' needs the reward of every sample"):
        config(baseline=baseline, max_failed_share=0.1)
    assert config(baseline="siblings", max_failed_share=0.1).max_failed_share == 0.1


@pytest.mark.parametrize(
    "name", sorted({*names(RolloutConfig)} - {*names(DenoisingConfig)}), ids=str
)
def test_a_setting_of_language_models_is_answered_by_where_it_exists(name):
    with pytest.raises(
        ValueError, match=f"^{name} is a setting of language models alone .*: leave"
    ):
        config(**{name: 1})


@pytest.mark.parametrize("name", ["plan", "baseline", "guidance_scale", "ema_decay"])
def test_a_setting_of_diffusion_models_is_answered_by_where_it_exists(name):
    with pytest.raises(ValueError, match=f"^{name} is a setting of diffusion models alone"):
        RolloutConfig(output_dir="unused", use_cpu=True, report_to="none", **{name: 1})


def test_neither_kind_of_settings_is_the_other():
    assert not issubclass(DenoisingConfig, RolloutConfig)
    assert "temperature" not in config().to_dict() and "plan" in config().to_dict()


# What a resumed run must share


def test_what_decides_rollouts_or_credits_must_be_shared_by_a_resumed_run():
    made = config()
    decisive = made.decisive_settings()
    changes = [
        {"plan": tiny.CHAIN},
        {"guidance_scale": 2.0},
        {"height": 128},
        {"width": 128},
        {"sibling_within_share": 0.5},
        {"baseline": "parent"},
        {"history_steps": 3},
        {"credit_scale": "none"},
        {"branch_threshold": 0.5},
        {"ema_decay": 0.9},
        {"shared_start_noise": True},
        {"shift": 3.0, "plan": tiny.CHAIN | {"rule": "flow_sde"}},
        {"seed": 5},
        {"rollouts_per_prompt": 3},
    ]
    for change in changes:
        assert config(**change).decisive_settings() != decisive, change
    for change in ({"learning_rate": 1.0}, {"advantage_clip": 3.0}, {"generation_batch_size": 1}):
        assert config(**change).decisive_settings() == decisive, change
    json.dumps(decisive)  # goes into every checkpoint


def test_a_yaml_says_it_all(tmp_path):
    from recipes.config import parse

    settings = {"output_dir": str(tmp_path), "plan": tiny.BRANCHED, "rollouts_per_prompt": 6}
    settings |= {"baseline": "leave_one_out", "ema_decay": 0.9, "use_cpu": True}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    (made,) = parse((DenoisingConfig,), ["--config", str(path), "--plan", json.dumps(tiny.CHAIN)])
    assert made.plan == tiny.CHAIN and made.baseline == "leave_one_out" and made.ema_decay == 0.9
    (made,) = parse((DenoisingConfig,), ["--config", str(path)])
    assert made.step_plan(0).leaves_per_root == 3


def test_a_schedule_over_the_run_is_written_down(tmp_path):
    trained = {"schedule": "backward_progressive", "first": 2, "last": 4}
    made = tiny.config(tmp_path, plan=tiny.CHAIN | {"trained": trained}, max_steps=9)
    assert made.plan["trained"]["stages"] == 9  # a resumed run with another max_steps is refused
    told = tiny.config(
        tmp_path, plan=tiny.CHAIN | {"trained": trained | {"stages": 3}}, max_steps=9
    )
    assert told.plan["trained"]["stages"] == 3
    assert "stages" not in trained


def test_a_shift_is_positive_and_of_flow_models():
    flow = tiny.CHAIN | {"rule": "flow_sde", "level": 0.7}
    assert config(plan=flow, shift=3.0).engine_settings()["shift"] == 3.0
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"shift must be .*finite, got {wrong}"):
            config(plan=flow, shift=wrong)
    with pytest.raises(ValueError, match=r"shift=3\.0 is of flow-matching models, and rule ddim"):
        config(shift=3.0)


def test_shared_start_noise_is_of_training_and_not_of_validation():
    made = config(plan=tiny.CHAIN, shared_start_noise=True)
    assert all(plan.shared_start for plan in made.step_plans())
    assert not any(plan.shared_start for _, plan in validations_of(made).values())


def test_arguments_of_the_pipeline_are_a_mapping_or_json_and_go_to_the_engine():
    for given in (
        {"num_frames": 9, "true_cfg_scale": 4.0},
        '{"num_frames": 9, "true_cfg_scale": 4.0}',
    ):
        made = config(pipeline_kwargs=given, negative_prompt="dark", guidance_scale=None)
        settings = made.engine_settings()
        assert settings["pipeline_kwargs"] == {"num_frames": 9, "true_cfg_scale": 4.0}
        assert settings["negative_prompt"] == "dark" and settings["guidance_scale"] is None
        assert made.decisive_settings() != config().decisive_settings()
    for wrong, message in (
        ("{num_frames: 9", "pipeline_kwargs must be a mapping or JSON, got '{num_frames: 9'"),
        ("9", "pipeline_kwargs must be a mapping such as .*, got 9"),
        ({"day": date(2020, 1, 1)}, "pipeline_kwargs must hold numbers, names and lists alone"),
    ):
        with pytest.raises(ValueError, match=message):
            config(pipeline_kwargs=wrong)


def test_an_edge_counts_once_where_trees_branch():
    made = config(edge_weight="once")
    decisions = decision_weights(made, tiny.drawn(plan=made.step_plan(0))[1])
    # BRANCHED trains edges 0 to 2 and splits in three at edge 1: 1, 3 and 3 distinct edges.
    expected = torch.tensor([3 / 7, 9 / 7, 9 / 7, 0], dtype=torch.float64)
    torch.testing.assert_close(decisions, expected.expand(9, 4))
    with pytest.raises(ValueError, match="edge_weight='once' is about steps .* does not branch"):
        config(edge_weight="once", plan=tiny.CHAIN)
    with pytest.raises(ValueError, match="edge_weight must be one of leaves, once"):
        config(edge_weight="twice")
