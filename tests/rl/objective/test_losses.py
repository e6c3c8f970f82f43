import math

import pytest
import torch

from rl.objective.losses import cispo, clipped_surrogate, raft, raft_pp, sapo


def capped(*args, **settings):
    return cispo(*args, **({"ratio_cap": 1.1} | settings))


LOSSES = [clipped_surrogate, raft, raft_pp, capped, sapo]


def batch(seed=0, num_rollouts=6, num_steps=5, binary=True):
    """Ratios on both sides of the clip, weights that differ, 0 on a ragged tail."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rollouts, num_steps)
    logprob_NT = -torch.rand(shape, dtype=torch.float64, generator=generator) * 3
    old_NT = logprob_NT + torch.randn(shape, dtype=torch.float64, generator=generator) * 0.3
    advantage_N = torch.randn(num_rollouts, dtype=torch.float64, generator=generator)
    if binary:
        advantage_N = (advantage_N > 0).double()
    weight_NT = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1
    length_N = torch.randint(1, num_steps + 1, (num_rollouts, 1), generator=generator)
    weight_NT = torch.where(torch.arange(num_steps) < length_N, weight_NT, 0.0)
    return logprob_NT.requires_grad_(), old_NT, advantage_N, weight_NT


def gradient(loss, logprob_NT):
    return torch.autograd.grad(loss, logprob_NT)[0]


def one(ratio, advantage, loss=clipped_surrogate, **settings):
    """Loss, gradient d loss / d logprob and statistics of one decision of weight 1."""
    logprob_NT = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    value, statistics = loss(
        logprob_NT,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.float64),
        denominator=1.0,
        **settings,
    )
    return value.item(), gradient(value, logprob_NT).item(), statistics


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # The gradient is -rho A where the clip does not bind, and 0 where it does.
        (1.5, 1.0, -1.28, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.1, -2.0, 2.2, 2.2),
        (1.0, 1.0, -1.0, -1.0),
        (5.0, -1.0, 5.0, 5.0),
    ],
)
def test_golden_values_and_gradients_of_the_clip(ratio, advantage, loss, slope):
    value, grad, _ = one(ratio, advantage, epsilon_low=0.2, epsilon_high=0.28)
    assert value == pytest.approx(loss, abs=1e-12)
    assert grad == pytest.approx(slope, abs=1e-12)


def test_dual_clip_caps_the_loss_of_a_negative_advantage():
    value, grad, statistics = one(5.0, -1.0, epsilon_high=0.28, dual_clip=3.0)
    assert (value, grad, statistics["clipped_dual"].item()) == (3.0, 0.0, 1.0)
    value, grad, statistics = one(2.0, -1.0, epsilon_high=0.28, dual_clip=3.0)
    assert (value, grad) == (pytest.approx(2.0), pytest.approx(2.0))
    assert statistics["clipped_dual"] == 0
    # A positive advantage is capped by the clip alone.
    assert one(5.0, 1.0, epsilon_high=0.28, dual_clip=3.0)[0] == pytest.approx(-1.28)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_clipped_surrogate_matches_a_loop(seed, dual_clip):
    logprob_NT, old_NT, advantage_N, weight_NT = batch(seed, binary=False)
    settings = {"epsilon_low": 0.1, "epsilon_high": 0.3, "dual_clip": dual_clip}
    loss, statistics = clipped_surrogate(
        logprob_NT, old_NT, advantage_N, weight_NT, denominator=7.0, **settings
    )
    total, slope_NT = 0.0, torch.zeros_like(weight_NT)
    counts = dict.fromkeys(statistics, 0.0)
    for n, t in weight_NT.nonzero().tolist():
        w, a = weight_NT[n, t].item(), advantage_N[n].item()
        log_rho = logprob_NT[n, t].item() - old_NT[n, t].item()
        rho = math.exp(log_rho)
        value = min(rho * a, min(max(rho, 0.9), 1.3) * a)
        low, high = a < 0 and rho < 0.9, a > 0 and rho > 1.3
        dual = dual_clip is not None and a < 0 and rho > dual_clip
        if dual:
            value = dual_clip * a
        total -= w * value / 7.0
        slope_NT[n, t] = 0.0 if low or high or dual else -w * a * rho / 7.0
        for name, x in [
            ("tokens", 1),
            ("ratio", rho),
            ("kl_old", rho - 1 - log_rho),
            ("clipped_low", low),
            ("clipped_high", high),
            ("clipped_dual", dual),
        ]:
            counts[name] += x
    assert counts["clipped_low"] > 0 or counts["clipped_high"] > 0
    assert loss.item() == pytest.approx(total, abs=1e-12)
    torch.testing.assert_close(gradient(loss, logprob_NT), slope_NT, atol=1e-12, rtol=0)
    for name, x in counts.items():
        assert statistics[name].item() == pytest.approx(x, abs=1e-12), name
        assert not statistics[name].requires_grad


def test_without_clips_it_is_the_plain_policy_gradient():
    logprob_NT, old_NT, advantage_N, weight_NT = batch(binary=False)
    loss, _ = clipped_surrogate(
        logprob_NT,
        old_NT,
        advantage_N,
        weight_NT,
        denominator=3.0,
        epsilon_low=math.inf,
        epsilon_high=math.inf,
    )
    ratio_NT = (logprob_NT - old_NT).exp().detach()
    expected = -weight_NT * ratio_NT * advantage_N[:, None] / 3.0
    torch.testing.assert_close(gradient(loss, logprob_NT), expected, atol=1e-14, rtol=0)


def test_raft_by_hand():
    logprob_NT = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]], dtype=torch.float64)
    logprob_NT.requires_grad_()
    weight_NT = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    advantage_N = torch.tensor([1.0, 1.0], dtype=torch.float64)
    loss, statistics = raft(logprob_NT, logprob_NT.detach(), advantage_N, weight_NT, denominator=2)
    # -(0.5 * -1 + 0.5 * -2 + 1 * -4)/2
    assert loss.item() == 2.75
    assert gradient(loss, logprob_NT).tolist() == [[-0.25, -0.25], [-0.5, 0.0]]
    assert statistics["tokens"] == 3 and statistics["ratio"] == 3


def test_raft_does_not_see_the_old_policy():
    logprob_NT, old_NT, advantage_N, weight_NT = batch()
    one_, _ = raft(logprob_NT, old_NT, advantage_N, weight_NT, denominator=1)
    other, _ = raft(logprob_NT, old_NT - 1, advantage_N, weight_NT, denominator=1)
    assert one_ == other


@pytest.mark.parametrize(
    ("ratio", "expected", "slope"), [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (1.3, 1.2, 0.0)]
)
def test_raft_pp_caps_the_ratio_from_above_only(ratio, expected, slope):
    value, grad, statistics = one(ratio, 1.0, raft_pp)
    assert -value == pytest.approx(expected, abs=1e-12)
    assert -grad == pytest.approx(slope, abs=1e-12)
    assert statistics["clipped_low"] == 0
    assert statistics["clipped_high"] == (ratio > 1.2)


@pytest.mark.parametrize("epsilon_low", [0.0, 0.2, 0.9])
def test_raft_pp_is_min_of_the_ratio_and_the_cap(epsilon_low):
    logprob_NT, old_NT, advantage_N, weight_NT = batch()
    loss, _ = raft_pp(
        logprob_NT, old_NT, advantage_N, weight_NT, denominator=2.0, epsilon_low=epsilon_low
    )
    ratio_NT = (logprob_NT - old_NT).exp()
    expected = -(weight_NT * advantage_N[:, None] * ratio_NT.clamp(max=1.2)).sum() / 2.0
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    slope_NT = gradient(loss, logprob_NT)
    torch.testing.assert_close(slope_NT, gradient(expected, logprob_NT), atol=1e-12, rtol=0)
    above_NT = ratio_NT > 1.2
    assert (slope_NT[above_NT] == 0).all() and above_NT.any()


def test_on_policy_raft_pp_has_the_gradient_of_raft():
    logprob_NT, _, advantage_N, weight_NT = batch()
    old_NT = logprob_NT.detach()
    grads = [
        gradient(loss(logprob_NT, old_NT, advantage_N, weight_NT, denominator=2.0)[0], logprob_NT)
        for loss in (raft, raft_pp, clipped_surrogate)
    ]
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], atol=1e-15, rtol=0)
    torch.testing.assert_close(grads[2], grads[0], atol=1e-15, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss):
    rows = batch()
    whole, statistics = loss(*rows, denominator=3.7)
    parts = [
        loss(*(x[part] for x in rows), denominator=3.7)
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(value for value, _ in parts), whole, atol=1e-12, rtol=0)
    for name, total in statistics.items():
        torch.testing.assert_close(sum(s[name] for _, s in parts), total, atol=1e-12, rtol=0)
    grads = gradient(sum(value for value, _ in parts), rows[0])
    torch.testing.assert_close(grads, gradient(whole, rows[0]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_and_row_order_change_nothing(loss):
    rows = batch()
    whole, _ = loss(*rows, denominator=2.0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    logprob_NT, old_NT, advantage_N, weight_NT = (x[order] for x in rows)
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (logprob_NT, old_NT, weight_NT)]
    padded, _ = loss(wide[0], wide[1], advantage_N, wide[2], denominator=2.0)
    torch.testing.assert_close(padded, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logprob", "old", "advantage"])
def test_what_stands_at_weight_0_reaches_neither_loss_nor_gradient(loss, rubbish, where):
    logprob_NT, old_NT, advantage_N, weight_NT = batch()
    advantage_NT = advantage_N[:, None].expand(weight_NT.shape)
    clean, expected = loss(logprob_NT, old_NT, advantage_N, weight_NT, denominator=2.0)
    columns = {"logprob": logprob_NT.detach(), "old": old_NT, "advantage": advantage_NT}
    columns[where] = torch.where(weight_NT == 0, rubbish, columns[where])
    columns["logprob"].requires_grad_()
    value, statistics = loss(*columns.values(), weight_NT, denominator=2.0)
    assert (weight_NT == 0).any() and value.item() == clean.item()
    grads = gradient(value, columns["logprob"])
    torch.testing.assert_close(grads, gradient(clean, logprob_NT), atol=0, rtol=0)
    for name, total in expected.items():
        assert statistics[name] == total, name


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nonfinite_logprob_that_counts_is_reported(loss):
    logprob_NT, old_NT, advantage_N, weight_NT = batch()
    assert loss(logprob_NT, old_NT, advantage_N, weight_NT, denominator=1)[1]["nonfinite"] == 0
    old_NT[0, 0] = -math.inf
    assert weight_NT[0, 0] > 0
    _, statistics = loss(logprob_NT, old_NT, advantage_N, weight_NT, denominator=1)
    assert statistics["nonfinite"] == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_without_weight_is_0_with_gradient_0(loss):
    logprob_NT, old_NT, advantage_N, weight_NT = batch()
    value, statistics = loss(logprob_NT, old_NT, advantage_N, weight_NT * 0, denominator=2.0)
    assert value == 0 and all(total == 0 for total in statistics.values())
    assert (gradient(value, logprob_NT) == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_advantages_may_vary_within_a_row(loss):
    logprob_NT, old_NT, advantage_N, weight_NT = batch()
    rowwise, _ = loss(logprob_NT, old_NT, advantage_N, weight_NT, denominator=2.0)
    advantage_NT = advantage_N[:, None].expand(weight_NT.shape).clone()
    stepwise, _ = loss(logprob_NT, old_NT, advantage_NT, weight_NT, denominator=2.0)
    assert stepwise == rowwise
    # Doubling one decision's advantage is doubling its weight.
    advantage_NT[:, 0] *= 2
    double_NT = weight_NT.clone()
    double_NT[:, 0] *= 2
    doubled, _ = loss(logprob_NT, old_NT, advantage_NT, weight_NT, denominator=2.0)
    expected, _ = loss(logprob_NT, old_NT, advantage_N, double_NT, denominator=2.0)
    torch.testing.assert_close(doubled, expected, atol=1e-14, rtol=0)
    assert doubled != rowwise


@pytest.mark.parametrize(
    ("loss", "expected"), [(clipped_surrogate, 1.2), (raft_pp, 1.2), (sapo, 4)]
)
def test_a_runaway_ratio_does_not_overflow(loss, expected):
    logprob_NT = torch.zeros(1, 1, requires_grad=True)
    value, statistics = loss(
        logprob_NT, torch.full((1, 1), -200.0), torch.ones(1), torch.ones(1, 1), denominator=1.0
    )
    assert value.item() == pytest.approx(-expected)
    assert statistics["ratio"].isfinite() and statistics["kl_old"].isfinite()
    assert gradient(value, logprob_NT) == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_the_loss_is_float32_at_least_whatever_the_weights_are(loss, dtype, expected):
    rows = batch()
    value, _ = loss(rows[0].to(dtype), *rows[1:], denominator=2.0)
    assert value.dtype == expected
    exact, _ = loss(rows[0].to(dtype).double(), *rows[1:], denominator=2.0)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_say_what_is_wrong(loss):
    rows = batch()
    with pytest.raises(TypeError, match="denominator"):
        loss(*rows)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"positive and finite, got {wrong}"):
            loss(*rows, denominator=wrong)
    with pytest.raises(ValueError, match=r"got \(6, 5\), \(5, 5\), \(6, 5\) and \(6,\)"):
        loss(rows[0], rows[1][1:], rows[2], rows[3], denominator=1.0)
    with pytest.raises(ValueError, match=r"advantage_N be \(N,\) or \(N, T\)"):
        loss(rows[0], rows[1], rows[2][1:], rows[3], denominator=1.0)


def test_clip_ranges_may_differ_between_decisions():
    logprob_NT, old_NT, advantage_N, weight_NT = batch(binary=False)
    generator = torch.Generator().manual_seed(5)
    low_NT, high_NT = torch.rand(2, 6, 5, dtype=torch.float64, generator=generator) * 0.4
    whole, statistics = clipped_surrogate(
        logprob_NT,
        old_NT,
        advantage_N,
        weight_NT,
        denominator=2.0,
        epsilon_low=torch.where(weight_NT == 0, math.nan, low_NT),
        epsilon_high=high_NT,
    )
    parts = []
    for n, t in weight_NT.nonzero().tolist():
        at = (slice(n, n + 1), slice(t, t + 1))
        parts.append(
            clipped_surrogate(
                logprob_NT[at],
                old_NT[at],
                advantage_N[n : n + 1],
                weight_NT[at],
                denominator=2.0,
                epsilon_low=low_NT[n, t].item(),
                epsilon_high=high_NT[n, t].item(),
            )
        )
    torch.testing.assert_close(sum(value for value, _ in parts), whole, atol=1e-12, rtol=0)
    for name, total in statistics.items():
        torch.testing.assert_close(sum(s[name] for _, s in parts), total, atol=1e-12, rtol=0)
    assert statistics["clipped_low"] > 0 and statistics["clipped_high"] > 0
    torch.testing.assert_close(
        gradient(whole, logprob_NT),
        gradient(sum(value for value, _ in parts), logprob_NT),
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clip_range_is_the_same_as_a_number_and_as_a_tensor(dtype):
    rows = [x.to(dtype) for x in batch(binary=False)]
    number, counts = clipped_surrogate(*rows, denominator=2.0, epsilon_low=0.25, epsilon_high=0.125)
    low_NT, high_NT = torch.full((6, 5), 0.25), torch.full((6, 5), 0.125)
    tensor, others = clipped_surrogate(
        *rows, denominator=2.0, epsilon_low=low_NT, epsilon_high=high_NT
    )
    assert number.item() == tensor.item() and number.dtype == tensor.dtype
    assert {k: v.item() for k, v in counts.items()} == {k: v.item() for k, v in others.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.0, 2.0, -2.0), (1.05, -2.0, 2.1), (3.0, 1.0, -1.1), (3.0, -1.0, 1.1), (0.2, 1.0, -0.2)],
)
def test_cispo_caps_the_weight_and_keeps_the_gradient(ratio, advantage, slope):
    # d loss / d logprob = -min(rho, 1.1) A; the value is that times logprob = log rho.
    value, grad, statistics = one(ratio, advantage, capped)
    assert grad == pytest.approx(slope, abs=1e-12)
    assert value == pytest.approx(slope * math.log(ratio), abs=1e-12)
    assert statistics["capped"] == (ratio > 1.1)
    assert statistics["clipped_high"] == 0


def test_an_epsilon_given_as_ratio_cap_is_refused():
    rows = batch()
    with pytest.raises(
        ValueError, match=r"ratio_cap must be at least 1, got 0\.2; it caps the ratio"
    ):
        cispo(*rows, denominator=1.0, ratio_cap=0.2)
    with pytest.raises(TypeError, match="ratio_cap"):
        cispo(*rows, denominator=1.0)


@pytest.mark.parametrize(("advantage", "tau"), [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.05), (-3.0, 1.05)])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.5, 6.0])
def test_sapo_is_a_sigmoid_gate_of_slope_1_at_ratio_1(ratio, advantage, tau):
    value, grad, _ = one(ratio, advantage, sapo)
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    assert value == pytest.approx(-4 / tau * gate * advantage, abs=1e-12)
    # d gate = tau gate (1 - gate) d rho, and d rho / d logprob = rho.
    assert grad == pytest.approx(-4 * gate * (1 - gate) * ratio * advantage, abs=1e-12)
    if ratio == 1.0:
        assert grad == pytest.approx(-advantage, abs=1e-12)


def test_sapo_golden_value():
    assert one(1.5, 1.0, sapo)[0] == pytest.approx(-2.489837, abs=5e-7)


def test_on_policy_every_token_loss_has_one_gradient():
    logprob_NT, _, advantage_N, weight_NT = batch(binary=False)
    rows = (logprob_NT, logprob_NT.detach(), advantage_N, weight_NT)
    expected = -weight_NT * advantage_N[:, None] / 3.0
    for loss in (clipped_surrogate, raft, capped, sapo):
        grads = gradient(loss(*rows, denominator=3.0)[0], logprob_NT)
        torch.testing.assert_close(grads, expected, atol=1e-14, rtol=0)


def test_settings_out_of_range_are_refused():
    rows = batch()
    with pytest.raises(ValueError, match=r"epsilon_high must be at least 0, got 0\.2 and -1"):
        clipped_surrogate(*rows, denominator=1.0, epsilon_high=-1)
    with pytest.raises(ValueError, match=r"epsilon_high must be at least 0, got nan and 0\.2"):
        raft_pp(*rows, denominator=1.0, epsilon_low=math.nan)
    with pytest.raises(ValueError, match="dual_clip must be above 1, got 1"):
        clipped_surrogate(*rows, denominator=1.0, dual_clip=1)
    with pytest.raises(ValueError, match=r"advantages must be at least 0, got -1\.0"):
        raft_pp(rows[0], rows[1], rows[2] - 1, rows[3], denominator=1.0)
    with pytest.raises(ValueError, match=r"got 0\.2 and -0\.5"):
        clipped_surrogate(*rows, denominator=1.0, epsilon_high=torch.full((6, 5), -0.5))
    with pytest.raises(ValueError, match=r"numbers or of shape \(6, 5\), got \(5,\)"):
        clipped_surrogate(*rows, denominator=1.0, epsilon_low=torch.full((5,), 0.5))
    with pytest.raises(ValueError, match=r"must be positive, got 1\.0 and 0"):
        sapo(*rows, denominator=1.0, temperature_negative=0)
