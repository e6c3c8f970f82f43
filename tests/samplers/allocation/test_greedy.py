"""The exact greedy against the loop it stands for, unit for unit and tie for tie."""

import heapq
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samplers import allocation
from samplers.allocation import _greedy as greedy
from samplers.allocation._greedy import best_first, fill
from samplers.allocation.knapsack import (
    _knapsack_gain,
    _knapsack_posterior_gain,
    _posterior_columns,
)


@pytest.fixture(autouse=True, params=[0, 4096], ids=["searched", "sorted"])
def sorted_at_once(request):
    """Small cases are otherwise only sorted; every test runs through the search for a level too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "SORTED_AT_ONCE", request.param)
        yield


def in_turn(gain, lower, upper, room, weight=None):
    """One unit after another to the largest gain; `gain(n, p)` is a plain function of numbers."""
    count = list(lower)
    weight = [1] * len(count) if weight is None else weight
    heap = [(-gain(n, p), n, p) for p, n in enumerate(count) if n < upper[p]]
    heapq.heapify(heap)
    while heap and weight[heap[0][-1]] <= room:
        *_, p = heapq.heappop(heap)
        count[p] += 1
        room -= weight[p]
        if count[p] < upper[p]:
            heapq.heappush(heap, (-gain(count[p], p), count[p], p))
    return count


def share(cost):
    """c / n, or c / (n - 1) in n - 1, as a function of two numbers; the first unit is infinite."""

    def gain(n, p):
        if n == 0 and cost[p] > 0:
            return math.inf
        return cost[p] / max(n * (n + 1), 1)

    return gain


def neyman_in_turn(std, total, lower, upper):
    exponent = math.frexp(max(std))[1]
    cost = [math.ldexp(s, -exponent) ** 2 for s in std]
    order = sorted(range(len(std)), key=lambda p: -cost[p])  # the first units: larger cost in front
    place = np.argsort(order, kind="stable")
    if all(low > 0 or c == 0 for low, c in zip(lower, cost, strict=True)):
        return in_turn(share(cost), lower, upper, total - sum(lower))
    lower = list(lower)
    for p in sorted(range(len(std)), key=lambda p: place[p]):
        if lower[p] == 0 and cost[p] > 0 and upper[p] > 0 and sum(lower) < total:
            lower[p] = 1
    return in_turn(share(cost), lower, upper, total - sum(lower))


def random_case(generator, least):
    """Scales of every awkward kind, boxes or none, few or many rollouts."""
    size = int(generator.integers(1, 40))
    std = [
        generator.random(size),
        generator.choice([0.0, 0.5, 1.0, 2.0], size),
        10.0 ** generator.uniform(-12, 12, size),
        np.zeros(size),
        np.full(size, 0.3),
        # So small that gains vanish or lose their digits, next to ordinary ones.
        10.0 ** generator.uniform(-170, -150, size) + (generator.random(size) < 0.1),
        generator.random(size) * generator.integers(0, 2, size),
    ][generator.integers(7)]
    lower = np.full(size, least) + generator.integers(0, generator.choice([1, 5]), size)
    room = int(10 ** generator.uniform(0, 2.7))
    if generator.random() < 0.5:
        upper = lower + generator.integers(0, room + 1, size)
        total = int(generator.integers(lower.sum(), upper.sum() + 1))
        total = min(total, int(lower.sum()) + 1000)
        return std, total, lower, upper
    total = int(lower.sum()) + room
    return std, total, lower, np.full(size, total)


@pytest.mark.parametrize("seed", range(20))
def test_neyman_and_leave_one_out_are_the_loop_in_many_random_cases(seed):
    generator = np.random.default_rng(seed)
    for _ in range(60):
        std, total, lower, upper = random_case(generator, int(generator.integers(0, 3)))
        expected = neyman_in_turn(std.tolist(), total, lower.tolist(), upper.tolist())
        assert allocation.neyman(std, total, minimum=lower, maximum=upper).tolist() == expected
        # Leave-one-out in n is the same loop in n - 1.
        budget = allocation.leave_one_out(
            std, total + 2 * len(std), minimum=lower + 2, maximum=upper + 2
        )
        expected = neyman_in_turn(
            std.tolist(), total + len(std), (lower + 1).tolist(), (upper + 1).tolist()
        )
        assert budget.tolist() == [n + 1 for n in expected]


def slow(family, seed):
    """A random case of a family, its answer by the loop, and its answer."""
    generator = np.random.default_rng(seed)
    least = {"dr_grpo": 3, "cost_aware": 1}.get(family, 2)
    std, total, lower, upper = random_case(generator, least)
    box = {"minimum": lower, "maximum": upper}
    room = total - int(lower.sum())
    if family == "cost_aware":
        weight = generator.integers(1, 50, len(std)).astype(float)
        spend = float(generator.random() * ((upper - lower) @ weight)) // 1
        spend = min(spend, 20_000.0)
        root = std / np.sqrt(weight)
        cost = np.ldexp(root, -math.frexp(root.max())[1]) ** 2
        expected = in_turn(share(cost), lower, upper, spend, weight)
        result = allocation.cost_aware(std, weight, spend + float(lower @ weight), **box)
        return expected, result
    if family == "dr_grpo":
        cost = np.ldexp(std, -math.frexp(std.max())[1]) ** 2

        def gain(n, p):
            n = float(n)
            return cost[p] * ((n * (n - 1) - 1) / (n * (n + 1)) ** 2)

        return in_turn(gain, lower, upper, room), allocation.dr_grpo(std, total, **box)
    if family == "knapsack":
        columns = (np.minimum(std, 1.0),)
        function, result = _knapsack_gain, allocation.knapsack(*columns, total, **box)
    else:
        a, b = generator.choice([1.0, 1.2, 4.5, 9.0], (2, len(std)))
        columns = (a, b, *_posterior_columns(a, b))
        function = _knapsack_posterior_gain
        result = allocation.knapsack_posterior(a, b, total, **box)
    n = np.arange(int(lower.min()), int(upper.max()) + 1, dtype=float)
    table = [function(n, *(np.full(len(n), c[p]) for c in columns)) for p in range(len(std))]
    return in_turn(lambda n, p: table[p][n - lower.min()], lower, upper, room), result


@pytest.mark.parametrize("family", ["dr_grpo", "knapsack", "knapsack_posterior", "cost_aware"])
def test_the_other_rules_are_the_loop_in_many_random_cases(family):
    for seed in range(40 if family.startswith("knapsack") else 100):
        expected, result = slow(family, seed)
        assert result.tolist() == list(expected), seed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    low=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    more=st.lists(st.integers(0, 9), min_size=9, max_size=9),
    share_of_room=st.floats(0, 1),
)
def test_filling_gives_each_unit_to_the_fewest_and_then_to_the_earliest(low, more, share_of_room):
    high = [n + extra for n, extra in zip(low, more[: len(low)], strict=True)]
    room = round(share_of_room * (sum(high) - sum(low)))
    expected = in_turn(lambda n, p: 0.0, low, high, room)
    assert fill(np.array(low), np.array(high), room).tolist() == expected


steps = st.lists(st.sampled_from([0.0, 5e-324, 0.25, 0.5, 1.0, 3.0]), min_size=12, max_size=12)


@pytest.mark.slow
@given(st.lists(steps, min_size=1, max_size=8), st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_gains_that_never_increase_will_do(rows, data):
    """Steps, plateaus, zeros and the smallest number there is; weights; guesses good and bad."""
    table = -np.sort(-np.array(rows), axis=1)
    size = len(table)
    lower = np.array(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    upper = lower + data.draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    weight = data.draw(
        st.none() | st.lists(st.sampled_from([1.0, 2.0, 7.0]), min_size=size, max_size=size)
    )
    units = np.ones(size) if weight is None else np.array(weight)
    room = data.draw(st.integers(0, int((upper - lower) @ units) + 3))
    guess = data.draw(st.sampled_from([None, 0.0, 4.0, 50.0]))
    place = np.arange(size, dtype=float)

    def gain(n_K, row_K):
        return table[row_K.astype(int), np.clip(n_K, 0, 11).astype(int)]

    result = best_first(
        gain,
        (place,),
        lower,
        upper,
        room,
        guess=None if guess is None else lambda level, row_K: np.full(len(row_K), guess),
        levels=data.draw(st.lists(st.sampled_from([0.3, 0.5, 2.0, 1e-9]), max_size=3)),
        weight_P=None if weight is None else units,
    )
    expected = in_turn(lambda n, p: float(table[p, n]), lower, upper, room, units)
    assert result.tolist() == list(expected)


@pytest.mark.parametrize("plateau", [0.0, 0.5])
@pytest.mark.parametrize("room", [0, 1, 39_999, 60_000, 123_457])
def test_many_units_of_one_gain_are_shared_like_water(plateau, room):
    lower = np.array([0, 7, 3])
    upper = np.array([40_000, 90_000, 50_000])
    result = best_first(lambda n_K: np.full(len(n_K), plateau), (), lower, upper, room)
    assert result.tolist() == fill(lower, upper, room).tolist()
    assert result.sum() == 10 + room


def test_a_lopsided_pool_costs_no_more_than_an_even_one():
    # One prompt takes nearly everything: the search must not walk there step by step.
    std = np.append(np.full(999, 1e-9), 1.0)
    budget = allocation.neyman(std, 10_000_000)
    assert budget.tolist() == [1] * 999 + [10_000_000 - 999]
