import json
import math

import pytest
import torch

from rl.objective.advantages import grpo
from rl.objective.hapo import (
    EntropyPivot,
    clip_ranges,
    hapo,
    heterogeneity,
    pivot,
    redistribute,
    token_level_group,
)
from rl.objective.losses import clipped_surrogate

# Five decisions; the 0.8 quantile, nearest, is the fourth: Q = log 1 = 0.
ENTROPY_NT = torch.tensor([[0.05, 0.1, 0.5, 1.0, 2.0]], dtype=torch.float64)
ALL_NT = torch.ones(1, 5, dtype=torch.bool)
H_NT = torch.tensor([[-1, -0.7686, -0.2314, 0, 1]], dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def random_step(seed=0, num_rollouts=8, num_steps=7):
    """Ragged rows of a step with rubbish off the mask, two of the rows without old ratio 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rollouts, num_steps)
    length_N1 = torch.randint(1, num_steps + 1, (num_rollouts, 1), generator=generator)
    mask_NT = torch.arange(num_steps) < length_N1
    entropy_NT = torch.rand(shape, dtype=torch.float64, generator=generator).pow(3) * 2
    logprob_NT = -torch.rand(shape, dtype=torch.float64, generator=generator) * 3
    old_NT = logprob_NT + 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    advantage_N = torch.randn(num_rollouts, dtype=torch.float64, generator=generator)
    entropy_NT = torch.where(mask_NT, entropy_NT, math.nan)
    return logprob_NT.requires_grad_(), old_NT, advantage_N, mask_NT, entropy_NT


def h_of(entropy_NT, mask_NT, **settings):
    return heterogeneity(entropy_NT, mask_NT, pivot(entropy_NT, mask_NT, **settings))


# Heterogeneity


def test_golden_heterogeneity_and_clip_ranges():
    h_NT = h_of(ENTROPY_NT, ALL_NT)
    close(h_NT, H_NT, atol=5e-5)
    low_NT, high_NT = clip_ranges(h_NT)
    close(low_NT, torch.tensor([[0.4, 0.3537, 0.2463, 0.2, 0.2]]).double(), atol=5e-5)
    close(high_NT, torch.tensor([[0.28, 0.28, 0.28, 0.28, 0.56]]).double(), atol=5e-7)


def test_certain_tokens_are_negative_where_the_released_code_has_them_positive():
    h_NT = h_of(ENTROPY_NT, ALL_NT)
    assert h_NT.sign().tolist() == [[-1, -1, -1, 0, 1]]
    # The release divides d <= 0 by its own, negative, minimum.
    distance_NT = ENTROPY_NT.log()
    released_NT = distance_NT / distance_NT.where(distance_NT > 0, distance_NT.min()).abs()
    released_NT = torch.where(distance_NT > 0, released_NT, distance_NT / distance_NT.min())
    close(released_NT, torch.tensor([[1, 0.7686, 0.2314, 0, 1]]).double(), atol=5e-5)
    of_step = pivot(ENTROPY_NT, ALL_NT)
    close(heterogeneity(ENTROPY_NT, ALL_NT, of_step, signed=False), released_NT.abs(), atol=1e-12)
    assert of_step.adaptive_temperature(0.1, signed=False).signed is False
    assert (h_NT != released_NT).any()
    low_NT, _ = clip_ranges(h_NT)
    assert (low_NT[:, :3] > 0.2).all()  # with h >= 0 for all, no lower clip would widen


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("quantile", [0.0, 0.31, 0.8, 1.0])
def test_h_matches_the_definition_whatever_the_spread_is_divided_by(seed, quantile):
    *_, mask_NT, entropy_NT = random_step(seed)
    h_NT = h_of(entropy_NT, mask_NT, quantile=quantile)
    log_M = entropy_NT[mask_NT].clamp(min=1e-8).log()
    d_M = log_M - torch.quantile(log_M, quantile, interpolation="nearest")
    d_M = d_M / d_M.square().mean().sqrt()  # sigma, which cancels
    most, least = max(float(d_M.max()), 0.0), min(float(d_M.min()), 0.0)
    expected = [d / most if d > 0 else (d / -least if least else 0.0) for d in d_M.tolist()]
    close(h_NT[mask_NT], torch.tensor(expected, dtype=torch.float64))
    assert (h_NT[~mask_NT] == 0).all()
    order = entropy_NT[mask_NT].argsort()
    assert (h_NT[mask_NT][order].diff() >= 0).all()  # monotone in the entropy
    assert h_NT.abs().max() == 1 and (h_NT == 0).sum() > (~mask_NT).sum()


def test_the_pivot_of_a_large_step_is_the_nearest_rank():
    entropy_NT = torch.rand(300, 100, generator=torch.Generator().manual_seed(0)).double()
    found = pivot(entropy_NT, torch.ones(300, 100, dtype=torch.bool))
    expected = torch.quantile(entropy_NT.log(), 0.8, interpolation="nearest")
    assert found.log_quantile == expected.item()


def test_equal_entropies_have_h_0_also_up_to_rounding_and_when_all_are_0():
    for value in (0.7, 0.0):
        entropy_NT = torch.full((2, 3), value)
        assert not h_of(entropy_NT, torch.ones(2, 3, dtype=torch.bool)).any()
    nearly_NT = 0.7 + 1e-8 * torch.arange(6).reshape(2, 3).double()
    assert not h_of(nearly_NT, torch.ones(2, 3, dtype=torch.bool)).any()


def test_a_side_without_tokens_is_guarded():
    # The quantile of two decisions is the larger: nothing lies above it.
    entropy_NT = torch.tensor([[0.5, 1.0]])
    found = pivot(entropy_NT, torch.ones(1, 2, dtype=torch.bool))
    assert found.above == 0 and found.below == pytest.approx(math.log(2))
    other_NT = torch.tensor([[3.0, 1.0, 0.1]])
    h_NT = heterogeneity(other_NT, torch.ones(1, 3, dtype=torch.bool), found)
    assert h_NT.tolist() == [[0, 0, -1]]  # nothing known above; clamped below


def test_entropies_have_a_floor():
    entropy_NT = torch.tensor([[0.0, 1e-12, 1e-8, 1.0, 2.0]])
    h_NT = h_of(entropy_NT, ALL_NT)
    assert h_NT[0, :3].tolist() == [-1, -1, -1]


def test_the_pivot_goes_through_json_and_on_to_the_next_step():
    found = pivot(ENTROPY_NT, ALL_NT)
    again = EntropyPivot.from_state(json.loads(json.dumps(found.state_dict())))
    assert again == found
    adaptive = found.adaptive_temperature(0.1)
    assert (adaptive.tau, adaptive.log_quantile) == (0.1, 0.0)
    assert adaptive.above == pytest.approx(math.log(2))
    assert adaptive.below == pytest.approx(math.log(20))


# B


def test_golden_token_level_advantages():
    reward_N, prompt_N = torch.tensor([1.0, 1.0, 0.0]).double(), torch.zeros(3).long()
    length_N = torch.tensor([10, 30, 60])
    # mu = 40/100, sd = sqrt(.4 * .6).
    advantage_N = token_level_group(reward_N, prompt_N, length_N, eps=0)
    close(advantage_N, torch.tensor([1.224745, 1.224745, -0.816497]).double(), atol=5e-7)
    close(
        grpo(reward_N, prompt_N, correction=0, eps=0),
        torch.tensor([0.707107, 0.707107, -1.414214]).double(),
        atol=5e-7,
    )


def ragged_groups(seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompt_N = torch.randint(0, 4, (20,), generator=generator) * 7
    reward_N = torch.randint(0, 4, (20,), generator=generator).double() / 3
    length_N = torch.randint(1, 30, (20,), generator=generator)
    return reward_N, prompt_N, length_N


@pytest.mark.parametrize("seed", range(10))
def test_token_level_advantages_are_those_of_a_list_of_all_tokens(seed):
    reward_N, prompt_N, length_N = ragged_groups(seed)
    advantage_N = token_level_group(reward_N, prompt_N, length_N, eps=0, fallback_at=math.inf)
    for prompt in prompt_N.unique():
        rows = prompt_N == prompt
        token_M = reward_N[rows].repeat_interleave(length_N[rows])
        if token_M.max() == token_M.min():
            assert not advantage_N[rows].any()
            continue
        expected_M = (token_M - token_M.mean()) / token_M.std(correction=0)
        found_M = advantage_N[rows].repeat_interleave(length_N[rows])
        close(found_M, expected_M)
        assert found_M.sum().item() == pytest.approx(0, abs=1e-10)
        assert found_M.var(correction=0).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("correct", "wrong", "falls_back"), [(1, 25, True), (1, 24, False), (25, 1, True)]
)
def test_a_group_falls_back_from_a_share_of_1_in_26(correct, wrong, falls_back):
    # |A| of the rarer side is sqrt((1 - q) / q): exactly 5 at q = 1/26, whichever side is rare.
    reward_N = torch.tensor([1.0, 0.0, 0.0, 1.0]).double()
    prompt_N, length_N = torch.tensor([0, 0, 1, 1]), torch.tensor([correct, wrong, 2, 2])
    advantage_N = token_level_group(reward_N, prompt_N, length_N, eps=0)
    unbiased_N = grpo(reward_N, prompt_N, correction=1, eps=0)
    share = correct / (correct + wrong)
    own = [((1 - share) / share) ** 0.5, -((share / (1 - share)) ** 0.5)]
    expected = unbiased_N[:2].tolist() if falls_back else own
    assert advantage_N.tolist() == pytest.approx([*expected, -1, 1], rel=1e-12)
    # The other group keeps its own, which with the unbiased std would be sqrt(1/2).


def test_degenerate_groups_and_rows_without_decisions_get_exactly_0():
    reward_N = torch.tensor([0.7] * 8 + [1.0, 1.0, 0.0])
    prompt_N = torch.tensor([3] * 8 + [5, 5, 5])
    length_N = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 4, 9, 0])
    # In group 5 the only wrong row has no decision: nothing is left to compare with.
    advantage_N = token_level_group(reward_N, prompt_N, length_N)
    assert advantage_N.tolist() == [0] * 11 and advantage_N.dtype == torch.float32
    nothing = token_level_group(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).long())
    assert nothing.tolist() == []
    lone = token_level_group(torch.ones(1), torch.zeros(1).long(), torch.tensor([4]))
    assert lone.tolist() == [0]


def test_row_order_shift_and_scale_of_rewards():
    reward_N, prompt_N, length_N = ragged_groups(2)
    expected_N = token_level_group(reward_N, prompt_N, length_N, eps=0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    close(token_level_group(reward_N[order], prompt_N[order], length_N[order], eps=0),
          expected_N[order])  # fmt: skip
    close(token_level_group(4 * reward_N + 2, prompt_N, length_N, eps=0), expected_N)


def test_equal_lengths_give_grpo():
    reward_N, prompt_N, _ = ragged_groups(1)
    even_N = torch.full((20,), 6)
    population_N = grpo(reward_N, prompt_N, correction=0, eps=1e-6)
    close(token_level_group(reward_N, prompt_N, even_N), population_N)


# C and D


@pytest.mark.parametrize(
    ("h", "ratio", "factor"),
    [
        # With .2 and .28 the zone is (.9, 1.28) at h = 0.5 and (.85, 1.14) at h = -0.5.
        (0.5, 1.0, 1),
        (0.5, 1.3, 1.5),
        (0.5, 0.89, 1.5),
        (-0.5, 1.0, 0.5),
        (-0.5, 1.2, 1),
        (-0.5, 0.8, 1),
        (-0.5, 0.86, 0.5),
        # 0 counts with the certain ones, where 1 + h is 1.
        (0.0, 1.0, 1),
        (-1.0, 1.0, 0),
        (1.0, 2.0, 2),
    ],
)
def test_redistribution_by_hand(h, ratio, factor):
    h_NT = torch.tensor([[h]]).double()
    ranges = clip_ranges(h_NT)
    for advantage in (-2.0, 3.0):
        found = redistribute(
            torch.tensor([advantage]).double(), h_NT, torch.tensor([[ratio]]).double(), *ranges
        )
        assert found.item() == pytest.approx(factor * advantage, abs=1e-15)


@pytest.mark.parametrize(("h", "ends"), [(0.5, (0.75, 1.25)), (-0.5, (0.75, 1.25))])
def test_the_neutral_zone_is_open(h, ends):
    h_NT = torch.tensor([[h, h]]).double()
    half_NT = torch.full((1, 2), 0.5).double()
    found_NT = redistribute(
        torch.ones(1).double(), h_NT, torch.tensor([ends]).double(), half_NT, half_NT
    )
    # Both ends are outside: changed where h > 0, left alone where h <= 0.
    assert found_NT.tolist() == [[1.5, 1.5] if h > 0 else [1, 1]]


def test_clip_ranges_are_between_once_and_twice_the_base():
    h_NT = torch.linspace(-1, 1, 41).double()[None]
    low_NT, high_NT = clip_ranges(h_NT)
    assert low_NT.min() == 0.2 and low_NT.max() == 0.4
    assert high_NT.min() == 0.28 and high_NT.max() == 0.56
    assert (low_NT.diff() <= 0).all() and (high_NT.diff() >= 0).all()


# The loss


def one_by_one(logprob_NT, old_NT, advantage_N, mask_NT, h_NT, denominator):
    """The definition, one decision at a time, base ranges .2 and .28, dual clip 10."""
    total, logprob_NT = 0.0, logprob_NT.detach()
    for i, t in mask_NT.nonzero().tolist():
        h, advantage = float(h_NT[i, t]), float(advantage_N[i])
        ratio = math.exp(float(logprob_NT[i, t] - old_NT[i, t]))
        low = 0.2 * (1 - h) if h <= 0 else 0.2
        high = 0.28 * (1 + h) if h > 0 else 0.28
        inside = 1 - low / 2 < ratio < 1 + high / 2
        if (h > 0 and not inside) or (h <= 0 and inside):
            advantage *= 1 + h
        clipped = min(max(ratio, 1 - low), 1 + high)
        surrogate = min(ratio * advantage, clipped * advantage)
        total -= max(surrogate, 10 * advantage) if advantage < 0 else surrogate
    return total / denominator


@pytest.mark.parametrize("seed", range(10))
def test_the_loss_matches_the_definition(seed):
    logprob_NT, old_NT, advantage_N, mask_NT, entropy_NT = random_step(seed)
    h_NT = h_of(entropy_NT, mask_NT)
    loss, statistics = hapo(
        logprob_NT, old_NT, advantage_N, mask_NT.double(), denominator=7.0, h_NT=h_NT
    )
    expected = one_by_one(logprob_NT, old_NT, advantage_N, mask_NT, h_NT, 7.0)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert statistics["heterogeneity"].item() == pytest.approx(h_NT.sum().item(), abs=1e-12)
    assert 0 < statistics["redistributed"] < statistics["tokens"] == mask_NT.sum()


def test_with_equal_entropies_it_is_dapo():
    logprob_NT, old_NT, advantage_N, mask_NT, _ = random_step()
    rows = (logprob_NT, old_NT, advantage_N, mask_NT.double())
    h_NT = h_of(torch.full(mask_NT.shape, 0.3), mask_NT)
    found = hapo(*rows, denominator=7.0, h_NT=h_NT)
    plain = clipped_surrogate(*rows, denominator=7.0, epsilon_high=0.28, dual_clip=10.0)
    assert found[0].item() == plain[0].item()
    assert all(found[1][name] == value for name, value in plain[1].items())
    assert found[1]["redistributed"] == 0
    gradients = [torch.autograd.grad(loss, logprob_NT)[0] for loss, _ in (found, plain)]
    assert torch.equal(*gradients)


def test_on_the_first_update_certain_tokens_are_turned_down_and_others_are_not():
    logprob_NT = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    h_NT = h_of(ENTROPY_NT, ALL_NT)
    loss, _ = hapo(
        logprob_NT,
        logprob_NT.detach(),
        torch.ones(1).double(),
        ALL_NT.double(),
        denominator=1.0,
        h_NT=h_NT,
    )
    (grad_NT,) = torch.autograd.grad(loss, logprob_NT)
    close(-grad_NT, 1 + H_NT.clamp(max=0), atol=5e-5)
    assert grad_NT[0, 0] == 0


def test_no_gradient_flows_through_h_the_ranges_or_the_redistribution():
    logprob_NT, old_NT, advantage_N, mask_NT, entropy_NT = random_step(3)
    entropy_NT = entropy_NT.nan_to_num(0.5).requires_grad_()
    h_NT = h_of(entropy_NT, mask_NT)
    assert not h_NT.requires_grad
    ranges = clip_ranges(h_NT.clone().requires_grad_())
    ratio_NT = (logprob_NT - old_NT).exp()
    assert not any(
        x.requires_grad for x in (*ranges, redistribute(advantage_N, h_NT, ratio_NT, *ranges))
    )
    loss, _ = hapo(logprob_NT, old_NT, advantage_N, mask_NT.double(), denominator=1.0, h_NT=h_NT)
    (grad_NT,) = torch.autograd.grad(loss, logprob_NT)
    # As of the clipped surrogate with those advantages as constants.
    low_NT, high_NT = clip_ranges(h_NT)
    constant_NT = redistribute(advantage_N, h_NT, ratio_NT, low_NT, high_NT)
    surrogate_NT = torch.minimum(
        ratio_NT * constant_NT, ratio_NT.clamp(1 - low_NT, 1 + high_NT) * constant_NT
    )
    plain = -torch.where(mask_NT, surrogate_NT, 0.0).sum()
    close(grad_NT, torch.autograd.grad(plain, logprob_NT)[0])


PARTS = (slice(0, 1), slice(1, 5), slice(5, 8))


def in_parts(step, h_NT, denominator):
    logprob_NT, old_NT, advantage_N, mask_NT, _ = step
    rows = (logprob_NT, old_NT, advantage_N, mask_NT.double())
    losses = [
        hapo(*(x[part] for x in rows), denominator=denominator, h_NT=h_NT[part]) for part in PARTS
    ]
    return sum(loss for loss, _ in losses), sum(s["redistributed"] for _, s in losses)


def test_micro_batches_add_up_with_one_pivot_and_not_with_a_pivot_each():
    step = random_step(4)
    *_, mask_NT, entropy_NT = step
    h_NT = h_of(entropy_NT, mask_NT)
    rows = (*step[:3], mask_NT.double())
    whole, statistics = hapo(*rows, denominator=9.0, h_NT=h_NT)
    loss, redistributed = in_parts(step, h_NT, 9.0)
    close(loss, whole)
    assert redistributed == statistics["redistributed"]
    close(torch.autograd.grad(loss, step[0])[0], torch.autograd.grad(whole, step[0])[0])
    # The release takes a pivot of each micro-batch, and its loss depends on the cut.
    own_NT = torch.cat([h_of(entropy_NT[part], mask_NT[part]) for part in PARTS])
    assert abs(in_parts(step, own_NT, 9.0)[0].item() - whole.item()) > 1e-2


def test_padding_row_order_and_rubbish_without_weight_change_nothing():
    step = random_step(5)
    logprob_NT, old_NT, advantage_N, mask_NT, entropy_NT = step
    rows = (logprob_NT, old_NT, advantage_N, mask_NT.double())
    h_NT = h_of(entropy_NT, mask_NT)
    expected, _ = hapo(*rows, denominator=9.0, h_NT=h_NT)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    again, _ = hapo(*(x[order] for x in rows), denominator=9.0, h_NT=h_NT[order])
    close(again, expected)
    more = [torch.nn.functional.pad(x, (0, 3)) for x in (*rows[:2], rows[3], h_NT)]
    more[3][:, -3:] = math.nan
    more[1] = torch.where(more[2] != 0, more[1], math.inf)
    padded, _ = hapo(*more[:2], advantage_N, more[2], denominator=9.0, h_NT=more[3])
    close(padded, expected)
    grads_NT = torch.autograd.grad(padded, logprob_NT)[0]
    assert grads_NT.isfinite().all() and (grads_NT[~mask_NT] == 0).all()


def test_what_is_wrong_is_said():
    bad_NT = ENTROPY_NT.clone()
    bad_NT[0, 2] = math.nan
    with pytest.raises(ValueError, match="entropy_NT must be finite.*got nan in row 0, step 2"):
        pivot(bad_NT, ALL_NT)
    with pytest.raises(ValueError, match="a pivot needs at least one decision"):
        pivot(ENTROPY_NT, torch.zeros_like(ALL_NT))
    with pytest.raises(ValueError, match=r"quantile must lie in \[0, 1\], got 1.2"):
        pivot(ENTROPY_NT, ALL_NT, quantile=1.2)
    with pytest.raises(ValueError, match="log_quantile must be finite, got nan"):
        EntropyPivot(log_quantile=math.nan, above=1.0, below=1.0)
    with pytest.raises(ValueError, match="below must be finite and not below 0, got -1"):
        EntropyPivot(log_quantile=0.0, above=1.0, below=-1.0)

    reward_N, prompt_N, length_N = ragged_groups()
    with pytest.raises(ValueError, match=r"length_N must be integers of shape \(20,\)"):
        token_level_group(reward_N, prompt_N, length_N[:3])
    with pytest.raises(ValueError, match=r"length_N must be integers .* got torch.float32"):
        token_level_group(reward_N, prompt_N, length_N.float())
    with pytest.raises(ValueError, match="length_N must not be negative, got -1"):
        token_level_group(reward_N, prompt_N, length_N.clamp(max=-1))
    with pytest.raises(ValueError, match="fallback_at must be positive, got 0"):
        token_level_group(reward_N, prompt_N, length_N, fallback_at=0)
    with pytest.raises(ValueError, match="reward_N must be finite, got nan"):
        token_level_group(reward_N * math.nan, prompt_N, length_N)

    with pytest.raises(ValueError, match=r"h_NT must lie in \[-1, 1\], got -2"):
        clip_ranges(2 * H_NT)
    with pytest.raises(ValueError, match="must be at least 0, got -0.1 and 0.28"):
        clip_ranges(H_NT, epsilon_low=-0.1)
    with pytest.raises(ValueError, match=r"must have the shape \(1, 5\) of h_NT"):
        redistribute(torch.ones(1), H_NT, H_NT[:, :2], *clip_ranges(H_NT))
    logprob_NT, old_NT, advantage_N, mask_NT, _ = random_step()
    rows = (logprob_NT, old_NT, advantage_N, mask_NT.double())
    with pytest.raises(ValueError, match="h_NT must share one shape"):
        hapo(*rows, denominator=1.0, h_NT=H_NT)
    with pytest.raises(ValueError, match="denominator must be positive"):
        hapo(*rows, denominator=0.0, h_NT=torch.zeros(8, 7))
