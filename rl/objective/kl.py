"""KL to a reference policy: losses to add to the policy's, and the penalty to subtract from rewards.

With d = log pi - log pi_ref at the token that was sampled (Schulman, 2020,
joschu.net/blog/kl-approx.html), the estimates of KL(pi || ref) and what they do as losses:

            value             E under pi             expected gradient, on-policy
    k1      d                 KL(pi || ref)          0: useless as a loss
    k2      d^2 / 2           biased, small          grad KL(pi || ref)
    k3      e^-d - 1 + d      KL(pi || ref), >= 0    grad KL(ref || pi): the other direction
    rho k3  rho (e^-d - 1 + d)                       grad KL(pi || ref)

An unbiased estimate of a value is not an unbiased gradient: the tokens are drawn from the policy
that is being differentiated, and autograd does not see that. k1 enters through the reward instead,
where the policy gradient supplies what autograd leaves out.

Every loss is  sum(weight_NT * k_NT) / denominator  with a weight and a denominator of its own, not
those of the policy's loss: which tokens the reference holds back is another question than which
teach. The caller multiplies by beta. Beside it come sums over the decisions with weight:

    kl_tokens      decisions with a weight other than 0
    kl_k1          d: unbiased for KL(pi || ref), of either sign
    kl_k3          e^-d - 1 + d: the same expectation, never negative
    kl_nonfinite   decisions with a log-probability that is NaN or infinite

Axes: N rollouts, T decision steps.
"""

from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import Tensor

from rl.objective.losses import MAX_LOG_RATIO, Statistics, check_denominator, clamped_exp, count


def kl_k2(
    logprob_NT: Tensor, reference_logprob_NT: Tensor, weight_NT: Tensor, *, denominator: float
) -> tuple[Tensor, Statistics]:
    """Half the squared log-ratio to the reference: the loss with the gradient of KL(pi || ref).

        k2 = d^2 / 2,    d k2 / d theta = d * (d log pi / d theta)

    As a value it is biased (it is the second-order term of the KL). Its gradient grows without
    bound with d; log-ratios are not clamped, since nothing is exponentiated.

    Args:
        logprob_NT: (N, T) log-probabilities under the policy being trained, with gradient.
        reference_logprob_NT: (N, T) under the reference; taken as constant.
        weight_NT: (N, T) weights >= 0, 0 where there was no decision; taken as constant.
        denominator: what the sum is divided by; positive.

    Returns:
        The loss, a scalar in the dtype of `logprob_NT` (float32 at least), and the sums of this
        module's first lines, detached. With no weight anywhere both are 0, as is the gradient.

    Raises:
        ValueError: if shapes do not match or the denominator is not positive.
    """
    weight_NT, d_NT, _ = _differences(logprob_NT, reference_logprob_NT, weight_NT, denominator)
    return (weight_NT * d_NT.square() / 2).sum() / denominator, _sums(weight_NT, d_NT)


def kl_k3(
    logprob_NT: Tensor, reference_logprob_NT: Tensor, weight_NT: Tensor, *, denominator: float
) -> tuple[Tensor, Statistics]:
    """The estimate of KL(pi || ref) that is never negative; as a loss it lowers KL(ref || pi).

        k3 = e^-d - 1 + d

    What GRPO adds to its loss (arXiv:2402.03300). d is clamped to +-20, beyond which it has no
    gradient.

    Args, Returns, Raises: as `kl_k2`.
    """
    weight_NT, d_NT, _ = _differences(logprob_NT, reference_logprob_NT, weight_NT, denominator)
    return (weight_NT * _k3(d_NT)).sum() / denominator, _sums(weight_NT, d_NT)


def kl_k3_weighted(
    logprob_NT: Tensor,
    reference_logprob_NT: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    old_logprob_NT: Tensor,
    mask_NT: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """k3 times the importance ratio: unbiased in value and gradient for KL(pi || ref).

        rho * k3,    rho = exp(logprob - old_logprob), with gradient

    The ratio carries the part of the gradient that comes from the tokens' being drawn from the
    policy. (DeepSeek-V3.2, arXiv:2512.02556; TRL's default, `use_bias_correction_kl`.) With
    one ratio per token the statement is exact token by token, given the tokens before it. With
    `mask_NT` the ratio is that of the row, as in `sequence_losses.gspo`:

        s_i k3,    s_i = exp(mean_t (logprob_it - old_it)), with gradient

    which is what TRL adds where its ratios are of sequences, and has neither property.

    Args:
        logprob_NT, reference_logprob_NT, weight_NT, denominator: as `kl_k2`.
        old_logprob_NT: (N, T) under the policy that sampled; taken as constant.
        mask_NT: (N, T) bool, every decision of the rows, for one ratio per row; None: per token.

    Returns, Raises: as `kl_k2`. The sums are those of the tokens as drawn, without the ratio.
    """
    weight_NT, d_NT, log_ratio_NT = _differences(
        logprob_NT, reference_logprob_NT, weight_NT, denominator, old_logprob_NT
    )
    if mask_NT is not None:
        log_ratio_NT = _row_log_ratio(logprob_NT, old_logprob_NT, mask_NT, weight_NT)
    k_NT = clamped_exp(log_ratio_NT) * _k3(d_NT)
    statistics = _sums(weight_NT, d_NT)
    statistics["kl_nonfinite"] = count(~(d_NT + log_ratio_NT.detach()).isfinite(), d_NT)
    return (weight_NT * k_NT).sum() / denominator, statistics


KL_LOSSES: dict[str, Callable[..., tuple[Tensor, Statistics]]] = {
    "k2": kl_k2,
    "k3": kl_k3,
    "k3_weighted": kl_k3_weighted,
}


def kl_loss(name: str) -> Callable[..., tuple[Tensor, Statistics]]:
    """The KL loss of that name.

    Raises:
        ValueError: for "k1", with the reason why there is no such loss, and for an unknown name.
    """
    if name == "k1":
        raise ValueError(
            "k1 cannot be a loss: its expected gradient under the policy is 0, so it would add "
            "noise and nothing else. Subtract beta * k1_penalty from the reward, or use k2 or "
            "k3_weighted, which have the gradient of KL(policy || reference)"
        )
    if name not in KL_LOSSES:
        close = get_close_matches(name, KL_LOSSES, n=1, cutoff=0.3)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"the KL loss must be one of {', '.join(KL_LOSSES)}, got {name!r}{hint}")
    return KL_LOSSES[name]


