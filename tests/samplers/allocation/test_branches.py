"""Budgets in whole branches, and what a sibling is worth."""

import itertools

import numpy as np
import pytest

from samplers import allocation
from samplers.allocation.branches import in_branches, sibling_evidence
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import UniformSelector


def test_by_hand():
    allocate = in_branches(allocation.neyman, 4)
    assert allocate([1.0, 3.0], 32, minimum=1, maximum=None).tolist() == [8, 24]
    assert allocate([1.0, 3.0], 32, minimum=9, maximum=None).tolist() == [12, 20]
    assert allocate([1.0, 3.0], 32, minimum=1, maximum=19).tolist() == [16, 16]
    assert in_branches(allocation.neyman, 1) is allocation.neyman


def test_no_split_into_whole_branches_is_better():
    rng = np.random.default_rng(0)
    for _ in range(40):
        std_P, leaves = rng.uniform(0.1, 1, 3), int(rng.integers(2, 5))
        total = leaves * int(rng.integers(3, 9))
        budget = in_branches(allocation.neyman, leaves)(std_P, total, minimum=1, maximum=None)
        assert budget.sum() == total and (budget % leaves == 0).all()
        options = [
            n
            for n in itertools.product(range(leaves, total + 1, leaves), repeat=3)
            if sum(n) == total
        ]
        best = min(sum(std_P**2 / np.array(n)) for n in options)
        assert sum(std_P**2 / budget) == pytest.approx(best, rel=1e-12)


def test_boxes_per_prompt():
    allocate = in_branches(allocation.neyman, 2)
    budget = allocate([1.0, 1.0, 1.0], 20, minimum=[1, 1, 7], maximum=[3, 20, 20])
    assert budget.tolist() == [2, 10, 8]


def test_what_does_not_divide_is_refused():
    allocate = in_branches(allocation.neyman, 4)
    with pytest.raises(ValueError, match="a multiple of 4 rollouts, .* got 30"):
        allocate([1.0, 1.0], 30, minimum=1, maximum=None)
    with pytest.raises(ValueError, match=r"lies in the box \[5, 7\]"):
        allocate([1.0, 1.0], 16, minimum=5, maximum=7)
    with pytest.raises(ValueError, match="leaves must be at least 1, got 0"):
        in_branches(allocation.neyman, 0)


def test_evidence_is_the_variance_of_one_independent_rollout_over_that_of_the_mean():
    """Monte Carlo of nested Gaussians: branch effect of variance 1 - w, leaf effect of w."""
    rng, leaves, branches, w = np.random.default_rng(1), 5, 3, 0.4
    draws = 200_000
    reward = np.sqrt(1 - w) * rng.normal(size=(draws, branches, 1))
    reward = reward + np.sqrt(w) * rng.normal(size=(draws, branches, leaves))
    variance = reward.mean((1, 2)).var()
    worth = sibling_evidence(leaves, w) * leaves * branches
    # The variance of a sample variance: a relative standard error of sqrt(2 / draws) = .0032.
    assert variance * worth == pytest.approx(1, abs=5 * 0.0032)


def test_evidence_at_its_ends():
    assert sibling_evidence(4, 1.0) == 1 and sibling_evidence(4, 0.0) == 0.25
    assert sibling_evidence(1, 0.3) == 1
    for leaves, share in ((0, 0.5), (2, 1.1), (2, float("nan"))):
        with pytest.raises(ValueError, match="got"):
            sibling_evidence(leaves, share)


def planned(**settings):
    return Planner(
        BetaPosterior(4, decay_chosen=1, decay_rest=1),
        UniformSelector(4, seed=0),
        in_branches(allocation.neyman, 4),
        keys=list("abcd"),
        prompts_per_step=2,
        rollouts_per_step=16,
        **settings,
    )


def test_the_planner_counts_siblings_by_their_evidence():
    planner = planned(evidence=sibling_evidence(4, 0.5))
    proposal = planner.propose()
    assert (proposal.budget_P % 4 == 0).all() and proposal.budget_P.sum() == 16
    reward_N = (np.arange(16) % 4 == 0).astype(float)
    planner.observe(proposal, reward_N, proposal.prompt_N)
    a, b = planner.posterior.parameters(proposal.index_P)
    assert a - 1 == pytest.approx(proposal.budget_P / 4 * 0.4)
    assert a + b - 2 == pytest.approx(proposal.budget_P * 0.4)


@pytest.mark.parametrize("evidence", [0, -1, 1.5, float("nan")])
def test_evidence_that_cannot_be_is_refused(evidence):
    with pytest.raises(ValueError, match="evidence must be above 0 and at most 1"):
        planned(evidence=evidence)
