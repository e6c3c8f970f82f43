import itertools

import numpy as np
import pytest
from scipy import stats

from samplers import allocation
from samplers.calibration import Reliability, calibration, log_predictive, randomised_pit
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import ThompsonSelector, UniformSelector


def test_log_predictive_by_hand_and_against_scipy():
    # Beta(2, 8): .2647, .2824, .2118 for 0, 1, 2 of 8. Beta(1, 1): 1/9 each.
    found = log_predictive([2, 2, 2, 1], [8, 8, 8, 1], [0, 1, 2, 5], [8, 8, 8, 8])
    np.testing.assert_allclose(np.exp(found), [0.2647, 0.2824, 0.2118, 1 / 9], atol=5e-5)
    a, b = [1.02, 9.5, 3.0], [8.68, 1.0, 3.0]
    expected = stats.betabinom.logpmf([3, 4, 0], [5, 4, 0], a, b)
    np.testing.assert_allclose(log_predictive(a, b, [3, 4, 0], [5, 4, 0]), expected, atol=1e-12)


def pit_of(generator, *, stopping):
    """PIT values of a second group, on a pool drawn from the prior, after a first group of 8.

    `stopping` cuts the first group by its outcomes, by finishing time, or not at all.
    """
    size = 4000
    rate_D = generator.random(size)
    rewards_DT = generator.random((size, 8)) < rate_D[:, None]
    if stopping == "outcome":  # 4 of 8 where all are alike
        alike_D = (rewards_DT[:, :4] == rewards_DT[:, :1]).all(axis=1)
        trials_D = np.where(alike_D, 4, 8)
    elif stopping == "time":  # the first 4 to finish, and successes are quicker
        rewards_DT, trials_D = -np.sort(-rewards_DT.astype(int), axis=1), np.full(size, 4)
    else:
        trials_D = np.full(size, 8)
    counted_DT = np.arange(8) < trials_D[:, None]
    posterior = BetaPosterior(size, decay_chosen=1, decay_rest=1)
    posterior.observe(range(size), (rewards_DT * counted_DT).sum(axis=1), trials_D)
    successes_D = generator.binomial(8, rate_D)
    a, b = posterior.parameters()
    return randomised_pit(a, b, successes_D, np.full(size, 8), generator=generator)


