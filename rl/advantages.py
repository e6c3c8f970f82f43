"""Advantage estimators: from one reward per rollout to one advantage per rollout.

Rollouts of one prompt share a value of `prompt_N`. Groups may differ in size and their rows
may lie anywhere in the batch, so nothing here reshapes to (prompts, group size). A group is one
draw of a prompt: a prompt drawn twice is two groups and comes with two ids.

Every estimator takes all scored rows of a step, before any row is dropped. Statistics are float64
and the result has the rewards' dtype; no gradient flows through it.

Axes: N rollouts, P prompts (groups).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Advantage = Callable[[Tensor, Tensor], Tensor]
"""`advantage(reward_N, prompt_N) -> advantage_N`. Any function of this shape is an estimator."""


class _Groups(NamedTuple):
    """The rewards in float64 and, for every row, the statistics of the group it belongs to."""

    reward_N: Tensor
    group_N: Tensor
    size_N: Tensor
    sum_N: Tensor
    max_N: Tensor
    mixed_N: Tensor

    def total(self, value_N: Tensor) -> Tensor:
        """Sum of `value_N` over each row's group, one entry per row."""
        num_groups = int(self.group_N.max()) + 1 if len(self.group_N) else 0
        sum_P = value_N.new_zeros(num_groups).index_add(0, self.group_N, value_N)
        return sum_P[self.group_N]


def _groups(reward_N: Tensor, prompt_N: Tensor) -> _Groups:
    """Check the rows and take their groups' statistics.

    A group is mixed when max > min. Its std will not do as the test: eight float32 rewards of
    0.7 have a residual of 6e-8, which eps = 1e-6 turns into an advantage of 0.056.
    """
    if reward_N.shape != prompt_N.shape or reward_N.ndim != 1:
        raise ValueError(
            f"reward_N and prompt_N must be 1-d and equally long, "
            f"got {tuple(reward_N.shape)} and {tuple(prompt_N.shape)}"
        )
    if not reward_N.is_floating_point():
        raise ValueError(f"reward_N must be floating point, got {reward_N.dtype}")
    if not torch.isfinite(reward_N).all():
        row = int((~torch.isfinite(reward_N)).nonzero()[0])
        raise ValueError(
            f"reward_N must be finite, got {reward_N[row].item()} in row {row} "
            f"of prompt {int(prompt_N[row])}"
        )
    value_N = reward_N.detach().double()
    _, group_N = prompt_N.unique(return_inverse=True)
    size_P = group_N.bincount()
    sum_P = value_N.new_zeros(len(size_P)).index_add(0, group_N, value_N)
    empty_P = value_N.new_zeros(len(size_P))
    max_P = empty_P.scatter_reduce(0, group_N, value_N, "amax", include_self=False)
    min_P = empty_P.scatter_reduce(0, group_N, value_N, "amin", include_self=False)
    return _Groups(
        reward_N=value_N,
        group_N=group_N,
        size_N=size_P[group_N],
        sum_N=sum_P[group_N],
        max_N=max_P[group_N],
        mixed_N=(max_P > min_P)[group_N],
    )


def centred(reward_N: Tensor, prompt_N: Tensor) -> Tensor:
    """Reward minus the mean reward of the prompt, without dividing by the std.

        A_i = r_i - mean_j r_j

    The mean contains rollout i itself, so the expected policy gradient is (n - 1) / n of the true
    one. That factor differs between prompts once their budgets differ; `leave_one_out` removes it.
    (Dr.GRPO: Liu et al., 2025, arXiv:2503.20783.)

    Args:
        reward_N: (N,) finite floating-point rewards.
        prompt_N: (N,) integers, the group of each rollout.

    Returns:
        (N,) advantages in the dtype of `reward_N`. A group of one, or of equal rewards, gets
        exactly 0.

    Raises:
        ValueError: if shapes differ, or a reward is not finite or not floating point.
    """
    g = _groups(reward_N, prompt_N)
    return torch.where(g.mixed_N, g.reward_N - g.sum_N / g.size_N, 0.0).to(reward_N.dtype)


