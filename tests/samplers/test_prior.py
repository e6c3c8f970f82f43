"""Priors that learn from a prompt's neighbours. Axes: D prompts, S strata."""

import copy
import itertools

import numpy as np
import pytest

from samplers import allocation
from samplers.posterior import BetaPosterior
from samplers.prior import (
    KAPPA,
    KAPPA_RANGE,
    FeaturesPrior,
    StrataPrior,
    Strength,
    pooled_prior,
    principal_components,
    standardised,
)
from samplers.selection import PosteriorMeanSelector, ThompsonSelector, mopps
from samplers.selection.bands import OnlineBandSelector
from samplers.selection.diverse import DiverseSelector
from samplers.stopping import Counts, early, early_unbiased

LEVELS = ["easy"] * 10 + ["hard"] * 10 + ["odd"] * 2 + [None]


def of_levels(**settings):
    return StrataPrior(LEVELS, **settings)


def every(num_prompts):
    features = np.random.default_rng(0).normal(size=(num_prompts, 3))
    strata = [f"{row % 3}" for row in range(num_prompts)]
    return {
        "pooled": pooled_prior(num_prompts),
        "strata": StrataPrior(strata),
        "features": FeaturesPrior(features),
    }


# -- strata


def test_a_stratums_rate_by_hand():
    prior = of_levels(decay=0.5)
    assert prior.names == ["easy", "hard"]
    prior.observe(np.array([0, 12, 20]), np.array([6.0, 1.0, 2.0]), np.array([8.0, 8.0, 4.0]))
    prior.decay()  # easy 3 of 4, hard .5 of 4, without a stratum 1 of 2
    easy = (3 + 2 * (1.5 + 1) / (6 + 2)) / (4 + 2)
    hard = (0.5 + 2 * (4 + 1) / (6 + 2)) / (4 + 2)
    pool = (4.5 + 1) / (10 + 2)
    np.testing.assert_allclose(prior.mean([0, 9, 10, 20, 22]), [easy, easy, hard, pool, pool])
    assert prior.mean().shape == (23,)


def test_with_one_stratum_it_is_the_pooled_prior():
    one, pooled = StrataPrior(["all"] * 9), pooled_prior(9)
    generator = np.random.default_rng(0)
    for _ in range(5):
        rows = generator.choice(9, 4, replace=False)
        passes = generator.integers(0, 5, 4).astype(float)
        for prior in (one, pooled):
            prior.observe(rows, passes, np.full(4, 4.0))
            prior.decay()
        np.testing.assert_array_equal(one.mean(), pooled.mean())
        assert one.kappa == pooled.kappa
    passed, failed = pooled._passed_S.sum(), pooled._failed_S.sum()
    assert pooled.mean([3])[0] == (passed + 1) / (passed + failed + 2)


def test_values_that_few_prompts_have_fall_back_to_the_pool():
    prior = StrataPrior(["a"] * 8 + ["b"] * 7)
    assert prior.names == ["a"]
    prior.observe(np.array([0, 8]), np.array([0.0, 4.0]), np.array([4.0, 4.0]))
    assert prior.mean([9])[0] == (4 + 1) / (8 + 2)  # that of all, not of the b's


def test_a_stratum_written_off_early_is_tried_again():
    prior = of_levels(decay=0.9, kappa=8)
    posterior = BetaPosterior(len(LEVELS), decay_rest=0.9, prior=prior)
    hard, easy = np.arange(10, 20), np.arange(10)
    posterior.observe(hard, np.zeros(10), np.full(10, 8.0))
    before = posterior.mean([10])[0]
    assert before < 0.02
    found = []
    for _ in range(120):  # only the easy ones are visited, half of which pass
        posterior.observe(easy[:2], [4, 4], [8, 8])
        found.append(posterior.mean([10])[0])
    assert (np.diff(found) > 0).all()  # they return to what the others say
    assert found[-1] == pytest.approx(0.5, abs=0.01)


