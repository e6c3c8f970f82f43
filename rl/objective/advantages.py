"""Advantage estimators: from one reward per rollout to one advantage per rollout.

Rollouts of one prompt share a value of `prompt_N`. Groups may differ in size and their rows
may lie anywhere in the batch, so nothing here reshapes to (prompts, group size). A group is one
draw of a prompt: a prompt drawn twice is two groups and comes with two ids.

Every estimator takes all scored rows of a step, over all processes and before any row is dropped.
Statistics are float64 and the result has the rewards' dtype; no gradient flows through it. For
`batch_whitened` and `batch_scaled` "all" is part of the definition: leaving out groups without
signal first raises the batch's std and so changes every advantage.

Axes: N rollouts, P prompts (groups).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Advantage = Callable[..., Tensor]
"""`advantage(reward_N, prompt_N) -> advantage_N`; `stratified` takes `stratum_N` third. Any function
of this shape is an estimator."""

SCALES = ("group", "batch", "none")
"""What `grpo` divides by; see there."""

FALLBACKS = ("blend", "group")
"""What `stratified` does where a stratum is too small; see there."""


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


def _check_std(correction: int, eps: float) -> None:
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 or 1, got {correction}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _standardised(g: _Groups, correction: int, eps: float) -> Tensor:
    """(r - mean) / (std + eps) of each row's group, in float64; exactly 0 where not mixed."""
    deviation_N = g.reward_N - g.sum_N / g.size_N
    variance_N = g.total(deviation_N.square()) / (g.size_N - correction).clamp(min=1)
    return torch.where(g.mixed_N, deviation_N / (variance_N.sqrt() + eps), 0.0)


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
    """The leave-one-out advantage: reward minus the mean reward of the prompt's other rollouts.

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


def grpo(
    reward_N: Tensor,
    prompt_N: Tensor,
    *,
    correction: int = 1,
    eps: float = 1e-4,
    scale: str = "group",
) -> Tensor:
    """Reward minus the mean reward of the prompt, in units of the prompt's std.

        A_i = (r_i - mean_j r_j) / (std_j r_j + eps)

    (Shao et al., 2024, arXiv:2402.03300.) With 0/1 rewards it ascends 2 arcsin(sqrt(p)) for large
    groups; for small ones the prompt's weight depends on the group size, so unequal budgets change
    the objective even under per-prompt means. The paper states neither the kind of std nor eps; the
    unbiased std and 1e-4 are those of TRL and PODS, whose advantages these are up to rounding (verl:
    unbiased, 1e-6). With the population std A is sqrt(n / (n - 1)) times as large, so that choice
    too re-weights prompts of unequal budgets.

    Args:
        reward_N: (N,) finite floating-point rewards.
        prompt_N: (N,) integers, the group of each rollout.
        correction: 0 for the population std, 1 for the unbiased one.
        eps: added to the std, outside the root; >= 0.
        scale: the std's rewards; TRL's `scale_rewards`. "group": the prompt's own. "batch": all of
            `reward_N`, as they are, so with the spread between prompts, which `batch_scaled` leaves
            out (PPO Lite: arXiv:2508.08221). "none": no division; `centred`.

    Returns:
        (N,) advantages in the dtype of `reward_N`. A group of one, or of equal rewards, gets
        exactly 0, whatever `eps` and `scale`; under "batch" its rows count in the std.

    Raises:
        ValueError: if shapes differ, a reward is not finite or not floating point, or a setting
            is out of range.
    """
    _check_std(correction, eps)
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    g = _groups(reward_N, prompt_N)
    if scale == "group":
        return _standardised(g, correction, eps).to(reward_N.dtype)
    deviation_N = torch.where(g.mixed_N, g.reward_N - g.sum_N / g.size_N, 0.0)
    if scale == "batch" and len(reward_N):
        square = (g.reward_N - g.reward_N.mean()).square().sum()
        deviation_N = deviation_N / ((square / max(len(reward_N) - correction, 1)).sqrt() + eps)
    return torch.where(g.mixed_N, deviation_N, 0.0).to(reward_N.dtype)


def maxrl(success_N: Tensor, prompt_N: Tensor) -> Tensor:
    """Success minus the prompt's pass rate, divided by that pass rate: the rarer a pass, the larger.

        A_i = (r_i - m) / m,    m = mean_j r_j,    0 if m = 0

    Per-prompt means of it (`objective: mean`) ascend the log of the pass rate, cut short: as
    log p = - sum_{k >= 1} (1 - p)^k / k,

        E[(1/n) sum_i A_i grad log pi_i] = sum_{k=1}^{n-1} (1 - p)^(k-1) grad p
                                         = (1 - (1 - p)^(n-1)) / p grad p
                                         = grad - sum_{k=1}^{n-1} (1 - p)^k / k

    so n = 2 is the mean objective and n without bound the log. The mean score of the passes, r_i / m,
    has n terms in expectation; the baseline takes off E[1(some pass) (1/n) sum_i grad log pi_i] =
    (1 - p)^(n-1) grad p, the last of them, because it is not subtracted where all fail. The first
    line follows by summing over all groups, which a test does. Groups of other sizes ascend other
    objectives: a prompt of n rollouts weighs (1 - (1 - p)^(n-1)) / p.
    (MaxRL: Tajwar et al., 2026, arXiv:2602.02710; the 0 where all fail is that of the released code.)

    Args:
        success_N: (N,) floating-point successes, each 0 or 1.
        prompt_N: (N,) integers, the group of each rollout.

    Returns:
        (N,) advantages in the dtype of `success_N`. A group of one, or in which all pass or all fail,
        gets exactly 0.

    Raises:
        ValueError: if shapes differ, or a success is not 0 or 1: the series is that of a probability.
    """
    g = _groups(success_N, prompt_N)
    other_N = (g.reward_N != 0) & (g.reward_N != 1)
    if other_N.any():
        row = int(other_N.nonzero()[0])
        raise ValueError(
            f"success_N must be 0 or 1, got {success_N[row].item()} in row {row} "
            f"of prompt {int(prompt_N[row])}"
        )
    mean_N = g.sum_N / g.size_N
    scaled_N = (g.reward_N - mean_N) / torch.where(g.mixed_N, mean_N, 1.0)
    return torch.where(g.mixed_N, scaled_N, 0.0).to(success_N.dtype)


def normalised_sum(
    reward_NF: Tensor,
    prompt_N: Tensor,
    *,
    weight_F: Tensor,
    correction: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Every reward function compared within the prompt by itself, then weighted, summed and scaled.

        z_if = (r_if - mean_j r_jf) / (std_j r_jf + eps),    R_i = sum_f weight_f z_if
        A_i  = R_i / (std_B R + eps)

    The std of a sum hides a function whose rewards vary little beside another's; here each has unit
    spread within the prompt before its weight counts. (GDPO: arXiv:2601.05242; TRL's
    `multi_objective_aggregation="normalize_then_sum"`, which also subtracts the mean of R over the
    batch: it is 0.)

    Args:
        reward_NF: (N, F) one column per reward function, NaN where a function gave none.
        prompt_N: (N,) integers, the group of each rollout.
        weight_F: (F,) finite weights.
        correction, eps: as `grpo`, within the group and over the batch.

    Returns:
        (N,) advantages in the dtype of `reward_NF`. A function that gave a prompt one reward, or
        equal ones, adds exactly 0 to its rows, and a missing reward adds 0 to its row. Rows without
        any reward get 0 and do not count in the std of the batch.

    Raises:
        ValueError: if shapes do not match, a reward or weight is infinite, or a setting is out of
            range.
    """
    _check_std(correction, eps)
    if reward_NF.ndim != 2 or tuple(weight_F.shape) != (reward_NF.shape[1],):
        raise ValueError(
            f"reward_NF must be (N, F) and weight_F (F,), got {tuple(reward_NF.shape)} and "
            f"{tuple(weight_F.shape)}"
        )
    if not torch.isfinite(weight_F).all():
        raise ValueError(f"weight_F must be finite, got {weight_F.tolist()}")
    total_N = torch.zeros(len(reward_NF), dtype=torch.float64, device=reward_NF.device)
    for reward_N, weight in zip(reward_NF.unbind(1), weight_F.tolist(), strict=True):
        given_N = ~reward_N.isnan()
        z_K = _standardised(_groups(reward_N[given_N], prompt_N[given_N]), correction, eps)
        total_N[given_N] += weight * z_K
    scored_N = ~reward_NF.isnan().all(dim=1)
    square = total_N[scored_N].square().sum()
    std = (square / (scored_N.sum() - correction).clamp(min=1)).sqrt()
    return torch.where(total_N == 0, 0.0, total_N / (std + eps)).to(reward_NF.dtype)


