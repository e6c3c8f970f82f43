"""Credit along a denoising chain that branches: one advantage per row and edge.

A rollout is a path of states from its root (pure noise) to its leaf (the sample), and siblings
share the states above their split. V(state) is the mean reward of the leaves below it; the credit
of an edge is V(child) - b, and the estimators differ in b alone:

    function             b                                            credit on the prefix
    branch_mean          mean over the leaves of the root             exactly 0
    depth_normalised     mean over the prompt's states of that depth, in units of their std
    parent_difference    V(parent)                                    exactly 0
    leave_branch_out     mean over the leaves that do not share the edge, below its nearest split

(`branch_mean` takes r_leaf for V(child).) There is one row per leaf, so an edge
that k leaves share occurs in k rows, and row weight 1 is its right weight; a loss over unique
edges would multiply by the leaf count. BranchGRPO's release does not: it trains every distinct edge
once (`edge_weight: once`, `denoising_weights.once_per_edge`).

As an (N,) column the first is `advantages.centred` with the root as its key; with the prompt as its key
that is the baseline of the whole prompt. `advantages.leave_one_out` with the root as its key is the
comparison within a branch.

All take every leaf of a step, before rows are dropped. Statistics are float64, the result has the
rewards' dtype and no gradient. Where the leaves that are compared have equal rewards the credit is
exactly 0.

Axes: N rollouts (leaves), T denoising steps, S = T + 1 states of a row, M distinct states.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rl.objective.advantages import centred


class Tree(NamedTuple):
    """The shape of a batch of denoising trees: the path of each row, and the states on the paths."""

    node_NS: Tensor
    """(N, S) int64, the states of each row from root to leaf."""
    parent_M: Tensor
    """(M,) int64, each state's parent; -1 at roots."""
    step_M: Tensor
    """(M,) int64, each state's place in its path, 0 at roots."""
    leaves_M: Tensor
    """(M,) int64, how many leaves each state has; those in the batch must be all."""
    prompt_N: Tensor
    """(N,) integers, the prompt of each rollout."""


Credit = Callable[[Tensor, Tree], Tensor]
"""`credit(reward_N, tree) -> advantage_NT`. Any function of this shape is an estimator."""


class _Values(NamedTuple):
    """Sums over the leaves below each state, in float64."""

    value_N: Tensor
    group_N: Tensor
    sum_M: Tensor
    count_M: Tensor
    max_M: Tensor
    min_M: Tensor

    @property
    def value_M(self) -> Tensor:
        """V, the mean reward of the leaves below each state; 0 where the batch has none."""
        return self.sum_M / self.count_M.clamp(min=1)

    @property
    def mixed_M(self) -> Tensor:
        """Whether the leaves below have different rewards."""
        return self.max_M > self.min_M


def branch_mean(reward_N: Tensor, tree: Tree) -> Tensor:
    """Reward minus the mean over the leaves of the same root, on the edges after the first split.

        A_nt = r_n - V(root)    where the edge is not shared by all leaves of the root, else 0

    On the prefix the credits of a root's leaves sum to 0, so nothing but clipping would be left of
    them; here they are exactly 0 there. Roots whose leaves have equal rewards are silent.

    Args, Returns, Raises: as `leave_branch_out`. A root of one leaf gets 0.
    """
    _values(reward_N, tree)
    node_NS, leaves_M = tree.node_NS, tree.leaves_M
    advantage_N = centred(reward_N, node_NS[:, 0])
    suffix_NT = leaves_M[node_NS[:, 1:]] < leaves_M[node_NS[:, :1]]
    return torch.where(suffix_NT, advantage_N[:, None], 0.0)