def chi_square(pit_P, bins=20):
    counts_B = np.histogram(pit_P, bins=bins, range=(0, 1))[0]
    expected = len(pit_P) / bins
    return ((counts_B - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("stopping", [None, "outcome"])
def test_without_decay_the_posterior_is_calibrated_on_a_stationary_pool(stopping):
    # Chi-square with 19 degrees of freedom: mean 19, standard deviation 6.2.
    assert chi_square(pit_of(np.random.default_rng(0), stopping=stopping)) < 19 + 4 * 6.2


def test_truncation_by_finishing_time_ruins_calibration():
    assert chi_square(pit_of(np.random.default_rng(0), stopping="time")) > 19 + 40 * 6.2


def expected_after(stopped, p=0.5, n=8):
    """E[successes / trials] and E[successes - p trials] over every outcome."""
    mean = drift = 0.0
    for rewards in itertools.product([0, 1], repeat=n):
        chance = np.prod([p if r else 1 - p for r in rewards])
        successes, trials = stopped(rewards)
        mean += chance * successes / trials
        drift += chance * (successes - p * trials)
    return mean, drift


def test_what_stopping_does_to_the_counts_by_enumeration():
    def by_outcome(rewards):
        trials = 4 if len(set(rewards[:4])) == 1 else 8
        return sum(rewards[:trials]), trials

    def by_time(rewards):
        return min(sum(rewards), 4), 4

    # A stop on outcomes leaves successes - p trials a martingale; the first 4 of 8 to finish, with
    # successes quicker, have mean .863 at p = .5.
    assert expected_after(by_outcome)[1] == pytest.approx(0, abs=1e-12)
    assert expected_after(by_outcome, p=0.2)[1] == pytest.approx(0, abs=1e-12)
    assert expected_after(by_time)[0] == pytest.approx(0.863, abs=5e-4)


def test_a_likelihood_stopped_on_outcomes_is_the_one_of_its_counts():
    # Exact: over a prior, the posterior given what a stopped group showed is Beta(1 + s, 1 + f).
    rate = (np.arange(4000) + 0.5) / 4000
    by_counts: dict[tuple[int, int], np.ndarray] = {}
    for rewards in itertools.product([0, 1], repeat=8):
        trials = 4 if len(set(rewards[:4])) == 1 else 8
        successes = sum(rewards[:trials])
        likelihood = rate ** sum(rewards) * (1 - rate) ** (8 - sum(rewards))
        key = (successes, trials)
        by_counts[key] = by_counts.get(key, 0) + likelihood
    for (successes, trials), likelihood in by_counts.items():
        mean = (rate * likelihood).sum() / likelihood.sum()
        assert mean == pytest.approx((1 + successes) / (2 + trials), abs=1e-6)


def test_log_loss_prefers_the_decay_that_fits():
    """A walk of .10 a step: remembering everything predicts worse; standard errors are given."""
    losses = {}
    for decay in (0.5, 1.0):
        generator = np.random.default_rng(0)
        rate_D = generator.random(512)
        posterior = BetaPosterior(512, decay_chosen=decay)
        selector = ThompsonSelector(posterior)
        loss = []
        for step in range(150):
            chosen = selector.select(64, generator=generator)
            successes = generator.binomial(8, rate_D[chosen])
            if step >= 50:
                a, b = posterior.parameters(chosen)
                loss.append(-log_predictive(a, b, successes, np.full(64, 8)))
            posterior.observe(chosen, successes, np.full(64, 8))
            rate_D = np.abs(rate_D + 0.1 * generator.normal(size=512))
            rate_D = 1 - np.abs(1 - rate_D)
        losses[decay] = np.concatenate(loss)
    error = sum(loss.var() / len(loss) for loss in losses.values()) ** 0.5
    assert losses[1.0].mean() - losses[0.5].mean() > 4 * error


def test_what_is_logged_by_hand():
    # Beta(1, 1) predicts 1/9 for each of 0..8. With u from the generator the PIT of r of 8 is
    # (r + u) / 9: below .1 for r = 0 and u < .9, above .9 for r = 8 and u > .1.
    u_P = np.random.default_rng(3).random(4)
    found = calibration(
        np.ones(5), np.ones(5), [0, 8, 4, 0, 1], [8, 8, 0, 8, 8], generator=np.random.default_rng(3)
    )
    ends = [u_P[0] < 0.9, u_P[1] > 0.1, u_P[2] < 0.9, False]
    assert found["calibration_pit_ends"] == np.mean(ends)
    assert found["calibration_log_score"] == pytest.approx(np.log(1 / 9))


def test_what_has_no_such_probability_is_not_logged():
    generator = np.random.default_rng(0)
    assert calibration([1.0], [1.0], [0.5], [4], generator=generator) == {}
    assert calibration([1.0], [1.0], [0.0], [0], generator=generator) == {}


def planner_of(rate_D, *, decay, **settings):
    keys = [f"key {i}" for i in range(len(rate_D))]
    planner = Planner(
        BetaPosterior(len(keys), decay_chosen=decay, decay_rest=1),
        UniformSelector(len(keys), seed=0, keys=keys),
        allocation.uniform,
        keys=keys,
        prompts_per_step=len(keys),
        rollouts_per_step=8 * len(keys),
        **settings,
    )

    def step(rate_D):
        while True:
            proposal = planner.propose()
            rate_N = np.repeat(rate_D[proposal.index_P], proposal.budget_P)
            planner.observe(proposal, proposal.seed_N / 2.0**63 < rate_N, proposal.prompt_N)
            if not planner.is_open:
                return planner.metrics()

    return step


def test_the_planner_logs_the_calibration_of_what_it_knew_before_the_step():
    rate_D = np.random.default_rng(0).random(2000)
    step = planner_of(rate_D, decay=1)
    # From Beta(1, 1) on rates that are uniform: calibrated, also once it has learned. 2000 groups at
    # .2: standard error .009.
    first, second = step(rate_D), step(rate_D)
    for metrics in (first, second):
        assert abs(metrics["planner/calibration_pit_ends"] - 0.2) < 4 * 0.009
    assert first["planner/calibration_log_score"] == pytest.approx(np.log(1 / 9))
    assert second["planner/calibration_log_score"] > np.log(1 / 9) + 0.2
    # Rates that moved since: overconfident.
    moved = step(1 - rate_D)
    assert moved["planner/calibration_pit_ends"] > 0.5
    assert moved["planner/calibration_log_score"] < second["planner/calibration_log_score"]


@pytest.mark.parametrize(
    "settings", [{"evidence": 0.5}, {"stopping": lambda counts: counts.left_P > 0, "round_size": 4}]
)
def test_counts_that_are_not_beta_binomial_are_not_judged(settings):
    metrics = planner_of(np.full(4, 0.5), decay=1, **settings)(np.full(4, 0.5))
    assert not [name for name in metrics if "log_score" in name or "pit" in name]


@pytest.mark.parametrize(
    ("successes", "trials", "message"),
    [
        ([1.5], [4], "successes must be integers in"),
        ([5], [4], "got 5 of 4 for prompt 0"),
        ([-1], [4], "got -1 of 4"),
        ([float("nan")], [4], "got nan of 4"),
        ([1, 2], [4, 4], "equally long"),
    ],
)
def test_counts_that_cannot_be_are_refused(successes, trials, message):
    with pytest.raises(ValueError, match=message):
        log_predictive([1.0], [1.0], successes, trials)


def test_deciles_by_hand():
    reliability = Reliability(decay=0.5)
    assert reliability.error is None and reliability.table() == []
    reliability.observe([0.05, 0.31, 0.39, 1.0], [1, 2, 0, 1.5], [2, 4, 4, 2])
    reliability.decay()
    reliability.observe([0.05], [0], [1])
    # Decile 0: (.1 / 2 + .05) / 2 and .5 of 2; 3: 2.8 and 2 of 8, halved; 9: 2 and 1.5 of 2, halved.
    assert reliability.table() == [
        pytest.approx((0.05, 0.25, 2)),
        pytest.approx((0.35, 0.25, 4)),
        pytest.approx((1.0, 0.75, 1)),
    ]
    assert reliability.error == pytest.approx((0.4 + 0.4 + 0.25) / 7)
    restored = Reliability(decay=0.5)
    restored.load_state_dict(reliability.state_dict())
    assert restored.table() == reliability.table()
    with pytest.raises(ValueError, match="state of a reliability lacks"):
        restored.load_state_dict({})


def test_right_predictions_have_the_error_of_chance():
    generator, reliability = np.random.default_rng(0), Reliability(decay=1)
    rate = generator.uniform(0, 1, 40_000)
    reliability.observe(rate, generator.binomial(4, rate), np.full(40_000, 4))
    # 16,000 rollouts a decile: an expected distance of .8 sqrt(1 / 6 / 16,000) = .0026.
    assert 0.001 < reliability.error < 0.005
    wrong = Reliability(decay=1)
    wrong.observe(np.clip(rate + 0.1, 0, 1), generator.binomial(4, rate), np.full(40_000, 4))
    assert wrong.error == pytest.approx(0.1, abs=0.01)
