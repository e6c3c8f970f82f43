"""The allocator of 1 / p rollouts: its rule, its exact sums, its edges."""

import itertools
import math

import numpy as np
import pytest

from samplers.allocation import inverse_pass_rate, neyman
from samplers.check import check_sampler


def wanted(p, most):
    """The rule, in plain Python."""
    return min(max(math.ceil(1 / p) if p else most, 2), most) if p < 0.5 else 2


def test_by_hand():
    # 1/p is 20, 5, 4 and 3.3 -> 4; from p = 1/2 on 2. They sum to 20 + 5 + 4 + 4 + 2 + 2 = 37.
    rates = [0.05, 0.2, 0.25, 0.3, 0.5, 0.9]
    assert inverse_pass_rate(rates, 37).tolist() == [20, 5, 4, 4, 2, 2]
    # Capped at 8: 8 + 5 + 4 + 4 + 2 + 2 = 25.
    assert inverse_pass_rate(rates, 25, maximum=8).tolist() == [8, 5, 4, 4, 2, 2]


@pytest.mark.parametrize("seed", range(40))
def test_what_adds_up_is_given_as_the_rule_says(seed):
    generator = np.random.default_rng(seed)
    rate_P = generator.beta(0.7, 1.5, 9).clip(0.01, 1)
    rule = [wanted(p, 64) for p in rate_P.tolist()]
    assert inverse_pass_rate(rate_P, sum(rule), maximum=64).tolist() == rule


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("total", [12, 17, 31, 64])
def test_any_total_is_spent_in_proportion_and_exactly(seed, total):
    generator = np.random.default_rng(seed)
    rate_P = generator.beta(1, 2, 5)
    budget_P = inverse_pass_rate(rate_P, total, maximum=20)
    wanted_P = np.array([wanted(p, 20) for p in rate_P.tolist()], dtype=float)
    assert budget_P.dtype == np.int64 and budget_P.sum() == total
    assert budget_P.min() >= 2 and budget_P.max() <= 20
    order = np.argsort(rate_P)  # equal wishes go by the pass rate
    by_neyman = neyman(wanted_P[order], total, minimum=2, maximum=20)
    assert budget_P[order].tolist() == by_neyman.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_no_split_of_the_total_is_closer_to_the_rule(seed):
    rate_P = np.random.default_rng(seed).beta(1, 2, 3)
    w_P = np.array([wanted(p, 14) for p in rate_P.tolist()], dtype=float)
    budget_P = inverse_pass_rate(rate_P, 14, maximum=14)
    splits = (n for n in itertools.product(range(2, 11), repeat=3) if sum(n) == 14)
    best = min(float((w_P**2 / np.array(n)).sum()) for n in splits)
    assert float((w_P**2 / budget_P).sum()) == pytest.approx(best, rel=1e-12)


def test_prompts_of_which_nothing_is_known_or_that_never_passed():
    assert inverse_pass_rate([0.5, 0.5, 0.5, 0.5], 10).tolist() == [3, 3, 2, 2]
    assert inverse_pass_rate([0.0, 1.0, 1.0], 12, maximum=8).tolist() == [8, 2, 2]
    assert inverse_pass_rate([0.0, 0.0], 9).tolist() == [5, 4]
    assert inverse_pass_rate([1e-320, 1.0], 10).tolist() == [8, 2]
    assert inverse_pass_rate([0.3], 7).tolist() == [7]


def test_it_keeps_the_contract_of_an_allocator():
    check_sampler(allocator=inverse_pass_rate, minimum=2)


def test_it_says_what_is_wrong():
    with pytest.raises(ValueError, match="minimum must be at least 2, got 1"):
        inverse_pass_rate([0.2, 0.4], 8, minimum=1)
    with pytest.raises(ValueError, match=r"pass rates must lie in \[0, 1\], got 1.5 for prompt 1"):
        inverse_pass_rate([0.2, 1.5], 8)
    with pytest.raises(ValueError, match="got nan for prompt 0"):
        inverse_pass_rate([float("nan"), 0.5], 8)
    with pytest.raises(ValueError, match="total=3 cannot give 2 prompts 2 rollouts each"):
        inverse_pass_rate([0.2, 0.5], 3)
