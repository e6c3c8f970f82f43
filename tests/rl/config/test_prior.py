"""Which prior a run's posterior has, and what is refused before the first rollout."""

import numpy as np
import pytest

from rl.config.build import prior_of
from rl.stages.planning import column_of, make_planner
from rollouts.prompts import Prompt
from samplers.prior import FeaturesPrior, StrataPrior
from samplers.selection.uniform_share import UniformShare
from tests import tiny

ROWS = [
    {
        "level": row % 3,
        "one": True,
        "kind": f"k{row % 2}",
        "id": row,
        "place": [row % 5, 1.0, row * 0.1],
    }
    for row in range(30)
]
KEYS = [str(row) for row in range(30)]


def columns(name):
    prompts = [
        Prompt(key=str(i), prompt="", token_ids=(1,), columns=row) for i, row in enumerate(ROWS)
    ]
    return column_of(prompts)(name)


def made(tmp_path, features=None, **settings):
    config = tiny.config(tmp_path, **({"trainer": "grpo", "selector": "vade"} | settings))
    return prior_of(config, 30, columns, features)


@pytest.mark.parametrize(
    ("settings", "prior", "share"),
    [
        ({"selector": "vade"}, "pooled", 0.03),
        ({"allocator": "neyman"}, "pooled", 0.0),
        ({"stopping": "early", "stopping_round_size": 2}, "pooled", 0.0),
        ({}, "flat", 0.0),
        ({"stopping": "balanced", "stopping_round_size": 2}, "flat", 0.0),
        ({"allocator": "knapsack_released"}, "flat", 0.0),
        ({"allocator": "knapsack_released", "posterior_prior": "pooled"}, "pooled", 0.0),
        ({"selector": "vade", "posterior_prior": "flat"}, "flat", 0.0),
        ({"selector": "mopps", "uniform_share": 0.1}, "pooled", 0.1),
        ({"selector": "static_band", "selection_column": "rate"}, "flat", 0.0),
    ],
)
def test_what_is_left_out_is_pooled_where_anything_reads_the_posterior(
    tmp_path, settings, prior, share
):
    config = tiny.config(tmp_path, **({"trainer": "grpo", "allocator": "uniform"} | settings))
    assert (config.posterior_prior, config.uniform_share) == (prior, share)


def test_settings_make_the_prior_they_name(tmp_path):
    assert made(tmp_path, posterior_prior="flat") is None
    pooled = made(tmp_path, posterior_kappa=3.0, posterior_prior_decay=0.5)
    assert isinstance(pooled, StrataPrior) and pooled.kappa == 3 and pooled._decay == 0.5
    of_level = made(tmp_path, posterior_prior="column", posterior_prior_column="level")
    assert of_level.names == ["[0]", "[1]", "[2]"]
    of_two = made(tmp_path, posterior_prior="column", posterior_prior_column=["level", "one"])
    assert of_two.names == ["[0, true]", "[1, true]", "[2, true]"]


@pytest.mark.parametrize("given", ["column", "features"])
def test_features_are_those_of_a_column_or_of_the_policy(tmp_path, given):
    column = {"posterior_prior_column": ["place"]} if given == "column" else {}
    raw = np.array([row["place"] for row in ROWS])
    prior = made(
        tmp_path,
        features=lambda: raw,
        posterior_prior="features",
        posterior_prior_components=2,
        posterior_prior_penalty=1.0,
        **column,
    )
    assert isinstance(prior, FeaturesPrior) and prior.feature_DC.shape == (30, 2)
    assert prior._penalty == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"posterior_prior": "column"}, "posterior_prior 'column' needs posterior_prior_column"),
        ({"posterior_prior": "colum"}, "Did you mean 'column'"),
        (
            {"posterior_prior": "column", "posterior_prior_column": "nope"},
            "column 'nope' is missing in row 0 of the data set, whose columns are id, kind, level, one",
        ),
        (
            {"posterior_prior": "column", "posterior_prior_column": "place"},
            "'place' must hold words or numbers, row 0 has a list: write posterior_prior: features",
        ),
        (
            {"posterior_prior": "features", "posterior_prior_column": "kind"},
            "'kind' must hold equally long lists of finite numbers, row 0 has k0",
        ),
        ({"posterior_prior": "features"}, "needs posterior_prior_column here, a column of embedd"),
        ({"posterior_kappa": 0.0}, "posterior_kappa must be positive, got 0.0"),
        ({"posterior_prior_decay": 1.5}, "posterior_prior_decay must be at most 1, got 1.5"),
        ({"uniform_share": -0.1}, "uniform_share must be at least 0, got -0.1"),
        ({"posterior_prior_components": 0}, "posterior_prior_components must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **settings)


def test_a_column_whose_values_are_all_rare_is_refused(tmp_path):
    settings = {"posterior_prior": "column", "posterior_prior_column": "id", "prompts_per_step": 2}
    config = tiny.config(tmp_path, trainer="grpo", selector="vade", **settings)
    with pytest.raises(ValueError, match="id: no value stands in 8 prompts, .* pooled"):
        make_planner(config, KEYS, columns=columns)


def test_the_planner_has_the_prior_and_the_share(tmp_path):
    config = tiny.config(tmp_path, trainer="grpo", selector="vade", prompts_per_step=2)
    planner = make_planner(config, KEYS, columns=columns)
    assert isinstance(planner.selector, UniformShare)
    assert planner.posterior.prior.num_prompts == 30
    config = tiny.config(tmp_path, trainer="grpo", selector="vade", posterior_prior="flat")
    assert not isinstance(make_planner(config, KEYS, columns=columns).selector, UniformShare)