def test_a_drifting_pool_stays_calibrated():
    # Both strata drift from .1 and .5 upwards; predictions are made before the rollouts they are of.
    generator, strata = np.random.default_rng(1), ["a"] * 100 + ["b"] * 100
    posterior = BetaPosterior(200, prior=StrataPrior(strata, decay=0.9, kappa=8))
    flat = BetaPosterior(200)
    predicted, of_flat, seen = [], [], []
    for step in range(150):
        rate = np.where(np.arange(200) < 100, 0.1, 0.5) + 0.003 * step
        rows = generator.choice(200, 16, replace=False)
        passes = generator.binomial(2, rate[rows])
        predicted.append(posterior.mean(rows))
        of_flat.append(flat.mean(rows))
        seen.append(passes / 2)
        for each in (posterior, flat):
            each.observe(rows, passes, np.full(16, 2))
    predicted, of_flat, seen = (np.concatenate(x[20:]) for x in (predicted, of_flat, seen))
    edges = np.quantile(predicted, [0, 0.25, 0.5, 0.75, 1])
    for low, high in itertools.pairwise(edges):
        inside = (predicted >= low) & (predicted <= high)
        # Standard error at most sqrt(.25 / 1000) = .016; the drift of .003 a step over the memory of
        # ten steps lags by .03.
        assert abs(predicted[inside].mean() - seen[inside].mean()) < 0.03 + 3.5 * 0.016
    assert ((predicted - seen) ** 2).mean() < ((of_flat - seen) ** 2).mean() - 0.02


# -- the posterior


def test_two_rollouts_at_one_half_are_todays_posterior_bit_for_bit():
    flat = BetaPosterior(6, decay_chosen=0.3)
    prior = pooled_prior(6, decay=0.0, kappa=2)
    informed = BetaPosterior(6, decay_chosen=0.3, prior=prior)
    generator = np.random.default_rng(0)
    for _ in range(10):
        rows = generator.choice(6, 3, replace=False)
        passes = generator.integers(0, 4, 3) / 3
        for posterior in (flat, informed):  # with decay 0 the prior has forgotten by the next step
            posterior.observe(rows, passes, [3, 3, 3])
        for index in (None, [4, 0]):
            for one, other in zip(flat.parameters(index), informed.parameters(index), strict=True):
                np.testing.assert_array_equal(one, other)


def test_with_kappa_without_end_the_posterior_is_the_stratum_alone():
    posterior = BetaPosterior(len(LEVELS), prior=of_levels(kappa=1e12))
    posterior.observe([0, 1, 10], [8, 0, 1], [8, 8, 8])
    prior = posterior.prior
    np.testing.assert_allclose(posterior.mean(), prior.mean(), rtol=1e-9)
    assert posterior.mean([0]) == pytest.approx(posterior.mean([1]), rel=1e-9)


def test_the_parameters_are_those_of_conjugacy():
    posterior = BetaPosterior(20, decay_chosen=1, decay_rest=1, prior=pooled_prior(20, kappa=5))
    posterior.observe([3, 4], [2, 0.5], [4, 3])
    m = posterior.prior.mean([3])[0]
    a, b = posterior.parameters([3, 4, 7])
    np.testing.assert_allclose(a, [2 + 5 * m, 0.5 + 5 * m, 5 * m], rtol=1e-14)
    np.testing.assert_allclose(b, [2 + 5 * (1 - m), 2.5 + 5 * (1 - m), 5 * (1 - m)], rtol=1e-14)


def test_the_prior_decays_once_a_training_step_and_learns_whatever_the_posterior_does():
    whole, parts = (BetaPosterior(9, prior=pooled_prior(9, decay=0.5, kappa=3)) for _ in range(2))
    whole.observe([0, 4], [1, 2], [2, 2])
    parts.decay([0, 4])
    parts.add([0], [1], [2])
    parts.add([4], [2], [2])
    parts.decay_others([0, 4])
    np.testing.assert_array_equal(whole.parameters(), parts.parameters())
    assert whole.prior.mean([8])[0] == (1.5 + 1) / (2 + 2)


