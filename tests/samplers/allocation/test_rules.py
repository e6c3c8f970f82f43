import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import allocation
from samplers.allocation import leave_one_out, neyman, uniform

ALLOCATORS = [uniform, neyman, leave_one_out]

# rule -> (allocator, least rollouts, cost of one prompt)
RULES = {
    "c/n": (neyman, 1, lambda c, n: c / n),
    "c/n from 0": (neyman, 0, lambda c, n: c / n if n else (math.inf if c else 0.0)),
    "c/(n-1)": (leave_one_out, 2, lambda c, n: c / (n - 1)),
    "even": (uniform, 0, lambda c, n: float(n * n)),
}


def splits(total, lower, upper):
    """Every way to split `total` within the boxes."""
    ranges = [range(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    return [split for split in itertools.product(*ranges) if sum(split) == total]


def random_case(seed, least):
    """Costs with zeros and equals among them, a box for each prompt, and a total that fits."""
    generator = np.random.default_rng(seed)
    num_prompts = generator.integers(1, 5)
    if seed % 3:
        std = generator.random(num_prompts) * generator.integers(0, 2, num_prompts)
    else:
        std = generator.choice([0.0, 0.5, 1.0, 2.0], num_prompts)
    lower = least + generator.integers(0, 3, num_prompts)
    upper = lower + generator.integers(0, 7, num_prompts)
    total = int(generator.integers(lower.sum(), upper.sum() + 1))
    return std, total, lower, upper


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(60))
def test_no_split_is_better(rule, seed):
    allocate, least, cost = RULES[rule]
    std, total, lower, upper = random_case(seed, least)
    budget = allocate(std, total, minimum=lower, maximum=upper)

    def whole(split):
        return sum(cost(s * s, n) for s, n in zip(std, split, strict=True))

    best = min(whole(split) for split in splits(total, lower, upper))
    assert whole(budget.tolist()) == pytest.approx(best, rel=1e-12)
    assert budget.sum() == total
    assert ((lower <= budget) & (budget <= upper)).all()


def test_by_hand():
    # Gains of a 2nd rollout are 9/2, 4/2, 1/2; of a 3rd, 9/6, 4/6. So: p0, p1, p0.
    assert neyman([3.0, 2.0, 1.0], 6).tolist() == [3, 2, 1]
    # Gains of a 3rd rollout are 9/2, 4/2, 1/2; of a 4th, 9/6, 4/6. So: p0, p1, p0.
    assert leave_one_out([3.0, 2.0, 1.0], 9).tolist() == [4, 3, 2]
    assert uniform([3.0, 2.0, 1.0], 8).tolist() == [3, 3, 2]


P = np.array([0.02, 0.1, 0.5, 0.9])
BASELINED = np.sqrt(P * (1 - P))
LOG = np.sqrt((1 - P) / P)
GVM = 1 / np.sqrt(P + 1e-3 / P)
EXTREME = np.sqrt(np.array([0, 0.1, 0.5, 1]) * (1 - np.array([0, 0.1, 0.5, 1])))


@pytest.mark.parametrize(
    ("allocate", "std", "total", "box", "expected"),
    [
        (neyman, BASELINED, 32, {}, [4, 8, 12, 8]),
        (leave_one_out, BASELINED, 32, {}, [4, 8, 12, 8]),
        (neyman, LOG, 32, {}, [20, 8, 3, 1]),
        (leave_one_out, LOG, 32, {}, [18, 8, 4, 2]),
        (neyman, LOG, 32, {"minimum": 4, "maximum": 12}, [12, 12, 4, 4]),
        (leave_one_out, LOG, 32, {"minimum": 4, "maximum": 12}, [12, 11, 5, 4]),
        (neyman, GVM, 32, {}, [13, 10, 5, 4]),
        (neyman, EXTREME, 16, {}, [1, 5, 9, 1]),
        (leave_one_out, EXTREME, 16, {}, [2, 5, 7, 2]),
        (neyman, np.zeros(4), 10, {}, [3, 3, 2, 2]),
        (leave_one_out, np.zeros(4), 10, {}, [3, 3, 2, 2]),
        (neyman, np.array([10.0, 1, 1]), 4, {}, [2, 1, 1]),
    ],
)
def test_golden_values(allocate, std, total, box, expected):
    assert allocate(std, total, **box).tolist() == expected


def hamilton(std, total):
    """Largest remainder: round the real solution down, hand the rest to the largest fractions."""
    share = total * std / std.sum()
    budget = np.floor(share).astype(int)
    order = np.argsort(-(share - budget), kind="stable")
    budget[order[: total - budget.sum()]] += 1
    return budget


def test_rounding_the_real_solution_would_not_do():
    # Reals (3.33, .33, .33): rounding leaves two live prompts without a rollout.
    std = np.array([10.0, 1.0, 1.0])
    assert 0 in hamilton(std, 4)
    assert (std**2 / neyman(std, 4)).sum() == 52


def real_solution(std, total, lower, upper, offset):
    """n = clip(offset + std / nu, lower, upper), nu by bisection."""
    low, high = 1e-12, 1e12
    for _ in range(300):
        middle = math.sqrt(low * high)
        if np.clip(offset + std / middle, lower, upper).sum() > total:
            low = middle
        else:
            high = middle
    return np.clip(offset + std / high, lower, upper)


@pytest.mark.parametrize(("allocate", "offset"), [(neyman, 0), (leave_one_out, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_large_budgets_meet_the_real_solution(allocate, offset, seed):
    std = np.random.default_rng(seed).random(20) + 0.05
    box = {"minimum": 300, "maximum": 1500}
    budget = allocate(std, 20_000, **box)
    # A real optimum rounds to within one rollout of each prompt.
    real = real_solution(std, 20_000, 300, 1500, offset)
    assert np.abs(budget - real).max() <= 1
    free = (budget > 300) & (budget < 1500)
    assert 2 < free.sum() < 20
    slope = std[free] / (budget[free] - offset)
    assert slope.max() / slope.min() - 1 < 2 / 300


boxed = st.integers(1, 12).flatmap(
    lambda size: st.tuples(
        st.lists(
            st.sampled_from([0.0, 1e-200, 0.1, 0.5, 1.0, 1e200]), min_size=size, max_size=size
        ),
        st.lists(st.integers(2, 5), min_size=size, max_size=size),
        st.lists(st.integers(0, 9), min_size=size, max_size=size),
        st.floats(0, 1),
    )
)


@pytest.mark.slow
@given(boxed)
@settings(max_examples=200)
@pytest.mark.parametrize("allocate", ALLOCATORS)
def test_every_allocator_spends_exactly_the_total_within_the_boxes(allocate, case):
    std, lower, room, share = case
    upper = np.add(lower, room)
    total = sum(lower) + round(share * sum(room))
    budget = allocate(std, total, minimum=lower, maximum=upper)
    assert budget.dtype == np.int64
    assert budget.sum() == total
    assert (budget >= lower).all() and (budget <= upper).all()
    assert budget.tolist() == allocate(std, total, minimum=lower, maximum=upper).tolist()


@given(
    std=st.lists(st.floats(0.001, 1), min_size=1, max_size=8, unique=True),
    extra=st.integers(0, 60),
    order_seed=st.integers(0, 100),
)
@pytest.mark.parametrize("allocate", [neyman, leave_one_out])
def test_budgets_follow_their_prompts_when_they_are_reordered(allocate, std, extra, order_seed):
    std = np.array(std)
    order = np.random.default_rng(order_seed).permutation(len(std))
    total = 2 * len(std) + extra
    expected = allocate(std, total)[order]
    assert allocate(std[order], total).tolist() == expected.tolist()


@given(
    std=st.lists(st.floats(0.001, 1), min_size=1, max_size=8),
    extra=st.integers(0, 60),
    exponent=st.integers(-900, 900),
)
@pytest.mark.parametrize("allocate", [neyman, leave_one_out])
def test_the_unit_of_the_scale_does_not_matter(allocate, std, extra, exponent):
    # Powers of two keep every tie a tie; they reach where squares overflow or vanish.
    total = 2 * len(std) + extra
    scaled = np.ldexp(std, exponent)
    assert allocate(scaled, total).tolist() == allocate(std, total).tolist()


@pytest.mark.parametrize("factor", [0.3, 7.0, 1e-5])
def test_other_units_do_not_matter_either(factor):
    std = np.random.default_rng(0).random(30)
    assert neyman(factor * std, 500).tolist() == neyman(std, 500).tolist()


@given(
    std=st.lists(st.sampled_from([0.0, 0.2, 0.25, 0.5, 1.0]), min_size=1, max_size=8),
    extra=st.integers(0, 60),
    cap=st.integers(2, 40) | st.none(),
)
def test_leave_one_out_is_neyman_in_one_rollout_less(std, extra, cap):
    size = len(std)
    cap = None if cap is None else max(cap, 2 + -(-extra // size))
    budget = leave_one_out(std, 2 * size + extra, maximum=cap)
    shifted = neyman(std, size + extra, maximum=None if cap is None else cap - 1)
    assert budget.tolist() == (1 + shifted).tolist()


@given(
    std=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    extra=st.integers(0, 40),
    factor=st.floats(1, 5),
)
@pytest.mark.parametrize("allocate", [neyman, leave_one_out])
def test_a_larger_scale_never_gets_less(allocate, std, extra, factor):
    total = 2 * len(std) + extra
    before = allocate(std, total)[0]
    assert allocate([factor * std[0], *std[1:]], total)[0] >= before


def test_ties_go_to_fewer_rollouts_and_then_to_the_earlier_prompt():
    assert neyman([1.0, 1.0, 1.0], 5).tolist() == [2, 2, 1]
    # Gains: 6/(2*3) = 1 for p0 and 2/(1*2) = 1 for p1, which has fewer.
    assert neyman(np.sqrt([6.0, 2.0]), 4, minimum=[2, 1]).tolist() == [2, 2]
    # Nothing to gain anywhere: even, whatever the minima.
    assert neyman([0.0, 0.0, 0.0], 7, minimum=[1, 4, 1]).tolist() == [2, 4, 1]


def test_a_first_rollout_goes_before_all_and_to_the_larger_scale_first():
    assert neyman([1.0, 3.0, 2.0, 0.0], 2, minimum=0).tolist() == [0, 1, 1, 0]
    assert neyman([1e-6, 3.0, 0.0], 9, minimum=0).tolist() == [1, 8, 0]
    assert neyman([0.0, 0.0], 3, minimum=0).tolist() == [2, 1]


def test_dead_prompts_stay_at_their_minimum_until_the_others_are_full():
    assert neyman([0.0, 1.0, 0.0], 9, minimum=0).tolist() == [0, 9, 0]
    assert neyman([0.0, 1.0, 0.0], 9, minimum=0, maximum=4).tolist() == [3, 4, 2]


@pytest.mark.parametrize("allocate", ALLOCATORS)
def test_a_total_at_either_end_of_the_boxes_leaves_no_choice(allocate):
    lower, upper = [2, 5, 3], [4, 6, 3]
    box = {"minimum": lower, "maximum": upper}
    assert allocate([1.0, 2.0, 3.0], 10, **box).tolist() == lower
    assert allocate([1.0, 2.0, 3.0], 13, **box).tolist() == upper


@pytest.mark.parametrize("allocate", [neyman, leave_one_out])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1e-200])
def test_knowing_nothing_is_uniform(allocate, scale):
    assert allocate(np.full(7, scale), 40).tolist() == uniform(np.ones(7), 40).tolist()


def test_uniform_fills_boxes_like_water():
    assert uniform(np.ones(4), 20, minimum=[0, 9, 0, 0], maximum=[2, 9, 9, 9]).tolist() == [
        2,
        9,
        5,
        4,
    ]


def test_the_scales_are_not_changed():
    std = np.array([0.5, 0.1])
    neyman(std, 10)
    assert std.tolist() == [0.5, 0.1]


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_thousand_rollouts_meet_the_proportions(seed):
    std = np.random.default_rng(seed).random(1000) + 0.1
    budget = neyman(std, 100_000)
    assert budget.sum() == 100_000
    assert np.abs(budget - 100_000 * std / std.sum()).max() < 1.01


@pytest.mark.parametrize("allocate", ALLOCATORS)
def test_it_says_what_is_wrong_with_the_total(allocate):
    with pytest.raises(ValueError, match="total=5 cannot give 2 prompts 3 rollouts each; it must "):
        allocate([1.0, 1.0], 5, minimum=3)
    with pytest.raises(ValueError, match="total=5 cannot give 2 prompts their minima; .* least 6"):
        allocate([1.0, 1.0], 5, minimum=[2, 4])
    with pytest.raises(ValueError, match="total=9 exceeds what 2 prompts may get; .* at most 8"):
        allocate([1.0, 1.0], 9, minimum=2, maximum=4)
    with pytest.raises(ValueError, match="minimum=4 exceeds maximum=3 of prompt 1"):
        allocate([1.0, 1.0], 9, minimum=[2, 4], maximum=[9, 3])
    with pytest.raises(ValueError, match=r"minimum must be one integer or \(2,\) integers"):
        allocate([1.0, 1.0], 9, minimum=2.0)
    with pytest.raises(ValueError, match=r"maximum must be .* got shape \(3,\) of int64"):
        allocate([1.0, 1.0], 9, minimum=2, maximum=[9, 9, 9])
    with pytest.raises(ValueError, match=r"at least one prompt, got shape \(0,\)"):
        allocate([], 0, minimum=2)


@pytest.mark.parametrize("allocate", [neyman, leave_one_out])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_scales_that_are_no_scales_are_refused(allocate, bad):
    with pytest.raises(ValueError, match=f"finite and non-negative, got {bad} for prompt 1"):
        allocate([1.0, bad], 8)


def test_boxes_that_a_rule_cannot_use_are_refused():
    with pytest.raises(ValueError, match="minimum must be at least 0, got -1"):
        neyman([1.0], 1, minimum=-1)
    with pytest.raises(ValueError, match="minimum must be at least 2, got 1"):
        leave_one_out([1.0], 5, minimum=1)


# -- totals and boxes at the ends of their range

EVERY = [
    allocation.uniform,
    allocation.neyman,
    allocation.leave_one_out,
    allocation.dr_grpo,
    allocation.knapsack,
    lambda std_P, total, **box: allocation.knapsack_posterior(1 + std_P, 2 - std_P, total, **box),
]


@pytest.mark.parametrize("allocate", EVERY)
@pytest.mark.parametrize(
    ("total", "message"),
    [
        (10.5, "total must be an integer, got 10.5"),
        (float("nan"), "total must be an integer, got nan"),
        (12.0, "total must be an integer, got 12.0"),
        ("12", "total must be an integer, got '12'"),
        (None, "total must be an integer, got None"),
        (2**53 + 1, "total must be at most 2.*, got 9007199254740993"),
        (2**60, "total must be at most 2"),
    ],
)
def test_totals_that_cannot_be_spent_exactly_are_refused(allocate, total, message):
    with pytest.raises(ValueError, match=message):
        allocate(np.array([0.2, 0.5]), total, minimum=3, maximum=10)
    with pytest.raises(ValueError, match=message):
        allocate(np.array([0.2, 0.5]), total, minimum=3, maximum=None)


@pytest.mark.parametrize("allocate", EVERY)
@pytest.mark.parametrize("total", [2**53, 2**53 - 1, 2**40, 2**40 - 7])
def test_the_largest_totals_are_spent_exactly(allocate, total):
    if allocate is EVERY[-1] and total > 2**40:
        with pytest.raises(ValueError, match=f"total must be at most 2.*40 here, got {total}"):
            allocate(np.array([0.2, 0.5, 0.3]), total, minimum=3, maximum=None)
        return
    budget_P = allocate(np.array([0.2, 0.5, 0.3]), total, minimum=3, maximum=None)
    assert sum(budget_P.tolist()) == total


@pytest.mark.parametrize("allocate", EVERY)
@pytest.mark.parametrize("maximum", [2**62, 2**63 - 1, [2**62, 2**62, 2**63 - 1]])
def test_a_maximum_beyond_the_total_binds_nothing(allocate, maximum):
    std_P = np.array([0.2, 0.5, 0.3])
    found_P = allocate(std_P, np.int64(50), minimum=3, maximum=maximum)
    assert found_P.tolist() == allocate(std_P, 50, minimum=3, maximum=None).tolist()


def test_boxes_beyond_64_bits_are_refused():
    with pytest.raises(ValueError, match="maximum must fit into 64 bits with a sign, got 9223372"):
        allocation.uniform([1.0], 4, maximum=2**63)
    with pytest.raises(ValueError, match=f"it must be at least {3 * 2**62}"):
        allocation.uniform([1.0] * 3, 4, minimum=2**62)
