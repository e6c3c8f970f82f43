"""Knapsack RL's allocation: the chance of a mixed group times its value, by the exact greedy.

(arXiv:2509.25849.) Axes: P prompts, K of them.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.boxes import boxes, one_per_prompt
from samplers.greedy import best_first
from samplers.scales import _beta_parameters as beta_parameters

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
    exact. What no prompt gains from is shared evenly here; the released code gives it to prompts
    that never passed.)

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
    p_P = one_per_prompt(p_P, name="p_P")
    valid_P = (p_P >= 0) & (p_P <= 1)
    if not valid_P.all():
        p = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(f"pass rates must be in [0, 1], got {p_P[p]} for prompt {p}")
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
        a_P, b_P: (P,) positive parameters of the posteriors.
        total, minimum, maximum: as in `knapsack`.

    Returns:
        (P,) int64 counts that sum to `total`, ties as in `neyman`.

    Raises:
        ValueError: if `total` does not fit the boxes, or a parameter is not positive and finite.
    """
    a_P, b_P = beta_parameters(a_P, b_P, least=0)
    lower_P, upper_P = boxes(len(one_per_prompt(a_P)), total, minimum, maximum, least=2)
    return best_first(
        _knapsack_posterior_gain, (a_P, b_P), lower_P, upper_P, total - int(lower_P.sum())
    )


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
    bottom, top = -700.0, 0.0
    for _ in range(24):
        middle = (bottom + top) / 2
        n_K = np.minimum(np.maximum(guess(math.exp(middle), *sample), low_K), high_K)
        bottom, top = (middle, top) if n_K.sum() > share else (bottom, middle)
    return [math.exp(bottom + step) for step in (0.03, -0.03, 0.3, -0.3)]


def _knapsack_gain(n_K: FloatArray, p_K: FloatArray, *_: FloatArray) -> FloatArray:
    rest_K = 1 - p_K
    return p_K * rest_K**2 * (p_K**n_K * rest_K + rest_K**n_K * p_K)


def _knapsack_posterior_gain(n_K: FloatArray, a_K: FloatArray, b_K: FloatArray) -> FloatArray:
    c_K = a_K + b_K
    # The factors that do not grow with n in full, the others as logs of rising factorials.
    passing_K = np.exp(_log_rising(a_K, n_K + 1) - _log_rising(c_K, n_K + 1))
    failing_K = np.exp(_log_rising(b_K, n_K + 2) - _log_rising(c_K, n_K + 2))
    far_K = c_K + n_K
    passing_K = passing_K * (
        b_K / (far_K + 1) * ((b_K + 1) / (far_K + 2)) * ((b_K + 2) / (far_K + 3))
    )
    failing_K = failing_K * (a_K / (far_K + 2) * ((a_K + 1) / (far_K + 3)))
    return passing_K + failing_K


def _log_rising(x_K: FloatArray, n_K: FloatArray) -> FloatArray:
    """log(x (x + 1) ... (x + n - 1)), x > 0, n >= 0: log Gamma(x + n) - log Gamma(x).

    By Stirling's series once x is at least 10, arranged so that large x do not cancel.
    """
    shift_K = np.ones_like(x_K)
    for step in range(10):
        # Gamma(x) = Gamma(x + 10) / (x (x + 1) ... (x + 9)), and likewise for x + n.
        shift_K *= (x_K + step) / (x_K + n_K + step)
    low_K, high_K = x_K + 10, x_K + n_K + 10
    body_K = (low_K - 0.5) * np.log1p(n_K / low_K) + n_K * (np.log(high_K) - 1)
    return np.log(shift_K) + body_K + (_stirling(high_K) - _stirling(low_K))


def _stirling(x_K: FloatArray) -> FloatArray:
    """log Gamma(x) - ((x - 1/2) log x - x + log(2 pi) / 2), to 1e-16 from x = 10 on."""
    square_K = 1 / np.square(x_K)
    tail_K = 1 / 1680 - square_K * (1 / 1188 - square_K * (691 / 360360 - square_K / 156))
    return (1 / 12 - square_K * (1 / 360 - square_K * (1 / 1260 - square_K * tail_K))) / x_K
