import math

import pytest
import torch

from rl.objective.advantages import (
    batch_scaled,
    batch_whitened,
    centred,
    grpo,
    leave_one_out,
    maxrl,
    normalised_sum,
    raft,
)

CENTRED = [centred, leave_one_out, grpo]
BATCH = [batch_whitened, batch_scaled]
ESTIMATORS = [*CENTRED, raft]
EVERY = [*ESTIMATORS, *BATCH]


def ragged(seed=0):
    """Groups of 1 to 7 rows, interleaved, with gaps in the ids and rewards of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 2, 5, 7, 3, 4, 6]
    prompt_N = torch.cat([torch.full((n,), 3 * p + 2) for p, n in enumerate(sizes)])
    prompt_N = prompt_N[torch.randperm(len(prompt_N), generator=generator)]
    reward_N = torch.randn(len(prompt_N), dtype=torch.float64, generator=generator)
    reward_N[prompt_N == 11] = 0.7  # one group of equal rewards
    binary_N = torch.rand(len(prompt_N), generator=generator) < 0.5
    reward_N = torch.where(prompt_N >= 14, binary_N.double(), reward_N)
    return reward_N, prompt_N


def by_loop(name, reward_N, prompt_N):
    """The definitions, one rollout at a time, in plain Python."""
    advantage = []
    rewards, prompts = reward_N.tolist(), prompt_N.tolist()
    if name == "batch_scaled":
        centred_N = by_loop("centred", reward_N, prompt_N).tolist()
        return by_loop("batch_whitened", torch.tensor(centred_N, dtype=torch.float64), prompt_N)
    if name == "batch_whitened":
        prompts = [0] * len(prompts)
    for i, (r, p) in enumerate(zip(rewards, prompts, strict=True)):
        group = [s for s, q in zip(rewards, prompts, strict=True) if q == p]
        others = [s for j, s in enumerate(rewards) if j != i and prompts[j] == p]
        mean = sum(group) / len(group)
        if name == "raft":
            advantage.append(float(r == max(group) and r > 0))
        elif max(group) == min(group):
            advantage.append(0.0)
        elif name == "centred":
            advantage.append(r - mean)
        elif name == "leave_one_out":
            advantage.append(r - sum(others) / len(others))
        else:
            std = math.sqrt(sum((s - mean) ** 2 for s in group) / (len(group) - 1))
            advantage.append((r - mean) / (std + 1e-4))
    return torch.tensor(advantage, dtype=torch.float64)


def test_by_hand():
    # Prompt 7 has rewards 1, 0, 0 and prompt 3 has 1, 1.
    reward_N = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    prompt_N = torch.tensor([7, 3, 7, 7, 3])
    # 1 - (0 + 0)/2,  equal,  0 - (1 + 0)/2,  0 - (1 + 0)/2,  equal
    assert leave_one_out(reward_N, prompt_N).tolist() == [1.0, 0.0, -0.5, -0.5, 0.0]
    # Mean 1/3.
    expected = [2 / 3, 0, -1 / 3, -1 / 3, 0]
    assert centred(reward_N, prompt_N).tolist() == pytest.approx(expected, abs=1e-15)
    # Variance (4 + 1 + 1)/9/3 = 2/9: 2/3 / sqrt(2/9) = sqrt 2, and -sqrt(2)/2.
    expected = [2**0.5, 0, -(2**0.5) / 2, -(2**0.5) / 2, 0]
    assert grpo(reward_N, prompt_N, correction=0, eps=0).tolist() == pytest.approx(
        expected, abs=1e-15
    )
    # Accepted: the one success of prompt 7, both of prompt 3.
    assert raft(reward_N, prompt_N).tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("estimate", "of_1", "of_4"),
    [
        (lambda r, p: grpo(r, p, correction=0, eps=0), (2.645751, -0.377964), 1.0),
        (lambda r, p: grpo(r, p, correction=1, eps=0), (2.474874, -0.353553), 0.935414),
        (grpo, (2.474174, -0.353453), 0.935239),
        (centred, (0.875, -0.125), 0.5),
        (leave_one_out, (1.0, -0.142857), 0.571429),
    ],
    ids=["population", "unbiased", "TRL", "centred", "leave_one_out"],
)
def test_golden_values_of_one_and_four_successes_in_eight(estimate, of_1, of_4):
    one = torch.tensor([1.0] + [0.0] * 7, dtype=torch.float64)
    four = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64)
    # Interleaved, so that a reshape to (2, 8) would mix them.
    reward_N = torch.stack([one, four], dim=1).flatten()
    prompt_N = torch.tensor([0, 1] * 8)
    advantage_N = estimate(reward_N, prompt_N)
    expected_1 = [of_1[0]] + [of_1[1]] * 7
    assert advantage_N[::2].tolist() == pytest.approx(expected_1, abs=5e-7)
    assert advantage_N[1::2].tolist() == pytest.approx([of_4] * 4 + [-of_4] * 4, abs=5e-7)


@pytest.mark.parametrize("estimate", EVERY)
@pytest.mark.parametrize("seed", range(5))
def test_matches_the_definition_on_ragged_interleaved_groups(estimate, seed):
    reward_N, prompt_N = ragged(seed)
    expected_N = by_loop(estimate.__name__, reward_N, prompt_N)
    torch.testing.assert_close(estimate(reward_N, prompt_N), expected_N, atol=1e-12, rtol=0)


def test_maxrl_by_hand():
    # Prompt 7 passes 1 of 4, m = 1/4: (1 - 1/4)/(1/4) = 3 and -1. Prompt 3 passes 2 of 3, m = 2/3:
    # (1/3)/(2/3) = 1/2 and -1. Prompt 5 fails, prompt 6 passes, prompt 9 is alone: 0.
    reward_N = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1], dtype=torch.float64)
    prompt_N = torch.tensor([7, 3, 7, 7, 3, 3, 7, 5, 5, 6, 6, 9])
    expected = [3, 0.5, -1, -1, 0.5, -1, -1, 0, 0, 0, 0, 0]
    assert maxrl(reward_N, prompt_N).tolist() == pytest.approx(expected, abs=1e-15)
    assert maxrl(reward_N.float(), prompt_N).dtype == torch.float32


@pytest.mark.parametrize("seed", range(5))
def test_maxrl_matches_the_definition_and_sums_to_0_in_every_group(seed):
    reward_N, prompt_N = ragged(seed)
    success_N = (reward_N > 0).double()
    advantage_N = maxrl(success_N, prompt_N)
    for i, (r, p) in enumerate(zip(success_N.tolist(), prompt_N.tolist(), strict=True)):
        group = success_N[prompt_N == p].tolist()
        mean = sum(group) / len(group)
        expected = (r - mean) / mean if mean > 0 else 0.0
        assert advantage_N[i].item() == pytest.approx(expected, abs=1e-12)
        assert advantage_N[prompt_N == p].sum().item() == pytest.approx(0, abs=1e-12)


def test_maxrl_refuses_what_neither_passes_nor_fails():
    with pytest.raises(ValueError, match="must be 0 or 1, got 0.5 in row 1 of prompt 4"):
        maxrl(torch.tensor([1.0, 0.5]), torch.tensor([4, 4]))
    assert maxrl(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_grpo_is_torchs_std_group_by_group(correction, eps):
    reward_N, prompt_N = ragged()
    advantage_N = grpo(reward_N, prompt_N, correction=correction, eps=eps)
    for prompt in prompt_N.unique():
        r = reward_N[prompt_N == prompt]
        expected = torch.zeros_like(r)
        if r.max() > r.min():
            expected = (r - r.mean()) / (r.std(correction=correction) + eps)
        torch.testing.assert_close(advantage_N[prompt_N == prompt], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimate", [*CENTRED, batch_scaled])
def test_a_prompts_own_shift_changes_nothing(estimate):
    reward_N, prompt_N = ragged()
    shifted_N = reward_N + 0.25 * prompt_N
    torch.testing.assert_close(
        estimate(shifted_N, prompt_N), estimate(reward_N, prompt_N), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    ("estimate", "power"),
    [(centred, 1), (leave_one_out, 1), (grpo, 0), (batch_whitened, 0), (batch_scaled, 0)],
)
def test_scale(estimate, power):
    reward_N, prompt_N = ragged()
    settings = {"eps": 0} if power == 0 else {}
    actual = estimate(3 * reward_N, prompt_N, **settings)
    expected = 3**power * estimate(reward_N, prompt_N, **settings)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimate", [*CENTRED, batch_scaled])
def test_advantages_of_a_prompt_sum_to_0(estimate):
    reward_N, prompt_N = ragged()
    sums = torch.zeros(30).double().index_add(0, prompt_N, estimate(reward_N, prompt_N))
    torch.testing.assert_close(sums, torch.zeros(30).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimate", EVERY)
def test_rows_may_come_in_any_order(estimate):
    reward_N, prompt_N = ragged()
    order = torch.randperm(len(reward_N), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        estimate(reward_N[order], prompt_N[order]),
        estimate(reward_N, prompt_N)[order],
        atol=1e-14,
        rtol=0,
    )


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_two_prompts_together_are_two_calls(estimate):
    reward_N, prompt_N = ragged()
    whole = estimate(reward_N, prompt_N)
    for prompt in prompt_N.unique():
        rows = prompt_N == prompt
        torch.testing.assert_close(
            estimate(reward_N[rows], prompt_N[rows]), whole[rows], atol=1e-14, rtol=0
        )


@pytest.mark.parametrize("estimate", [*CENTRED, *BATCH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rewards", [[0.7] * 8, [1.0], [0.0], [-3.1] * 3, [1e30] * 3])
def test_equal_rewards_and_lone_rows_get_exactly_0(estimate, dtype, rewards):
    reward_N = torch.tensor(rewards, dtype=dtype)
    advantage_N = estimate(reward_N, torch.zeros(len(rewards), dtype=torch.int64))
    assert advantage_N.tolist() == [0.0] * len(rewards)
    assert advantage_N.dtype == dtype


def test_the_max_min_test_is_needed():
    # The float32 std of eight rewards of 0.7 is 6e-8, not 0; eps = 1e-6 would make that 0.056.
    reward_N = torch.tensor([0.7] * 8)
    mean = reward_N.sum() / 8
    std = (reward_N - mean).square().mean().sqrt()
    assert ((reward_N - mean) / (std + 1e-6)).abs().max() > 0.05


@pytest.mark.parametrize("estimate", CENTRED)
def test_rewards_that_differ_in_the_last_bit_are_not_equal(estimate):
    reward_N = torch.tensor([1.0, 1.0 + 1e-15], dtype=torch.float64)
    advantage_N = estimate(reward_N, torch.zeros(2, dtype=torch.int64))
    assert advantage_N[0] < 0 < advantage_N[1]


def test_raft_accepts_the_best_and_nothing_where_all_fail():
    reward_N = torch.tensor([0.0, 0.0, 0.2, 0.9, 0.9, -2.0, -1.0, 1.0], dtype=torch.float64)
    prompt_N = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    # All fail; the two best of prompt 1; the best of prompt 2 is still negative; a lone success.
    assert raft(reward_N, prompt_N).tolist() == [0, 0, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("estimate", EVERY)
def test_no_rows_give_no_advantages(estimate):
    assert estimate(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("estimate", EVERY)
def test_no_gradient_flows_through_an_advantage(estimate):
    reward_N, prompt_N = ragged()
    assert not estimate(reward_N.requires_grad_(), prompt_N).requires_grad


@pytest.mark.parametrize("estimate", EVERY)
def test_float32_rewards_are_averaged_in_float64(estimate):
    reward_N, prompt_N = ragged()
    reward_N = reward_N.float() + 1000  # float32 sums of these would lose four digits
    actual = estimate(reward_N, prompt_N)
    expected = by_loop(estimate.__name__, reward_N.double(), prompt_N)
    torch.testing.assert_close(actual, expected.float(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("estimate", "factor"), [(leave_one_out, 1.0), (centred, 3 / 4)])
def test_gradient_is_unbiased_where_the_group_mean_shrinks_it(estimate, factor):
    # Bernoulli policy, reward = the action itself: d E[r] / d theta = p (1 - p) = 0.21.
    generator = torch.Generator().manual_seed(0)
    p, n, trials = 0.3, 4, 200_000
    reward_N = torch.bernoulli(torch.full((trials * n,), p).double(), generator=generator)
    prompt_N = torch.arange(trials).repeat_interleave(n)
    score_N = reward_N - p  # d log pi / d theta of a logit-parametrised Bernoulli
    mean = (estimate(reward_N, prompt_N) * score_N).mean().item()
    # The per-trial estimate has std 0.126, so this is 4 standard errors, 0.0011.
    assert abs(mean - factor * p * (1 - p)) < 4 * 0.126 / trials**0.5


@pytest.mark.parametrize("estimate", EVERY)
def test_estimators_say_what_is_wrong(estimate):
    prompt_N = torch.tensor([4, 4])
    with pytest.raises(ValueError, match=r"equally long, got \(2,\) and \(3,\)"):
        estimate(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"1-d and equally long, got \(1, 2\) and \(1, 2\)"):
        estimate(torch.zeros(1, 2), prompt_N[None])
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        estimate(torch.zeros(2, dtype=torch.int64), prompt_N)
    with pytest.raises(ValueError, match="finite, got nan in row 1 of prompt 4"):
        estimate(torch.tensor([0.0, math.nan]), prompt_N)
    with pytest.raises(ValueError, match="finite, got inf in row 0 of prompt 4"):
        estimate(torch.tensor([math.inf, 0.0]), prompt_N)


@pytest.mark.parametrize("estimate", [grpo, *BATCH])
def test_settings_out_of_range_are_refused(estimate):
    with pytest.raises(ValueError, match="correction must be 0 or 1, got 2"):
        estimate(torch.zeros(2), torch.zeros(2).long(), correction=2)
    with pytest.raises(ValueError, match=r"eps must be at least 0, got -0\.1"):
        estimate(torch.zeros(2), torch.zeros(2).long(), eps=-0.1)


def quarters():
    """Prompts with 1, 3 and 4 of 4 correct."""
    reward_N = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
    return reward_N, torch.arange(3).repeat_interleave(4)


def test_batch_scaled_golden_values():
    # c = (.75, -.25 x3, .25 x3, -.75, 0 x4): sum of squares 1.5 over 12 rows, std .353553.
    reward_N, prompt_N = quarters()
    high, low = 2.121320, 0.707107
    expected = [high] + [-low] * 3 + [low] * 3 + [-high] + [0] * 4
    advantage_N = batch_scaled(reward_N, prompt_N, correction=0, eps=0)
    assert advantage_N.tolist() == pytest.approx(expected, abs=5e-7)
    assert centred(reward_N, prompt_N).std(correction=0).item() == pytest.approx(0.353553, abs=5e-7)


@pytest.mark.parametrize(("correction", "std"), [(0, 0.471405), (1, 0.492366)])
def test_batch_scaled_is_not_trls_batch_scale_which_has_the_spread_between_prompts(correction, std):
    reward_N, prompt_N = quarters()
    raw = reward_N.std(correction=correction)
    assert raw.item() == pytest.approx(std, abs=5e-7)
    trl_N = grpo(reward_N, prompt_N, scale="batch", correction=correction, eps=0)
    torch.testing.assert_close(trl_N, centred(reward_N, prompt_N) / raw, atol=1e-14, rtol=0)
    ours_N = batch_scaled(reward_N, prompt_N, correction=correction, eps=0)
    assert (ours_N / trl_N)[:8].min() > 1.3


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("estimate", BATCH)
def test_with_one_prompt_the_batch_is_the_group(estimate, correction):
    reward_N, _ = ragged()
    prompt_N = torch.full((len(reward_N),), 9)
    settings = {"correction": correction, "eps": 1e-4}
    torch.testing.assert_close(
        estimate(reward_N, prompt_N, **settings),
        grpo(reward_N, prompt_N, **settings),
        atol=1e-14,
        rtol=0,
    )


def test_batch_whitened_has_mean_0_and_variance_1_over_the_batch_and_needs_no_groups():
    reward_N, prompt_N = ragged()
    advantage_N = batch_whitened(reward_N, prompt_N, correction=0, eps=0)
    assert advantage_N.mean().item() == pytest.approx(0, abs=1e-14)
    assert advantage_N.var(correction=0).item() == pytest.approx(1, abs=1e-14)
    alone_N = torch.arange(len(reward_N))
    assert torch.equal(batch_whitened(reward_N, alone_N, correction=0, eps=0), advantage_N)
    # A lone row, and a group of equal rewards, still differ from the batch.
    assert (advantage_N[prompt_N == 2] != 0).all() and (advantage_N[prompt_N == 11] != 0).all()


def test_batch_whitened_by_hand():
    # Mean 2, deviations -1, 0, 1, population variance 2/3; unbiased 1.
    reward_N, prompt_N = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([5, 5, 6])
    expected = [-(1.5**0.5), 0, 1.5**0.5]
    population_N = batch_whitened(reward_N, prompt_N, correction=0, eps=0)
    assert population_N.tolist() == pytest.approx(expected, abs=1e-15)
    unbiased_N = batch_whitened(reward_N, prompt_N, correction=1, eps=0)
    assert unbiased_N.tolist() == pytest.approx([-1, 0, 1], abs=1e-15)


@pytest.mark.parametrize("estimate", BATCH)
def test_dropping_groups_without_signal_first_changes_the_batch_estimators_alone(estimate):
    reward_N, prompt_N = quarters()
    kept = slice(0, 8)
    before_N, after_N = (
        estimate(reward_N, prompt_N)[kept],
        estimate(reward_N[kept], prompt_N[kept]),
    )
    assert (before_N - after_N).abs().max() > 0.1
    for group in CENTRED:
        assert torch.equal(group(reward_N, prompt_N)[kept], group(reward_N[kept], prompt_N[kept]))


def trls(reward_NF, weight_F, *, size, scale="group", first_sum=True):
    """What TRL 1.16 makes of rewards in equal groups that lie one after the other, step by step."""

    def spread(value):
        return value.std() if value.numel() > 1 else value.new_zeros(())

    total_N, groups = [], range(0, len(reward_NF), size)
    if first_sum:
        reward_N = (reward_NF * weight_F).sum(1)
        for start in groups:
            group = reward_N[start : start + size]
            std = {"group": spread(group), "batch": spread(reward_N)}.get(scale)
            total_N.append((group - group.mean()) / (1 if std is None else std + 1e-4))
        return torch.cat(total_N)
    for start in groups:
        group = reward_NF[start : start + size]
        z = (group - group.mean(0)) / (group.std(0) + 1e-4)
        total_N.append((z * weight_F).sum(1))
    reward_N = torch.cat(total_N)
    return (reward_N - reward_N.mean()) / (reward_N.std() + 1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_equal_groups_get_trls_advantages_by_any_scale(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    reward_N1 = torch.randn(24, 1, dtype=torch.float64, generator=generator)
    expected_N = trls(reward_N1, torch.ones(1).double(), size=6, scale=scale)
    prompt_N = torch.arange(4).repeat_interleave(6)
    order = torch.randperm(24, generator=generator)
    found_N = grpo(reward_N1[order, 0], prompt_N[order], scale=scale)
    torch.testing.assert_close(found_N, expected_N[order], atol=1e-13, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_lone_rows_and_equal_rewards_get_0_by_any_scale(scale):
    reward_N = torch.tensor([0.7, 0.7, 0.7, 3.0, 0.0, 1.0])
    advantage_N = grpo(reward_N, torch.tensor([0, 0, 0, 1, 2, 2]), scale=scale)
    assert advantage_N[:4].tolist() == [0.0] * 4 and (advantage_N[4:] != 0).all()
    assert grpo(torch.zeros(0), torch.zeros(0, dtype=torch.int64), scale=scale).tolist() == []
    with pytest.raises(ValueError, match="scale must be one of group, batch, none, got 'all'"):
        grpo(reward_N, torch.zeros(6).long(), scale="all")


@pytest.mark.parametrize("seed", range(3))
def test_normalised_sum_is_trls_normalize_then_sum(seed):
    generator = torch.Generator().manual_seed(seed)
    reward_NF = torch.randn(24, 3, dtype=torch.float64, generator=generator)
    reward_NF[:, 1] = (reward_NF[:, 1] > 0).double() * 100  # drowns the others in a sum
    weight_F = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    expected_N = trls(reward_NF, weight_F, size=6, first_sum=False)
    prompt_N = torch.arange(4).repeat_interleave(6)
    order = torch.randperm(24, generator=generator)
    found_N = normalised_sum(reward_NF[order], prompt_N[order], weight_F=weight_F)
    torch.testing.assert_close(found_N, expected_N[order], atol=1e-12, rtol=0)
    summed_N = grpo((reward_NF * weight_F).sum(1), prompt_N)
    assert (summed_N - expected_N).abs().max() > 0.5  # another estimator


def test_normalised_sum_by_hand_with_rewards_missing():
    nan = math.nan
    # The second function knows nothing of row 1, and everything of prompt 8 is equal but row 3's.
    reward_NF = torch.tensor(
        [[1.0, 0.0], [0.0, nan], [0.0, 4.0], [nan, nan], [2.0, 5.0], [2.0, 5.0]]
    )
    prompt_N = torch.tensor([7, 7, 7, 8, 8, 8])
    found_N = normalised_sum(
        reward_NF.double(), prompt_N, weight_F=torch.tensor([1.0, 3.0]), eps=0.0
    )
    # Function 1: (2, -1, -1) / sqrt 3; function 2: -1, none, 1 in units of sqrt 2, times 3.
    a, b = 3**-0.5, 3 * 2**-0.5
    total_N = torch.tensor([2 * a - b, -a, b - a, 0, 0, 0], dtype=torch.float64)
    std = (total_N.square().sum() / 4).sqrt()  # five rows have a reward
    torch.testing.assert_close(found_N, total_N / std, atol=1e-14, rtol=0)
    assert found_N[3:].tolist() == [0, 0, 0]
    none_N = torch.zeros(0, dtype=torch.int64)
    assert normalised_sum(torch.zeros(0, 2), none_N, weight_F=torch.ones(2)).tolist() == []


def test_normalised_sum_says_what_is_wrong():
    prompt_N = torch.tensor([4, 4])
    with pytest.raises(ValueError, match=r"weight_F \(F,\), got \(2, 3\) and \(2,\)"):
        normalised_sum(torch.zeros(2, 3), prompt_N, weight_F=torch.ones(2))
    with pytest.raises(ValueError, match="weight_F must be finite"):
        normalised_sum(torch.zeros(2, 1), prompt_N, weight_F=torch.tensor([math.inf]))
    with pytest.raises(ValueError, match="finite, got inf in row 0 of prompt 4"):
        normalised_sum(torch.tensor([[math.inf], [0.0]]), prompt_N, weight_F=torch.ones(1))
