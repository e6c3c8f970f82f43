"""Knapsack RL's allocation: the chance of a mixed group times its value, by the exact greedy.

(arXiv:2509.25849.) Axes: P prompts, K of them.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.allocation._boxes import boxes, one_per_prompt
from samplers.allocation._greedy import best_first, fill
from samplers.allocation.scales import _beta_parameters as beta_parameters

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def knapsack(
    p_P: ArrayLike, total: int, *, minimum: ArrayLike = 2, maximum: ArrayLike | None = 128
) -> IntArray:
    """Spend `total` rollouts where mixed groups are likely and worth most.

    Maximises  sum_p (1 - p^n - (1 - p)^n) p (1 - p)^2  over integers  minimum <= n_p <= maximum,
    sum_p n_p = total: the chance that a group has both outcomes times its value.

    (Knapsack RL, arXiv:2509.25849, whose code solves it by dynamic programming. The gain of one
    more rollout, p (1 - p)^2 (p^n (1 - p) + (1 - p)^n p), never increases with n, so the greedy is
    exact. What no prompt gains from is shared evenly here; `knapsack_released` has the fallback of
    the released code.)

    Args:
        p_P: (P,) pass rates in [0, 1], for example `mean_pass_rate` of a posterior, in the place
            where other allocators take a scale.
        total: rollouts to hand out.
        minimum: rollouts every prompt gets, one int or (P,), at least 2.
        maximum: rollouts no prompt exceeds, one int or (P,); None for no cap.

    Returns:
        (P,) int64 counts that sum to `total`, ties as in `neyman`.

    Raises:
        ValueError: if `total` does not fit the boxes, or a pass rate is outside [0, 1].
    """
    p_P = _pass_rates(p_P)
    lower_P, upper_P = boxes(len(p_P), total, minimum, maximum, least=2)
    columns = (p_P, *_knapsack_columns(p_P))
    return best_first(
        _knapsack_gain,
        columns,
        lower_P,
        upper_P,
        total - int(lower_P.sum()),
        guess=_knapsack_guess,
        levels=_guessed_levels(_knapsack_guess, columns, lower_P, upper_P, total),
    )


def knapsack_released(
    p_P: ArrayLike, total: int, *, minimum: ArrayLike = 2, maximum: ArrayLike | None = 128
) -> IntArray:
    """`knapsack` with the fallback of the released code: what is spare explores prompts never passed.

    A prompt of 0 < p < 1 is taken to need

        cost = log(1 - 0.9) / log(max(p, 1 - p)),  rounded down, at most its maximum,

    rollouts beyond its minimum to be mixed with a chance of .9. If these prompts together need less
    than there is, they share what they need by the rule of `knapsack`, and the rest goes evenly to
    the prompts of p = 0; without any, to those of p = 1. By `knapsack` alone a prompt that never
    passed gets its minimum for as long as any other gains: of pass rates (.5, 0, 0, 0) and 32
    rollouts the release makes (5, 9, 9, 9), `knapsack` (26, 2, 2, 2).

    (Knapsack RL, arXiv:2509.25849, read as released, with its alpha of .9. There the fallback knows
    no maximum. Here what does not fit goes to prompts of p = 1, then to the mixed ones.)

    Args, Returns and Raises: as `knapsack`; `p_P` holds 0 where no rollout passed, as `passed_share` of
        a posterior does, and not its mean, which is never 0.
    """
    p_P = _pass_rates(p_P)
    lower_P, upper_P = boxes(len(p_P), total, minimum, maximum, least=2)
    space_P, room = upper_P - lower_P, total - int(lower_P.sum())
    never_P, always_P = p_P == 0, p_P == 1
    mixed_P = ~(never_P | always_P)
    with np.errstate(divide="ignore"):
        cost_P = np.floor(math.log(0.1) / np.log1p(-np.minimum(p_P, 1 - p_P)))
    needed = float(np.minimum(cost_P, upper_P)[mixed_P].sum())
    left = room - int(min(needed, room, int(space_P[mixed_P].sum())))
    budget_P = lower_P.copy()
    for alike_P in (never_P, always_P):
        spare = min(left, int(space_P[alike_P].sum()))
        if spare:
            budget_P[alike_P] = fill(lower_P[alike_P], upper_P[alike_P], spare)
        left -= spare
    if mixed_P.any():
        gained = total - int(budget_P.sum())
        budget_P[mixed_P] = knapsack(
            p_P[mixed_P],
            int(lower_P[mixed_P].sum()) + gained,
            minimum=lower_P[mixed_P],
            maximum=upper_P[mixed_P],
        )
    return budget_P


def knapsack_posterior(
    a_P: ArrayLike,
    b_P: ArrayLike,
    total: int,
    *,
    minimum: ArrayLike = 2,
    maximum: ArrayLike | None = 128,
) -> IntArray:
    """`knapsack` when pass rates are known as Beta(a, b) only: maximises the expected value.

    The gain of one more rollout is  E[p (1 - p)^2 (p^n (1 - p) + (1 - p)^n p)] =
    (B(a + n + 1, b + 3) + B(a + 2, b + n + 2)) / B(a, b),  still decreasing in n. A prompt that
    failed every time is not given up: it may yet pass.

    Args:
        a_P, b_P: (P,) parameters of the posteriors, in [1e-100, 1e30]: beyond, gains underflow.
        total, minimum, maximum: as in `knapsack`.

    Returns:
        (P,) int64 counts that sum to `total`, ties as in `neyman`.

    Raises:
        ValueError: if `total` does not fit the boxes or is above 2**40, or a parameter is out of
            range.
    """
    a_P, b_P = beta_parameters(a_P, b_P)
    most = max(a_P.max(initial=0), b_P.max(initial=0))
    if most > 1e30:  # the tenth power of their sum is taken
        raise ValueError(f"a_P and b_P must be at most 1e30, got {most}")
    least = min(a_P.min(initial=1), b_P.min(initial=1))
    if least < 1e-100:  # with the other at 1e30 the gains are then about its cube below, 1e-190
        raise ValueError(f"a_P and b_P must be at least 1e-100, got {least}")
    lower_P, upper_P = boxes(len(one_per_prompt(a_P)), total, minimum, maximum, least=2)
    if total > 2**40:  # beyond, the rounding of gains exceeds their differences
        raise ValueError(f"total must be at most 2**40 here, got {total}")
    columns = (a_P, b_P, *_posterior_columns(a_P, b_P))
    return best_first(
        _knapsack_posterior_gain,
        columns,
        lower_P,
        upper_P,
        total - int(lower_P.sum()),
        guess=_posterior_guess,
        levels=_guessed_levels(_posterior_guess, columns, lower_P, upper_P, total),
    )


def _pass_rates(p_P: ArrayLike) -> FloatArray:
    """One pass rate per prompt; ValueError if one is not in [0, 1]."""
    p_P = one_per_prompt(p_P, name="p_P")
    valid_P = (p_P >= 0) & (p_P <= 1)
    if not valid_P.all():
        p = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(f"pass rates must be in [0, 1], got {p_P[p]} for prompt {p}")
    return p_P


def _knapsack_columns(p_P: FloatArray) -> tuple[FloatArray, ...]:
    """The gain is A (M^n m + m^n M) with M = max(p, 1 - p), m = min(p, 1 - p); (P,) of
    log(A m), log(A M), log M and log m."""
    rest_P = 1 - p_P
    with np.errstate(divide="ignore"):
        log_p_P, log_rest_P = np.log(p_P), np.log1p(-p_P)
    log_value_P = log_p_P + 2 * log_rest_P
    larger_P = np.where(p_P > rest_P, log_p_P, log_rest_P)
    smaller_P = np.where(p_P > rest_P, log_rest_P, log_p_P)
    return log_value_P + smaller_P, log_value_P + larger_P, larger_P, smaller_P


def _knapsack_guess(
    level: float,
    p_K: FloatArray,
    first_K: FloatArray,
    second_K: FloatArray,
    larger_K: FloatArray,
    smaller_K: FloatArray,
) -> FloatArray:
    """Newton's method on the logarithm of the gain, which is convex in n; none gains at p 0, 1."""
    if level == 0:
        return np.where((p_K > 0) & (p_K < 1), np.inf, 0.0)
    target = math.log(level)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Where either power alone reaches the level: never beyond the two together.
        n_K = np.maximum((first_K - target) / -larger_K, (second_K - target) / -smaller_K)
        for _ in range(2):
            log_K, share_K = first_K + n_K * larger_K, second_K + n_K * smaller_K
            ratio_K = np.exp(share_K - log_K)
            excess_K = log_K + np.log1p(ratio_K) - target
            n_K -= excess_K * (1 + ratio_K) / (larger_K + ratio_K * smaller_K)
    return np.where(np.isfinite(n_K), np.maximum(np.ceil(n_K), 0), 0.0)


