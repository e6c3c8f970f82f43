import itertools
import math

import pytest
import torch

from rl.objective.advantages import leave_one_out
from rl.objective.posterior_baseline import posterior_leave_one_out


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def ragged(seed=0):
    """Groups of 1 to 5 rows, interleaved, with fractional rewards; prompt 2 has none."""
    generator = torch.Generator().manual_seed(seed)
    prompt_N = torch.tensor([0, 1, 1, 3, 3, 3, 4, 4, 4, 4, 4])
    prompt_N = prompt_N[torch.randperm(len(prompt_N), generator=generator)]
    reward_N = torch.rand(len(prompt_N), dtype=torch.float64, generator=generator)
    a_P, b_P = torch.rand(2, 5, dtype=torch.float64, generator=generator) * 4
    return reward_N, prompt_N, a_P, b_P


def test_by_hand():
    # Prompt 0, Beta(2, 6), rewards 1, 0, 0; prompt 1, Beta(3, 1), reward 1.
    found_N = posterior_leave_one_out(
        f64([1, 1, 0, 0]), torch.tensor([0, 1, 0, 0]), f64([2, 3]), f64([6, 1])
    )
    # 1 - 2/10,  1 - 3/4,  0 - 3/10,  0 - 3/10
    assert found_N.tolist() == pytest.approx([0.8, 0.25, -0.3, -0.3], abs=1e-15)


def test_matches_the_definition_on_ragged_groups():
    reward_N, prompt_N, a_P, b_P = ragged()
    expected = []
    for i, (r, p) in enumerate(zip(reward_N.tolist(), prompt_N.tolist(), strict=True)):
        others = [
            float(reward_N[j]) for j in range(len(reward_N)) if j != i and int(prompt_N[j]) == p
        ]
        a, b = float(a_P[p]), float(b_P[p])
        expected.append(r - (a + sum(others)) / (a + b + len(others)))
    found_N = posterior_leave_one_out(reward_N, prompt_N, a_P, b_P)
    assert found_N.tolist() == pytest.approx(expected, abs=1e-14)


def test_knowing_nothing_it_is_leave_one_out_and_a_lone_rollout_gets_0():
    reward_N, prompt_N, a_P, _ = ragged(1)
    nothing_P = torch.zeros_like(a_P)
    found_N = posterior_leave_one_out(reward_N, prompt_N, nothing_P, nothing_P)
    torch.testing.assert_close(found_N, leave_one_out(reward_N, prompt_N), atol=1e-14, rtol=0)
    assert found_N[prompt_N == 0].tolist() == [0.0]


def test_a_lone_rollout_is_compared_with_what_was_known_before():
    found_N = posterior_leave_one_out(f64([0.25]), torch.tensor([0]), f64([0.3]), f64([0.9]))
    assert found_N.item() == pytest.approx(0.25 - 0.3 / 1.2, abs=1e-15)


def test_in_terms_of_the_posterior_after_the_group():
    # b_i = (alpha + 1 - r_i) / (alpha + beta + 1), with alpha + 1 and beta + 1 the parameters after it.
    reward_N = f64([1, 0, 1, 1])
    a, b = 1.0, 2.5
    alpha, beta = a + 3 - 1, b + 1 - 1
    found_N = posterior_leave_one_out(reward_N, torch.zeros(4).long(), f64([a]), f64([b]))
    expected_N = reward_N - (alpha + 1 - reward_N) / (alpha + beta + 1)
    torch.testing.assert_close(found_N, expected_N, atol=1e-15, rtol=0)


def moments(p, n, a, b):
    """Mean of a group's gradient and n times its variance, by enumeration; Bernoulli's one logit."""
    mean = square = 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=n):
        reward_N = f64(outcome)
        advantage_N = posterior_leave_one_out(reward_N, torch.zeros(n).long(), f64([a]), f64([b]))
        gradient = float((advantage_N * (reward_N - p)).mean())
        chance = math.prod(p if r else 1 - p for r in outcome)
        mean += chance * gradient
        square += chance * gradient**2
    return mean, n * (square - mean**2)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (0.2, 0.1), (30, 1), (0, 7)])
@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_its_expected_gradient_is_that_of_the_pass_rate_whatever_was_believed(p, n, a, b):
    assert moments(p, n, a, b)[0] == pytest.approx(p * (1 - p), abs=1e-14)


@pytest.mark.parametrize(
    ("p", "n", "a", "b", "variance"),
    [
        *[(0.2, 2, 0, 0, 0.109), (0.2, 4, 0, 0, 0.075), (0.2, 8, 0, 0, 0.065)],
        *[(0.2, 2, 1, 1, 0.031), (0.2, 4, 1, 1, 0.043), (0.2, 8, 1, 1, 0.050)],
        *[(0.2, 2, 2.6, 7.4, 0.048), (0.2, 4, 2.6, 7.4, 0.050), (0.2, 8, 2.6, 7.4, 0.052)],
        *[(0.5, 2, 0, 0, 0.125), (0.5, 2, 1, 1, 0.014), (0.5, 2, 5, 5, 0.001)],
        (0.5, 2, 6.6, 3.4, 0.006),
    ],
)
def test_what_is_known_lowers_the_variance_of_small_groups(p, n, a, b, variance):
    assert moments(p, n, a, b)[1] == pytest.approx(variance, abs=1e-3)


def test_it_follows_its_rows_and_gives_the_dtype_of_the_rewards():
    reward_N, prompt_N, a_P, b_P = ragged(2)
    order = torch.randperm(len(reward_N), generator=torch.Generator().manual_seed(3))
    found_N = posterior_leave_one_out(reward_N, prompt_N, a_P, b_P)
    moved_N = posterior_leave_one_out(reward_N[order], prompt_N[order], a_P, b_P)
    torch.testing.assert_close(moved_N, found_N[order], atol=1e-14, rtol=0)
    assert posterior_leave_one_out(reward_N.float(), prompt_N, a_P, b_P).dtype == torch.float32
    assert posterior_leave_one_out(f64([]), torch.zeros(0).long(), f64([]), f64([])).shape == (0,)


@pytest.mark.parametrize(
    ("reward", "prompt", "a", "message"),
    [
        ([1.5], [0], [1.0], "rewards must lie in"),
        ([math.nan], [0], [1.0], "rewards must lie in"),
        ([1.0], [1], [1.0], r"prompt_N must be in \[0, 1\)"),
        ([1.0, 0.0], [0], [1.0], "1-d and equally long, got"),
        ([1.0], [0], [-1.0], "finite and at least 0"),
        ([1.0], [0], [math.inf], "finite and at least 0"),
        ([1.0], [0], [1.0, 1.0], "a_P and b_P must be 1-d and equally long"),
    ],
)
def test_it_says_what_is_wrong(reward, prompt, a, message):
    with pytest.raises(ValueError, match=message):
        posterior_leave_one_out(f64(reward), torch.tensor(prompt), f64(a), f64([1.0]))
