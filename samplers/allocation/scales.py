"""Scale functions: how much one more rollout is worth, from each prompt's success posterior.

A scale is the root of the expected cost of a prompt, up to a unit all prompts share; allocators
spend in proportion to it as far as integers and boxes allow. Each belongs to an objective, see the
table in `samplers/allocation/__init__.py`. Forms named `plug_in` use the mean a / (a + b) only, so pilot
counts (successes, failures) may be passed to them too; the others are expectations over the
Beta(a, b) posterior. Axis: P prompts.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

TALL = 1000.0
"""Posteriors of more counts, a + b, are integrated near their mean; on [0, 1] they are too narrow."""

Scale = Callable[..., FloatArray]
"""`scale(a_P, b_P) -> std_P` from the parameters of each prompt's Beta posterior. One that draws
also takes the keyword `generator`."""


def plug_in_std(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """sqrt(m (1 - m)) at the mean m = a / (a + b): as if the mean were the pass rate.

    Also takes pilot counts, (successes, failures). The largest of the three baselined scales.
    """
    mean_P = _mean(a_P, b_P)
    return np.sqrt(mean_P * (1 - mean_P))


def mean_std(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """E[sqrt(p (1 - p))] = B(a + 1/2, b + 1/2) / B(a, b), the expected std of a 0/1 reward.

    The smallest of the three baselined scales; needs a, b > 0. To 1e-13 however many the counts.
    """
    a_P, b_P = _beta_parameters(a_P, b_P)
    ratio_P = [
        math.exp(_log_half_step(a) + _log_half_step(b))
        for a, b in zip(a_P.tolist(), b_P.tolist(), strict=True)
    ]
    root_P = np.sqrt(a_P + b_P)  # a / (a + b) itself may underflow
    return np.sqrt(a_P) / root_P * (np.sqrt(b_P) / root_P) * np.array(ratio_P, dtype=np.float64)


def posterior_std(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """sqrt(E[p (1 - p)]) = sqrt(a b / ((a+b) (a+b+1))), the default.

    Budgets are fixed before the rollouts, so what they minimise is the posterior expectation
    E[sum c(p) / n] = sum E[c(p)] / n: the Bayes choice of scale is sqrt(E[c(p)]). Beta(1, 1) for
    every prompt, no evidence, gives equal scales. Between `mean_std` and `plug_in_std`; equal to
    the latter times sqrt((a+b) / (a+b+1)).
    """
    a_P, b_P = _parameters(a_P, b_P)
    return np.sqrt(_mean(a_P, b_P) * b_P / (a_P + b_P + 1))


def thompson_std(a_P: ArrayLike, b_P: ArrayLike, *, generator: np.random.Generator) -> FloatArray:
    """sqrt(q (1 - q)) at one fresh draw q of each posterior.

    Here to be compared with: a draw is a good way to choose prompts and a bad way to allocate. In
    expectation its budgets are worse than uniform ones, where `posterior_std` is better. The planner
    gives it the generator of the step, so that a resumed run draws the same.
    """
    pass_rate_P = generator.beta(*_beta_parameters(a_P, b_P))
    return np.sqrt(pass_rate_P * (1 - pass_rate_P))


def mean_pass_rate(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """a / (a + b): what `allocation.knapsack` takes in the place of a scale.

    It is none: norms and lengths may not multiply it, see `is_multipliable`.
    """
    return _mean(a_P, b_P)


def passed_share(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """(a - 1) / (a + b - 2): the share that passed of what a posterior remembers, 0 if none did.

    What `allocation.knapsack_released` takes in the place of a scale; a prompt of which nothing is
    known has 1/2. It is no scale, as `mean_pass_rate` is none, and takes no bare counts.

    That it is the remembered share holds for the prior Beta(1, 1) alone. It is the likeliest pass rate
    under any: 0 for a < 1 <= b, 1 for b < 1 <= a, and 1/2 where both ends are (a, b < 1).

    Raises:
        ValueError: if a parameter is not positive.
    """
    a_P, b_P = _beta_parameters(a_P, b_P)
    known_P = a_P + b_P - 2
    share_P = np.where((a_P < 1) == (b_P < 1), 0.5, (b_P < 1).astype(np.float64))
    inside_P = (a_P >= 1) & (b_P >= 1) & (known_P > 0)
    return np.divide(a_P - 1, known_P, out=share_P, where=inside_P)


def is_multipliable(scale: Scale) -> bool:
    """Whether gradient norms and lengths may multiply what the function gives.

    Any function counts as a scale but `mean_pass_rate` and `passed_share`, whose multiples are other
    pass rates.
    """
    while isinstance(scale, functools.partial):
        scale = scale.func
    return scale not in (mean_pass_rate, passed_share)


def accepted_std(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """sqrt(E[p]) = sqrt(a / (a + b)), for the mean objective with accepted rows only.

    Plug-in and posterior form agree because p enters linearly; takes pilot counts as well.
    """
    return np.sqrt(_mean(a_P, b_P))


def log_std(a_P: ArrayLike, b_P: ArrayLike, *, alpha: float = 1e-3) -> FloatArray:
    """sqrt(E[p (1 - p) / (p^2 + alpha)]), for log p with a baseline, kept finite by alpha > 0.

    Without alpha the cost (1 - p) / p has no finite mean for a prompt that never passed.
    Needs a, b > 0; see `gvm` for the quadrature.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    return np.sqrt(_expectation(lambda p: p * (1 - p) / (p * p + alpha), a_P, b_P))


