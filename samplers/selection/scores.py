"""Scores: how much a visit to a prompt is worth, from its pass rate or from its posterior.

A score of a pass rate is a function `score(pass_rate_K) -> score_K` and goes with a draw of the
pass rate (`selection.ThompsonSelector`). An expected score is `score(a_K, b_K) -> score_K`, the
mean of the former under Beta(a, b), and needs no draw (`selection.PosteriorMeanSelector`). Only the
order of scores matters. Axes: K candidates.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

Score = Callable[[FloatArray], FloatArray]
"""`score(pass_rate_K) -> score_K`; the largest are chosen."""

ExpectedScore = Callable[[FloatArray, FloatArray], FloatArray]
"""`score(a_K, b_K) -> score_K` from the parameters of the posterior; the largest are chosen."""


def vade(pass_rate_K: FloatArray) -> FloatArray:
    """p (1 - p)^2, largest (4/27) at p = 1/3: a mixed group is likely, and harder is better.

    0.128 at 0.2, 0.125 at 0.5, 0.096 at 0.6. Why the square, the source does not say; as a plug-in
    of one draw it is no mutual information. (VADE, arXiv:2511.18902, project page.)
    """
    fail_K = 1 - pass_rate_K
    return pass_rate_K * fail_K * fail_K


def variance(pass_rate_K: FloatArray) -> FloatArray:
    """p (1 - p), the variance of a 0/1 reward, largest at 1/2.

    VADE's ablation. It is 1/4 - (p - 1/2)^2 and so ranks exactly as `distance_to(0.5)`, MoPPS.
    """
    return pass_rate_K * (1 - pass_rate_K)


def distance_to(target: float) -> Score:
    """The score -(p - target)^2. (MoPPS, arXiv:2507.04632, whose target is 0.5.)

    Raises:
        ValueError: if the target is not in [0, 1].
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target must be in [0, 1], got {target}")

    def distance(pass_rate_K: FloatArray) -> FloatArray:
        return -np.square(pass_rate_K - target)

    return distance


def expected_vade(a_K: FloatArray, b_K: FloatArray) -> FloatArray:
    """E[p (1 - p)^2] = a b (b + 1) / ((a + b) (a + b + 1) (a + b + 2)); 1/12 for Beta(1, 1).

    Our reading of the "greedy" ablation of VADE, whose exact meaning its sources do not give.
    """
    total_K = a_K + b_K
    # A product of three ratios below 1 neither overflows nor loses digits.
    return (a_K / total_K) * (b_K / (total_K + 1)) * ((b_K + 1) / (total_K + 2))


def expected_variance(a_K: FloatArray, b_K: FloatArray) -> FloatArray:
    """E[p (1 - p)] = a b / ((a + b) (a + b + 1)); 1/6 for Beta(1, 1)."""
    total_K = a_K + b_K
    return (a_K / total_K) * (b_K / (total_K + 1))


SCORES: dict[str, Score] = {"vade": vade, "variance": variance}
EXPECTED_SCORES: dict[str, ExpectedScore] = {
    "vade": expected_vade,
    "variance": expected_variance,
}
