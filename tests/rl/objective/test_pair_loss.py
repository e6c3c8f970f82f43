import math

import pytest
import torch

from rl.objective.pair_loss import d3po_pair


def batch(seed=0, num_rows=5, num_steps=4, spread=0.15):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_steps)
    reference_NT = torch.randn(shape, dtype=torch.float64, generator=generator)
    logprob_NT = reference_NT + spread * torch.randn(
        shape, dtype=torch.float64, generator=generator
    )
    chosen_K, rejected_K = torch.tensor([0, 0, 3, 4]), torch.tensor([1, 2, 1, 3])
    weight_KT = torch.rand(4, num_steps, dtype=torch.float64, generator=generator) + 0.1
    weight_KT[1, 2:] = 0
    return logprob_NT.requires_grad_(), reference_NT, chosen_K, rejected_K, weight_KT


def pair(chosen, rejected, **settings):
    """Loss, both gradients and statistics of one pair with the given log-ratios."""
    logprob_NT = torch.tensor([[chosen], [rejected]], dtype=torch.float64, requires_grad=True)
    loss, statistics = d3po_pair(
        logprob_NT,
        torch.zeros(2, 1, dtype=torch.float64),
        torch.tensor([0]),
        torch.tensor([1]),
        torch.ones(1, 1, dtype=torch.float64),
        denominator=1.0,
        **settings,
    )
    return loss.item(), *torch.autograd.grad(loss, logprob_NT)[0].flatten().tolist(), statistics


def test_on_the_reference_the_loss_is_log_2_and_pulls_apart():
    loss, up, down, statistics = pair(0.0, 0.0)
    # d/dx of -log sigmoid(.1 x) at 0 is -.1 / 2.
    assert (loss, up, down) == (pytest.approx(math.log(2)), pytest.approx(-0.05), 0.05)
    assert {name: x.item() for name, x in statistics.items()} == {
        "pairs": 1,
        "preferred": 0,
        "margin": 0,
        "clipped": 0,
        "nonfinite": 0,
    }


def test_inside_the_clamp_by_hand():
    loss, up, down, statistics = pair(0.05, -0.08)
    margin = 0.1 * 0.13
    assert loss == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-14)
    assert up == pytest.approx(-0.1 / (1 + math.exp(margin)), abs=1e-14)
    assert down == pytest.approx(-up, abs=1e-14)
    assert statistics["margin"].item() == pytest.approx(margin)
    assert (statistics["preferred"], statistics["clipped"]) == (1, 0)


def test_a_ratio_outside_the_clamp_has_no_gradient_whichever_side_it_is_on():
    # log 1.1 = .0953, log .9 = -.1054.
    loss, up, down, statistics = pair(0.2, -0.3)
    assert (up, down) == (0.0, 0.0)
    margin = 0.1 * (math.log(1.1) - math.log(0.9))
    assert loss == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-14)
    assert (statistics["clipped"], statistics["preferred"]) == (2, 1)
    assert pair(-0.2, 0.0)[1:3] == (0.0, pytest.approx(0.05, abs=1e-3))
    assert pair(0.09, -0.10)[3]["clipped"] == 0