def depth_normalised(reward_N: Tensor, tree: Tree, *, eps: float = 1e-8) -> Tensor:
    """V(child) standardised over the states of its depth.

        A_nt = (V(child) - mean_d V) / (std_d V + eps)

    with mean and unbiased std over the prompt's distinct states of that depth, each counted once
    however many leaves it has. (BranchGRPO, arXiv:2509.06040, as released, where a prompt has one
    root; that several roots of a prompt are compared with each other is a project default.) As a
    state's value already averages its leaves, stds are smaller near the root, and the division
    brings every depth to unit scale. The release takes stds below 1e-6 for 0, here only equal
    values are; the two differ for rewards closer than that.

    Args, Returns, Raises: as `leave_branch_out`; ValueError too for a negative `eps`. A depth of
    one state, or of equal values, gets 0.
    """
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    values = _values(reward_N, tree)
    node_NS, parent_M = tree.node_NS, tree.parent_M
    prompt_M = torch.full_like(parent_M, -1)  # stays -1 where no row of the batch goes through
    prompt_M[node_NS] = values.group_N[:, None].expand(node_NS.shape)
    _, group_M = (prompt_M * node_NS.shape[1] + tree.step_M).unique(return_inverse=True)
    sum_G, size_G, *_ = _below(values.value_M, group_M)
    deviation_M = values.value_M - (sum_G / size_G)[group_M]
    square_G, *_ = _below(deviation_M.square(), group_M)
    std_G = (square_G / (size_G - 1).clamp(min=1)).sqrt()
    # Means of equal rewards may differ in their last digit, the rewards do not.
    *_, max_G, _ = _below(values.max_M, group_M)
    *_, min_G = _below(values.min_M, group_M)
    z_M = deviation_M / (std_G[group_M] + eps)
    z_M = torch.where((max_G > min_G)[group_M] & (deviation_M != 0), z_M, 0.0)
    return z_M[node_NS[:, 1:]].to(reward_N.dtype)


def parent_difference(reward_N: Tensor, tree: Tree) -> Tensor:
    """What each edge changed in the value of the path: V(child) - V(parent).

    Along a path the credits add up to r_leaf - V(root), and over the children of a state, weighted
    by leaves, to 0. It is exactly 0 on every edge whose state has one child, so by itself it trains
    the edges of splits only. The mean contains the edge's own leaves: with k children the expected
    gradient is (k - 1) / k of the true one. (No source: derived.)

    Args, Returns, Raises: as `leave_branch_out`.
    """
    values = _values(reward_N, tree)
    child_NT, parent_NT = tree.node_NS[:, 1:], tree.node_NS[:, :-1]
    splits_NT = values.count_M[child_NT] < values.count_M[parent_NT]
    credit_NT = values.value_M[child_NT] - values.value_M[parent_NT]
    credit_NT = torch.where(splits_NT & values.mixed_M[parent_NT], credit_NT, 0.0)
    return credit_NT.to(reward_N.dtype)


def leave_branch_out(reward_N: Tensor, tree: Tree) -> Tensor:
    """V(child) minus the mean over the leaves that took another branch.

        A_nt = V(child) - mean of r over the leaves below the other children of the nearest
               split at or above the edge; above the first split, over the prompt's other roots

    The baseline does not depend on the edge's noise, so the gradient is unbiased for every edge,
    those of the prefix included. Leaving out only the leaf is not enough there: its siblings share
    the edge, and with k leaves a root and n leaves a prompt the expected gradient of a prefix edge
    shrinks to 1 - (k - 1) / (n - 1). (No source: derived.)

    Args:
        reward_N: (N,) finite floating-point rewards, one per leaf.
        tree: the paths of the same rows, and their states.

    Returns:
        (N, T) advantages in the dtype of `reward_N`, one value per distinct edge. An edge that
        nothing is compared with, as above the first split of a prompt's only root, gets 0.

    Raises:
        ValueError: if shapes differ, a reward is not finite or not floating point, a path does not
            follow the parents, or leaves are missing or occur twice.
    """
    values, node_NS = _values(reward_N, tree), tree.node_NS
    per_state = (values.sum_M, values.count_M, values.max_M, values.min_M)
    # Going down: the leaves below the nearest split, at first the prompt's. Those below the edge are
    # the branch, as nothing splits in between.
    around = [x_P[values.group_N] for x_P in _below(values.value_N, values.group_N)]
    credit_NT = torch.zeros_like(node_NS[:, 1:], dtype=values.value_N.dtype)
    for t in range(node_NS.shape[1] - 1):
        state_N, child_N = node_NS[:, t], node_NS[:, t + 1]
        splits_N = values.count_M[child_N] < values.count_M[state_N]
        around = [
            torch.where(splits_N, x_M[state_N], x_N)
            for x_M, x_N in zip(per_state, around, strict=True)
        ]
        sum_N, count_N, max_N, min_N = around
        others_N = count_N - values.count_M[child_N]
        baseline_N = (sum_N - values.sum_M[child_N]) / others_N.clamp(min=1)
        compared_N = (others_N > 0) & (max_N > min_N)
        credit_NT[:, t] = torch.where(compared_N, values.value_M[child_N] - baseline_N, 0.0)
    return credit_NT.to(reward_N.dtype)


