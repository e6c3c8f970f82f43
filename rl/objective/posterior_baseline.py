"""An advantage whose baseline remembers: the posterior of a prompt's pass rate, without the row itself.

Axes: P prompts, N rollouts (flat rows).
"""

from __future__ import annotations

import torch
from torch import Tensor


def posterior_leave_one_out(reward_N: Tensor, prompt_N: Tensor, a_P: Tensor, b_P: Tensor) -> Tensor:
    """Reward minus what the prompt's posterior expects, given everything but that rollout.

        b_i = (a_p + S_p - r_i) / (a_p + b_p + n_p - 1)          A_i = r_i - b_i

    with Beta(a_p, b_p) the posterior before any rollout of the group, n_p the group's rollouts and S_p
    their summed rewards. It blends leave-one-out and memory by what each is worth, n - 1 and a + b.
    The baseline does not depend on rollout i, so E[A_i grad log pi_i] is the gradient of the pass rate
    for every n of at least 1 and every (a, b), right or wrong: budgets and priors do not change the
    objective. a = b = 0 is leave-one-out (RLOO, arXiv:2402.14740); n = 1 is SPO's value baseline
    (arXiv:2509.13232). Groups that are all alike carry signal too. (Derived for this project.)

    Args:
        reward_N: (N,) rewards in [0, 1]; fractions count as fractions.
        prompt_N: (N,) int64, which prompt each rollout belongs to: a row of a_P and b_P.
        a_P, b_P: (P,) finite and at least 0.

    Returns:
        (N,) in the dtype of `reward_N`. A lone rollout of a prompt with a = b = 0 has nothing to be
        compared with and gets 0.

    Raises:
        ValueError: if shapes differ, a reward is outside [0, 1], a prompt has no parameters, or these
            are negative or not finite.
    """
    if reward_N.shape != prompt_N.shape or reward_N.ndim != 1:
        raise ValueError(
            f"reward_N and prompt_N must be 1-d and equally long, "
            f"got {tuple(reward_N.shape)} and {tuple(prompt_N.shape)}"
        )
    if a_P.shape != b_P.shape or a_P.ndim != 1:
        raise ValueError(
            f"a_P and b_P must be 1-d and equally long, got {tuple(a_P.shape)} and {tuple(b_P.shape)}"
        )
    if len(prompt_N) and not 0 <= int(prompt_N.min()) <= int(prompt_N.max()) < len(a_P):
        raise ValueError(f"prompt_N must be in [0, {len(a_P)}), the prompts that a_P has")
    # Written so that NaN fails too.
    if not bool(((reward_N >= 0) & (reward_N <= 1)).all()):
        raise ValueError("rewards must lie in [0, 1]: they are compared with a pass rate")
    a_P, b_P = (each.to(reward_N.device, torch.float64) for each in (a_P, b_P))
    if not bool(((a_P >= 0) & (b_P >= 0) & a_P.isfinite() & b_P.isfinite()).all()):
        raise ValueError("a_P and b_P must be finite and at least 0")
    value_N = reward_N.double()
    sum_P = torch.zeros_like(a_P).index_add(0, prompt_N, value_N)
    strength_P = a_P + b_P + prompt_N.bincount(minlength=len(a_P)) - 1
    strength_N = strength_P[prompt_N]
    baseline_N = ((a_P + sum_P)[prompt_N] - value_N) / strength_N
    return torch.where(strength_N > 0, value_N - baseline_N, 0.0).to(reward_N.dtype)
