"""HAPO: a token's entropy changes its advantage and its clip range. (arXiv:2509.16591.)

Every token has a signed heterogeneity h in [-1, 1], from the entropies of the whole step: 0 at
their 0.8 quantile, 1 at the highest, -1 at the lowest. Four parts use it or go with it:

    A  T_t = T (1 + tau h), h by the pivot of the step before    rollouts/engines/adaptive_temperature.py
    B  advantages against the mean over the group's tokens       token_level_group
    C  advantages times 1 + h, by h and by the ratio             redistribute
    D  clip ranges wider by |h|, one side each                   clip_ranges

In one step: B on full groups, before rows are dropped; then `pivot` and `heterogeneity` once, over
all valid tokens of all processes, from the entropies of the policy before its first update; then
the loss `hapo`, which is C and D around the clipped surrogate; `pivot(...).adaptive_temperature`
is A of the next step. The released code takes the pivot of each micro-batch instead, so that its
loss depends on their size.

Axes: N rollouts, P prompts, T decision steps, M decisions of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rl.objective.advantages import grpo
from rl.objective.losses import Statistics, clamped_exp, clipped_surrogate, count
from rl.objective.token_selection import checked_entropy
from rollouts.engines.adaptive_temperature import (
    LEAST_ENTROPY,
    AdaptiveTemperature,
    signed_heterogeneity,
)


@dataclass(frozen=True, kw_only=True)
class EntropyPivot:
    """What `heterogeneity` measures entropies by.

    Raises:
        ValueError: if a number is not finite, or a distance is negative.
    """

    log_quantile: float
    """Q, the quantile of log H where h is 0; H in nats."""
    above: float
    """max(log H) - Q, where h is 1."""
    below: float
    """Q - min(log H), where h is -1."""

    def __post_init__(self) -> None:
        self.adaptive_temperature(0.0)  # asks the same of the three

    def state_dict(self) -> dict[str, float]:
        """Plain numbers for a checkpoint; `EntropyPivot.from_state` is the way back."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> EntropyPivot:
        return cls(**{name: float(state[name]) for name in ("log_quantile", "above", "below")})

    def adaptive_temperature(self, tau: float, *, signed: bool = True) -> AdaptiveTemperature:
        """Part A, for the rollouts of the next step."""
        return AdaptiveTemperature(tau=tau, signed=signed, **asdict(self))