def batch_whitened(
    reward_N: Tensor, prompt_N: Tensor, *, correction: int = 1, eps: float = 1e-4
) -> Tensor:
    """Reward minus the mean of the whole batch, in units of the batch's std.

        A_i = (r_i - mean_B r) / (std_B r + eps)

    One baseline for all prompts, so a prompt needs one rollout only and a prompt that always
    succeeds is still reinforced; the price is that easy prompts are pushed up and hard ones down
    whatever was done on them. (REINFORCE++: Hu et al., 2025, arXiv:2501.03262.) Statistics are
    over rows; over tokens, as in some code, they would weigh rows by length. Kind of std and eps
    are `grpo`'s, as the paper states neither; leaving a KL term to the reward is a project default.

    Args:
        reward_N: (N,) finite floating-point rewards of the whole step.
        prompt_N: (N,) integers, the group of each rollout; only checked, no group is formed.
        correction: 0 for the population std, 1 for the unbiased one.
        eps: added to the std, outside the root; >= 0.

    Returns:
        (N,) advantages in the dtype of `reward_N`. A batch of one row, or of equal rewards, gets
        exactly 0; a group of one within a batch does not.

    Raises:
        ValueError: as `grpo`.
    """
    _check_std(correction, eps)
    _groups(reward_N, prompt_N)  # the checks, which name the prompt
    batch = _groups(reward_N, torch.zeros_like(prompt_N))
    return _standardised(batch, correction, eps).to(reward_N.dtype)


