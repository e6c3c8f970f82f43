"""Rewards standardised over a prompt's past: by hand, against a loop, and B2's selection by them."""

import json
import math
import statistics

import pytest
import torch

from rl.objective.prompt_history import (
    PromptHistory,
    buffer_standardised,
    history_standardised,
)
from samplers.downsampling import best_and_worst


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def steps(seed, num_steps=12, num_rows=5):
    """A run's rewards and data-set rows; some rows are absent from some steps."""
    generator = torch.Generator().manual_seed(seed)
    run = []
    for _ in range(num_steps):
        size = int(torch.randint(3, 12, (1,), generator=generator))
        row_N = 7 * torch.randint(num_rows, (size,), generator=generator)
        run.append((torch.randn(size, dtype=torch.float64, generator=generator), row_N))
    return run


def test_history_by_hand():
    history = PromptHistory(steps=2)
    history.observe(double(0.0, 1.0), torch.tensor([3, 4]))
    # Row 3 knows 0, 2, 4: mean 2, unbiased std 2. Row 4 knows 1, 3: mean 2, std sqrt(2).
    z_N = history_standardised(double(2.0, 3.0, 4.0), torch.tensor([3, 4, 3]), history, eps=0.0)
    torch.testing.assert_close(z_N, double(0.0, 1 / math.sqrt(2), 1.0))


def test_asking_does_not_remember():
    history = PromptHistory(steps=2)
    for _ in range(2):
        history_standardised(double(2.0, 3.0), torch.tensor([3, 3]), history)
    assert history.past(3) == []


def test_a_history_of_steps_counts_the_steps_a_row_was_absent_from():
    history = PromptHistory(steps=2)
    history.observe(double(1.0, 2.0), torch.tensor([3, 3]))
    history.observe(double(5.0), torch.tensor([4]))
    assert history.past(3) == [1.0, 2.0]
    history.observe(double(6.0), torch.tensor([4]))
    assert (history.past(3), history.past(4)) == ([], [5.0, 6.0])


def test_a_history_of_no_steps_is_the_step_alone():
    history = PromptHistory(steps=0)
    history.observe(double(1.0, 2.0), torch.tensor([3, 3]))
    assert history.past(3) == []


def test_a_history_of_rewards_keeps_the_last_however_old():
    history = PromptHistory(rewards=3)
    history.observe(double(1.0, 2.0), torch.tensor([3, 3]))
    for _ in range(50):
        history.observe(double(5.0), torch.tensor([4]))
    history.observe(double(8.0, 9.0), torch.tensor([3, 3]))
    assert (history.past(3), history.past(4)) == ([2.0, 8.0, 9.0], [5.0, 5.0, 5.0])


@pytest.mark.parametrize("seed", range(3))
def test_history_matches_a_loop_over_the_last_eight_steps(seed):
    history, run = PromptHistory(steps=8), steps(seed)
    for at, (reward_N, row_N) in enumerate(run):
        z_N = history_standardised(reward_N, row_N, history)
        for n, row in enumerate(row_N.tolist()):
            known = [
                reward
                for rewards, rows in run[max(0, at - 8) : at + 1]
                for reward, other in zip(rewards.tolist(), rows.tolist(), strict=True)
                if other == row
            ]
            expected = 0.0
            if len(known) > 1:
                expected = (reward_N[n].item() - statistics.mean(known)) / (
                    statistics.stdev(known) + 1e-8
                )
            assert z_N[n].item() == pytest.approx(expected, abs=1e-10)
        history.observe(reward_N, row_N)


@pytest.mark.parametrize("seed", range(3))
def test_buffer_matches_a_loop(seed):
    history, run = PromptHistory(rewards=6), steps(seed)
    seen: dict[int, list[float]] = {}
    own = 0
    for reward_N, row_N in run:
        for reward, row in zip(reward_N.tolist(), row_N.tolist(), strict=True):
            seen.setdefault(row, []).append(reward)
        advantage_N = buffer_standardised(reward_N, row_N, history, min_count=4)
        for n, row in enumerate(row_N.tolist()):
            peers = seen[row][-6:]
            own += len(peers) >= 4
            peers = peers if len(peers) >= 4 else reward_N.tolist()
            expected = (reward_N[n].item() - statistics.mean(peers)) / (
                statistics.pstdev(peers) + 1e-6
            )
            assert advantage_N[n].item() == pytest.approx(expected, abs=1e-10)
        history.observe(reward_N, row_N)
    assert 0 < own < sum(len(row_N) for _, row_N in run)