@torch.no_grad()
def k1_penalty(logprob_NT: Tensor, reference_logprob_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """What a rollout's departure from the reference costs: subtract beta times it from the reward.

        penalty_i = sum_t (logprob_it - reference_it)

    The policy gradient of the reward so reduced contains beta grad KL(pi || ref) of whole rollouts.
    (Stiennon et al., 2020, arXiv:2009.01325; as TRL's RLOOTrainer, whose beta is 0.05.)

    Args:
        logprob_NT: (N, T) under the policy that sampled.
        reference_logprob_NT: (N, T) under the reference.
        mask_NT: (N, T) bool, the decisions that count.

    Returns:
        (N,) of either sign, in the dtype of `logprob_NT` (float32 at least), without gradient; 0
        for a row without decisions. A NaN or infinity under the mask stays one, so that the
        advantages refuse the reward and name the row.

    Raises:
        ValueError: if shapes do not match or the mask is not bool.
    """
    shape = tuple(logprob_NT.shape)
    if mask_NT.dtype != torch.bool or logprob_NT.ndim != 2:
        raise ValueError(
            f"mask_NT must be bool and logprob_NT (N, T), got {mask_NT.dtype} and shape {shape}"
        )
    if not shape == tuple(reference_logprob_NT.shape) == tuple(mask_NT.shape):
        raise ValueError(
            f"logprob_NT, reference_logprob_NT and mask_NT must share one shape (N, T), got "
            f"{shape}, {tuple(reference_logprob_NT.shape)} and {tuple(mask_NT.shape)}"
        )
    dtype = torch.promote_types(logprob_NT.dtype, torch.float32)
    d_NT = logprob_NT.to(dtype) - reference_logprob_NT.to(dtype)
    return torch.where(mask_NT, d_NT, 0.0).sum(dim=1)


def _differences(
    logprob_NT: Tensor,
    reference_logprob_NT: Tensor,
    weight_NT: Tensor,
    denominator: float,
    old_logprob_NT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, log pi - log pi_ref and log pi - log pi_old in one dtype, 0 at weight 0."""
    shape = tuple(logprob_NT.shape)
    others = {"reference_logprob_NT": reference_logprob_NT, "weight_NT": weight_NT}
    if old_logprob_NT is not None:
        others["old_logprob_NT"] = old_logprob_NT
    for name, other in others.items():
        if logprob_NT.ndim != 2 or tuple(other.shape) != shape:
            raise ValueError(
                f"{name} must have the shape (N, T) of logprob_NT, "
                f"got {tuple(other.shape)} and {shape}"
            )
    check_denominator(denominator)
    dtype = torch.promote_types(logprob_NT.dtype, torch.float32)
    active_NT = weight_NT != 0

    def selected(value_NT: Tensor) -> Tensor:
        return torch.where(active_NT, value_NT.to(dtype), 0.0)

    new_NT = selected(logprob_NT)
    old_NT = new_NT if old_logprob_NT is None else selected(old_logprob_NT.detach())
    return (
        weight_NT.detach().to(dtype),
        new_NT - selected(reference_logprob_NT.detach()),
        new_NT - old_NT,
    )


def _row_log_ratio(
    logprob_NT: Tensor, old_logprob_NT: Tensor, mask_NT: Tensor, weight_NT: Tensor
) -> Tensor:
    """Mean log-ratio of each row with any weight over its decisions, at every decision with weight."""
    if mask_NT.dtype != torch.bool or mask_NT.shape != weight_NT.shape:
        raise ValueError(
            f"mask_NT must be bool of shape {tuple(weight_NT.shape)}, "
            f"got {mask_NT.dtype} of shape {tuple(mask_NT.shape)}"
        )
    active_NT = weight_NT != 0
    counted_NT = mask_NT & active_NT.any(dim=1, keepdim=True)
    log_ratio_NT = logprob_NT.to(weight_NT.dtype) - old_logprob_NT.detach().to(weight_NT.dtype)
    sum_N1 = torch.where(counted_NT, log_ratio_NT, 0.0).sum(dim=1, keepdim=True)
    mean_N1 = sum_N1 / counted_NT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(active_NT, mean_N1, 0.0)


def _k3(d_NT: Tensor) -> Tensor:
    d_NT = d_NT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-d_NT) + d_NT


@torch.no_grad()
def _sums(weight_NT: Tensor, d_NT: Tensor) -> Statistics:
    return {
        "kl_tokens": count(weight_NT != 0, d_NT),
        "kl_k1": d_NT.sum(),
        "kl_k3": _k3(d_NT).sum(),
        "kl_nonfinite": count(~d_NT.isfinite(), d_NT),
    }
