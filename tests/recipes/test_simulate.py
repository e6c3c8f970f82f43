"""`apportion simulate`: the planner on prompts of given pass rates."""

import json
import math

import numpy as np
import pytest

from recipes import simulate as module
from recipes.simulate import (
    ALLOCATORS,
    POOLS,
    PRIORS,
    SELECTORS,
    STOPPINGS,
    UNIFORM,
    Outcome,
    Settings,
    main,
    pass_rates,
    simulate,
    strata_of,
)

EVEN = Settings(**UNIFORM)


def test_uniform_gives_every_prompt_the_same_by_hand():
    # 64 prompts, 32 a step, 4 steps: two epochs of 8 rollouts each.
    outcome = simulate(np.full(64, 0.5), EVEN, steps=4)
    assert (outcome.visits_D == 2).all() and (outcome.rollouts_D == 16).all()
    assert outcome.rollouts == 4 * 32 * 8


def test_prompts_that_always_fail_or_pass_have_no_mixed_group():
    for rate in (0.0, 1.0):
        outcome = simulate(np.full(40, rate), EVEN, steps=3)
        assert outcome.mixed_share == 0 and math.isinf(outcome.rollouts_per_mixed_group)


def test_the_share_of_mixed_groups_is_the_binomial_one():
    # P(mixed) = 1 - .3^8 - .7^8 = .9423; over 3200 groups its standard error is .0041.
    outcome = simulate(np.full(64, 0.3), EVEN, steps=100)
    assert outcome.mixed_share == pytest.approx(1 - 0.3**8 - 0.7**8, abs=4 * 0.0041)
    assert outcome.rollouts_per_mixed_group == pytest.approx(8 / outcome.mixed_share)


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_and_allocator_spends_what_it_may(selector, allocator):
    settings = Settings(selector=selector, allocator=allocator, prompts_per_step=8)
    outcome = simulate(pass_rates("half_dead", num_prompts=40, seed=0), settings, steps=5)
    assert outcome.rollouts == 5 * 8 * 8 and outcome.visits_D.sum() == 5 * 8


@pytest.mark.parametrize("name", [name for name in STOPPINGS if name != "none"])
def test_every_stopping_rule_saves_rollouts_of_prompts_that_need_none(name):
    # A prompt that always passes is done at once under `positive`; the others see no mix to come.
    rate_D = np.ones(40) if name == "positive" else np.zeros(40)
    settings = Settings(selector="uniform", allocator="uniform", stopping=name)
    if name == "balanced":  # goes on to the end for want of a pass
        rate_D = np.full(40, 0.5)
    assert simulate(rate_D, settings, steps=20).rollouts < 20 * 32 * 8


def test_a_selector_that_remembers_leaves_hopeless_prompts_alone():
    rate_D = pass_rates("half_dead", num_prompts=256, seed=1)
    remembers = Settings(posterior_decay_chosen=1.0, posterior_decay_rest=1.0)
    yours, even = (simulate(rate_D, each, steps=60) for each in (remembers, EVEN))
    _, wasted = yours.of(rate_D == 0)
    _, wasted_evenly = even.of(rate_D == 0)
    assert wasted_evenly == pytest.approx(0.5, abs=0.05) and wasted < 0.35
    assert yours.rollouts_per_mixed_group < even.rollouts_per_mixed_group


@pytest.mark.slow
def test_a_prior_of_kinds_finds_mixed_groups_that_no_posterior_of_a_prompt_can():
    # 900 prompts and 40 steps of 32: a prompt is visited 1.4 times, and its kind 140 times.
    rate_D = pass_rates("levels", num_prompts=900, seed=1)
    strata = strata_of("levels", num_prompts=900)
    few = {"rollouts_per_prompt": 2, "allocator": "uniform", "posterior_decay_chosen": 0.8}
    found = {
        prior: simulate(rate_D, Settings(posterior_prior=prior, **few), steps=40, strata=strata)
        for prior in ("flat", "pooled", "column")
    }
    shares = {prior: each.mixed_share for prior, each in found.items()}
    # Of 1280 groups each: standard error .014.
    assert shares["column"] > shares["flat"] + 0.08
    assert shares["pooled"] == pytest.approx(shares["flat"], abs=0.06)
    with pytest.raises(
        ValueError, match="needs prompts of several kinds: write pass_rates: levels"
    ):
        simulate(rate_D, Settings(posterior_prior="column"), steps=1)


def test_kinds_are_levels_or_the_numbers_themselves():
    assert strata_of("0,0.5", num_prompts=4) == ["0", "0", "0.5", "0.5"]
    assert strata_of("levels", num_prompts=10)[9] == "level 0"
    assert (
        strata_of("skewed", num_prompts=4) is None and strata_of("beta:1,2", num_prompts=4) is None
    )