def gvm(a_P: ArrayLike, b_P: ArrayLike, *, alpha: float = 1e-3, beta: float = 2.0) -> FloatArray:
    """sqrt(E[1 / (p + alpha p^(1 - beta))]), GVM's scale under a posterior instead of a pilot.

    With beta = 2 the cost is p / (p^2 + alpha), at most 1 / (2 sqrt(alpha)). Unlike the plug-in no
    prompt gets 0: one that failed 8 of 8 still counts for what it may be.

    (GVM-RAFT, arXiv:2505.02391, Proposition 1, with the posterior expectation of the cost in place
    of the cost at the pilot's pass rate. Its beta >= 2 is required here too.)

    Args:
        a_P, b_P: (P,) parameters of the Beta posteriors, positive.
        alpha: positive; the smaller, the more a nearly hopeless prompt weighs.
        beta: at least 2.

    Returns:
        (P,) float64 by quadrature, the expectation with a relative error below 1e-7 at the published
        setting, whatever a + b is.

    Raises:
        ValueError: if a parameter is not positive and finite, or alpha or beta is out of range.
    """
    _check_gvm(alpha, beta)
    if alpha == 0:
        raise ValueError("alpha must be positive: E[1 / p] is infinite for a prompt never passed")
    return np.sqrt(_expectation(lambda p: p ** (beta - 1) / (p**beta + alpha), a_P, b_P))


def gvm_plug_in(
    a_P: ArrayLike, b_P: ArrayLike, *, alpha: float = 1e-3, beta: float = 2.0
) -> FloatArray:
    """1 / sqrt(m + alpha m^(1 - beta)) at the mean m = a / (a + b), GVM as published; 0 at m = 0.

    Largest at m = (alpha (beta - 1))^(1 / beta), 0.0316 at the published setting. With 8 pilots the
    smallest positive m is 1/8, where alpha does next to nothing: the real cut-off is m = 0.

    (GVM-RAFT, arXiv:2505.02391, Proposition 1; multiply by the gradient norm.)

    Args:
        a_P, b_P: (P,) parameters of a posterior, or pilot counts (successes, failures).
        alpha: at least 0; at 0 this is `inverse_sqrt`.
        beta: at least 2.

    Raises:
        ValueError: if a prompt has no counts at all, or alpha or beta is out of range.
    """
    _check_gvm(alpha, beta)
    mean_P = _mean(a_P, b_P)
    live_P = np.where(mean_P > 0, mean_P, 1.0)
    scale_P = np.sqrt(live_P ** (beta - 1) / (live_P**beta + alpha))
    return np.where(mean_P > 0, scale_P, 0.0)


