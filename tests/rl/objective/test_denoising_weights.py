import math

import pytest
import torch

from rl.objective.denoising_weights import kl_factor, noise_weighted, once_per_edge, trained_steps
from rl.objective.losses import clipped_surrogate
from rl.objective.weights import token_weight
from rollouts.diffusion.sde import gaussian_kl, step_noise
from rollouts.step_plan import StepPlan
from tests import tiny_denoising as tiny


def masked(num_rows=3, num_steps=5):
    """All edges stochastic but the last, whose std is 0."""
    mask_NT = torch.ones(num_rows, num_steps, dtype=torch.bool)
    mask_NT[:, -1] = False
    return mask_NT


def test_trained_steps_by_hand():
    weight_NT = trained_steps(torch.tensor([0.5, 2.0]), masked(2), (1, 3, 4))
    # Edge 4 has no log-probability.
    assert weight_NT.tolist() == [[0, 0.5, 0, 0.5, 0], [0, 2, 0, 2, 0]]
    assert weight_NT.dtype == torch.float32


def test_no_trained_steps_are_no_weights():
    assert not trained_steps(torch.ones(3), masked(), ()).any()


def test_a_length_rule_takes_the_trained_edges_for_its_mask():
    row_weight_N = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mask_NT = trained_steps(row_weight_N, masked(), (0, 2)) != 0
    weight_NT = token_weight("row_mean", row_weight_N, mask_NT, max_completion_length=5)
    assert weight_NT.tolist() == [[0.5, 0, 0.5, 0, 0], [1, 0, 1, 0, 0], [1.5, 0, 1.5, 0, 0]]


def test_over_its_nonzero_weights_the_loss_is_the_mean_over_rows_and_trained_steps():
    generator = torch.Generator().manual_seed(0)
    logprob_NT = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    advantage_N = torch.randn(3, dtype=torch.float64, generator=generator)
    weight_NT = trained_steps(torch.ones(3, dtype=torch.float64), masked(), (1, 2))
    denominator = float((weight_NT != 0).sum())
    loss, _ = clipped_surrogate(
        logprob_NT,
        torch.zeros_like(logprob_NT),
        advantage_N,
        weight_NT,
        denominator=denominator,
        epsilon_low=math.inf,
        epsilon_high=math.inf,
    )
    expected = -(logprob_NT[:, 1:3].exp() * advantage_N[:, None]).mean()
    torch.testing.assert_close(loss, expected)