def test_one_seed_is_one_outcome():
    rate_D = pass_rates("skewed", num_prompts=64, seed=3)
    one, again = (simulate(rate_D, Settings(seed=3), steps=5) for _ in range(2))
    assert (one.rollouts_D == again.rollouts_D).all() and (one.mixed_D == again.mixed_D).all()


def test_names_mean_what_they_mean_in_a_recipe():
    """The tables here are those of training, without what needs torch, a column or lengths."""
    from rl.config import methods
    from rl.config.language import RolloutConfig

    without = {"static_band", "diverse"}  # of a column
    assert set(SELECTORS) == set(methods.SELECTORS) - without
    assert set(ALLOCATORS) == set(methods.ALLOCATORS) - {"cost_aware"}  # of lengths
    assert set(STOPPINGS) == set(methods.STOPPINGS)
    for name, allocator in ALLOCATORS.items():
        method = methods.ALLOCATORS[name]
        assert (allocator.solve, allocator.scale) == (method.function, method.scale), name
        assert allocator.minimum == max(method.minimum, 1), name
    assert set(PRIORS) == set(methods.PRIORS) - {"features"}
    same = {"posterior_decay_chosen", "posterior_decay_rest", "posterior_prior_decay"}
    for name in same | {"posterior_kappa", "uniform_share", "prompts_per_step"}:
        assert getattr(Settings(), name) == RolloutConfig.__dataclass_fields__[name].default


# Pools


@pytest.mark.parametrize("name", POOLS)
def test_pools_are_pass_rates(name):
    rate_D = pass_rates(name, num_prompts=100, seed=0)
    assert rate_D.shape == (100,) and (rate_D >= 0).all() and (rate_D <= 1).all()


def test_numbers_are_dealt_in_equal_shares():
    assert pass_rates("0,0.5", num_prompts=4, seed=0).tolist() == [0, 0, 0.5, 0.5]


def test_a_beta_pool_has_its_mean():
    # Mean 2/5, std of Beta(2, 3) is .2, so the standard error over 4000 is .0032.
    assert pass_rates("beta:2,3", num_prompts=4000, seed=0).mean() == pytest.approx(0.4, abs=0.013)


def test_files_of_pass_rates(tmp_path):
    (tmp_path / "rates.txt").write_text("0.25\n\n1\n")
    assert pass_rates(str(tmp_path / "rates.txt"), num_prompts=9, seed=0).tolist() == [0.25, 1]
    rows = [{"prompt": "a", "solved": 0.5}, {"prompt": "b", "solved": 0}]
    (tmp_path / "rates.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = pass_rates(str(tmp_path / "rates.jsonl"), num_prompts=9, seed=0, column="solved")
    assert found.tolist() == [0.5, 0]
    with pytest.raises(
        ValueError, match="rates.jsonl, line 1: must be an object with a number 'pass"
    ):
        pass_rates(str(tmp_path / "rates.jsonl"), num_prompts=9, seed=0)
    (tmp_path / "rates.txt").write_text("0.25\nhalf\n")
    with pytest.raises(ValueError, match="rates.txt, line 2: must be a number"):
        pass_rates(str(tmp_path / "rates.txt"), num_prompts=9, seed=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pass_rates", "half-dead"], "pass_rates must be one of uniform, half_dead,"),
        (["--pass_rates", "0,1.5"], r"pass rates must be in \[0, 1\]"),
        (["--num_prompts", "8"], r"prompts_per_step must be in \[1, 8\]"),
        (["--num_prompts", "0"], "num_prompts must be at least 1"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--budget_min", "9"], "error: "),
    ],
)
def test_what_cannot_be_simulated_is_one_line(words, message):
    with pytest.raises(SystemExit, match=message):
        main(words)


def test_the_command_prints_both_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    main(["--num_prompts", "64", "--steps", "5", "--pass_rates", "0,0.5,1", "--stopping", "early"])
    printed = capsys.readouterr().out
    assert "rollouts per mixed group" in printed and "0.4 to 0.6" in printed
    assert (
        "yours: selector vade, prior pooled, allocator leave_one_out, stopping early; 5 steps"
        in printed
    )


def test_a_band_without_visits_is_no_number():
    outcome = Outcome(np.array([0.0, 0.5]), *(np.array([0, n]) for n in (1, 8, 1)))
    assert outcome.of(outcome.pass_rate_D == 0) == (None, 0.0)
    assert outcome.of(outcome.pass_rate_D > 0) == (8.0, 1.0)
    assert len(module.tables({"only": outcome})) == 2