def test_the_first_step_of_a_buffer_is_standardised_over_the_batch():
    history = PromptHistory(rewards=16)
    # Mean 2, population variance 8/3.
    advantage_N = buffer_standardised(
        double(0.0, 2.0, 4.0), torch.tensor([1, 2, 3]), history, eps=0.0
    )
    torch.testing.assert_close(advantage_N, double(-2.0, 0.0, 2.0) / math.sqrt(8 / 3))


@pytest.mark.parametrize("seed", range(3))
def test_positive_affine_maps_of_the_reward_change_nothing(seed):
    plain, mapped = PromptHistory(steps=8), PromptHistory(steps=8)
    for reward_N, row_N in steps(seed):
        z_N = history_standardised(reward_N, row_N, plain, eps=0.0)
        again_N = history_standardised(3 * reward_N - 5, row_N, mapped, eps=0.0)
        torch.testing.assert_close(again_N, z_N, atol=1e-10, rtol=1e-10)
        plain.observe(reward_N, row_N)
        mapped.observe(3 * reward_N - 5, row_N)


def test_one_sample_or_equal_samples_of_a_prompt_get_exactly_0():
    history = PromptHistory(steps=8)
    reward_N, row_N = double(0.7, 0.7, 0.7, 5.0), torch.tensor([1, 1, 1, 2])
    assert history_standardised(reward_N, row_N, history).tolist() == [0, 0, 0, 0]
    assert buffer_standardised(
        double(0.7, 0.7), torch.tensor([1, 2]), PromptHistory(rewards=16)
    ).tolist() == [0, 0]


def test_group_values_sum_to_0_without_a_past():
    reward_N, row_N = steps(0)[0]
    z_N = history_standardised(reward_N, row_N, PromptHistory(steps=8))
    for row in row_N.unique():
        assert z_N[row_N == row].sum().item() == pytest.approx(0, abs=1e-7)


def test_dtype_and_an_empty_step():
    history = PromptHistory(steps=8)
    assert history_standardised(torch.rand(3), torch.tensor([1, 1, 1]), history).dtype == (
        torch.float32
    )
    none, rows = double(), torch.zeros(0, dtype=torch.int64)
    assert history_standardised(none, rows, history).shape == (0,)
    assert buffer_standardised(none, rows, PromptHistory(rewards=4)).shape == (0,)
    history.observe(none, rows)


@pytest.mark.parametrize("settings", [{"steps": 3}, {"rewards": 5}])
def test_a_resumed_history_goes_on_exactly(settings):
    run = steps(4)
    whole, resumed = PromptHistory(**settings), PromptHistory(**settings)
    for reward_N, row_N in run[:6]:
        whole.observe(reward_N, row_N)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for reward_N, row_N in run[6:]:
        z_N = history_standardised(reward_N, row_N, whole)
        assert torch.equal(history_standardised(reward_N, row_N, resumed), z_N)
        whole.observe(reward_N, row_N)
        resumed.observe(reward_N, row_N)
    assert resumed.state_dict() == whole.state_dict()


# Selection by z: B2-DiffuRL as released.


