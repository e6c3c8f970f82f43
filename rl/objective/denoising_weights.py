"""Weights of denoising steps: which edges are trained, and how much each counts.

The weight of a decision is a row's weight on the edges that are trained, times what the edge's
noise makes of it:

    weight_NT = trained_steps(row_weight_N, mask_NT, plan.trained)
    weight_NT = noise_weighted(weight_NT, std_T, edges=plan.stochastic)
    weight_NT = once_per_edge(weight_NT, distinct_T, steps=plan.trained)
    loss      = sum(weight_NT * surrogate_NT) / denominator

No length rule is needed, as every row of a plan trains the same edges: over rows and trained steps,
as the published losses are, the denominator is the number of weights other than 0. With
`step_weights.token_weight` for a length rule, `trained_steps(...) != 0` is its mask.

Axes: N rollouts, T denoising steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

KL_REDUCTIONS = ("sum", "mean", "flow_grpo")


def trained_steps(row_weight_N: Tensor, mask_NT: Tensor, steps: Sequence[int]) -> Tensor:
    """The row's weight on the edges that are trained, 0 on the others.

        w_nt = row_weight_n   if t in steps and mask_nt, else 0

    An edge that drew no noise, or noise of std 0 as the last of `ddim` with an exact end, is off
    the mask: it has no log-probability and is left out, whatever the plan says.

    Args:
        row_weight_N: (N,) weights >= 0.
        mask_NT: (N, T) bool, True where the edge has a log-probability.
        steps: edges in 0 .. T - 1.

    Returns:
        (N, T) weights in the dtype of `row_weight_N`.

    Raises:
        ValueError: if shapes differ, or an edge is outside the chain or occurs twice.
    """
    if mask_NT.ndim != 2 or row_weight_N.shape != mask_NT.shape[:1]:
        raise ValueError(
            f"row_weight_N must be (N,) and mask_NT (N, T), "
            f"got {tuple(row_weight_N.shape)} and {tuple(mask_NT.shape)}"
        )
    is_trained_T = _edges("steps", steps, mask_NT.shape[1]).to(mask_NT.device)
    return torch.where(mask_NT & is_trained_T, row_weight_N[:, None], 0.0).to(row_weight_N.dtype)


def noise_weighted(weight_NT: Tensor, std_T: Tensor, *, edges: Sequence[int]) -> Tensor:
    """Weights in proportion to the noise of the edge, with mean 1 over `edges`.

        w_nt  <-  w_nt * std_t / (mean of std over edges)

    The score of an edge is (x' - mean) / std^2, so that late edges, with little noise, have large
    gradients and would lead; the factor evens them out. (TempFlow-GRPO, arXiv:2508.04324: the loss
    times the std, scaled to mean 1, as third parties describe it; its formula was not at hand.)

    Args:
        weight_NT: (N, T) weights.
        std_T: (T,) std of each edge's noise, from the kernel and the table of levels; >= 0.
        edges: what the mean is over: all edges that take their turn, not only this step's, or
            training one edge at a time would undo the factor. Their mean std must be positive.

    Returns:
        (N, T) weights in the dtype of `weight_NT`; exactly 0 where they were.

    Raises:
        ValueError: if shapes differ, a std is negative or not finite, all stds of `edges` are 0, or
            `edges` are none, outside the chain or not distinct.
    """
    if weight_NT.ndim != 2 or std_T.shape != weight_NT.shape[1:]:
        raise ValueError(
            f"weight_NT must be (N, T) and std_T (T,), "
            f"got {tuple(weight_NT.shape)} and {tuple(std_T.shape)}"
        )
    std_T = std_T.detach().double()
    if not (std_T.isfinite() & (std_T >= 0)).all():
        raise ValueError(f"std_T must be finite and at least 0, got {std_T.tolist()}")
    among_T = _edges("edges", edges, len(std_T)).to(std_T.device)
    if not among_T.any() or not std_T[among_T].mean() > 0:
        raise ValueError(
            f"the mean std over edges must be positive, got {std_T[among_T].tolist()} "
            f"at edges {tuple(edges)}"
        )
    factor_T = (std_T / std_T[among_T].mean()).to(weight_NT.device)
    return (weight_NT.double() * factor_T).to(weight_NT.dtype)


def kl_factor(reduction: str, levels: Tensor, *, elements: int) -> Tensor:
    """What a step's KL in nats (`rollouts.diffusion.sde.gaussian_kl`) is multiplied by, for each edge.

        sum        1               kl, of all D elements of a latent
        mean       1 / D           of one element: beside log-probabilities that are means as well
        flow_grpo  |dt| / D        mean over D of (mean - mean_ref)^2 / (2 g^2),  g = std / sqrt(|dt|)

    with dt = sigma' - sigma. The last is that of Flow-GRPO (arXiv:2505.05470, released code), in
    whose unit its beta of .04 is given; g is the diffusion coefficient of the SDE rules, `flow_sde`
    and `constant_sde`. The factor must go with `logprob_reduction`: a policy gradient of means is 1 / D
    of that of sums, and a KL that is a sum beside it holds the policy still.

    Args:
        reduction: a name above.
        levels: (T, 4) table of the chain: alpha, sigma, alpha', sigma'.
        elements: D, of one latent.

    Returns:
        (T,) float64.

    Raises:
        ValueError: if the name is unknown or `elements` below 1.
    """
    if reduction not in KL_REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(KL_REDUCTIONS)}, got {reduction!r}")
    if elements < 1:
        raise ValueError(f"elements must be at least 1, got {elements}")
    one_T = torch.ones(len(levels), dtype=torch.float64, device=levels.device)
    if reduction == "sum":
        return one_T
    if reduction == "mean":
        return one_T / elements
    return (levels[:, 1].double() - levels[:, 3].double()).abs() / elements


def once_per_edge(weight_NT: Tensor, distinct_T: Tensor, *, steps: Sequence[int]) -> Tensor:
    """Weights with which an edge that several samples share counts once, and not once for each.

        w_nt  <-  w_nt * m_t / (mean of m over the trained edges)

    with m_t the distinct edges of one tree at step t. There is one row per leaf, so an edge above
    k leaves occurs in k rows: by itself it counts k times, its share of the leaves, which is its
    weight in the gradient of the expected reward. With the factor every distinct edge of a tree has
    one weight, and that of all together is what it was. The advantage of an edge is then the mean of
    its rows'; rows that were dropped count as 0. (BranchGRPO, arXiv:2509.06040, whose released code
    trains a list of distinct edges; shallow edges then have up to the leaves of a tree times less
    weight than in the gradient of the expected reward.)

    Args:
        weight_NT: (N, T) weights.
        distinct_T: (T,) positive numbers of distinct edges of one tree.
        steps: the trained edges in 0 .. T - 1, at least one.

    Returns:
        (N, T) weights in the dtype of `weight_NT`. Where trees do not branch, nothing changes.

    Raises:
        ValueError: if shapes differ, a number is below 1, or `steps` are none, outside the chain or
            not distinct.
    """
    if weight_NT.ndim != 2 or distinct_T.shape != weight_NT.shape[1:]:
        raise ValueError(
            f"weight_NT must be (N, T) and distinct_T (T,), "
            f"got {tuple(weight_NT.shape)} and {tuple(distinct_T.shape)}"
        )
    if not (distinct_T >= 1).all() or not len(steps):
        raise ValueError(
            f"distinct_T must be at least 1 and steps not empty, got {distinct_T.tolist()} and "
            f"{tuple(steps)}"
        )
    among_T = _edges("steps", steps, len(distinct_T)).to(distinct_T.device)
    distinct_T = distinct_T.double()
    factor_T = (distinct_T / distinct_T[among_T].mean()).to(weight_NT.device)
    return (weight_NT.double() * factor_T).to(weight_NT.dtype)


def _edges(name: str, edges: Sequence[int], num_steps: int) -> Tensor:
    """(T,) bool, True at the edges."""
    if len(set(edges)) != len(edges) or any(not 0 <= edge < num_steps for edge in edges):
        raise ValueError(f"{name} must be distinct edges in 0..{num_steps - 1}, got {tuple(edges)}")
    is_edge_T = torch.zeros(num_steps, dtype=torch.bool)
    is_edge_T[list(edges)] = True
    return is_edge_T