def batch_whitened_tokens(
    reward_N: Tensor,
    prompt_N: Tensor,
    logprob_NT: Tensor,
    reference_logprob_NT: Tensor | None,
    mask_NT: Tensor,
    *,
    beta: float,
    correction: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """The token form of `batch_whitened`: each token pays for the KL from itself on.

        a_it = r_i - beta * sum_{u >= t} (logprob_iu - reference_iu)
        A_it = (a_it - mean_B a) / (std_B a + eps)

    A token cannot change the KL of those before it, so their cost would only be noise in its
    advantage. Statistics are over the decisions of the batch, so long rows weigh more in them: at
    beta 0 that is what is left of the difference to `batch_whitened`.
    (REINFORCE++: Hu et al., 2025, arXiv:2501.03262, as third parties print it. verl takes the
    statistics over tokens too, with the unbiased std and 1e-8 added to the variance; kind of std and
    eps are `grpo`'s here.)

    Args:
        reward_N: (N,) finite rewards of the whole step, without any KL.
        prompt_N: (N,) integers, the group of each rollout; only checked.
        logprob_NT: (N, T) under the policy that sampled.
        reference_logprob_NT: (N, T) under the reference policy; None where beta is 0.
        mask_NT: (N, T) bool, the decisions.
        beta: weight of the KL, >= 0.
        correction, eps: as `batch_whitened`.

    Returns:
        (N, T) advantages in the dtype of `reward_N`, 0 off the mask, and everywhere if all a_it are
        equal.

    Raises:
        ValueError: as `grpo`, or for shapes that do not match, a negative beta, or a log-probability
            on the mask that is not finite.
    """
    _check_std(correction, eps)
    _groups(reward_N, prompt_N)
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be finite and at least 0, got {beta}")
    if reference_logprob_NT is None:
        if beta:
            raise ValueError(f"beta={beta} needs reference_logprob_NT, got None")
        reference_logprob_NT = logprob_NT
    shape = tuple(mask_NT.shape)
    if mask_NT.dtype != torch.bool or not shape == tuple(logprob_NT.shape) == tuple(
        reference_logprob_NT.shape
    ):
        raise ValueError(
            f"logprob_NT, reference_logprob_NT and a bool mask_NT must share one shape (N, T), got "
            f"{tuple(logprob_NT.shape)}, {tuple(reference_logprob_NT.shape)} and {mask_NT.dtype} "
            f"{shape}"
        )
    difference_NT = (logprob_NT.detach() - reference_logprob_NT.detach()).double()
    k1_NT = torch.where(mask_NT, difference_NT, 0.0)
    if not k1_NT.isfinite().all():
        row = int((~k1_NT.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(
            f"log-probabilities must be finite where the mask is True, row {row} is not"
        )
    from_here_NT = k1_NT.flip(1).cumsum(1).flip(1)
    return_NT = reward_N.detach().double()[:, None] - beta * from_here_NT
    return_K = return_NT[mask_NT]
    whitened_NT = torch.zeros(shape, dtype=torch.float64, device=reward_N.device)
    if len(return_K) and return_K.max() > return_K.min():
        mean = return_K.mean()
        variance = (return_K - mean).square().sum() / max(len(return_K) - correction, 1)
        whitened_NT[mask_NT] = (return_K - mean) / (variance.sqrt() + eps)
    return whitened_NT.to(reward_N.dtype)


def batch_scaled(
    reward_N: Tensor, prompt_N: Tensor, *, correction: int = 1, eps: float = 1e-4
) -> Tensor:
    """Reward minus the mean reward of the prompt, in units of one std for the whole batch.

        c_i = r_i - mean_j r_j,    A_i = c_i / (std_B c + eps)

    The baseline is the prompt's, the scale everyone's, so that prompts keep their relative weight
    where `grpo` gives each of them unit variance. The mean of c over the batch is 0 and need not
    be subtracted. (REINFORCE++ with baseline: Hu et al., 2025, arXiv:2501.03262, in words; kind of
    std and eps are `grpo`'s, not from the paper.) `grpo` with `scale="batch"`, which is TRL's, divides
    by the std of the raw rewards instead, which contains the spread between prompts.

    Args:
        reward_N: (N,) finite floating-point rewards of the whole step.
        prompt_N: (N,) integers, the group of each rollout.
        correction: 0 for the population std, 1 for the unbiased one.
        eps: added to the std, outside the root; >= 0.

    Returns:
        (N,) advantages in the dtype of `reward_N`. A group of one, or of equal rewards, gets
        exactly 0, and counts in the std of the batch as rows of deviation 0.

    Raises:
        ValueError: as `grpo`.
    """
    _check_std(correction, eps)
    g = _groups(reward_N, prompt_N)
    deviation_N = torch.where(g.mixed_N, g.reward_N - g.sum_N / g.size_N, 0.0)
    variance = deviation_N.square().sum() / max(len(deviation_N) - correction, 1)
    scaled_N = deviation_N / (variance.sqrt() + eps)
    return torch.where(g.mixed_N, scaled_N, 0.0).to(reward_N.dtype)


def stratified(
    reward_N: Tensor,
    prompt_N: Tensor,
    stratum_N: Tensor,
    *,
    alpha: float = 0.6,
    fallback: str = "blend",
    min_stratum_size: int = 2,
    correction: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Advantage against the prompt's rollouts of the same stratum, blended with the group's.

        A_SAN,i = (r_i - mean_k r) / (std_k r + eps)       k the stratum of i within its prompt
        A_GN,i  = (r_i - mean_j r) / (std_j r + eps)       the whole prompt: `grpo`
        A_i     = alpha A_SAN,i + (1 - alpha) A_GN,i

    Rollouts with three searches are compared with others that searched three times: the group mean
    would credit a row with the offset between its stratum and the group. (Stratified GRPO:
    arXiv:2510.06214.) SAN is `grpo` with the group key (prompt, stratum), so with one stratum per
    prompt (and no minimum above 2), or alpha = 0, the result is `grpo` bit for bit; a stratum never
    reaches across prompts.

    alpha = 1 is an ablation: where the stratum decides the reward, A_SAN is 0 everywhere and the
    choice of the stratum is not trained. The label is the policy's own doing, so as a baseline it
    depends on the action and the gradient is not the unbiased one of `leave_one_out`. alpha = 0.6
    is reported for one base model; what small strata get is a project default, not from the paper, and
    kind of std and eps are `grpo`'s.

    Args:
        reward_N: (N,) finite floating-point rewards.
        prompt_N: (N,) integers, the group of each rollout.
        stratum_N: (N,) integers, categorical; any ids, reused freely between prompts.
        alpha: share of A_SAN, in [0, 1].
        fallback: for strata of fewer than `min_stratum_size` rows; "blend" takes A_SAN = 0, so
            (1 - alpha) A_GN is left, "group" takes A_GN whole, after which the advantages of the
            group no longer sum to 0.
        min_stratum_size: at least 1; below 2 it does nothing.
        correction: 0 for the population std, 1 for the unbiased one, in strata and groups alike.
        eps: added to both stds, outside the root; >= 0.

    Returns:
        (N,) advantages in the dtype of `reward_N`. A stratum that is large enough but of equal
        rewards has A_SAN = 0 exactly under either fallback; a group of one, or of equal rewards,
        gets exactly 0.

    Raises:
        ValueError: as `grpo`; if `stratum_N` is not (N,) integers; if a setting is out of range.
    """
    _check_std(correction, eps)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if fallback not in FALLBACKS:
        raise ValueError(f"fallback must be one of {', '.join(FALLBACKS)}, got {fallback!r}")
    if min_stratum_size < 1:
        raise ValueError(f"min_stratum_size must be at least 1, got {min_stratum_size}")
    if stratum_N.shape != reward_N.shape:
        raise ValueError(
            f"stratum_N must have one label per reward, shape {tuple(reward_N.shape)}, "
            f"got {tuple(stratum_N.shape)}"
        )
    if stratum_N.is_floating_point() or stratum_N.dtype == torch.bool:
        raise ValueError(f"stratum_N must be integers, got {stratum_N.dtype}")
    whole = _groups(reward_N, prompt_N)
    label_K, label_N = stratum_N.unique(return_inverse=True)
    strata = _groups(reward_N, whole.group_N * len(label_K) + label_N)
    group_N = _standardised(whole, correction, eps)
    within_N = _standardised(strata, correction, eps)
    instead_N = group_N if fallback == "group" else torch.zeros_like(group_N)
    within_N = torch.where(strata.size_N < min_stratum_size, instead_N, within_N)
    # lerp gives group_N and within_N exactly at 0 and 1, and where they are equal.
    return torch.lerp(group_N, within_N, alpha).to(reward_N.dtype)


def raft(reward_N: Tensor, prompt_N: Tensor) -> Tensor:
    """1 for the accepted rollouts of a prompt, 0 for the others: no baseline, no negatives.

        A_i = 1 if r_i = max_j r_j and max_j r_j > 0, else 0

    For 0/1 rewards this is A = r. The indicator r = max r is the paper's (RAFT++: Yao et al.,
    2025, arXiv:2505.02391, eq. 8); read literally it keeps every row of a prompt whose rollouts all
    fail, where the released code trains on none, and the code is followed.

    Graded rewards are given as successes in [0, 1] (`samplers/success.py`), as the trainer does.
    Where these are yes or no, every row that passes is accepted, whatever the range of the rewards;
    where they are shares of full marks, the best rows of the prompt are, if not worthless. A project
    default: the paper speaks of right and wrong alone.

    Args:
        reward_N: (N,) finite floating-point successes, or rewards that say the same.
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