def inverse_sqrt(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """1 / sqrt(m) at the mean m = a / (a + b), and 0 where m = 0: GVM without its regulariser."""
    mean_P = _mean(a_P, b_P)
    return np.where(mean_P > 0, 1 / np.sqrt(np.where(mean_P > 0, mean_P, 1.0)), 0.0)


def reinforce_ada_std(a_P: ArrayLike, b_P: ArrayLike, *, epsilon: float = 1e-3) -> FloatArray:
    """1 / sqrt(m + epsilon) at the mean m = a / (a + b), Reinforce-Ada's estimated budgets.

    The published rule is n ~ 1 / sqrt(m + epsilon), clipped to [minimum, maximum]: with
    `allocation.neyman` and its boxes, exact in integers. n ~ 1 / m was found unstable there. Unlike
    `gvm_plug_in` it rises all the way to m = 0, where it is 1 / sqrt(epsilon).

    (Reinforce-Ada Est, arXiv:2510.04996. The value of epsilon is a project default, not from the
    paper.)

    Args:
        a_P, b_P: (P,) parameters of a posterior, or counts (successes, failures).
        epsilon: positive and finite.

    Raises:
        ValueError: if a prompt has no counts at all, or epsilon is out of range.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    return 1 / np.sqrt(_mean(a_P, b_P) + epsilon)


def live(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """1 where the mean is positive, 0 where no pilot passed: drop those and share evenly.

    Under a posterior every mean is positive, so this separates prompts by pilot counts only.
    """
    return (_mean(a_P, b_P) > 0).astype(np.float64)


def _parameters(a_P: ArrayLike, b_P: ArrayLike) -> tuple[FloatArray, FloatArray]:
    a_P, b_P = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a_P.ndim != 1 or a_P.shape != b_P.shape:
        raise ValueError(
            f"a_P and b_P must be 1-d and equally long, got {a_P.shape} and {b_P.shape}"
        )
    valid_P = np.isfinite(a_P) & np.isfinite(b_P) & (a_P >= 0) & (b_P >= 0) & (a_P + b_P > 0)
    if not valid_P.all():
        p = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(
            f"a and b must be finite and non-negative with a + b > 0, "
            f"got {a_P[p]} and {b_P[p]} for prompt {p}"
        )
    return a_P, b_P


def _beta_parameters(a_P: ArrayLike, b_P: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Parameters of proper densities: positive."""
    a_P, b_P = _parameters(a_P, b_P)
    smallest = min(a_P.min(initial=np.inf), b_P.min(initial=np.inf))
    if smallest <= 0:
        raise ValueError(f"a and b must be positive here, got {smallest}")
    return a_P, b_P


def _mean(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    a_P, b_P = _parameters(a_P, b_P)
    return a_P / (a_P + b_P)


def _check_gvm(alpha: float, beta: float) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and non-negative, got {alpha}")
    if not 2 <= beta < math.inf:
        raise ValueError(f"beta must be at least 2 and finite, got {beta}")


def _log_half_step(x: float) -> float:
    """log(Gamma(x + 1/2) / (sqrt(x) Gamma(x))); from 20 on by its asymptotic series to 1e-16,
    because the two logarithms grow as x log x and cancel."""
    if x < 20:
        return math.lgamma(x + 0.5) - math.lgamma(x) - math.log(x) / 2
    square, tail = 1 / x / x, 0.0
    for term in (-31 / 18432, 17 / 14336, -1 / 640, 1 / 192, -1 / 8):
        tail = tail * square + term
    return tail / x


@functools.cache
def _nodes() -> tuple[FloatArray, FloatArray, FloatArray]:
    """Nodes p on [0, 1], 1 - p without cancellation, and weights.

    256-node Gauss-Legendre in t with p = t^2 (3 - 2 t). Decayed counts are fractional and their
    density is not smooth where p or 1 - p is 0: with b = 1.02 nodes in p itself are about 1e-4
    off. The substitution smooths both ends.
    """
    node, weight = np.polynomial.legendre.leggauss(256)
    t, rest = (1 + node) / 2, (1 - node) / 2
    return t * t * (3 - 2 * t), rest * rest * (3 - 2 * rest), weight * 3 * t * rest


def _expectation(
    cost: Callable[[FloatArray], FloatArray], a_P: ArrayLike, b_P: ArrayLike
) -> FloatArray:
    """E[cost(p)] under each Beta(a, b), by quadrature; logs keep tall densities in range.

    Where a parameter is below 1 the density is infinite at an end: what the cost is there is taken out,

        cost(p) = cost(0) (1 - p) + cost(1) p + p (1 - p) k(p)
        E[cost] = cost(0) b / (a + b) + cost(1) a / (a + b) + a b / ((a + b) (a + b + 1)) E[k],

    the last expectation under Beta(a + 1, b + 1).
    """
    a_P, b_P = _beta_parameters(a_P, b_P)
    low_P = (a_P < 1) | (b_P < 1)
    expected_P = np.empty(a_P.shape)
    expected_P[~low_P] = _smooth_expectation(lambda p, _: cost(p), a_P[~low_P], b_P[~low_P])
    if not low_P.any():
        return expected_P
    at_0, at_1 = cost(np.array([0.0, 1.0])).tolist()

    def between(p: FloatArray, rest: FloatArray) -> FloatArray:
        return (cost(p) - at_0 * rest - at_1 * p) / (p * rest)

    a_K, b_K = a_P[low_P], b_P[low_P]
    total_K = a_K + b_K
    share_K, rest_K = a_K / total_K, b_K / total_K
    inner_K = _smooth_expectation(between, a_K + 1, b_K + 1)
    expected_P[low_P] = at_0 * rest_K + at_1 * share_K + share_K * (b_K / (total_K + 1)) * inner_K
    return expected_P


def _smooth_expectation(
    cost: Callable[[FloatArray, FloatArray], FloatArray], a_P: FloatArray, b_P: FloatArray
) -> FloatArray:
    """`_expectation` of a cost of p and 1 - p for parameters of at least 1."""
    p, rest, weight = _nodes()
    log_density = np.outer(a_P - 1, np.log(p)) + np.outer(b_P - 1, np.log(rest))
    mean = _mean_cost(cost(p, rest), log_density, weight)
    tall_P = a_P + b_P > TALL
    if tall_P.any():
        p_K, rest_K, log_density_K = _tall(a_P[tall_P, None], b_P[tall_P, None])
        mean[tall_P] = _mean_cost(cost(p_K, rest_K), log_density_K, weight)
    return mean


def _mean_cost(cost: FloatArray, log_density: FloatArray, weight: FloatArray) -> FloatArray:
    density = np.exp(log_density - log_density.max(axis=1, keepdims=True)) * weight
    # Not a matrix product, which may round one row differently from the next: equal posteriors must
    # have equal scales.
    return (density * cost).sum(axis=1) / density.sum(axis=1)


def _tall(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Nodes p, 1 - p and log densities within 40 standard deviations of the mean, as far as [0, 1] goes.

    So many because a density at the end of [0, 1] falls like e^-x only. Logarithms are taken
    relative to the mean, where those of the two powers cancel.
    """
    share, rest_share, _ = _nodes()
    total = a + b
    mean, rest_mean = a / total, b / total
    reach = 40 * np.sqrt(mean) * np.sqrt(rest_mean / (total + 1))
    left, right = np.minimum(mean, reach), np.minimum(rest_mean, reach)
    p = (mean - left) + (left + right) * share
    rest = (rest_mean - right) + (left + right) * rest_share
    step = (left + right) * share - left
    log_density = (a - 1) * _log_of_ratio(p, step, mean)
    return p, rest, log_density + (b - 1) * _log_of_ratio(rest, -step, rest_mean)


def _log_of_ratio(value: FloatArray, step: FloatArray, mean: FloatArray) -> FloatArray:
    """log(value / mean) with value = mean + step, in the form that keeps its digits."""
    far = np.abs(step) > mean / 2
    return np.where(far, np.log(value / mean), np.log1p(np.where(far, 0.0, step / mean)))