def _guessed_levels(
    guess: Callable[..., FloatArray],
    columns: tuple[FloatArray, ...],
    lower_P: IntArray,
    upper_P: IntArray,
    total: float,
) -> list[float]:
    """Gains on either side of the last rollout's, from a sample of prompts and what is guessed there.

    Bisects the logarithm of the level until the sample has its share of the total. A bad guess costs
    time and nothing else.
    """
    every = max(1, len(lower_P) // 1024)
    sample = tuple(column[::every] for column in columns)
    low_K, high_K = lower_P[::every].astype(np.float64), upper_P[::every].astype(np.float64)
    share = total * len(low_K) / len(lower_P)

    def too_many(log_level: float) -> bool:
        n_K = np.minimum(np.maximum(guess(math.exp(log_level), *sample), low_K), high_K)
        return float(n_K.sum()) > share

    bottom, top = -8.0, 0.0
    while bottom > -700 and not too_many(bottom):
        bottom, top = 2 * bottom, bottom
    while top - bottom > 0.03:
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if too_many(middle) else (bottom, middle)
    return [math.exp(bottom + step) for step in (0.06, -0.06, 0.3, -0.3)]


def _knapsack_gain(n_K: FloatArray, p_K: FloatArray, *_: FloatArray) -> FloatArray:
    rest_K = 1 - p_K
    return p_K * rest_K**2 * (p_K**n_K * rest_K + rest_K**n_K * p_K)


def _posterior_columns(a_P: FloatArray, b_P: FloatArray) -> tuple[FloatArray, ...]:
    """Logarithms of what does not depend on n in  passing = B(a + n + 1, b + 3) / B(a, b)  and in
    failing = B(a + 2, b + n + 2) / B(a, b); (P,) each, two for the guess, then two for the gain."""
    c_P = a_P + b_P
    front_P = np.log(b_P) + np.log(b_P + 1) + np.log(b_P + 2), np.log(a_P) + np.log(a_P + 1)
    near_P = [np.log(_rising(x_P)) - _stirling(x_P + 10) for x_P in (a_P, b_P, c_P)]
    passing_P, failing_P = (front_P[i] + (near_P[i] - near_P[2]) for i in (0, 1))
    tail_P = _stirling(c_P + 10)
    to_c_P = _log_far(a_P, b_P) - tail_P, _log_far(b_P, a_P) - tail_P
    return passing_P + to_c_P[0], failing_P + to_c_P[1], passing_P, failing_P


def _posterior_guess(
    level: float,
    a_K: FloatArray,
    b_K: FloatArray,
    passing_K: FloatArray,
    failing_K: FloatArray,
    *_: FloatArray,
) -> FloatArray:
    """A step of Newton's method as in `_knapsack_guess`, on  log Gamma(n + x) - log Gamma(n + y) =
    -d log z + d (d^2 - 1) / (24 z^2) - ...,  d = y - x, z = n + (x + y - 1) / 2."""
    if level == 0:
        return np.full_like(a_K, np.inf)
    target = math.log(level)
    power_K, other_power_K = b_K + 3, a_K + 2
    shift_K, other_shift_K = a_K + b_K / 2 + 2, b_K + a_K / 2 + 2.5
    with np.errstate(over="ignore", invalid="ignore"):
        n_K = np.maximum(
            np.exp((passing_K - target) / power_K) - shift_K,
            np.exp((failing_K - target) / other_power_K) - other_shift_K,
        )
        z_K = np.maximum(n_K, 0) + shift_K
        other_z_K = z_K + (other_shift_K - shift_K)
        bend_K = power_K * (np.square(power_K) - 1) / (24 * np.square(z_K))
        other_bend_K = other_power_K * (np.square(other_power_K) - 1) / (24 * np.square(other_z_K))
        log_K = passing_K - power_K * np.log(z_K) + bend_K
        other_log_K = failing_K - other_power_K * np.log(other_z_K) + other_bend_K
        ratio_K = np.exp(other_log_K - log_K)
        slope_K = (power_K + 2 * bend_K) / z_K
        slope_K += ratio_K * ((other_power_K + 2 * other_bend_K) / other_z_K)
        excess_K = log_K + np.log1p(ratio_K) - target
        n_K = z_K - shift_K + excess_K * (1 + ratio_K) / slope_K
    return np.where(np.isfinite(n_K), np.maximum(np.ceil(n_K), 0), 0.0)


def _knapsack_posterior_gain(
    n_K: FloatArray,
    a_K: FloatArray,
    b_K: FloatArray,
    _: FloatArray,
    __: FloatArray,
    passing_K: FloatArray,
    failing_K: FloatArray,
) -> FloatArray:
    """passing + failing, with c = a + b, m = n + 1 and fall = (c + m) (c + m + 1) (c + m + 2):

    passing = b (b + 1) (b + 2) (Gamma(a + m) / Gamma(a)) (Gamma(c) / Gamma(c + m)) / fall,
    failing = a (a + 1) (b + m) (Gamma(b + m) / Gamma(b)) (Gamma(c) / Gamma(c + m)) / fall.
    """
    m_K, c_K = n_K + 1, a_K + b_K
    far_K = c_K + m_K
    log_K, near_K = _log_far(c_K, m_K), _rising(far_K)
    near_K /= far_K * (far_K + 1) * (far_K + 2)
    # The two products of ten are divided before a small factor meets one of them and underflows.
    passing_K = np.exp(_log_far(a_K, m_K) - log_K + passing_K) * (near_K / _rising(a_K + m_K))
    failing_K = np.exp(_log_far(b_K, m_K) - log_K + failing_K) * (near_K / _rising(b_K + m_K))
    failing_K *= b_K + m_K
    passing_K += failing_K
    return passing_K


def _log_far(x_K: FloatArray, n_K: FloatArray) -> FloatArray:
    """log Gamma(x + 10 + n) - log Gamma(x + 10) by Stirling's series, but for `_stirling(x + 10)`;
    arranged so that large x do not cancel."""
    low_K, high_K = x_K + 10, x_K + n_K + 10
    log_K = (low_K - 0.5) * np.log1p(n_K / low_K)
    log_K += n_K * (np.log(high_K) - 1)
    log_K += _stirling(high_K)
    return log_K


def _rising(x_K: FloatArray) -> FloatArray:
    """Gamma(x + 10) / Gamma(x) = x (x + 1) ... (x + 9), in pairs: (x + i) (x + 9 - i) =
    x (x + 9) + i (9 - i)."""
    square_K = x_K * (x_K + 9)
    product_K = square_K + 8
    product_K *= square_K
    for more in (14, 18, 20):
        product_K *= square_K + more
    return product_K


def _stirling(x_K: FloatArray) -> FloatArray:
    """log Gamma(x) - ((x - 1/2) log x - x + log(2 pi) / 2), to 1e-14 from x = 10 on."""
    square_K = 1 / np.square(x_K)
    tail_K = square_K / 1188
    for term in (-1 / 1680, 1 / 1260, -1 / 360):
        tail_K += term
        tail_K *= square_K
    tail_K += 1 / 12
    tail_K /= x_K
    return tail_K