@pytest.mark.parametrize("name", ["pooled", "strata", "features"])
def test_saved_and_loaded_is_the_same_bit_for_bit(name):
    posterior = BetaPosterior(40, prior=every(40)[name])
    generator = np.random.default_rng(0)

    def steps(posterior, generator, num):
        for _ in range(num):
            rows = generator.choice(40, 8, replace=False)
            posterior.observe(rows, generator.integers(0, 5, 8), np.full(8, 4))

    steps(posterior, generator, 4)
    state, kept = posterior.state_dict(), copy.deepcopy(posterior.state_dict())
    restored, rest = BetaPosterior(40, prior=every(40)[name]), copy.deepcopy(generator)
    restored.load_state_dict(state)
    steps(posterior, generator, 4)
    assert state["prior"].keys() == kept["prior"].keys()
    for key, value in state["prior"].items():
        np.testing.assert_equal(value, kept["prior"][key])
    steps(restored, rest, 4)
    np.testing.assert_array_equal(posterior.parameters(), restored.parameters())


def test_strata_that_come_and_go_are_restored_by_name():
    before, after = StrataPrior(["a"] * 8 + ["b"] * 8), StrataPrior(["b"] * 8 + ["c"] * 8)
    before.observe(np.array([0, 8]), np.array([3.0, 1.0]), np.array([4.0, 4.0]))
    after.load_state_dict(before.state_dict())
    b = (1 + 2 * (3 + 1) / (4 + 2)) / (4 + 2)
    c = (2 * (4 + 1) / (8 + 2)) / 2
    np.testing.assert_allclose(after.mean([0, 8]), [b, c])


