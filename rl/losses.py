"""Losses: from log-probabilities, advantages and weights to the scalar that is differentiated.

Every loss is  -sum(weight_NT * surrogate_NT) / denominator.  No loss counts its own rows: the
caller states the denominator once per optimizer step, over all processes and micro-batches, so
that the losses of the parts add up to the loss of the whole. Beside the loss comes a dict of sums
of statistics over the decisions with weight, to be added up and divided by `tokens`:

    tokens         decisions with a weight other than 0
    ratio          rho = pi / pi_old, the policies' probabilities of the decision
    kl_old         rho - 1 - log rho, an estimate of KL(pi_old || pi) that is never negative
    clipped_low    decisions whose gradient the lower clip removed
    clipped_high   decisions whose gradient the upper clip removed
    clipped_dual   decisions whose gradient the dual clip removed
    nonfinite      decisions with a log-probability that is NaN or infinite; any is a reason to stop

A position of weight 0 is taken out by selection, not by multiplication, so that a NaN or infinity
there reaches neither the loss nor the gradient.

Axes: N rollouts, T decision steps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Statistics = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Statistics]]
"""`loss(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator) -> (loss, sums)`."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp, which leaves ratios of up to 4.9e8 as they are."""


def clipped_surrogate(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Statistics]:
    """The clipped policy-gradient loss with one ratio per token.

        rho = exp(logprob - old_logprob)
        surrogate = min(rho * A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) * A)
        loss = -sum(weight * surrogate) / denominator

    (Schulman et al., 2017, arXiv:1707.06347; with group advantages: GRPO, arXiv:2402.03300.)
    Unequal clips are the clip-higher of DAPO (arXiv:2503.14476), which uses 0.2 and 0.28. For A < 0
    the minimum leaves large ratios unbounded; `dual_clip` = c caps the loss of a decision at c |A|
    (Ye et al., 2020, arXiv:1912.09729). Which of grpo, dapo, dr_grpo this is, weight and
    denominator decide.

    Args:
        logprob_NT: (N, T) log-probabilities under the policy being trained, with gradient.
        old_logprob_NT: (N, T) log-probabilities under the policy that sampled; taken as constant.
        advantage_N: (N,), or (N, T) where it varies within a row; taken as constant.
        weight_NT: (N, T) weights >= 0, exactly 0 where there was no decision; taken as constant.
        denominator: what the sum is divided by; positive.
        epsilon_low, epsilon_high: >= 0; both infinite give the plain policy gradient.
        dual_clip: above 1, or None for no cap.

    Returns:
        The loss, a scalar in the dtype of `logprob_NT` (float32 at least), and the sums of this
        module's first lines, detached. With no weight anywhere the loss is 0 and so is its
        gradient.

    Raises:
        ValueError: if shapes do not match or a setting is out of range.
    """
    if not epsilon_low >= 0 or not epsilon_high >= 0:
        raise ValueError(
            f"epsilon_low and epsilon_high must be at least 0, got {epsilon_low} and {epsilon_high}"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    active_NT, logprob_NT, old_NT, advantage_NT, weight_NT = _aligned(
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator
    )
    ratio_NT = (logprob_NT - old_NT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_NT = ratio_NT.clamp(1 - epsilon_low, 1 + epsilon_high)
    surrogate_NT = torch.minimum(ratio_NT * advantage_NT, clipped_NT * advantage_NT)
    dual_NT = torch.zeros_like(active_NT)
    if dual_clip is not None:
        dual_NT = (advantage_NT < 0) & (ratio_NT > dual_clip)
        surrogate_NT = torch.where(dual_NT, dual_clip * advantage_NT, surrogate_NT)
    statistics = _statistics(active_NT, logprob_NT, old_NT) | {
        "clipped_low": _count((advantage_NT < 0) & (ratio_NT < 1 - epsilon_low), ratio_NT),
        "clipped_high": _count((advantage_NT > 0) & (ratio_NT > 1 + epsilon_high), ratio_NT),
        "clipped_dual": _count(dual_NT, ratio_NT),
    }
    return -(weight_NT * surrogate_NT).sum() / denominator, statistics


def raft(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
) -> tuple[Tensor, Statistics]:
    """The likelihood of the accepted rollouts.

        loss = -sum(weight * A * logprob) / denominator

    with A from `advantages.raft`. (Xiong et al., 2025, arXiv:2504.11343.) No ratio and no clip:
    with several updates per batch it fits the same rows further and further, which `raft_pp`
    limits. The log-probabilities of the sampling policy take part in the statistics only.

    Args:
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator: as `clipped_surrogate`.

    Returns:
        As `clipped_surrogate`; the counts of clipped decisions are 0.

    Raises:
        ValueError: if shapes do not match or the denominator is not positive.
    """
    active_NT, logprob_NT, old_NT, advantage_NT, weight_NT = _aligned(
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator
    )
    statistics = _statistics(active_NT, logprob_NT, old_NT)
    return -(weight_NT * advantage_NT * logprob_NT).sum() / denominator, statistics


def raft_pp(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> tuple[Tensor, Statistics]:
    """RAFT++: the accepted rollouts, with importance ratios and the clip.

        surrogate = A * min(rho, clip(rho, 1 - epsilon_low, 1 + epsilon_high))
                  = A * min(rho, 1 + epsilon_high)

    with A in {0, 1} from `advantages.raft`. (Yao et al., 2025, arXiv:2505.02391, eq. 8.) Where
    nothing is negative the lower clip never binds; `epsilon_low` is accepted because the paper
    states it and has no effect. While the policy is the one that sampled, the gradient is `raft`'s.

    Args:
        logprob_NT, old_logprob_NT, weight_NT, denominator: as `clipped_surrogate`.
        advantage_N: as `clipped_surrogate`, and >= 0 wherever there is weight.
        epsilon_low, epsilon_high: >= 0.

    Returns:
        As `clipped_surrogate`.

    Raises:
        ValueError: as `clipped_surrogate`, and if an advantage is negative.
    """
    _, _, _, advantage_NT, _ = _aligned(
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator
    )
    if (advantage_NT < 0).any():
        raise ValueError(
            f"raft_pp has no negative signal: advantages must be at least 0, "
            f"got {advantage_NT.min().item()}"
        )
    return clipped_surrogate(
        logprob_NT,
        old_logprob_NT,
        advantage_N,
        weight_NT,
        denominator=denominator,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
    )


def _aligned(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    denominator: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments in one dtype and of shape (N, T), 0 wherever the weight is 0."""
    shape = tuple(logprob_NT.shape)
    if (
        logprob_NT.ndim != 2
        or tuple(old_logprob_NT.shape) != shape
        or tuple(weight_NT.shape) != shape
        or tuple(advantage_N.shape) not in (shape[:1], shape)
    ):
        raise ValueError(
            f"logprob_NT, old_logprob_NT and weight_NT must share one shape (N, T), and "
            f"advantage_N be (N,) or (N, T); got {shape}, {tuple(old_logprob_NT.shape)}, "
            f"{tuple(weight_NT.shape)} and {tuple(advantage_N.shape)}"
        )
    if not (denominator > 0 and math.isfinite(denominator)):
        raise ValueError(f"denominator must be positive and finite, got {denominator}")
    active_NT = weight_NT != 0
    dtype = torch.promote_types(logprob_NT.dtype, torch.float32)

    def selected(value_NT: Tensor) -> Tensor:
        return torch.where(active_NT, value_NT.to(dtype), 0.0)

    advantage_NT = advantage_N.detach()
    if advantage_NT.ndim == 1:
        advantage_NT = advantage_NT[:, None]
    return (
        active_NT,
        selected(logprob_NT),
        selected(old_logprob_NT.detach()),
        selected(advantage_NT),
        weight_NT.detach().to(dtype),
    )


@torch.no_grad()
def _statistics(active_NT: Tensor, logprob_NT: Tensor, old_NT: Tensor) -> Statistics:
    log_ratio_NT = (logprob_NT - old_NT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    finite_NT = logprob_NT.isfinite() & old_NT.isfinite()
    none = torch.zeros_like(active_NT)
    return {
        "tokens": _count(active_NT, log_ratio_NT),
        "ratio": torch.where(active_NT, log_ratio_NT.exp(), 0.0).sum(),
        "kl_old": (torch.expm1(log_ratio_NT) - log_ratio_NT).sum(),
        "clipped_low": _count(none, log_ratio_NT),
        "clipped_high": _count(none, log_ratio_NT),
        "clipped_dual": _count(none, log_ratio_NT),
        "nonfinite": _count(~finite_NT, log_ratio_NT),
    }


def _count(flag_NT: Tensor, like: Tensor) -> Tensor:
    return flag_NT.sum().to(like.dtype)
