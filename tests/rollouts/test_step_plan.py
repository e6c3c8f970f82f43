"""`StepPlan`: costs by hand and by walking the tree, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.step_plan import StepPlan


def plan(steps=10, **changes):
    return StepPlan(
        **{"num_steps": steps, "rule": "ddim", "level": 1.0, "stochastic": tuple(range(steps))}
        | changes
    )


def walk(plan, step=0):
    """(evaluations, leaves) below one state, one child at a time."""
    if step == plan.num_steps:
        return 0, 1
    below = [walk(plan, step + 1) for _ in range(plan.children_of(step))]
    return 1 + sum(cost for cost, _ in below), sum(leaves for _, leaves in below)


def test_the_worked_example_costs_38_and_a_linear_plan_of_its_leaves_80():
    # Two prefixes, T = 10, t0 = 6, k = 4: 2 * ((6 + 1) + 4 * (10 - 6 - 1)) = 2 * 19.
    assert plan(splits=((6, 4),)).evaluations(2) == 38
    assert plan().evaluations(8) == 80


def test_a_binary_tree_at_0_3_6_9_of_20_costs_203_for_16_leaves():
    # 1 edge, then 3 * (2 + 4 + 8), then 10 edges of 16 states: 1 + 42 + 160.
    tree = plan(20, splits=((0, 2), (3, 2), (6, 2), (9, 2)))
    assert (tree.evaluations(1), tree.leaves_per_root) == (203, 16)
    assert [tree.states_at(step) for step in (0, 1, 3, 4, 9, 10, 20)] == [1, 2, 2, 4, 8, 16, 16]


@pytest.mark.parametrize(
    ("split", "cost"),
    [((0, 4), 1 + 4 * 9), ((9, 4), 10), ((3, 1), 10)],
    ids=["t0 = 0: 1 + k (T - 1)", "t0 = T - 1: T", "k = 1: T"],
)
def test_edge_cases_of_the_cost(split, cost):
    assert plan(splits=(split,)).evaluations(1) == cost


def test_b2s_first_and_last_stage_cost_72_and_96():
    assert plan(20, splits=((6, 5),)).evaluations(1) == 72
    assert plan(20, splits=((0, 5),)).evaluations(1) == 96


@given(
    children=st.dictionaries(st.integers(0, 7), st.integers(1, 3), max_size=4),
    num_roots=st.integers(0, 4),
)
def test_cost_and_leaves_are_those_of_the_tree_when_walked(children, num_roots):
    tree = plan(8, splits=sorted(children.items()))
    cost, leaves = walk(tree)
    assert tree.evaluations(num_roots) == num_roots * cost
    assert tree.leaves_per_root == tree.states_at(8) == leaves


def test_the_first_split_is_the_first_with_more_than_one_child():
    assert plan().first_split is None
    assert plan(splits=((2, 1),)).first_split is None
    assert plan(splits=((2, 1), (4, 3), (6, 2))).first_split == 4
    assert [plan(splits=((2, 3),)).children_of(step) for step in (1, 2, 3)] == [1, 3, 1]


def test_plans_are_equal_and_hash_by_value_whatever_sequences_they_came_from():
    first = plan(stochastic=[1, 2, 5], splits=[[2, 3]], trained=np.array([2, 5]), level=1)
    second = plan(stochastic=(1, 2, 5), splits=((2, 3),), trained=(2, 5))
    assert first == second
    assert hash(first) == hash(second)
    assert type(first.trained[0]) is int


def test_level_0_is_a_deterministic_chain():
    assert plan(level=0).evaluations(3) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 2.0}, "num_steps must be integers, got 2.0"),
        ({"rule": ""}, "rule must be the name of a transition, got ''"),
        ({"level": -0.1}, "level must be finite and at least 0, got -0.1"),
        ({"level": float("nan")}, "level must be finite and at least 0, got nan"),
        ({"level": "1e-1"}, "level must be a number, got '1e-1'"),
        ({"stochastic": (3, 10)}, r"stochastic must lie in 0..9, got \(3, 10\)"),
        ({"stochastic": (3, 3)}, r"stochastic must be increasing edges, got \(3, 3\)"),
        ({"stochastic": (1,), "trained": (1, 2)}, r"trained need .* \[2\] are not in stoch"),
        ({"stochastic": (1,), "splits": ((4, 2),)}, r"splits need .* \[4\] are not in stoch"),
        ({"splits": ((4, 2), (3, 2))}, r"edges of splits must be increasing edges, got \(4, 3\)"),
        ({"splits": ((4, 0),)}, r"at least 1 child, got \[\(4, 0\)\]"),
        ({"splits": ((4, 2, 1),)}, r"pairs \(edge, children\), got \[\(4, 2, 1\)\]"),
        ({"splits": ((4, True),)}, "children of splits must be integers, got True"),
        ({"splits": ((4, 2),), "level": 0}, r"splits need noise, got level=0 .* at \(4,\)"),
        ({"trained": (4,), "level": 0}, r"trained need noise, got level=0 .* at \(4,\)"),
        ({"shared_start": 1}, "shared_start must be True or False, got 1"),
        ({"shared_start": True, "level": 0}, "shared_start .* would be one image.* level=0"),
        ({"shared_start": True, "stochastic": ()}, r"shared_start .* got stochastic=\(\)"),
    ],
)
def test_a_plan_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_questions_about_steps_outside_the_chain_are_refused():
    with pytest.raises(ValueError, match=r"step must be in 0..9, got 10"):
        plan().children_of(10)
    with pytest.raises(ValueError, match=r"step must be in 0..10, got -1"):
        plan().states_at(-1)
    with pytest.raises(ValueError, match="num_roots must be at least 0, got -1"):
        plan().evaluations(-1)
