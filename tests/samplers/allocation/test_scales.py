"""The scale functions of samplers/allocation/scales.py, as allocation hands them on."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from samplers import allocation
from samplers.allocation import leave_one_out, neyman, uniform
from samplers.posterior import BetaPosterior

POSTERIORS = [
    (1, 1),
    (5, 5),
    (1, 9),
    (9, 1),
    (2, 8),
    (1.02, 8.68),
    (9.7, 1.02),
    (1.3, 1.2),
    (30, 90),
]
A, B = np.array(POSTERIORS, dtype=float).T

# scale function -> cost whose posterior expectation it is the root of
COSTS = {
    allocation.posterior_std: lambda p: p * (1 - p),
    allocation.accepted_std: lambda p: p,
    allocation.gvm: lambda p: p / (p * p + 1e-3),
    allocation.log_std: lambda p: p * (1 - p) / (p * p + 1e-3),
}
PLUG_IN = [
    allocation.plug_in_std,
    allocation.accepted_std,
    allocation.gvm_plug_in,
    allocation.inverse_sqrt,
    allocation.live,
    allocation.reinforce_ada_std,
    allocation.mean_pass_rate,
]
POSTERIOR = [allocation.mean_std, allocation.posterior_std, allocation.gvm, allocation.log_std]


def expectation(cost, a, b):
    """By adaptive quadrature in p = t^2 (3 - 2 t), on pieces around where cost and density turn."""

    def integrand(t):
        p = t * t * (3 - 2 * t)
        return cost(p) * stats.beta.pdf(p, a, b) * 6 * t * (1 - t)

    cuts = np.linspace(0, 1, 21)
    return sum(
        integrate.quad(integrand, low, high, epsabs=1e-13, epsrel=1e-12)[0]
        for low, high in itertools.pairwise(cuts)
    )


@pytest.mark.slow
@pytest.mark.parametrize("scale", COSTS, ids=lambda scale: scale.__name__)
def test_each_is_the_root_of_the_expected_cost(scale):
    expected = [math.sqrt(expectation(COSTS[scale], a, b)) for a, b in POSTERIORS]
    np.testing.assert_allclose(scale(A, B), expected, rtol=1e-8)


@pytest.mark.slow
def test_the_mean_std_is_the_expected_std():
    expected = [expectation(lambda p: math.sqrt(p * (1 - p)), a, b) for a, b in POSTERIORS]
    np.testing.assert_allclose(allocation.mean_std(A, B), expected, rtol=1e-8)
    formula = special.beta(A + 0.5, B + 0.5) / special.beta(A, B)
    np.testing.assert_allclose(allocation.mean_std(A, B), formula, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "beta"), [(1e-3, 2.5), (1e-2, 2.0), (1e-4, 4.0)])
def test_other_settings_of_gvm_are_the_expectations_too(alpha, beta):
    def cost(p):
        return 1 / (p + alpha * p ** (1 - beta)) if p else 0.0

    expected = [math.sqrt(expectation(cost, a, b)) for a, b in POSTERIORS]
    np.testing.assert_allclose(allocation.gvm(A, B, alpha=alpha, beta=beta), expected, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("total", [3, 50, 500, 2000])
def test_quadrature_holds_for_much_evidence_and_fractional_counts(total):
    a = 1 + (total - 2) * np.array([0.0, 1e-4, 0.003, 0.01, 0.2, 0.5, 0.9, 1.0])
    b = total - a
    node, weight = np.polynomial.legendre.leggauss(1500)
    t, rest = (1 + node) / 2, (1 - node) / 2
    p, q = t * t * (3 - 2 * t), rest * rest * (3 - 2 * rest)
    log_density = np.outer(a - 1, np.log(p)) + np.outer(b - 1, np.log(q))
    density = np.exp(log_density - special.betaln(a, b)[:, None]) * weight * 3 * t * rest
    expected = density @ (p / (p * p + 1e-3))
    np.testing.assert_allclose(allocation.gvm(a, b) ** 2, expected, rtol=1e-7)


def test_moments_are_the_means_of_draws():
    draws = np.random.default_rng(0).beta(A, B, (100_000, len(A)))
    for scale, cost in COSTS.items():
        values = cost(draws)
        error = values.std(axis=0) / 100_000**0.5
        assert (np.abs(values.mean(axis=0) - scale(A, B) ** 2) < 4.5 * error).all()


def test_golden_values():
    a, b = np.array([[1, 1], [5, 5], [1, 9], [2, 8]], dtype=float).T
    plug_in, mean, posterior = (
        scale(a, b)
        for scale in (allocation.plug_in_std, allocation.mean_std, allocation.posterior_std)
    )
    np.testing.assert_allclose(plug_in, [0.5, 0.5, 0.3, 0.4], atol=1e-15)
    np.testing.assert_allclose(mean, [math.pi / 8, 0.475654, 0.262203, 0.370169], atol=5e-7)
    np.testing.assert_allclose(posterior, [0.408248, 0.476731, 0.286039, 0.381385], atol=5e-7)
    a, b = np.array([[1, 1], [5, 5], [1, 9], [9, 1], [2, 8]], dtype=float).T
    expected = [3.454, 2.230, 9.547, 1.124, 6.500]
    np.testing.assert_allclose(allocation.gvm(a, b) ** 2, expected, atol=1e-3)


def test_golden_budgets():
    a, b = np.array([[1, 1], [5, 5], [1, 9], [9, 1]], dtype=float).T
    assert neyman(allocation.posterior_std(a, b), 32).tolist() == [9, 11, 6, 6]
    assert leave_one_out(allocation.posterior_std(a, b), 32).tolist() == [9, 10, 7, 6]
    assert neyman(allocation.gvm(a, b), 32).tolist() == [8, 6, 13, 5]


def test_golden_values_of_gvm_as_published():
    p = np.array([1, 1 / 8, 1 / 16, 1 / 32])
    expected = [0.99950, 2.74204, 3.56915, 3.97621]
    np.testing.assert_allclose(allocation.gvm_plug_in(p, 1 - p), expected, atol=5e-6)
    successes, norm = np.array([1, 4, 8, 0]), np.array([1, 1, 1, 5])
    std = allocation.gvm_plug_in(successes, 8 - successes) * norm
    np.testing.assert_allclose(std, [2.74204, 1.41139, 0.99950, 0], atol=5e-6)
    np.testing.assert_allclose(32 * std / std.sum(), [17.0282, 8.7648, 6.2069, 0], atol=5e-5)
    assert neyman(std, 32, minimum=0).tolist() == [17, 9, 6, 0]
    assert neyman(std, 32, minimum=1).tolist() == [16, 9, 6, 1]


def test_gvm_rises_up_to_its_peak_and_falls_after_it():
    for alpha, beta in [(1e-3, 2.0), (1e-2, 3.0)]:
        p = np.linspace(0, 1, 20_001)
        scale = allocation.gvm_plug_in(p, 1 - p, alpha=alpha, beta=beta)
        peak = (alpha * (beta - 1)) ** (1 / beta)
        assert p[scale.argmax()] == pytest.approx(peak, abs=1e-4)
        assert (np.diff(scale[p < peak]) > 0).all()
        assert (np.diff(scale[p > peak]) < 0).all()
    p = np.array([1e-3**0.5])
    np.testing.assert_allclose(allocation.gvm_plug_in(p, 1 - p), 3.976, atol=5e-4)


def test_gvm_budgets_fall_with_the_pass_rate_above_the_peak_and_rise_below_it():
    others = np.array([0.3, 0.7])

    def budget(p):
        p_P = np.append(others, p)
        return neyman(allocation.gvm_plug_in(p_P, 1 - p_P), 60)[-1]

    below, above = np.linspace(0.001, 0.031, 20), np.linspace(0.032, 1, 40)
    assert (np.diff([budget(p) for p in below]) >= 0).all()
    assert (np.diff([budget(p) for p in above]) <= 0).all()
    assert budget(0.001) < budget(0.031) > budget(1.0)


def test_without_its_regulariser_gvm_is_one_over_the_root():
    successes = np.array([0, 1, 4, 8])
    expected = [0, 8**0.5, 2**0.5, 1]
    for scale in (
        allocation.inverse_sqrt(successes, 8 - successes),
        allocation.gvm_plug_in(successes, 8 - successes, alpha=0),
    ):
        np.testing.assert_allclose(scale, expected, rtol=1e-15)


def test_live_prompts_share_evenly_and_dead_ones_get_their_minimum():
    successes = np.array([0, 1, 4, 8])
    std = allocation.live(successes, 8 - successes)
    assert std.tolist() == [0, 1, 1, 1]
    assert neyman(std, 31).tolist() == [1, 10, 10, 10]


@pytest.mark.parametrize("scale", [*POSTERIOR, *PLUG_IN], ids=lambda scale: scale.__name__)
def test_knowing_nothing_is_uniform(scale):
    std = scale(*BetaPosterior(7).parameters())
    assert std.dtype == np.float64
    assert neyman(std, 40).tolist() == uniform(std, 40).tolist()


@pytest.mark.parametrize("scale", [*POSTERIOR, *PLUG_IN], ids=lambda scale: scale.__name__)
def test_a_scale_belongs_to_its_parameters_and_not_to_their_place(scale):
    generator = np.random.default_rng(0)
    rows = generator.integers(0, len(A), 301)
    alone = np.concatenate([scale(A[[row]], B[[row]]) for row in range(len(A))])
    np.testing.assert_array_equal(scale(A[rows], B[rows]), alone[rows])


@given(st.lists(st.tuples(st.floats(1, 300), st.floats(1, 300)), min_size=1, max_size=5))
def test_the_three_forms_are_ordered(parameters):
    a, b = np.array(parameters).T
    mean, posterior, plug_in = (
        scale(a, b)
        for scale in (allocation.mean_std, allocation.posterior_std, allocation.plug_in_std)
    )
    assert (mean < posterior).all() and (posterior < plug_in).all()
    np.testing.assert_allclose(posterior / plug_in, np.sqrt((a + b) / (a + b + 1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("moment", "plug_in"),
    [
        (allocation.mean_std, allocation.plug_in_std),
        (allocation.posterior_std, allocation.plug_in_std),
        (allocation.gvm, allocation.gvm_plug_in),
    ],
)
def test_with_much_evidence_a_moment_tends_to_its_plug_in_form(moment, plug_in):
    p = np.array([0.05, 0.3, 0.5, 0.9])
    gaps = [
        np.abs(moment(total * p, total * (1 - p)) / plug_in(p, 1 - p) - 1).max()
        for total in (30, 300, 2000)
    ]
    # The first correction is of order 1 / (a + b).
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 1e-2


def test_the_scale_of_log_p_by_hand():
    # (1 - p) / p at p = 1/5 is 4, at p = 1/2 it is 1, and a tall posterior is nearly a point.
    std = allocation.log_std([2e4, 5e4], [8e4, 5e4], alpha=1e-9)
    np.testing.assert_allclose(std, [2, 1], rtol=1e-4)
    assert np.isfinite(allocation.log_std([1.0], [9.0])).all()


def test_costs_under_a_posterior_stay_below_their_maximum():
    # p / (p^2 + reg) is at most 1 / (2 sqrt(reg)), 15.8 at 1e-3.
    b = np.array([2.0, 10, 30, 100, 1000])
    assert (allocation.gvm(np.ones(5), b) ** 2 < 15.82).all()


@pytest.mark.parametrize("scale", PLUG_IN, ids=lambda scale: scale.__name__)
def test_a_prompt_without_counts_has_no_plug_in(scale):
    with pytest.raises(ValueError, match="a \\+ b > 0, got 0.0 and 0.0 for prompt 1"):
        scale([1, 0], [3, 0])


@pytest.mark.parametrize("scale", [*POSTERIOR, *PLUG_IN], ids=lambda scale: scale.__name__)
def test_parameters_that_cannot_be_are_refused(scale):
    with pytest.raises(ValueError, match="finite and non-negative .* got nan and 1.0"):
        scale([float("nan")], [1.0])
    with pytest.raises(ValueError, match="finite and non-negative .* got -1.0 and 3.0"):
        scale([-1.0], [3.0])
    with pytest.raises(ValueError, match=r"equally long, got \(1,\) and \(2,\)"):
        scale([1.0], [1.0, 1.0])


def test_densities_and_settings_that_cannot_be_are_refused():
    for scale in (allocation.gvm, allocation.log_std):
        with pytest.raises(ValueError, match="a and b must be positive here, got 0.0"):
            scale([0.0], [2.0])
        with pytest.raises(ValueError, match="alpha must be positive"):
            scale([1.0], [1.0], alpha=0)
    with pytest.raises(ValueError, match="a and b must be positive here, got 0.0"):
        allocation.mean_std([0.0], [2.0])
    for scale in (allocation.gvm, allocation.gvm_plug_in):
        with pytest.raises(ValueError, match="beta must be at least 2 and finite, got 1.5"):
            scale([1.0], [1.0], beta=1.5)
        with pytest.raises(ValueError, match="alpha must be finite and non-negative, got -1"):
            scale([1.0], [1.0], alpha=-1)


# -- counts without end


def beta_ratio(a, b):
    """B(a + 1/2, b + 1/2) / B(a, b) in 60 digits."""
    with mpmath.workdps(60):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        steps = (mpmath.loggamma(x + 0.5) - mpmath.loggamma(x) for x in (a, b))
        return float(mpmath.exp(sum(steps)) / (a + b))


def test_the_mean_std_keeps_its_digits_however_many_the_counts():
    counts = [1e-12, 0.5, 1.0, 19.99, 20.0, 20.01, 300.0, 1e6, 1e12, 1e15, 1e30]
    a, b = np.array(list(itertools.product(counts, repeat=2))).T
    expected = [beta_ratio(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_allclose(allocation.mean_std(a, b), expected, rtol=1e-13)
    # It tends to sqrt(m (1 - m)) = 1/2 from below, by 1 / (4 a) of it.
    std = allocation.mean_std([1e6, 1e12, 1e15], [1e6, 1e12, 1e15])
    np.testing.assert_allclose(std, [0.5 * (1 - 0.25e-6), 0.5 * (1 - 0.25e-12), 0.5], rtol=2e-13)


def near_the_mean(cost, a, b):
    """E[cost] by the trapezoid rule on 200,001 points of log(p / (1 - p)) around the mean."""
    logit, spread = math.log(a / b), math.sqrt(1 / a + 1 / b)
    x = logit + spread * np.linspace(-60, 15, 200_001)
    p, rest = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    log_density = a * np.log(p / (a / (a + b))) + b * np.log(rest / (b / (a + b)))
    density = np.exp(log_density - log_density.max())
    return (density * cost(p)).sum() / density.sum()


@pytest.mark.parametrize("scale", [allocation.gvm, allocation.log_std])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1.0, 1e3),
        (1.02, 1e3),
        (3.5, 2e3),
        (60.0, 3e3),
        (1.3, 1e6),
        (2.0, 1e6),
        (1e3, 1e6),
        (5e5, 5e5),
        (3e8, 1e9),
        (1e6, 4.0),
    ],
)
def test_tall_densities_are_integrated_where_they_stand(scale, a, b):
    found = float(scale([a], [b])[0] ** 2)
    # The density in log(p / (1 - p)) is p^a (1 - p)^b, smooth whatever a and b are.
    assert found == pytest.approx(near_the_mean(COSTS[scale], a, b), rel=1e-8)


@pytest.mark.parametrize("counts", [1e6, 1e9, 1e12, 1e15, 1e30])
@pytest.mark.parametrize("mean", [0.02, 0.3, 0.5, 0.9])
def test_with_evidence_without_end_the_scale_is_that_of_the_mean(mean, counts):
    # By the delta method: cost(m) + cost''(m) m (1 - m) / (2 (a + b + 1)), and terms in 1 / counts^2.
    for scale in (allocation.gvm, allocation.log_std):
        cost, step = COSTS[scale], 1e-4
        bend = (cost(mean + step) - 2 * cost(mean) + cost(mean - step)) / step**2
        expected = cost(mean) + bend * mean * (1 - mean) / (2 * (counts + 1))
        found = float(scale([mean * counts], [(1 - mean) * counts])[0] ** 2)
        assert found == pytest.approx(expected, rel=max(1e-8, 1e7 / counts**2))


@pytest.mark.parametrize("scale", [allocation.gvm, allocation.log_std])
def test_the_scale_does_not_jump_where_the_nodes_change(scale):
    for share in (0.001, 0.02, 0.4, 0.98):
        counts = np.array([1000 * (1 - 1e-9), 1000 * (1 + 1e-9)])
        below, above = scale(1 + share * (counts - 2), 1 + (1 - share) * (counts - 2))
        assert above == pytest.approx(below, rel=1e-8)


# -- parameters below 1, as a prior that learns gives

LOW = [(0.5, 2.0), (0.01, 7.99), (3.0, 0.2), (0.3, 0.4), (1e-6, 2.0), (2.0, 1e-6), (0.9, 5000.0)]


def with_ends_taken_out(cost, a, b):
    """E[cost] by adaptive quadrature in the powers of p and 1 - p that make the density flat there."""
    with mpmath.workdps(30):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        # u = p^a below the mean and v = (1 - p)^b above it
        cut, whole = a / (a + b), mpmath.beta(a, b)
        left = mpmath.quad(
            lambda u: cost(u ** (1 / a)) * (1 - u ** (1 / a)) ** (b - 1) / a,
            [0, *(mpmath.mpf(10) ** -k * cut**a for k in (12, 6, 3, 2, 1)), cut**a],
        )
        top = (1 - cut) ** b
        right = mpmath.quad(
            lambda v: cost(1 - v ** (1 / b)) * (1 - v ** (1 / b)) ** (a - 1) / b,
            [0, *(mpmath.mpf(10) ** -k * top for k in (12, 6, 3, 2, 1)), top],
        )
        return float((left + right) / whole)


@pytest.mark.slow
@pytest.mark.parametrize("scale", COSTS, ids=lambda scale: scale.__name__)
@pytest.mark.parametrize(("a", "b"), [(0.5, 2.0), (0.1, 7.9), (3.0, 0.2), (0.3, 0.4)])
def test_below_1_too_each_is_the_root_of_the_expected_cost(scale, a, b):
    expected = with_ends_taken_out(COSTS[scale], a, b)
    assert float(scale([a], [b])[0] ** 2) == pytest.approx(expected, rel=2e-7)


def test_parameters_of_hardly_anything_leave_what_the_ends_cost():
    # Beta(a, b) with a, b -> 0 is a success with chance a / (a + b), and a failure else.
    a, b = np.array([1e-9, 3e-9]), np.array([1e-9, 1e-9])
    np.testing.assert_allclose(allocation.gvm(a, b) ** 2, np.array([0.5, 0.75]) / 1.001, rtol=1e-5)
    np.testing.assert_allclose(allocation.log_std(a, b), 0, atol=2e-3)


@pytest.mark.parametrize("scale", [allocation.gvm, allocation.log_std])
def test_the_scale_does_not_jump_where_a_parameter_falls_below_1(scale):
    for other in (1.0, 2.5, 40.0):
        below, above = np.array([1 - 1e-9]), np.array([1 + 1e-9])
        assert scale(below, [other]) == pytest.approx(scale(above, [other]), rel=1e-7)
        assert scale([other], below) == pytest.approx(scale([other], above), rel=1e-7)
    # and a batch of both gives each what it has alone
    together = scale([0.5, 2.0, 0.2], [3.0, 3.0, 9.0])
    alone = [float(scale([a], [b])[0]) for a, b in [(0.5, 3.0), (2.0, 3.0), (0.2, 9.0)]]
    assert together.tolist() == alone


@pytest.mark.parametrize("scale", [*POSTERIOR, *PLUG_IN, allocation.passed_share])
def test_every_scale_takes_any_positive_pair(scale):
    a, b = np.array(LOW).T
    found = scale(a, b)
    assert np.isfinite(found).all() and (found >= 0).all()