def test_beta_epsilon_and_the_scale_by_hand():
    settings = {"beta": 2.0, "epsilon": 0.5, "log_ratio_scale": 0.01}
    loss, up, down, statistics = pair(30.0, -80.0, **settings)
    # The log-ratios are .3 and -.8; the latter is clamped to log .5.
    margin = 2 * (0.3 - math.log(0.5))
    assert loss == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-14)
    assert up == pytest.approx(-2 * 0.01 / (1 + math.exp(margin)), abs=1e-14)
    assert (down, statistics["clipped"]) == (0.0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_matches_a_loop(seed):
    logprob_NT, reference_NT, chosen_K, rejected_K, weight_KT = batch(seed)
    loss, statistics = d3po_pair(*batch(seed), denominator=6.0)
    total = margins = 0.0
    clipped = preferred = 0
    for k, t in weight_KT.nonzero().tolist():
        logs = []
        for row, sign in ((int(chosen_K[k]), 1), (int(rejected_K[k]), -1)):
            rho = math.exp((logprob_NT - reference_NT)[row, t].item())
            clipped += not 0.9 <= rho <= 1.1
            logs.append(0.1 * sign * math.log(min(max(rho, 0.9), 1.1)))
        total -= weight_KT[k, t].item() * math.log(1 / (1 + math.exp(-sum(logs)))) / 6
        margins += sum(logs)
        preferred += sum(logs) > 0
    assert loss.item() == pytest.approx(total, abs=1e-12)
    assert statistics["margin"].item() == pytest.approx(margins, abs=1e-12)
    assert (statistics["clipped"], statistics["preferred"]) == (clipped, preferred)
    assert statistics["pairs"] == 14
    assert clipped > 0


def test_the_gradient_is_that_of_central_differences():
    logprob_NT, *rest = batch(spread=0.03)
    assert torch.autograd.gradcheck(
        lambda x: d3po_pair(x, *rest, denominator=2.0)[0], (logprob_NT,), atol=1e-8
    )


def test_swapping_a_pair_mirrors_its_margin():
    logprob_NT, reference_NT, chosen_K, rejected_K, weight_KT = batch()
    one = d3po_pair(logprob_NT, reference_NT, chosen_K, rejected_K, weight_KT, denominator=1.0)
    other = d3po_pair(logprob_NT, reference_NT, rejected_K, chosen_K, weight_KT, denominator=1.0)
    torch.testing.assert_close(one[1]["margin"], -other[1]["margin"])


def test_pairs_and_steps_in_micro_batches_add_up_to_the_batch():
    logprob_NT, reference_NT, chosen_K, rejected_K, weight_KT = batch()
    whole, statistics = d3po_pair(*batch(), denominator=5.0)
    parts = [
        d3po_pair(
            logprob_NT[:, edges],
            reference_NT[:, edges],
            chosen_K[pairs],
            rejected_K[pairs],
            weight_KT[pairs, edges],
            denominator=5.0,
        )
        for pairs in (slice(0, 1), slice(1, 4))
        for edges in (slice(0, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name, value in statistics.items():
        torch.testing.assert_close(sum(sums[name] for _, sums in parts), value)


def test_what_stands_where_the_weight_is_0_does_not_matter():
    logprob_NT, reference_NT, chosen_K, rejected_K, weight_KT = batch()
    expected, _ = d3po_pair(*batch(), denominator=5.0)
    with torch.no_grad():
        logprob_NT[2, 2:] = math.nan  # row 2 is in the pair without weight there
    loss, statistics = d3po_pair(
        logprob_NT, reference_NT, chosen_K, rejected_K, weight_KT, denominator=5.0
    )
    assert loss == expected
    assert statistics["nonfinite"] == 0
    slope_NT = torch.autograd.grad(loss, logprob_NT)[0]
    assert slope_NT.isfinite().all() and not slope_NT[2, 2:].any()


def test_a_nan_where_it_counts_is_counted():
    logprob_NT, *rest = batch()
    with torch.no_grad():
        logprob_NT[0, 0] = math.nan
    assert d3po_pair(logprob_NT, *rest, denominator=5.0)[1]["nonfinite"] == 2


def test_no_pairs_give_no_loss():
    logprob_NT, reference_NT, *_ = batch()
    none = torch.zeros(0, dtype=torch.int64)
    loss, statistics = d3po_pair(
        logprob_NT, reference_NT, none, none, torch.zeros(0, 4), denominator=1.0
    )
    assert loss == 0 and statistics["pairs"] == 0
    assert not torch.autograd.grad(loss, logprob_NT)[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, "beta must be positive and finite, got 0"),
        ({"epsilon": 1}, r"epsilon must be in \(0, 1\), got 1"),
        ({"denominator": 0}, "denominator must be positive and finite, got 0"),
        ({"log_ratio_scale": -1}, "log_ratio_scale must be positive and finite, got -1"),
        ({"chosen_K": torch.tensor([0, 0, 3, 5])}, r"chosen_K must lie in 0..4, got \[0, 0, 3, 5"),
        ({"chosen_K": torch.tensor([0, 0, 1, 4])}, "pair 2 is of row 1 with itself"),
        ({"rejected_K": torch.tensor([1])}, r"weight_KT \(K, 4\), got \(4,\), \(1,\) and \(4, 4\)"),
        ({"reference_logprob_NT": torch.zeros(5, 3)}, r"got \(5, 4\) and \(5, 3\)"),
    ],
)
def test_what_is_wrong_is_said(changes, message):
    names = ("logprob_NT", "reference_logprob_NT", "chosen_K", "rejected_K", "weight_KT")
    arguments = dict(zip(names, batch(), strict=True)) | {"denominator": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        d3po_pair(**arguments)
