"""Dealing work to ranks: balanced, complete, the same everywhere."""

import itertools

import numpy as np
import pytest

from rl.distributed import chunks_of_budgets, deal


def test_deal_by_hand():
    # 5 to rank 0, 4 to rank 1, 3 to rank 1 (load 4 < 5), 3 to rank 0 (5 < 7).
    assert deal([3, 5, 4, 3], 2).tolist() == [1, 0, 1, 0]


def test_ties_go_to_the_earlier_request_and_the_lower_rank():
    assert deal([1, 1, 1, 1], 3).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_largest_load_is_within_grahams_bound(seed, num_ranks):
    cost_R = np.random.default_rng(seed).integers(1, 20, size=7)
    splits = itertools.product(range(num_ranks), repeat=len(cost_R))
    best = min(np.bincount(s, weights=cost_R, minlength=num_ranks).max() for s in splits)
    load = np.bincount(deal(cost_R, num_ranks), weights=cost_R, minlength=num_ranks).max()
    assert load <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


def test_no_request_is_dealt_to_nobody():
    assert deal([], 2).tolist() == []
    assert deal([1.0], 4).tolist() == [0]


@pytest.mark.parametrize("cost", [[-1.0], [float("nan")], [float("inf")]])
def test_impossible_costs_are_refused(cost):
    with pytest.raises(ValueError, match="finite and non-negative"):
        deal(cost, 2)


def test_no_rank_is_refused():
    with pytest.raises(ValueError, match="num_ranks must be at least 1, got 0"):
        deal([1.0], 0)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("budgets", [[3, 0, 5], [100, 1, 1], [0, 0], [1]])
def test_requests_cover_every_row_once_and_never_mix_prompts(budgets, num_ranks):
    budget_P = np.array(budgets)
    requests = chunks_of_budgets(budget_P, num_ranks)
    rows = np.concatenate(requests) if requests else np.zeros(0)
    assert rows.tolist() == list(range(budget_P.sum()))
    prompt_N = np.repeat(np.arange(len(budget_P)), budget_P)
    assert all(len(set(prompt_N[r])) == 1 for r in requests)


def test_one_prompt_with_most_rollouts_is_shared_between_ranks():
    requests = chunks_of_budgets(np.array([97, 1, 1, 1]), 4)
    rank_R = deal([len(r) for r in requests], 4)
    load = np.bincount(rank_R, weights=[len(r) for r in requests])
    assert load.max() <= 28  # 100 rows over 4 ranks, uncut it would be 97