def branches(seed, num_branches=200, pass_rate=0.5):
    """Branches of five 0/1 rewards of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    branch_N = torch.arange(num_branches).repeat_interleave(5)
    reward_N = (torch.rand(len(branch_N), generator=generator) < pass_rate).double()
    return reward_N, branch_N, torch.zeros_like(branch_N)


def test_a_branch_keeps_its_best_iff_z_reaches_the_threshold_and_its_worst_iff_it_is_below():
    generator = torch.Generator().manual_seed(0)
    reward_N = torch.randn(300, dtype=torch.float64, generator=generator)
    branch_N = torch.arange(60).repeat_interleave(5)
    row_N = branch_N // 12
    z_N = history_standardised(reward_N, row_N, PromptHistory(steps=8))
    expected = set()
    for branch in range(60):
        rows = (branch_N == branch).nonzero().flatten().tolist()
        best, worst = max(rows, key=lambda n: z_N[n]), min(rows, key=lambda n: z_N[n])
        expected |= {best} if z_N[best] >= 0.5 else set()
        expected |= {worst} if z_N[worst] < -0.5 else set()
    kept = best_and_worst(z_N.numpy(), branch_N.numpy(), threshold=0.5)
    assert set(kept.tolist()) == expected
    assert 0 < len(kept) < 120
    # The selection does not change with the unit of the reward either.
    again_N = history_standardised(40 * reward_N + 3, row_N, PromptHistory(steps=8))
    assert best_and_worst(again_N.numpy(), branch_N.numpy(), threshold=0.5).tolist() == (
        kept.tolist()
    )


@pytest.mark.parametrize(
    ("pass_rate", "failures", "successes"),
    [(0.1, False, True), (0.5, True, True), (0.9, True, False)],
)
def test_of_0_1_rewards_rare_failures_and_common_successes_are_not_kept(
    pass_rate, failures, successes
):
    # z is sqrt((1 - p) / p) for a success and -sqrt(p / (1 - p)) for a failure: past .5 for
    # p <= .8 and p > .2. The measured p of 1000 rewards is within .05 of the true one by 5 s.e.
    reward_N, branch_N, row_N = branches(1, pass_rate=pass_rate)
    z_N = history_standardised(reward_N, row_N, PromptHistory(steps=8))
    kept = best_and_worst(z_N.numpy(), branch_N.numpy(), threshold=0.5)
    assert ((reward_N[kept] == 0).any(), (reward_N[kept] == 1).any()) == (failures, successes)


def test_no_branch_may_pass():
    z_N = history_standardised(double(1.0, 1.0), torch.tensor([0, 0]), PromptHistory(steps=8))
    assert best_and_worst(z_N.numpy(), [0, 0], threshold=0.5).tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PromptHistory(), "one of the two, got steps=None, rewards=None"),
        (lambda: PromptHistory(steps=1, rewards=1), "one of the two, got steps=1, rewards=1"),
        (lambda: PromptHistory(steps=-1), "steps must be at least 0, got -1"),
        (lambda: PromptHistory(rewards=0), "rewards must be at least 1, got 0"),
        (
            lambda: PromptHistory(steps=1).observe(double(1.0, math.inf), torch.tensor([8, 9])),
            "reward_N must be finite, got inf in row 1 of data-set row 9",
        ),
        (
            lambda: PromptHistory(steps=1).observe(double(1.0), torch.tensor([8, 9])),
            r"equally long, got \(1,\) and \(2,\)",
        ),
        (
            lambda: PromptHistory(steps=1).observe(torch.tensor([1]), torch.tensor([8])),
            "reward_N must be floating point, got torch.int64",
        ),
        (
            lambda: PromptHistory(steps=1).observe(double(1.0), double(8.0)),
            "row_N must be integers, got torch.float64",
        ),
        (
            lambda: PromptHistory(steps=1).load_state_dict(PromptHistory(steps=2).state_dict()),
            "of a history with steps=2, this one has steps=1",
        ),
        (
            lambda: buffer_standardised(double(1.0), torch.tensor([8]), PromptHistory(steps=2)),
            "a buffer counts rewards, got a history of steps=2",
        ),
        (
            lambda: buffer_standardised(
                double(1.0), torch.tensor([8]), PromptHistory(rewards=2), min_count=0
            ),
            "min_count must be at least 1, got 0",
        ),
        (
            lambda: history_standardised(
                double(1.0), torch.tensor([8]), PromptHistory(steps=2), eps=-1
            ),
            "eps must be at least 0, got -1",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
