"""One posterior, three consumers: what it is worth to allocation, and what must not feed it."""

import itertools

import numpy as np
import pytest

from samplers import allocation
from samplers.allocation.scales import mean_std, plug_in_std, posterior_std
from samplers.keys import step_generator
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import ThompsonSelector, UniformSelector


def leave_one_out_gradient(rewards, p):
    """(1/n) sum_j A_j d log pi(r_j) for a Bernoulli policy of logit theta; the reward is the act."""
    rewards = np.array(rewards, dtype=float)
    n = len(rewards)
    return (((rewards - rewards.mean()) * n / (n - 1)) * (rewards - p)).mean()


def chance(rewards, p):
    return np.prod([p if r else 1 - p for r in rewards])


def every(count):
    return itertools.product([0, 1], repeat=count)


def test_with_budgets_from_earlier_steps_the_gradient_is_unbiased():
    # Step 0 has 2 rollouts of each prompt, every outcome of it; step 1 divides 7 by what was seen.
    keys, rates = ["a", "b"], (0.15, 0.6)
    expected, budgets = np.zeros(2), set()
    for seen in every(4):
        planner = Planner(
            BetaPosterior(2, decay_chosen=1, decay_rest=1),
            UniformSelector(2, seed=0, keys=keys),
            allocation.leave_one_out,
            keys=keys,
            prompts_per_step=2,
            rollouts_per_step=7,
            minimum=2,
        )
        planner.posterior.observe([0, 1], [seen[0] + seen[1], seen[2] + seen[3]], [2, 2])
        proposal = planner.propose()
        budget_D = np.empty(2, dtype=int)
        budget_D[proposal.index_P] = proposal.budget_P
        budgets.add(tuple(budget_D))
        of_seen = chance(seen[:2], rates[0]) * chance(seen[2:], rates[1])
        for row, p in enumerate(rates):
            for rewards in every(budget_D[row]):
                expected[row] += of_seen * chance(rewards, p) * leave_one_out_gradient(rewards, p)
    assert len(budgets) > 1  # the budgets do follow what was seen
    np.testing.assert_allclose(expected, [p * (1 - p) for p in rates], rtol=1e-12)


@pytest.mark.parametrize(("p", "weight"), [(0.5, 1.208333), (0.1, 1.435)])
def test_with_budgets_from_its_own_rewards_it_is_not(p, weight):
    # Negative control: two more rollouts iff the first two fail.
    expected = 0.0
    for rewards in every(4):
        used = 2 if any(rewards[:2]) else 4
        expected += chance(rewards, p) * leave_one_out_gradient(rewards[:used], p)
    assert expected / (p * (1 - p)) == pytest.approx(weight, abs=1e-6)


def bound(cost_P, std_P):
    """sum c / n with n in proportion to the scale, relative to even n."""
    return (cost_P / std_P).mean() * std_P.mean() / cost_P.mean()


@pytest.mark.parametrize(("visited", "expected"), [(0, 1.0), (4, 0.985), (8, 0.9705), (16, 0.9558)])
def test_on_a_pool_drawn_from_the_prior_moments_allocate_better_than_evenly(visited, expected):
    # r of n is uniform under Beta(1, 1); E[p (1 - p)] given r is the square of scale (iii).
    r = np.arange(visited + 1)
    a, b = 1.0 + r, 1.0 + visited - r
    cost = posterior_std(a, b) ** 2
    found = {scale: bound(cost, scale(a, b)) for scale in (plug_in_std, mean_std, posterior_std)}
    assert found[posterior_std] == pytest.approx(expected, abs=5e-5)
    assert all(value <= 1 + 1e-12 for value in found.values())
    assert found[posterior_std] == pytest.approx(min(found.values()), rel=1e-12)
    oracle = (np.pi / 8) ** 2 * 6
    assert oracle == pytest.approx(0.9253, abs=5e-5) and oracle < found[posterior_std]


def test_more_visits_bring_the_bound_nearer_to_the_oracle():
    bounds = []
    for visited in (0, 4, 8, 16, 64, 512):
        r = np.arange(visited + 1)
        std = posterior_std(1.0 + r, 1.0 + visited - r)
        bounds.append(bound(std**2, std))
    assert (np.diff(bounds) < 0).all()
    assert bounds[-1] == pytest.approx((np.pi / 8) ** 2 * 6, abs=2e-3)


@pytest.mark.parametrize(
    ("shape", "moments", "drawn"), [(1.0, 0.9705, 1.040), (0.5, 0.9134, 1.057)]
)
def test_a_fresh_draw_allocates_worse_than_evenly(shape, moments, drawn):
    # One visit of 8, then 8 a prompt on average and at least 2; 20,000 prompts of Beta(shape, shape).
    generator = np.random.default_rng(0)
    size = 20_000
    p = generator.beta(shape, shape, size=size)
    successes = generator.binomial(8, p)
    a, b = shape + successes, shape + 8 - successes  # the prior is the pool's own law
    q = generator.beta(a, b)
    cost = p * (1 - p)
    even = (cost / 8).sum()

    def relative(std_P):
        return (cost / allocation.neyman(std_P, 8 * size, minimum=2)).sum() / even

    # Integers and the minimum of 2 cost the moments little; standard errors are below .003.
    moment_std = np.sqrt(a * b / ((a + b) * (a + b + 1)))
    assert relative(moment_std) == pytest.approx(moments, abs=0.015)
    assert relative(np.sqrt(q * (1 - q))) == pytest.approx(drawn, abs=0.015)


def test_the_winning_draws_allocate_evenly():
    # The winner's curse: among the chosen the draws are all alike, so they tell nothing.
    generator = np.random.default_rng(0)
    p = generator.random(1024)
    posterior = BetaPosterior(1024)
    selector = ThompsonSelector(posterior)
    sums, spread = np.zeros(3), []
    for step in range(200):
        chosen = selector.select(64, generator=step_generator(0, "select", step))
        drawn = posterior.draw(generator=step_generator(0, "select", step))[chosen]
        fresh = np.maximum(posterior.draw(chosen, generator=generator), 1e-3)
        cost = p[chosen] * (1 - p[chosen])
        if step >= 50:
            for at, std in enumerate(
                (
                    np.sqrt(drawn * (1 - drawn)),
                    posterior_std(*posterior.parameters(chosen)),
                    np.maximum(np.sqrt(fresh * (1 - fresh)), 0.1),
                )
            ):
                sums[at] += (cost / std).sum() * std.sum() / (64 * cost.sum()) / 150
            spread.append((drawn.std(), p[chosen].std()))
        posterior.observe(chosen, generator.binomial(8, p[chosen]), np.full(64, 8))
    winning, moments, fresh_draw = sums
    assert abs(winning - 1) < 0.01
    # Simulated elsewhere: .989 and 1.031; draws of sd .030 where pass rates have .157.
    assert moments == pytest.approx(0.989, abs=0.01) and fresh_draw == pytest.approx(
        1.031, abs=0.02
    )
    assert np.mean(spread, axis=0) == pytest.approx([0.030, 0.157], abs=0.02)