def test_noise_weighted_by_hand():
    std_T = torch.tensor([0.6, 0.3, 0.3, 0.0], dtype=torch.float64)
    weight_NT = torch.tensor([[1.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    # Mean std over edges 0 .. 2 is .4, so the factors are 1.5, .75, .75 and 0.
    expected_NT = torch.tensor([[1.5, 0.75, 0.0, 0.0], [3.0, 1.5, 1.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(noise_weighted(weight_NT, std_T, edges=(0, 1, 2)), expected_NT)


def test_the_factors_have_mean_1_over_the_edges_whichever_is_trained():
    std_T = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edges = (1, 2, 5, 7)
    total = 0.0
    for edge in edges:
        weight_NT = trained_steps(
            torch.ones(2, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool), (edge,)
        )
        total += noise_weighted(weight_NT, std_T, edges=edges)[0, edge].item()
    assert total / len(edges) == pytest.approx(1, abs=1e-12)


def test_only_ratios_of_stds_count_and_equal_stds_change_nothing():
    weight_NT = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    std_T = torch.tensor([0.1, 0.2, 0.3, 0.4])
    first_NT = noise_weighted(weight_NT, std_T, edges=range(4))
    assert first_NT.dtype == torch.float32
    torch.testing.assert_close(noise_weighted(weight_NT, 7 * std_T, edges=range(4)), first_NT)
    same_NT = noise_weighted(weight_NT, torch.full((4,), 0.3), edges=range(4))
    torch.testing.assert_close(same_NT, weight_NT, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trained_steps(torch.ones(2), masked(), (1,)), r"got \(2,\) and \(3, 5\)"),
        (lambda: trained_steps(torch.ones(3), masked(), (1, 5)), r"in 0..4, got \(1, 5\)"),
        (lambda: trained_steps(torch.ones(3), masked(), (1, 1)), r"distinct .* got \(1, 1\)"),
        (
            lambda: noise_weighted(torch.ones(2, 3), torch.ones(2), edges=(0,)),
            r"got \(2, 3\) and \(2,\)",
        ),
        (
            lambda: noise_weighted(torch.ones(2, 2), torch.tensor([1.0, -1.0]), edges=(0,)),
            r"at least 0, got \[1.0, -1.0\]",
        ),
        (
            lambda: noise_weighted(torch.ones(2, 2), torch.tensor([1.0, 0.0]), edges=(1,)),
            r"must be positive, got \[0.0\] at edges \(1,\)",
        ),
        (
            lambda: noise_weighted(torch.ones(2, 2), torch.tensor([1.0, 0.0]), edges=()),
            r"must be positive, got \[\] at edges \(\)",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_kl_factors_by_hand():
    """Edges from sigma 1 to .75 and from .75 to .5, latents of 8 elements."""
    levels = torch.tensor([[0.0, 1.0, 0.25, 0.75], [0.25, 0.75, 0.5, 0.5]])
    assert kl_factor("sum", levels, elements=8).tolist() == [1, 1]
    assert kl_factor("mean", levels, elements=8).tolist() == [0.125, 0.125]
    assert kl_factor("flow_grpo", levels, elements=8).tolist() == [0.03125, 0.03125]
    with pytest.raises(
        ValueError, match="reduction must be one of sum, mean, flow_grpo, got 'max'"
    ):
        kl_factor("max", levels, elements=8)
    with pytest.raises(ValueError, match="elements must be at least 1, got 0"):
        kl_factor("sum", levels, elements=0)


@pytest.mark.parametrize(("rule", "level"), [("flow_sde", 0.7), ("constant_sde", 0.3)])
def test_flow_grpos_kl_is_the_mean_over_elements_by_the_coefficient_without_the_step(rule, level):
    """((mean - mean_ref) ** 2).mean() / (2 g ** 2), g as its paper defines it; 64 elements."""
    sigma, next_sigma, elements = 0.6, 0.5, 64
    levels = torch.tensor([[1 - sigma, sigma, 1 - next_sigma, next_sigma]], dtype=torch.float64)
    g = level * math.sqrt(sigma / (1 - sigma)) if rule == "flow_sde" else level
    generator = torch.Generator().manual_seed(0)
    mean, reference = torch.randn(2, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    mean, reference = mean[None], reference[None]
    std, _ = step_noise(levels, rule=rule, level=level)
    released = ((mean - reference) ** 2).mean() / (2 * g**2)
    ours = gaussian_kl(mean, reference, std) * kl_factor("flow_grpo", levels, elements=elements)
    assert ours.item() == pytest.approx(released.item(), rel=1e-12)
    # In nats of the latent it is D / |dt| = 640 times as large.
    assert gaussian_kl(mean, reference, std).item() == pytest.approx(640 * released.item())


def test_once_per_edge_by_hand():
    # Edges 0 and 1 of a tree are one each, after a split in two and another in two there are 2 and 4;
    # edge 1 is not trained. The mean of 1, 2 and 4 is 7 / 3.
    weight_NT = torch.tensor([[1.0, 0.0, 1.0, 1.0], [2.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    found_NT = once_per_edge(weight_NT, torch.tensor([1, 1, 2, 4]), steps=(0, 2, 3))
    expected = [[3 / 7, 0, 6 / 7, 12 / 7], [6 / 7, 0, 12 / 7, 0]]
    torch.testing.assert_close(found_NT, torch.tensor(expected, dtype=torch.float64))


def test_once_per_edge_is_the_mean_over_the_list_of_distinct_edges():
    _, rollouts = tiny.drawn(
        budgets=(6, 12),
        plan=StepPlan(
            num_steps=4,
            rule="ddim",
            level=1.0,
            stochastic=(0, 1, 2),
            splits=((1, 2), (2, 3)),
            trained=(0, 1, 2),
        ),
    )
    plan, tree = rollouts.tree.plan, rollouts.tree
    value_M = torch.randn(len(tree), dtype=torch.float64)  # of the edge into each state
    weight_NT = trained_steps(torch.ones(18, dtype=torch.float64), rollouts.mask_NT, plan.trained)
    distinct_T = torch.tensor([plan.states_at(t + 1) for t in range(4)])
    once_NT = once_per_edge(weight_NT, distinct_T, steps=plan.trained)
    value_NT = value_M[rollouts.node_NS[:, 1:]]
    listed = [
        value_M[m]
        for m in range(len(tree))
        if tree.parent_M[m] >= 0 and tree.step_M[m] - 1 in (0, 1, 2)
    ]
    assert len(listed) == 3 * (1 + 2 + 6)
    mean = (once_NT * value_NT).sum() / (18 * 3)
    torch.testing.assert_close(mean, torch.stack(listed).mean())
    assert not torch.allclose((weight_NT * value_NT).sum() / (18 * 3), mean)


def test_trees_that_do_not_branch_have_their_edges_once():
    weight_NT = torch.rand(3, 4)
    assert torch.equal(once_per_edge(weight_NT, torch.ones(4).long(), steps=(0, 1)), weight_NT)


def test_once_per_edge_says_what_is_wrong():
    weight_NT, ones_T = torch.ones(2, 3), torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2,\)"):
        once_per_edge(weight_NT, ones_T[:2], steps=(0,))
    with pytest.raises(ValueError, match="at least 1 and steps not empty, got .*0"):
        once_per_edge(weight_NT, ones_T * 0, steps=(0,))
    with pytest.raises(ValueError, match=r"not empty, got .* and \(\)"):
        once_per_edge(weight_NT, ones_T, steps=())
