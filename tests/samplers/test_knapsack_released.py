"""Knapsack RL's fallback, as released."""

import math

import numpy as np
import pytest

from samplers.allocation import knapsack, knapsack_released, mean_pass_rate, passed_share
from samplers.posterior import BetaPosterior


def test_spare_rollouts_explore_prompts_that_never_passed():
    # 32 - 4 * 2 = 24; p = .5 needs floor(log .1 / log .5) = 3, and (24 - 3) / 3 = 7 each.
    assert knapsack_released([0.5, 0, 0, 0], 32).tolist() == [5, 9, 9, 9]
    assert knapsack([0.5, 0, 0, 0], 32).tolist() == [26, 2, 2, 2]


@pytest.mark.parametrize(
    ("p_P", "total", "expected"),
    [
        ([0.5, 1, 1], 18, [5, 7, 6]),  # 12 left, 3 needed: the rest to those that always pass
        ([0.0, 0.0, 1.0], 12, [5, 5, 2]),
        ([1.0, 1.0], 7, [4, 3]),
        ([0.5, 0.5], 20, [10, 10]),  # nobody else to give it to
        ([0.5, 0.0], 7, [5, 2]),  # no more than is needed is there
    ],
)
def test_by_hand(p_P, total, expected):
    assert knapsack_released(p_P, total).tolist() == expected


def test_without_anything_to_spare_it_is_knapsack_of_the_mixed_prompts():
    p_P = np.array([0.05, 0.1, 0.0, 0.3])
    assert sum(int(math.log(0.1) / math.log(1 - p)) for p in (0.05, 0.1, 0.3)) > 40 - 8
    budget_P = knapsack_released(p_P, 40)
    assert budget_P[2] == 2
    mixed = [0, 1, 3]
    assert budget_P[mixed].tolist() == knapsack(p_P[mixed], 38).tolist()


@pytest.mark.parametrize("seed", range(30))
def test_every_total_is_spent_within_the_boxes(seed):
    generator = np.random.default_rng(seed)
    p_P = generator.choice(
        [0, 1, 0.5, 1e-300, 1 - 1e-16, 0.01, 0.97], int(generator.integers(1, 12))
    )
    minimum = int(generator.integers(2, 4))
    maximum = minimum + int(generator.integers(0, 20))
    total = int(generator.integers(minimum * len(p_P), maximum * len(p_P) + 1))
    budget_P = knapsack_released(p_P, total, minimum=minimum, maximum=maximum)
    assert budget_P.sum() == total and budget_P.dtype == np.int64
    assert minimum <= budget_P.min() <= budget_P.max() <= maximum


def test_the_share_that_passed_is_0_where_none_did_and_half_where_nothing_is_known():
    posterior = BetaPosterior(4)
    posterior.observe([0, 1, 2], [0, 2, 8], [8, 8, 8])
    assert passed_share(*posterior.parameters()).tolist() == [0, 0.25, 1, 0.5]
    assert mean_pass_rate(*posterior.parameters())[0] == 0.1
    posterior.observe([3], [0], [1])  # what was counted decays, and keeps its share
    assert passed_share(*posterior.parameters())[1] == pytest.approx(0.25)
    with pytest.raises(ValueError):
        passed_share([0.0], [2.0])


def test_under_other_priors_the_share_is_the_likeliest_pass_rate():
    a, b = [0.4, 3.0, 0.5, 1.0, 2.4], [7.6, 0.9, 0.5, 1.0, 5.6]
    assert passed_share(a, b) == pytest.approx([0, 1, 0.5, 0.5, 1.4 / 6])


def test_a_pass_rate_outside_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5 for prompt 1"):
        knapsack_released([0.5, 1.5], 8)
