"""The rules beyond c / n and c / (n - 1): Dr.GRPO, Knapsack, cost-aware, Reinforce-Ada, alignment."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from samplers import allocation
from samplers.allocation import (
    align_total,
    cost_aware,
    dr_grpo,
    knapsack,
    knapsack_posterior,
    neyman,
)
from samplers.allocation.knapsack import (
    _knapsack_gain,
    _knapsack_posterior_gain,
    _posterior_columns,
    _posterior_guess,
)


def mixed_value(p, n):
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def posterior_value(ab, n):
    """E[mixed_value] by integrating the polynomial: moments of p and 1 - p."""
    a, b = ab

    def moment(i, j):
        return math.exp(special.betaln(a + i, b + j) - special.betaln(a, b))

    return moment(1, 2) - moment(n + 1, 2) - moment(1, n + 2)


# rule -> (allocator of columns, least rollouts, draws columns, cost of one prompt)
RULES = {
    "dr_grpo": (dr_grpo, 3, lambda c, n: c[0] ** 2 * (n - 1) / n**2),
    "knapsack": (knapsack, 2, lambda c, n: -mixed_value(c[0], n)),
    "knapsack_posterior": (knapsack_posterior, 2, lambda c, n: -posterior_value(c, n)),
}


def columns_of(rule, generator, size):
    if rule == "knapsack_posterior":
        return generator.choice([1.0, 1.0, 1.3, 4.0, 9.0], (2, size))
    if generator.integers(3):
        return (generator.random(size) * generator.integers(0, 2, size))[None]
    return generator.choice([0.0, 0.25, 0.5, 1.0], size)[None]


def random_boxes(generator, size, least):
    lower = least + generator.integers(0, 3, size)
    upper = lower + generator.integers(0, 7, size)
    return lower, upper, int(generator.integers(lower.sum(), upper.sum() + 1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(60))
def test_no_split_is_better(rule, seed):
    allocate, least, cost = RULES[rule]
    generator = np.random.default_rng(seed)
    size = int(generator.integers(1, 5))
    columns = columns_of(rule, generator, size)
    lower, upper, total = random_boxes(generator, size, least)
    budget = allocate(*columns, total, minimum=lower, maximum=upper)
    assert budget.sum() == total and budget.dtype == np.int64
    assert ((lower <= budget) & (budget <= upper)).all()

    def whole(split):
        return sum(cost(columns[:, p], int(n)) for p, n in enumerate(split))

    ranges = [range(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    best = min(whole(split) for split in itertools.product(*ranges) if sum(split) == total)
    assert whole(budget) == pytest.approx(best, rel=1e-11, abs=1e-14)


# -- golden values and limits

P = np.array([0.02, 0.1, 0.5, 0.9])


def test_golden_values_of_knapsack():
    budget = knapsack(P, 32, maximum=16)
    assert budget.tolist() == [2, 16, 8, 6]
    assert mixed_value(P, budget).sum() == pytest.approx(0.194984, abs=5e-7)
    assert knapsack(P, 32).tolist() == [2, 21, 7, 2]


def posterior_gain(n, a, b):
    a, b = np.full(len(n), float(a)), np.full(len(n), float(b))
    columns = _posterior_columns(a, b)
    return _knapsack_posterior_gain(n, a, b, *columns)


def test_golden_value_of_the_posterior_gain():
    gain = posterior_gain(np.array([8.0]), 2, 8)
    assert gain[0] == pytest.approx(0.003026076, abs=5e-10)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 8), (0.3, 0.2), (1.02, 8.68), (40, 3), (1e4, 7)])
def test_the_posterior_gain_is_the_expected_gain(a, b):
    n = np.array([2.0, 3, 8, 31, 128, 5000])
    formula = special.betaln(a + n + 1, b + 3), special.betaln(a + 2, b + n + 2)
    expected = sum(np.exp(x - special.betaln(a, b)) for x in formula)
    gain = posterior_gain(n, a, b)
    np.testing.assert_allclose(gain, expected, rtol=2e-9 if a > 100 else 1e-10)
    if a < 100:
        quadrature = [
            integrate.quad(
                lambda p, m=m: stats.beta.pdf(p, a, b) * _knapsack_gain(m, p),
                *(0, 1),
                points=[0.05, 0.5, 0.95],
                limit=200,
            )[0]
            for m in n[:4]
        ]
        np.testing.assert_allclose(gain[:4], quadrature, rtol=1e-6)
    many = np.arange(2.0, 3000.0)
    assert (np.diff(posterior_gain(many, a, b)) < 0).all()


@pytest.mark.slow
def test_what_is_guessed_of_the_posterior_gain_is_mostly_right():
    """Nothing but time depends on the guess; here 1 in 20 may be wrong, and none by much."""
    generator = np.random.default_rng(0)
    p = generator.random(4000)
    a, b = 1 + 8 * p, 9 - 8 * p
    columns = (a, b, *_posterior_columns(a, b))
    n = generator.integers(3, 60, 4000).astype(float)
    gain = [_knapsack_posterior_gain(m, *columns) for m in (n - 1, n)]
    level = np.sqrt(gain[0] * gain[1])  # the unit before n gains more than it, that of n less
    guess = [
        _posterior_guess(float(x), *(column[[i]] for column in columns))[0]
        for i, x in enumerate(level)
    ]
    assert np.mean(np.array(guess) != n) < 0.05 and np.abs(np.array(guess) - n).max() <= 3


@pytest.mark.filterwarnings("error")
def test_posteriors_from_the_smallest_to_the_largest_evidence_are_allocated_to():
    a = np.repeat([1e-100, 1e-9, 1.0, 1e6, 1e30], 5)
    b = np.tile([1e-100, 1e-9, 1.0, 1e6, 1e30], 5)
    budget = knapsack_posterior(a, b, 400, maximum=64)
    assert budget.sum() == 400 and budget.min() >= 2


def test_with_much_evidence_the_posterior_gives_the_budgets_of_its_mean():
    p = np.array([0.05, 0.2, 0.5, 0.8])
    a, b = 1e6 * p, 1e6 * (1 - p)
    assert knapsack_posterior(a, b, 60).tolist() == knapsack(p, 60).tolist()


def test_a_prompt_that_always_failed_is_not_given_up_under_a_posterior():
    # Beta(1, 9): 0 of 8. At p = 0 there is nothing to gain; under the posterior there is.
    assert knapsack([0.0, 0.5], 20).tolist() == [2, 18]
    assert knapsack_posterior([1.0, 5.0], [9.0, 5.0], 20)[0] > 5


def test_without_anything_to_gain_it_is_shared_evenly():
    assert knapsack([0.0, 1.0, 0.0], 20).tolist() == [7, 7, 6]


def test_dr_grpo_by_hand():
    # c (n^2 - n - 1) / (n (n + 1))^2 at n = 3, 4, 5: .03472 c, .0275 c, .02111 c. With c = 9, 4, 1:
    # .3125, .2475, .19 for p0, .1389, .11, ... for p1, .0347 for p2. So: p0 three times, p0 at
    # n = 6 gains 9 * 29 / 42^2 = .148, again before p1.
    assert dr_grpo([3.0, 2.0, 1.0], 13).tolist() == [7, 3, 3]
    # n = 7: 9 * 41 / 56^2 = .1177, now after p1.
    assert dr_grpo([3.0, 2.0, 1.0], 14).tolist() == [7, 4, 3]


def test_dr_grpo_is_refused_where_the_greedy_would_err():
    with pytest.raises(ValueError, match="minimum must be at least 3, got 2"):
        dr_grpo([1.0, 1.0], 8, minimum=2)
    # Why: from 2 the second rollout more gains more than the first.
    cost = np.array([0.98, 0.92])

    def whole(split):
        return (cost * (np.array(split) - 1) / np.square(split)).sum()

    gain = [(n - 1) / n**2 - n / (n + 1) ** 2 for n in (2, 3, 4)]
    assert gain[1] > gain[0] > gain[2]
    budget = [2, 2]
    for _ in range(4):
        gain_P = [
            c * ((n - 1) / n**2 - n / (n + 1) ** 2) for c, n in zip(cost, budget, strict=True)
        ]
        budget[int(np.argmax(gain_P))] += 1
    assert budget == [5, 3]
    assert whole([4, 4]) < whole(budget)


def test_large_dr_grpo_budgets_meet_the_real_solution():
    std = np.random.default_rng(0).random(20) + 0.05
    budget = dr_grpo(std, 20_000, minimum=300, maximum=1500).astype(float)
    free = (budget > 300) & (budget < 1500)
    assert 2 < free.sum() < 20
    # Off the box the slopes c (n - 2) / n^3 are equal, up to one rollout.
    slope = (std**2 * (budget - 2) / budget**3)[free]
    assert slope.max() / slope.min() - 1 < 2 * 2 / 300


def test_large_knapsack_budgets_meet_the_real_solution():
    p = np.array([0.003, 0.01, 0.03, 0.1, 0.5])
    budget = knapsack(p, 3000, maximum=None)
    assert budget.min() > 2
    gain = _knapsack_gain(budget.astype(float), p)
    before = _knapsack_gain(budget - 1.0, p)
    assert gain.max() <= before.min()


# -- unequal costs


def test_cost_aware_by_hand():
    # Gains per token of a 2nd, 3rd rollout: p0 9/2/3 = 1.5, 9/6/3 = .5; p1 4/2/1 = 2, 4/6 = .67,
    # 4/12 = .33. Minima take 4 tokens; then p1 (1), p0 (3), p1 (1) fit into 9; p0 again (3) not.
    assert cost_aware([3.0, 2.0], [3.0, 1.0], 9).tolist() == [2, 3]
    assert cost_aware([3.0, 2.0], [3.0, 1.0], 11.5).tolist() == [2, 3]
    assert cost_aware([3.0, 2.0], [3.0, 1.0], 12).tolist() == [3, 3]


@pytest.mark.parametrize("seed", range(60))
def test_no_affordable_split_that_spends_as_little_is_better(seed):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(1, 5))
    std = generator.choice([0.0, 0.3, 0.5, 1.0], size)
    length = generator.integers(1, 6, size).astype(float)
    lower, upper, _ = random_boxes(generator, size, 1)
    total = float(lower @ length + generator.integers(0, 30))
    budget = cost_aware(std, length, total, minimum=lower, maximum=upper)
    spent = budget @ length
    assert spent <= total and ((lower <= budget) & (budget <= upper)).all()

    ranges = [range(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    affordable = [s for s in itertools.product(*ranges) if np.dot(s, length) <= spent]
    best = min((std**2 / split).sum() for split in affordable)
    assert (std**2 / budget).sum() == pytest.approx(best, rel=1e-12)
    # Ends only before a rollout that does not fit.
    more = [length[p] for p in range(size) if budget[p] < upper[p]]
    assert not more or total - spent < max(more)


def test_large_cost_aware_budgets_meet_the_real_solution():
    generator = np.random.default_rng(1)
    std, length = generator.random(30) + 0.1, generator.random(30) * 900 + 100
    budget = cost_aware(std, length, 1e7)
    real = std / np.sqrt(length)
    np.testing.assert_allclose(budget / budget.sum(), real / real.sum(), rtol=5e-3)
    assert 1e7 - budget @ length < length.max()


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8),
    st.integers(0, 60),
    st.integers(0, 1),
)
def test_at_equal_lengths_it_is_neyman(std, extra, least):
    total = least * len(std) + extra
    expected = neyman(std, total, minimum=least).tolist()
    assert (
        cost_aware(std, np.full(len(std), 4.0), 4 * total + 3, minimum=least).tolist() == expected
    )


def test_cost_aware_says_what_is_wrong():
    with pytest.raises(
        ValueError, match="total=5 cannot give 2 prompts their minima; .* least 7.0"
    ):
        cost_aware([1.0, 1.0], [3.0, 4.0], 5)
    with pytest.raises(
        ValueError, match="length_P must be finite and positive, got 0.0 for prompt"
    ):
        cost_aware([1.0, 1.0], [3.0, 0.0], 50)
    with pytest.raises(ValueError, match=r"equally long, got \(2,\) and \(1,\)"):
        cost_aware([1.0, 1.0], [3.0], 50)
    with pytest.raises(ValueError, match="total must be finite and non-negative, got nan"):
        cost_aware([1.0], [3.0], float("nan"))
    with pytest.raises(ValueError, match="minimum=4 exceeds maximum=3 of prompt 0"):
        cost_aware([1.0], [3.0], 50, minimum=4, maximum=3)


# -- what holds for every rule of this file

FAMILIES = [
    dr_grpo,
    knapsack,
    lambda p, *rest, **box: knapsack_posterior(1 + p, 2 - p, *rest, **box),
]
NAMES = ["dr_grpo", "knapsack", "knapsack_posterior"]


@pytest.mark.slow
@pytest.mark.parametrize("allocate", FAMILIES, ids=NAMES)
@given(
    p=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8, unique=True),
    extra=st.integers(0, 60),
    order_seed=st.integers(0, 100),
)
def test_budgets_follow_their_prompts_when_they_are_reordered(allocate, p, extra, order_seed):
    p = np.unique(np.round(p, 2))
    order = np.random.default_rng(order_seed).permutation(len(p))
    total = 3 * len(p) + extra
    box = {"minimum": 3, "maximum": None}
    expected = allocate(p, total, **box)
    assert expected.sum() == total and expected.min() >= 3
    assert allocate(p[order], total, **box).tolist() == expected[order].tolist()
    assert allocate(p, total, **box).tolist() == expected.tolist()


@pytest.mark.parametrize("allocate", FAMILIES, ids=NAMES)
def test_a_total_at_either_end_of_the_boxes_leaves_no_choice(allocate):
    lower, upper = [3, 5, 4], [4, 6, 4]
    p = np.array([0.1, 0.2, 0.3])
    assert allocate(p, 12, minimum=lower, maximum=upper).tolist() == lower
    assert allocate(p, 14, minimum=lower, maximum=upper).tolist() == upper
    assert allocate(p, 13, minimum=lower, maximum=[9, 5, 4]).tolist() == [4, 5, 4]


@pytest.mark.parametrize("allocate", FAMILIES, ids=NAMES)
def test_it_says_what_is_wrong(allocate):
    p = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="total=5 cannot give 2 prompts 3 rollouts each"):
        allocate(p, 5, minimum=3)
    with pytest.raises(ValueError, match="total=9 exceeds what 2 prompts may get"):
        allocate(p, 9, minimum=3, maximum=4)
    with pytest.raises(ValueError, match="nan"):
        allocate(np.array([0.5, float("nan")]), 8)
    with pytest.raises(ValueError, match=r"at least one prompt, got shape \(0,\)"):
        allocate(np.array([]), 0)


def test_pass_rates_and_parameters_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"pass rates must be in \[0, 1\], got 1.5 for prompt 1"):
        knapsack([0.5, 1.5], 8)
    with pytest.raises(ValueError, match="minimum must be at least 2, got 1"):
        knapsack([0.5, 0.5], 8, minimum=1)
    with pytest.raises(ValueError, match="a and b must be positive here, got 0.0"):
        knapsack_posterior([1.0, 0.0], [1.0, 1.0], 8)
    with pytest.raises(ValueError, match=r"a_P and b_P must be at most 1e30, got 2e\+30"):
        knapsack_posterior([1.0, 1.0], [1.0, 2e30], 8)
    with pytest.raises(ValueError, match="a_P and b_P must be at least 1e-100, got 5.6e-249"):
        knapsack_posterior([9e16, 1.0], [5.6e-249, 1.0], 8)


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    st.integers(0, 60),
    st.integers(-400, 400),
)
def test_the_unit_of_the_scale_does_not_matter_to_dr_grpo(std, extra, exponent):
    total = 3 * len(std) + extra
    assert dr_grpo(np.ldexp(std, exponent), total).tolist() == dr_grpo(std, total).tolist()


@given(
    std=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    extra=st.integers(0, 40),
    factor=st.floats(1, 5),
)
def test_a_larger_scale_never_gets_less_from_dr_grpo(std, extra, factor):
    total = 3 * len(std) + extra
    assert dr_grpo([factor * std[0], *std[1:]], total)[0] >= dr_grpo(std, total)[0]


# -- scales and totals


def test_reinforce_ada_is_neyman_with_its_own_scale():
    p = np.array([0.0, 0.25, 1.0])
    std = allocation.reinforce_ada_std(p, 1 - p, epsilon=0.01)
    np.testing.assert_allclose(std, 1 / np.sqrt(p + 0.01), rtol=1e-15)
    # Shares of 1000 without boxes: 10, 1.9612, .99504 of 12.956.
    real = 1000 * std / std.sum()
    assert np.abs(neyman(std, 1000) - real).max() < 1
    assert neyman(std, 48, minimum=4, maximum=32).tolist() == [32, 11, 5]
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"epsilon must be positive and finite, got {epsilon}"):
            allocation.reinforce_ada_std(p, 1 - p, epsilon=epsilon)


@pytest.mark.slow
def test_a_thompson_scale_is_that_of_a_fresh_draw():
    a, b = np.array([[1.0, 5.0, 1.0], [1.0, 5.0, 9.0]])
    draw = np.random.default_rng(7).beta(a, b)
    std = allocation.thompson_std(a, b, generator=np.random.default_rng(7))
    assert std.tolist() == np.sqrt(draw * (1 - draw)).tolist()
    generator = np.random.default_rng(0)
    many = np.array([allocation.thompson_std(a, b, generator=generator) for _ in range(20_000)])
    # Its mean is scale (ii), its mean square scale (iii) squared; five standard errors.
    for power, expected in [
        (1, allocation.mean_std(a, b)),
        (2, allocation.posterior_std(a, b) ** 2),
    ]:
        error = (many**power).std(axis=0) / len(many) ** 0.5
        assert (np.abs((many**power).mean(axis=0) - expected) < 5 * error).all()
    with pytest.raises(ValueError, match="a and b must be positive"):
        allocation.thompson_std([0.0], [1.0], generator=generator)


def bound_over_uniform(scale, a, b, p, *, minimum):
    """Sum p (1 - p) / n of budgets from a scale, over that of 8 rollouts each."""
    budget = neyman(scale(a, b), 8 * len(p), minimum=minimum)
    return (p * (1 - p) / budget).sum() / (p * (1 - p) / 8).sum()


@pytest.mark.parametrize(("shape", "expected"), [(1.0, (0.9705, 1.040)), (0.5, (0.9134, 1.001))])
def test_a_draw_is_a_bad_way_to_allocate(shape, expected):
    """One visit of 8: the moments gain on uniform, a fresh draw gains nothing or loses."""
    generator = np.random.default_rng(0)
    p = generator.beta(shape, shape, 40_000)
    successes = generator.binomial(8, p)
    # The prior is Beta(1, 1) for either pool; with the pool's own law, Beta(.5, .5), a draw costs
    # 1.057 (test_one_posterior.py).
    a, b = 1.0 + successes, 9.0 - successes

    def thompson(a_P, b_P):
        return allocation.thompson_std(a_P, b_P, generator=generator)

    moments = bound_over_uniform(allocation.posterior_std, a, b, p, minimum=1)
    draws = bound_over_uniform(thompson, a, b, p, minimum=2)
    # Over 40,000 prompts the ratios scatter by about .003 and .005.
    assert moments == pytest.approx(expected[0], abs=0.01)
    assert draws == pytest.approx(expected[1], abs=0.015)
    assert draws > moments + 0.05


def test_totals_are_aligned_downwards_and_before_allocating():
    assert [align_total(n, 8) for n in (8, 15, 16, 100)] == [8, 8, 16, 96]
    assert align_total(7, 1) == 7
    assert neyman([1.0, 2.0, 3.0], align_total(100, 32)).sum() == 96
    for total, multiple in [(7, 8), (8, 0), (-8, 4), (0, 1)]:
        with pytest.raises(ValueError, match=f"multiple={multiple} fits into total={total}"):
            align_total(total, multiple)


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_the_aligned_total_is_the_largest_multiple(total, multiple):
    if total >= multiple:
        aligned = align_total(total, multiple)
        assert aligned % multiple == 0 and total - multiple < aligned <= total
