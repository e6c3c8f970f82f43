"""Dealing work to ranks: balanced, complete, the same everywhere."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import StateDictType

from rl.ranks import Ranks, chunks_of_budgets, deal, refuse_unusable


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


def test_requests_of_long_prompts_are_cut_finer():
    # 8 rollouts of 30 tokens and 8 of 10 for 2 ranks: a quarter of a share is 320 / 8 = 40 tokens, so
    # requests of ceil(40 / 30) = 2 rollouts and of ceil(40 / 10) = 4.
    requests = chunks_of_budgets(np.array([8, 8]), 2, np.array([30.0, 10.0]))
    assert [len(r) for r in requests] == [2, 2, 2, 2, 4, 4]


class TwoRanks:
    """What `Ranks` reads of an accelerator."""

    distributed_type = "MULTI_CPU"
    num_processes = 2

    def __init__(self, rank):
        self.process_index = rank


def test_the_longest_expected_are_dealt_first_and_evenly():
    budget_P, length_P = np.array([4, 4, 4, 4]), np.array([40.0, 1.0, 30.0, 9.0])
    shares = [Ranks(TwoRanks(rank)).share_of(budget_P, length_P) for rank in range(2)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(16))
    length_N = np.repeat(length_P, budget_P)
    loads = [length_N[rows].sum() for rows in shares]
    # Requests of 4 x 40, 2 x 60, 36 and 4 tokens: 60 + 40 + 40 + 36 and 60 + 40 + 40 + 4.
    assert sorted(loads) == [144, 176]
    equal = [Ranks(TwoRanks(rank)).share_of(budget_P) for rank in range(2)]
    assert [len(rows) for rows in equal] == [8, 8]


def test_a_prompt_expected_to_say_nothing_still_counts_as_one_token():
    assert len(Ranks(TwoRanks(0)).share_of(np.array([2, 2]), np.zeros(2))) == 2


def test_alone_an_error_is_raised_at_once_and_as_it_is():
    alone = TwoRanks(0)
    alone.num_processes = 1
    ranks = Ranks(alone)
    assert ranks.gather("x") == ["x"]
    with pytest.raises(ZeroDivisionError):
        ranks.gather(None, error=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError), ranks.until_gather():
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError):
        ranks.from_main(lambda: 1 / 0)
    assert ranks.gather("x") == ["x"]


def test_an_error_waits_for_the_gather_where_others_must_not_wait(monkeypatch):
    """Both sides of one exchange, made one after the other: what each rank hands in, the other reads."""
    handed = {}

    def exchange(rows):
        handed[len(handed)] = rows[0]
        return [("FloatingPointError: NaN", None), (None, 5)] if len(handed) == 1 else rows * 2

    monkeypatch.setattr("rl.ranks.gather_object", exchange)
    failed, other = Ranks(TwoRanks(0)), Ranks(TwoRanks(1))
    with failed.until_gather():
        raise FloatingPointError("NaN")
    with failed.until_gather():
        raise ValueError("the first counts")
    with pytest.raises(RuntimeError, match="rank 0 failed, all stop: FloatingPointError: NaN"):
        other.gather(5)
    with pytest.raises(FloatingPointError, match="NaN"):
        failed.gather(5)
    assert handed[1][0] == "FloatingPointError: NaN"
    assert failed.gather(5) == [5, 5]  # said once


def zero3(**zero):
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": zero})
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )


def fsdp(version, state_dict):
    plugin = SimpleNamespace(fsdp_version=version, state_dict_type=state_dict)
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin)
    )


def test_what_could_not_be_saved_or_resumed_is_refused():
    with pytest.raises(ValueError, match="zero3_save_16bit_model: true"):
        refuse_unusable(zero3())
    refuse_unusable(zero3(stage3_gather_16bit_weights_on_model_save=True))
    with pytest.raises(ValueError, match="FSDP 1 cannot generate rollouts; write fsdp_version: 2"):
        refuse_unusable(fsdp(1, StateDictType.FULL_STATE_DICT))
    with pytest.raises(ValueError, match="write fsdp_state_dict_type: FULL_STATE_DICT"):
        refuse_unusable(fsdp(2, StateDictType.SHARDED_STATE_DICT))
    refuse_unusable(fsdp(2, StateDictType.FULL_STATE_DICT))


# Rows that must not be parted


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("together", [1, 3, 4])
def test_leaves_of_a_branch_are_in_one_request_and_on_one_rank(num_ranks, together):
    budget_P = np.array([24, 12, 0, 48, 12])
    requests = chunks_of_budgets(budget_P, num_ranks, together=together)
    assert np.concatenate(requests).tolist() == list(range(96))
    assert all(rows[0] % together == 0 and len(rows) % together == 0 for rows in requests)
    dealt = []
    for rank in range(num_ranks):
        accelerator = TwoRanks(rank)
        accelerator.num_processes = num_ranks
        rows = Ranks(accelerator).share_of(budget_P, together=together)
        assert set(np.bincount(rows // together)) <= {0, together}  # whole branches
        dealt += rows.tolist()
    assert sorted(dealt) == list(range(96))


def test_requests_of_branches_by_hand():
    # A quarter of a share of 2 ranks is 20 / 8 = 2.5 rollouts, so requests of 3, rounded up to one
    # branch of 4; without branches 3, 3, 3, 3 and 3, 3, 2.
    requests = chunks_of_budgets(np.array([12, 8]), 2, together=4)
    assert [len(rows) for rows in requests] == [4, 4, 4, 4, 4]
    assert [len(rows) for rows in chunks_of_budgets(np.array([12, 8]), 2)] == [3, 3, 3, 3, 3, 3, 2]


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_gradients_reduced_by_hand_need_whole_models(kind):
    sharded = zero3(stage3_gather_16bit_weights_on_model_save=True)
    if kind == DistributedType.FSDP:
        sharded = fsdp(2, StateDictType.FULL_STATE_DICT)
    sharded.num_processes, sharded.process_index = 2, 0
    with pytest.raises(
        ValueError, match=f"trains on several processes with DDP, not with {kind.value}"
    ):
        Ranks(sharded, by_hand=True)
    assert Ranks(sharded).num == 2
    assert Ranks(TwoRanks(1), by_hand=True).rank == 1


class Alone(TwoRanks):
    """A process of one that counts its backward passes."""

    num_processes = 1

    def __init__(self):
        super().__init__(0)
        self.passes = 0
        self.gradient_state = SimpleNamespace(_set_sync_gradients=lambda is_last: None)

    def backward(self, loss):
        self.passes += 1
        loss.backward()


def test_gradients_of_processes_are_averaged_by_hand(monkeypatch):
    """Two processes in turn, of which the second has no rows: d/dw of 3 w is the sum of both's."""
    own = []

    def exchange(value):
        own.append(value.clone())
        value += 2.0 * (len(own) == 2)  # what the other process has: 2 of the second weight

    monkeypatch.setattr(torch.distributed, "all_reduce", exchange)
    accelerator = Alone()
    accelerator.num_processes = 2
    ranks = Ranks(accelerator, by_hand=True)
    model = torch.nn.ParameterList([torch.ones(()), torch.ones(()), torch.ones(())])
    model[2].requires_grad_(False)
    ranks.backward(model, 3 * model[0], is_last=False)
    assert not own
    ranks.backward(model, torch.zeros(()), is_last=True)  # rows of weight 0 have no graph
    assert accelerator.passes == 1
    assert [float(value) for value in own] == [6.0, 0.0]  # the sum of two is what is divided by two
    assert float(model[0].grad) == 3.0 and float(model[1].grad) == 1.0 and model[2].grad is None
    alone = Ranks(Alone(), by_hand=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        alone.backward(model, torch.zeros(()), is_last=True)


def test_all_leave_a_block_together_or_all_raise(monkeypatch):
    handed = []

    def exchange(rows):
        handed.append(rows[0])
        return [*rows, ("KeyError: 'other'", None)] if len(handed) > 1 else [*rows, (None, None)]

    monkeypatch.setattr("rl.ranks.gather_object", exchange)
    ranks = Ranks(TwoRanks(0))
    with ranks.together():
        pass
    message = "rank 1 failed, all stop: KeyError: 'other'"
    with pytest.raises(RuntimeError, match=message), ranks.together():
        pass
    with pytest.raises(ZeroDivisionError), ranks.together():
        1 / 0  # noqa: B018
    assert handed[2][0] == "ZeroDivisionError: division by zero"