def pivot(entropy_NT: Tensor, mask_NT: Tensor, *, quantile: float = 0.8) -> EntropyPivot:
    """The pivot of a step: a quantile of log H over all its valid tokens, and how far they reach.

        Q = quantile of log max(H, 1e-8),   the value whose place in the sorted list is nearest

    Args:
        entropy_NT: (N, T) nats, of all rows of the step over all processes.
        mask_NT: (N, T) bool, their decisions; at least one.
        quantile: in [0, 1].

    Returns:
        The pivot. With equal entropies everywhere both distances are 0, and so is every h.

    Raises:
        ValueError: without decisions, for a quantile out of range, or entropies that
            `token_selection.checked_entropy` refuses.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in [0, 1], got {quantile}")
    valid_NT = mask_NT.cpu()
    entropy_M = checked_entropy(entropy_NT, mask_NT)[valid_NT]
    if not len(entropy_M):
        raise ValueError("a pivot needs at least one decision, got a mask without any")
    log_M = entropy_M.clamp(min=LEAST_ENTROPY).log()
    # torch.quantile stops at 16 million values.
    place = round(quantile * (len(log_M) - 1))
    log_quantile = float(log_M.kthvalue(place + 1).values)
    return EntropyPivot(
        log_quantile=log_quantile,
        above=float(log_M.max()) - log_quantile,
        below=log_quantile - float(log_M.min()),
    )


def heterogeneity(
    entropy_NT: Tensor, mask_NT: Tensor, pivot: EntropyPivot, *, signed: bool = True
) -> Tensor:
    """Signed place of each token's entropy between the lowest, the pivot and the highest.

        d = log max(H, 1e-8) - Q,    h = d / above if d > 0,  d / below if d <= 0

    See `rollouts.engines.adaptive_temperature.signed_heterogeneity`, also for the sign, which released
    code loses.

    Args:
        entropy_NT: (N, T) nats.
        mask_NT: (N, T) bool.
        pivot: of the same step for parts C and D. By that of another, h is clamped to [-1, 1].
        signed: False for |h| as released, by which the branches of C and D for certain tokens act
            only at the pivot.

    Returns:
        (N, T) float64 on the device of `mask_NT`, detached; exactly 0 off the mask, at the pivot,
        and on a side of it where the pivot's step had no spread.

    Raises:
        ValueError: as `token_selection.checked_entropy`.
    """
    value_NT = checked_entropy(entropy_NT, mask_NT)
    h_NT = signed_heterogeneity(value_NT, signed=signed, **pivot.state_dict()).to(mask_NT.device)
    return torch.where(mask_NT, h_NT, 0.0)


def token_level_group(
    reward_N: Tensor,
    prompt_N: Tensor,
    length_N: Tensor,
    *,
    fallback_at: float = 5.0,
    eps: float = 1e-6,
) -> Tensor:
    """Part B: reward against the mean over the prompt's tokens, in units of the std over them.

        mu = sum_j L_j r_j / sum_j L_j,   sd^2 = sum_j L_j (r_j - mu)^2 / sum_j L_j
        A_i = (r_i - mu) / (sd + eps)

    A loss over tokens sees each row L_i times, so with the mean over rows the advantages of its
    tokens do not sum to 0 unless lengths are equal; here they do. A short row among long ones gets
    a huge advantage: where any (r_i - mu) / sd of a group reaches `fallback_at`, the whole group
    gets `advantages.grpo` with the unbiased std. For 0/1 rewards that is a share of 1/26 of the
    tokens or less in correct rows, or in wrong ones. (HAPO's code looks at padding too; here only
    rows with decisions count.)

    Args:
        reward_N: (N,) finite floating-point rewards.
        prompt_N: (N,) integers, the group of each rollout.
        length_N: (N,) integers, decisions of each rollout in full, so before rows are dropped.
        fallback_at: positive; infinity never falls back. The released code's 5.
        eps: added to both stds, outside the root; >= 0. The released code's 1e-6.

    Returns:
        (N,) advantages in the dtype of `reward_N`. A row without decisions takes no part and gets
        0; a group of one, or of equal rewards, gets exactly 0.

    Raises:
        ValueError: as `advantages.grpo`, and if lengths are misaligned or negative or
            `fallback_at` is not positive.
    """
    if not fallback_at > 0:
        raise ValueError(f"fallback_at must be positive, got {fallback_at}")
    if length_N.shape != reward_N.shape or length_N.is_floating_point():
        raise ValueError(
            f"length_N must be integers of shape {tuple(reward_N.shape)}, "
            f"got {length_N.dtype} of shape {tuple(length_N.shape)}"
        )
    if (length_N < 0).any():
        raise ValueError(f"length_N must not be negative, got {int(length_N.min())}")
    grpo(reward_N, prompt_N, eps=eps)  # its checks, of rows without decisions too
    row_K = (length_N > 0).nonzero().flatten()
    value_K, weight_K = reward_N[row_K].detach().double(), length_N[row_K].double()
    _, group_K = prompt_N[row_K].unique(return_inverse=True)
    num_groups = int(group_K.max()) + 1 if len(group_K) else 0

    def total(x_K: Tensor) -> Tensor:
        return x_K.new_zeros(num_groups).index_add(0, group_K, x_K)[group_K]

    def extreme(x_K: Tensor) -> Tensor:
        most_P = x_K.new_full((num_groups,), -torch.inf)
        return most_P.scatter_reduce(0, group_K, x_K, "amax")[group_K]

    mixed_K = extreme(value_K) > -extreme(-value_K)
    deviation_K = value_K - total(weight_K * value_K) / total(weight_K)
    std_K = (total(weight_K * deviation_K.square()) / total(weight_K)).sqrt()
    # The slack is for a share of exactly 1/26, where |A| is 5 up to rounding.
    far_K = mixed_K & (deviation_K.abs() >= fallback_at * (1 - 1e-12) * std_K)
    advantage_K = torch.where(
        extreme(far_K.double()) > 0,
        grpo(value_K, prompt_N[row_K], correction=1, eps=eps),
        deviation_K / (std_K + eps),
    )
    advantage_N = torch.zeros(len(reward_N), dtype=torch.float64, device=reward_N.device)
    advantage_N[row_K] = torch.where(mixed_K, advantage_K, 0.0)
    return advantage_N.to(reward_N.dtype)


def clip_ranges(
    h_NT: Tensor, *, epsilon_low: float = 0.2, epsilon_high: float = 0.28
) -> tuple[Tensor, Tensor]:
    """Part D: clip ranges of each token.

        low  = epsilon_low  (1 - h)  if h <= 0, else epsilon_low
        high = epsilon_high (1 + h)  if h > 0,  else epsilon_high

    Undecided tokens may be raised further, certain ones lowered further.

    Args:
        h_NT: (N, T) of `heterogeneity`, in [-1, 1].
        epsilon_low, epsilon_high: >= 0; the paper's 0.2 and 0.28, its scripts' 0.2 and 0.2.

    Returns:
        Two (N, T) tensors like `h_NT`, between 1 and 2 times the numbers given.

    Raises:
        ValueError: for h outside [-1, 1] or a negative range.
    """
    if not epsilon_low >= 0 or not epsilon_high >= 0:
        raise ValueError(
            f"epsilon_low and epsilon_high must be at least 0, got {epsilon_low} and {epsilon_high}"
        )
    if not (h_NT.abs() <= 1).all():
        raise ValueError(
            f"h_NT must lie in [-1, 1], got {h_NT.min().item()} .. {h_NT.max().item()}"
        )
    h_NT = h_NT.detach()
    return epsilon_low * (1 - h_NT.clamp(max=0)), epsilon_high * (1 + h_NT.clamp(min=0))


def redistribute(
    advantage_N: Tensor,
    h_NT: Tensor,
    ratio_NT: Tensor,
    epsilon_low_NT: Tensor,
    epsilon_high_NT: Tensor,
) -> Tensor:
    """Part C: more advantage to undecided tokens that moved, less to certain ones that did not.

        A (1 + h)   if h > 0 and the ratio is outside the neutral zone,
                    or h <= 0 and it is inside;      else A
        zone: 1 - epsilon_low / 2 < ratio < 1 + epsilon_high / 2

    On the first update every ratio is 1: undecided tokens are as they were, and certain ones are
    turned down, to 0 at h = -1.

    Args:
        advantage_N: (N,), or (N, T) where it varies within a row.
        h_NT: (N, T) of `heterogeneity`.
        ratio_NT: (N, T) policy / old policy.
        epsilon_low_NT, epsilon_high_NT: (N, T) of `clip_ranges`, the adapted ones.

    Returns:
        (N, T) advantages, detached.

    Raises:
        ValueError: if shapes do not match.
    """
    shape = tuple(h_NT.shape)
    columns = (ratio_NT, epsilon_low_NT, epsilon_high_NT)
    if any(tuple(column.shape) != shape for column in columns) or tuple(advantage_N.shape) not in (
        shape[:1],
        shape,
    ):
        raise ValueError(
            f"ratio_NT and both epsilons must have the shape {shape} of h_NT and advantage_N be "
            f"(N,) or (N, T), got {[tuple(c.shape) for c in columns]} and "
            f"{tuple(advantage_N.shape)}"
        )
    ratio_NT, h_NT, advantage_NT = ratio_NT.detach(), h_NT.detach(), advantage_N.detach()
    if advantage_NT.ndim == 1:
        advantage_NT = advantage_NT[:, None]
    inside_NT = (ratio_NT > 1 - epsilon_low_NT / 2) & (ratio_NT < 1 + epsilon_high_NT / 2)
    changed_NT = (h_NT > 0) ^ inside_NT
    return torch.where(changed_NT, advantage_NT * (1 + h_NT), advantage_NT)


def hapo(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    h_NT: Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    dual_clip: float | None = 10.0,
) -> tuple[Tensor, Statistics]:
    """The clipped surrogate with the advantages of part C and the clip ranges of part D.

    With h = 0 everywhere, as of equal entropies, it is `losses.clipped_surrogate`. The advantages
    are those of `token_level_group` (part B), weights and denominator `token_mean`'s.

    Args:
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator: as `clipped_surrogate`.
        h_NT: (N, T) of `heterogeneity`; what stands where the weight is 0 does not matter.
        epsilon_low, epsilon_high: as `clip_ranges`.
        dual_clip: as `clipped_surrogate`; the released code's 10.

    Returns:
        As `clipped_surrogate`, with the sums `heterogeneity`, of h over the decisions with
        weight, and `redistributed`, those of them whose advantage part C changed.

    Raises:
        ValueError: as `clipped_surrogate`, `clip_ranges` and `redistribute`.
    """
    if not logprob_NT.shape == old_logprob_NT.shape == weight_NT.shape == h_NT.shape:
        raise ValueError(
            f"logprob_NT, old_logprob_NT, weight_NT and h_NT must share one shape (N, T), got "
            f"{[tuple(x.shape) for x in (logprob_NT, old_logprob_NT, weight_NT, h_NT)]}"
        )
    active_NT = weight_NT != 0
    dtype = torch.promote_types(logprob_NT.dtype, torch.float32)
    h_NT = torch.where(active_NT, h_NT.detach().to(dtype), 0.0)
    log_ratio_NT = (logprob_NT - old_logprob_NT).detach().to(dtype)
    ratio_NT = clamped_exp(torch.where(active_NT, log_ratio_NT, 0.0))
    low_NT, high_NT = clip_ranges(h_NT, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    advantage_NT = redistribute(advantage_N.to(dtype), h_NT, ratio_NT, low_NT, high_NT)
    loss, statistics = clipped_surrogate(
        logprob_NT,
        old_logprob_NT,
        advantage_NT,
        weight_NT,
        denominator=denominator,
        epsilon_low=low_NT,
        epsilon_high=high_NT,
        dual_clip=dual_clip,
    )
    before_NT = advantage_N.to(dtype).reshape(len(h_NT), -1)
    changed_NT = active_NT & (advantage_NT != before_NT)
    redistributed = count(changed_NT, h_NT)
    return loss, statistics | {"heterogeneity": h_NT.sum(), "redistributed": redistributed}