def test_states_and_priors_of_something_else_are_refused():
    flat, informed = BetaPosterior(9), BetaPosterior(9, prior=pooled_prior(9))
    with pytest.raises(ValueError, match="without a prior that learns, this one has one: .*flat"):
        informed.load_state_dict(flat.state_dict())
    with pytest.raises(ValueError, match="with a prior that learns, this one has none"):
        flat.load_state_dict(informed.state_dict())
    with pytest.raises(ValueError, match="the prior is of 8 prompts, the posterior of 9"):
        BetaPosterior(9, prior=pooled_prior(8))
    for make, message in [
        (lambda: pooled_prior(0), "num_prompts must be at least 1"),
        (lambda: pooled_prior(3, decay=1.5), r"decay must be in \[0, 1\], got 1.5"),
        (lambda: pooled_prior(3, kappa=0), "kappa must be positive and finite, or None, got 0"),
        (lambda: FeaturesPrior([[1.0]], penalty=0), "penalty must be positive"),
        (lambda: FeaturesPrior([1.0, 2.0]), r"\(prompts, features\), got shape \(2,\)"),
        (lambda: FeaturesPrior([[1.0], [np.nan]]), "those of row 1 are not"),
        (lambda: principal_components([[1.0]], 0), "num_components must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    features, others = FeaturesPrior(np.zeros((4, 2))), FeaturesPrior(np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"features of shape \(5, 2\), there are 4 prompts"):
        features.load_state_dict(others.state_dict())
    with pytest.raises(ValueError, match="features of 5 prompts, expected 4"):
        FeaturesPrior(lambda: np.zeros((5, 2)), num_prompts=4).mean()
    damaged = of_levels().state_dict() | {"passed_S": np.zeros(2)}
    with pytest.raises(ValueError, match="one number for each stratum, and one more"):
        of_levels().load_state_dict(damaged)


# -- kappa


def test_the_strength_is_that_of_its_definition():
    m, s, n = np.array([0.3, 0.6, 0.5]), np.array([2, 3, 1]), np.array([3, 4, 1])
    strength = Strength(None)
    strength.observe(m, s, n)
    alike = pairs = 0.0
    for rate, passes, trials in zip(m, s, n, strict=True):
        rewards = [1.0] * passes + [0.0] * (trials - passes)
        for i in range(trials):
            for j in range(trials):
                if i != j:
                    alike += (rewards[i] - rate) * (rewards[j] - rate)
                    pairs += rate * (1 - rate)
    assert strength._alike == pytest.approx(alike)
    assert strength._pairs == pytest.approx(pairs)


@pytest.mark.parametrize("kappa", [3.0, 8.0, 25.0])
@pytest.mark.parametrize("trials", [2, 8])
def test_the_estimate_finds_the_strength_of_a_pool(kappa, trials):
    generator, strength = np.random.default_rng(0), Strength(None)
    m = generator.uniform(0.2, 0.8, 40_000)
    rate = generator.beta(kappa * m, kappa * (1 - m))
    strength.observe(m, generator.binomial(trials, rate).astype(float), np.full(len(m), trials))
    # Of 40,000 pairs the correlation has standard error .005: rho = .25, .111, .038, 4 of these.
    rho = 1 / (1 + strength.kappa)
    assert rho == pytest.approx(1 / (1 + kappa), abs=0.02)
    if trials == 8:
        assert strength.kappa == pytest.approx(kappa, rel=0.08)


def test_the_strength_starts_at_a_guess_stays_in_its_range_and_can_be_given():
    assert Strength(None).kappa == pytest.approx(KAPPA)
    alike, apart = Strength(None), Strength(None)
    alike.observe(np.full(500, 0.5), np.full(500, 4.0), np.full(500, 8))  # all exactly at m
    apart.observe(np.full(500, 0.5), np.tile([0.0, 8.0], 250), np.full(500, 8))
    assert (apart.kappa, alike.kappa) == KAPPA_RANGE
    lone = Strength(None)
    lone.observe(np.full(500, 0.5), np.zeros(500), np.ones(500))
    assert lone.kappa == pytest.approx(KAPPA)  # one rollout says nothing of what prompts differ by
    given = Strength(120)
    given.observe(np.full(500, 0.5), np.zeros(500), np.full(500, 8))
    assert given.kappa == 120


# -- features


def test_ridge_is_the_solution_of_its_equations():
    generator = np.random.default_rng(0)
    raw = generator.normal(size=(30, 2)) * [3, 0.1] + 5
    prior = FeaturesPrior(raw, decay=0.5, penalty=4.0)
    steps = []
    for _ in range(3):
        rows = generator.choice(30, 6, replace=False)
        passes, trials = generator.integers(0, 3, 6).astype(float), np.full(6, 2.0)
        prior.observe(rows, passes, trials)
        prior.decay()
        steps.append((rows, passes, trials))
    x = np.column_stack([np.ones(30), (raw - raw.mean(0)) / raw.std(0)])
    design, target = [np.sqrt(2) * np.eye(3)[:1]], [np.sqrt(2) * 0.5 * np.ones(1)]
    for age, (rows, passes, trials) in enumerate(reversed(steps), start=1):
        root = np.sqrt(trials * 0.5**age)
        design.append(x[rows] * root[:, None])
        target.append(passes / trials * root)
    design.append(2.0 * np.eye(3)[1:])
    target.append(np.zeros(2))
    coefficients, *_ = np.linalg.lstsq(np.concatenate(design), np.concatenate(target), rcond=None)
    np.testing.assert_allclose(prior.mean(), np.clip(x @ coefficients, 0.05, 0.95), atol=1e-8)


def test_features_are_asked_for_once_and_not_where_a_state_has_them():
    generator = np.random.default_rng(0)
    raw = generator.normal(size=(20, 3))
    asked = []

    def features():
        asked.append(True)
        return raw

    lazy, eager = FeaturesPrior(features, num_prompts=20), FeaturesPrior(raw)
    empty = lazy.state_dict()
    assert empty["feature_DC"] is None and not asked
    rows, passes = np.arange(0, 20, 2), generator.integers(0, 3, 10).astype(float)
    for prior in (lazy, eager):
        prior.observe(rows, passes, np.full(10, 2.0))
        prior.decay()
    np.testing.assert_array_equal(lazy.mean(), eager.mean())
    assert len(asked) == 1
    # A run that goes on has the features it began with, whatever its model would give by now.
    resumed = FeaturesPrior(lambda: pytest.fail("asked again"), num_prompts=20)
    resumed.load_state_dict(lazy.state_dict())
    np.testing.assert_array_equal(resumed.mean(), eager.mean())
    lazy.load_state_dict(empty)
    assert lazy.mean().tolist() == [0.5] * 20 and len(asked) == 2


def test_constant_features_are_the_pooled_prior():
    constant, pooled = FeaturesPrior(np.full((12, 3), 7.0)), pooled_prior(12)
    generator = np.random.default_rng(0)
    for _ in range(6):
        rows = generator.choice(12, 4, replace=False)
        for prior in (constant, pooled):
            prior.observe(rows, np.array([1.0, 0.0, 2.0, 1.0]), np.full(4, 2.0))
            prior.decay()
    np.testing.assert_allclose(constant.mean(), pooled.mean(), atol=1e-9)
    assert constant.kappa == pytest.approx(pooled.kappa)


def test_features_find_a_planted_direction_that_drifts():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(800, 8))
    direction = generator.normal(size=8)
    direction /= np.linalg.norm(direction)
    prior = FeaturesPrior(x)
    for step in range(25):
        rate = 1 / (1 + np.exp(-1.5 * x @ direction + 2 - 0.05 * step))
        rows = generator.choice(800, 32, replace=False)
        prior.observe(rows, generator.binomial(8, rate[rows]).astype(float), np.full(32, 8.0))
        prior.decay()
    ranks = (np.argsort(np.argsort(each)) for each in (prior.mean(), rate))
    assert np.corrcoef(*ranks)[0, 1] > 0.95
    assert prior.mean().min() >= 0.05 and prior.mean().max() <= 0.95


def test_units_and_rotations_of_features_do_not_matter():
    generator = np.random.default_rng(0)
    x = standardised(generator.normal(size=(50, 4)))
    rows, passes = np.arange(20), generator.integers(0, 3, 20).astype(float)
    found = []
    for features in (x, x * [1e-200, 1, 1e200, -3] + 5 * np.array([0, 1, 0, 0])):
        prior = FeaturesPrior(features)
        prior.observe(rows, passes, np.full(20, 2.0))
        found.append(prior.mean())
    np.testing.assert_allclose(found[0], found[1], atol=1e-8)
    assert (standardised(np.full((3, 2), 1e300)) == 0).all()


@pytest.mark.parametrize("shape", [(200, 40), (30, 300)])
def test_principal_components_are_those_of_the_decomposition(shape):
    generator = np.random.default_rng(0)
    raw = generator.normal(size=(shape[0], 6)) * [9, 7, 5, 4, 3, 2] @ generator.normal(
        size=(6, shape[1])
    ) + 0.1 * generator.normal(size=shape)
    found = principal_components(raw, 4)
    u, s, _ = np.linalg.svd(standardised(raw), full_matrices=False)
    expected = (u * s)[:, :4]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-6 * s[0])
    np.testing.assert_array_equal(found, principal_components(raw, 4))
    assert principal_components(raw[:3], 16).shape == (3, 3)


