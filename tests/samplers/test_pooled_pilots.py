"""What the planner's docstring says of pooled pilots, by exact enumeration through the planner."""

import itertools
import math

import numpy as np
import pytest

from samplers import allocation
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import UniformSelector

RATE_P = np.array([0.1, 0.6])


def chance(successes, trials, p):
    return math.comb(trials, successes) * p**successes * (1 - p) ** (trials - successes)


def budgets(pilot_successes, **settings):
    """(P,) rollouts of the step, in the order of `RATE_P`, after pilots of so many successes."""
    planner = Planner(
        BetaPosterior(2),
        UniformSelector(2, seed=0),
        allocation.leave_one_out,
        keys=["rare", "frequent"],
        prompts_per_step=2,
        rollouts_per_step=10,
        scale=allocation.plug_in_std,
        minimum=2,
        pilot=2,
        **settings,
    )
    pilots = planner.propose()
    reward_PN = [[float(slot < pilot_successes[row]) for slot in (0, 1)] for row in pilots.index_P]
    planner.observe(pilots, np.concatenate(reward_PN), pilots.prompt_N)
    rest = planner.propose()
    drawn_P = np.empty(2, dtype=np.int64)
    drawn_P[rest.index_P] = pilots.budget_P + rest.budget_P
    return drawn_P


def gradient_weights(counted, **settings):
    """(P,) E[leave-one-out gradient of the rows counted, weighted 1 / n] / (p (1 - p)).

    A success has the score 1 - p and a failure -p, so the gradient of R successes of n is
    R (n - R) / (n (n - 1)).
    """
    weight_P = np.zeros(2)
    for pilot_P in itertools.product(range(3), repeat=2):
        pilot_chance = math.prod(chance(s, 2, p) for s, p in zip(pilot_P, RATE_P, strict=True))
        drawn_P = budgets(pilot_P, **settings)
        assert drawn_P.sum() == 10
        for at, p in enumerate(RATE_P):
            rest = int(drawn_P[at]) - 2
            first, n = (pilot_P[at], rest + 2) if counted == "all" else (0, rest)
            for successes in range(rest + 1):
                r = first + successes
                gradient = r * (n - r) / (n * (n - 1)) / (p * (1 - p))
                weight_P[at] += pilot_chance * chance(successes, rest, p) * gradient
    return weight_P


def test_pooled_pilots_that_decide_their_own_budgets_change_the_objective():
    weight_P = gradient_weights("all", estimate="pilot")
    assert weight_P.tolist() == pytest.approx([0.682, 0.888], abs=5e-4)


def test_discarded_pilots_keep_it():
    # The control: rollouts whose number others decided. Ten in all, of which 4 are discarded.
    weight_P = gradient_weights("rest", estimate="pilot", pilots="discard")
    assert weight_P.tolist() == pytest.approx([1, 1], abs=1e-12)
