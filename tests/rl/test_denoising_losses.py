"""The clipped surrogate on denoising steps: ratios of means, credit per edge, micro-batches."""

import math

import pytest
import torch

from rl.objective.losses import clipped_surrogate


def batch(seed=0, num_rows=6, num_steps=5, spread=0.3):
    """Log-probabilities as large as a latent's, advantages per edge, weight 0 on the last edge."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_steps)

    def normal():
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    logprob_NT = -4e4 + 50 * normal()
    old_NT = logprob_NT + spread * normal()
    advantage_NT = normal()
    weight_NT = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1
    weight_NT[:, -1] = 0
    return logprob_NT.requires_grad_(), old_NT, advantage_NT, weight_NT


def gradient(loss, logprob_NT):
    return torch.autograd.grad(loss, logprob_NT)[0]


def one(log_ratio, advantage, **settings):
    """Loss, gradient and statistics of one decision with the given log-ratio in nats."""
    logprob_NT = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    loss, statistics = clipped_surrogate(
        logprob_NT, zero, zero + advantage, zero + 1, denominator=1.0, **settings
    )
    return loss.item(), gradient(loss, logprob_NT).item(), statistics


@pytest.mark.parametrize("scale", [1.0, 1 / 16384])
def test_at_ratio_1_the_gradient_is_reinforces(scale):
    logprob_NT, _, advantage_NT, weight_NT = batch()
    loss, statistics = clipped_surrogate(
        logprob_NT,
        logprob_NT.detach().clone(),
        advantage_NT,
        weight_NT,
        denominator=7.0,
        epsilon_low=1e-4,
        epsilon_high=1e-4,
        log_ratio_scale=scale,
    )
    expected_NT = -scale * weight_NT * advantage_NT / 7
    torch.testing.assert_close(gradient(loss, logprob_NT), expected_NT, atol=0, rtol=1e-14)
    assert statistics["ratio"] == statistics["tokens"] == 24


def test_rows_without_advantage_contribute_exactly_nothing():
    logprob_NT, old_NT, advantage_NT, weight_NT = batch()
    advantage_NT[[1, 4]] = 0
    loss, _ = clipped_surrogate(logprob_NT, old_NT, advantage_NT, weight_NT, denominator=1.0)
    assert not gradient(loss, logprob_NT)[[1, 4]].any()
    rest = torch.tensor([0, 2, 3, 5])
    part, _ = clipped_surrogate(
        logprob_NT[rest], old_NT[rest], advantage_NT[rest], weight_NT[rest], denominator=1.0
    )
    torch.testing.assert_close(part, loss)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [
        # D = 10, e = .1: the clip is at +.9531 and -1.0536 nats, 10 log(1 +- e).
        (0.95, 1.0, True),
        (0.96, 1.0, False),
        (0.96, -1.0, True),
        (-1.05, -1.0, True),
        (-1.06, -1.0, False),
        (-1.06, 1.0, True),
    ],
)
def test_the_clip_stops_what_has_gone_far_enough_in_its_direction(log_ratio, advantage, moves):
    settings = {"epsilon_low": 0.1, "epsilon_high": 0.1, "log_ratio_scale": 0.1}
    _, slope, statistics = one(log_ratio, advantage, **settings)
    expected = -advantage * 0.1 * math.exp(0.1 * log_ratio) if moves else 0.0
    assert slope == pytest.approx(expected, abs=1e-15)
    clipped = statistics["clipped_low"] + statistics["clipped_high"]
    assert clipped == (0 if moves else 1)
    assert statistics["ratio"].item() == pytest.approx(math.exp(0.1 * log_ratio))
    # In nats, whatever the scale.
    assert statistics["kl_old"].item() == pytest.approx(math.exp(log_ratio) - 1 - log_ratio)


@pytest.mark.parametrize(
    ("epsilon", "nats"), [(1e-5, 0.16), (1e-4, 1.64), (1e-3, 16.4), (0.1, 1638)]
)
def test_how_many_nats_published_clips_are_at_16384_elements(epsilon, nats):
    settings = {"epsilon_low": epsilon, "epsilon_high": epsilon, "log_ratio_scale": 1 / 16384}
    # The clip is at D log(1 + e), between D e (1 - e / 2) and D e; figures have two digits.
    assert one(nats * (1 - epsilon / 2) * 0.96, 1.0, **settings)[1] < 0
    assert one(nats * 1.04, 1.0, **settings)[1] == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_clip_on_means_has_the_clip_set_of_one_d_times_as_wide_on_sums(seed):
    elements, epsilon = 64, 1e-4
    batch_ = batch(seed, spread=elements * epsilon)
    sets = []
    for scale, low, high in [
        (1 / elements, epsilon, epsilon),
        (1.0, 1 - (1 - epsilon) ** elements, (1 + epsilon) ** elements - 1),
        (1.0, elements * epsilon, elements * epsilon),
    ]:
        loss, statistics = clipped_surrogate(
            *batch_, denominator=1.0, epsilon_low=low, epsilon_high=high, log_ratio_scale=scale
        )
        sets.append(gradient(loss, batch_[0]) == 0)
        assert statistics["clipped_low"] + statistics["clipped_high"] == sets[-1].sum() - 6
    # Exactly so, and to first order in the clip with e_sum = D e.
    assert torch.equal(sets[0], sets[1])
    assert 6 < sets[0].sum() < 30
    assert (sets[0] != sets[2]).sum() <= 1


def test_the_ratio_of_means_is_that_of_stored_means():
    logprob_NT, old_NT, advantage_NT, weight_NT = batch()
    loss, _ = clipped_surrogate(
        logprob_NT, old_NT, advantage_NT, weight_NT, denominator=3.0, log_ratio_scale=1 / 64
    )
    mean, _ = clipped_surrogate(
        logprob_NT / 64, old_NT / 64, advantage_NT, weight_NT, denominator=3.0
    )
    torch.testing.assert_close(loss, mean, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1 / 64])
def test_one_advantage_per_row_is_the_same_on_every_edge(scale):
    logprob_NT, old_NT, advantage_NT, weight_NT = batch()
    advantage_N = advantage_NT[:, 0]
    results = [
        clipped_surrogate(
            logprob_NT, old_NT, advantage, weight_NT, denominator=3.0, log_ratio_scale=scale
        )
        for advantage in (advantage_N, advantage_N[:, None].expand(6, 5))
    ]
    assert results[0] == results[1]


def test_credit_per_edge_by_hand():
    # At ratio 1 the loss is -(1 * 1 + 1 * -2 + .5 * 3) / 2.
    logprob_NT = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    advantage_NT = torch.tensor([[1.0, -2.0], [3.0, math.nan]], dtype=torch.float64)
    weight_NT = torch.tensor([[1.0, 1.0], [0.5, 0.0]], dtype=torch.float64)
    loss, _ = clipped_surrogate(
        logprob_NT, torch.zeros(2, 2).double(), advantage_NT, weight_NT, denominator=2.0
    )
    assert loss.item() == -0.25
    assert gradient(loss, logprob_NT).tolist() == [[-0.5, 1.0], [-0.75, 0.0]]


def test_rows_and_steps_in_micro_batches_add_up_to_the_batch():
    batch_ = batch()
    settings = {"denominator": 11.0, "log_ratio_scale": 1 / 8, "epsilon_high": 0.01}
    whole, statistics = clipped_surrogate(*batch_, **settings)
    whole_NT = gradient(whole, batch_[0])
    parts, sums, slope_NT = [], [], torch.zeros_like(whole_NT)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        for edges in (slice(0, 2), slice(2, 3), slice(3, 5)):
            part, part_statistics = clipped_surrogate(*(x[rows, edges] for x in batch_), **settings)
            slope_NT += gradient(part, batch_[0])
            parts.append(part)
            sums.append(part_statistics)
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    torch.testing.assert_close(slope_NT, whole_NT, atol=1e-15, rtol=0)
    for name, value in statistics.items():
        torch.testing.assert_close(sum(part[name] for part in sums), value)


def test_a_scale_of_1_changes_no_bit():
    batch_ = batch()
    plain = clipped_surrogate(*batch_, denominator=3.0)
    scaled = clipped_surrogate(*batch_, denominator=3.0, log_ratio_scale=1.0)
    assert plain == scaled


@pytest.mark.parametrize("scale", [0, -1, math.inf, math.nan])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(ValueError, match="log_ratio_scale must be positive and finite, got"):
        clipped_surrogate(*batch(), denominator=1.0, log_ratio_scale=scale)


def test_a_wrong_shape_of_credit_is_refused():
    logprob_NT, old_NT, advantage_NT, weight_NT = batch()
    with pytest.raises(ValueError, match=r"advantage_N be \(N,\) or \(N, T\); got .*\(6, 4\)"):
        clipped_surrogate(logprob_NT, old_NT, advantage_NT[:, :4], weight_NT, denominator=1.0)