def leave_one_out(reward_N: Tensor, prompt_N: Tensor) -> Tensor:
    """Reward minus the mean reward of the prompt's other rollouts.

        A_i = r_i - mean_{j != i} r_j = n / (n - 1) * (r_i - mean_j r_j)

    with n the size of i's group. The baseline does not depend on rollout i, so the policy
    gradient stays unbiased; with the plain group mean it is scaled by (n - 1) / n, which differs
    between prompts once their budgets differ. (Kool et al., 2019; Ahmadian et al., 2024,
    arXiv:2402.14740.)

    Args:
        reward_N: (N,) finite floating-point rewards.
        prompt_N: (N,) integers, the group of each rollout.

    Returns:
        (N,) advantages in the dtype of `reward_N`. A lone rollout has nothing to be compared with
        and gets 0, as does a group of equal rewards, exactly.

    Raises:
        ValueError: if shapes differ, or a reward is not finite or not floating point.
    """
    g = _groups(reward_N, prompt_N)
    baseline_N = (g.sum_N - g.reward_N) / (g.size_N - 1).clamp(min=1)
    return torch.where(g.mixed_N, g.reward_N - baseline_N, 0.0).to(reward_N.dtype)


def grpo(reward_N: Tensor, prompt_N: Tensor, *, correction: int = 0, eps: float = 1e-6) -> Tensor:
    """Reward minus the mean reward of the prompt, in units of the prompt's std.

        A_i = (r_i - mean_j r_j) / (std_j r_j + eps)

    (Shao et al., 2024, arXiv:2402.03300.) With 0/1 rewards it ascends 2 arcsin(sqrt(p)) for large
    groups; for small ones the prompt's weight depends on the group size, so unequal budgets change
    the objective even under per-prompt means. The paper states neither the kind of std nor eps:
    the population std and 1e-6 are the project's defaults, not from the paper. TRL is matched by
    `correction=1, eps=1e-4`. The choice of std scales A by sqrt((n - 1) / n), so it too re-weights
    prompts of unequal budgets.

    Args:
        reward_N: (N,) finite floating-point rewards.
        prompt_N: (N,) integers, the group of each rollout.
        correction: 0 for the population std, 1 for the unbiased one.
        eps: added to the std, outside the root; >= 0.

    Returns:
        (N,) advantages in the dtype of `reward_N`. A group of one, or of equal rewards, gets
        exactly 0, whatever `eps`.

    Raises:
        ValueError: if shapes differ, a reward is not finite or not floating point, or a setting
            is out of range.
    """
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 or 1, got {correction}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    g = _groups(reward_N, prompt_N)
    deviation_N = g.reward_N - g.sum_N / g.size_N
    variance_N = g.total(deviation_N.square()) / (g.size_N - correction).clamp(min=1)
    scaled_N = deviation_N / (variance_N.sqrt() + eps)
    return torch.where(g.mixed_N, scaled_N, 0.0).to(reward_N.dtype)


def raft(reward_N: Tensor, prompt_N: Tensor) -> Tensor:
    """1 for the accepted rollouts of a prompt, 0 for the others: no baseline, no negatives.

        A_i = 1 if r_i = max_j r_j and max_j r_j > 0, else 0

    For 0/1 rewards this is A = r. The indicator r = max r is the paper's (RAFT++: Yao et al.,
    2025, arXiv:2505.02391, eq. 8); read literally it keeps every row of a prompt whose rollouts all
    fail, where the released code trains on none, and the code is followed. That a maximum of 0 or
    less is a failure for rewards other than 0/1 too is a project default, not from the paper.

    Args:
        reward_N: (N,) finite floating-point rewards.
        prompt_N: (N,) integers, the group of each rollout.

    Returns:
        (N,) zeros and ones in the dtype of `reward_N`. Ties at the maximum are all accepted, so a
        group of one, or of equal rewards, is accepted whole if its reward is positive: unlike
        the estimators with a baseline, RAFT learns from prompts that always succeed.

    Raises:
        ValueError: if shapes differ, or a reward is not finite or not floating point.
    """
    g = _groups(reward_N, prompt_N)
    return ((g.reward_N == g.max_N) & (g.max_N > 0)).to(reward_N.dtype)