def _values(reward_N: Tensor, tree: Tree) -> _Values:
    """Check the tree and sum the rewards below every state."""
    node_NS, parent_M, step_M, leaves_M, prompt_N = tree
    num_rows, num_states = len(reward_N), len(parent_M)
    if node_NS.ndim != 2 or len(node_NS) != num_rows or node_NS.shape[1] < 2:
        raise ValueError(
            f"node_NS must be ({num_rows}, T + 1) with T at least 1 to match reward_N, "
            f"got {tuple(node_NS.shape)}"
        )
    if not step_M.shape == leaves_M.shape == parent_M.shape == (num_states,):
        raise ValueError(
            f"parent_M, step_M and leaves_M must be 1-d and equally long, got "
            f"{tuple(parent_M.shape)}, {tuple(step_M.shape)} and {tuple(leaves_M.shape)}"
        )
    centred(reward_N, prompt_N)  # its checks, which name the row and the prompt
    if num_rows and not (node_NS.min() >= 0 and node_NS.max() < num_states):
        raise ValueError(
            f"node_NS must lie in 0..{num_states - 1}, "
            f"got {int(node_NS.min())} .. {int(node_NS.max())}"
        )
    above_NS = torch.cat([torch.full_like(node_NS[:, :1], -1), node_NS[:, :-1]], dim=1)
    place_NS = torch.arange(node_NS.shape[1], device=node_NS.device).expand_as(node_NS)
    for name, column_M, expected_NS in (
        ("parent_M", parent_M, above_NS),
        ("step_M", step_M, place_NS),
    ):
        wrong_NS = column_M[node_NS] != expected_NS
        if wrong_NS.any():
            row, at = wrong_NS.nonzero()[0].tolist()
            raise ValueError(
                f"node_NS does not follow {name}: state {int(node_NS[row, at])} at place {at} of "
                f"row {row} has {int(column_M[node_NS[row, at]])}, "
                f"expected {int(expected_NS[row, at])}"
            )
    value_N = reward_N.detach().double()
    value_NS = value_N[:, None].expand(node_NS.shape)
    below = _below(value_NS.flatten(), node_NS.flatten(), num_states)
    missing_M = (below[1] > 0) & (below[1] != leaves_M)
    if missing_M.any():
        state = int(missing_M.nonzero()[0])
        raise ValueError(
            f"state {state} has {int(leaves_M[state])} leaves, but {int(below[1][state])} rows go "
            f"through it; credit is given to all leaves of a step, before rows are dropped"
        )
    _, group_N = prompt_N.unique(return_inverse=True)
    _, _, max_M, min_M = _below(group_N, node_NS[:, 0], num_states)
    if (max_M != min_M).any():
        raise ValueError(f"state {int((max_M != min_M).nonzero()[0])} is the root of two prompts")
    return _Values(value_N, group_N, *below)


def _below(
    value_K: Tensor, group_K: Tensor, num_groups: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, count, largest and smallest of the values of each group."""
    if num_groups is None:
        num_groups = int(group_K.max()) + 1 if len(group_K) else 0
    zero_G = value_K.new_zeros(num_groups)
    return (
        zero_G.index_add(0, group_K, value_K),
        group_K.bincount(minlength=num_groups),
        zero_G.scatter_reduce(0, group_K, value_K, "amax", include_self=False),
        zero_G.scatter_reduce(0, group_K, value_K, "amin", include_self=False),
    )