# -- everything that reads a posterior takes parameters below 1


@pytest.mark.parametrize("name", ["pooled", "strata", "features"])
def test_selectors_allocators_and_stopping_take_parameters_below_1(name):
    prior = every(60)[name]
    posterior = BetaPosterior(60, prior=prior)
    for _ in range(40):  # hopeless: m falls towards 0
        posterior.observe(np.arange(0, 60, 2), np.zeros(30), np.full(30, 4.0))
    a, b = posterior.parameters()
    assert a.min() < 1 and (a > 0).all() and (b > 0).all()
    generator = np.random.default_rng(0)
    embedding = np.random.default_rng(1).normal(size=(60, 2))
    for selector in (
        ThompsonSelector(posterior),
        mopps(posterior),
        PosteriorMeanSelector(posterior),
        OnlineBandSelector(posterior, short="nearest"),
        DiverseSelector(posterior, embedding, gamma=0.1),
    ):
        assert len(set(selector.select(8, generator=generator).tolist())) == 8
    for scale in (
        *(allocation.posterior_std, allocation.mean_std, allocation.plug_in_std, allocation.gvm),
        *(allocation.log_std, allocation.accepted_std, allocation.reinforce_ada_std),
    ):
        assert allocation.neyman(scale(a, b), 240).sum() == 240
    drawn = allocation.thompson_std(a, b, generator=generator)
    assert allocation.leave_one_out(drawn, 240).sum() == 240
    assert allocation.knapsack(allocation.mean_pass_rate(a, b), 240).sum() == 240
    assert allocation.knapsack_released(allocation.passed_share(a, b), 240).sum() == 240
    assert allocation.knapsack_posterior(a, b, 240).sum() == 240
    counts = Counts.of(a, b, np.zeros(60), np.full(60, 4), np.full(60, 4), 0.4)
    assert ((counts.mixed_P >= 0) & (counts.mixed_P <= 1)).all()
    assert early(threshold=0.5)(counts).shape == (60,)
    goes_on_P, weight_P = early_unbiased(threshold=0.5, rho=0.5)(counts)
    assert np.isfinite(weight_P[goes_on_P]).all()
