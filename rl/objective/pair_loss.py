"""D3PO: a loss on pairs of rollouts, one preferred to the other, without a reward model.

Axes: N rollouts, K pairs, T denoising steps.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rl.objective.losses import Statistics, check_denominator, check_log_ratio_scale, count


def d3po_pair(
    logprob_NT: Tensor,
    reference_logprob_NT: Tensor,
    chosen_K: Tensor,
    rejected_K: Tensor,
    weight_KT: Tensor,
    *,
    denominator: float,
    beta: float = 0.1,
    epsilon: float = 0.1,
    log_ratio_scale: float = 1.0,
) -> tuple[Tensor, Statistics]:
    """Make the chosen row of each pair likelier than the rejected one, edge by edge.

        rho    = clamp(exp((logprob - reference_logprob) * log_ratio_scale), 1 - epsilon, 1 + epsilon)
        margin = beta * (log rho_chosen - log rho_rejected)
        loss   = -sum(weight * log sigmoid(margin)) / denominator

    (D3PO, arXiv:2311.13231, with the clamp, beta and epsilon of the released code, where the ratio
    is of means over the latent's D elements, `log_ratio_scale` = 1/D, and the reference is the
    model with its adapters off.) Every trained edge is a pair of its own: the comparison of two
    samples is credited to all edges that differ. A ratio outside the clamp has no gradient, of
    whichever side, so that a pair stops once both are 10 % away from the reference. Siblings of one
    branch make pairs that share their past; the weight is then 0 on the edges they share.

    Args:
        logprob_NT: (N, T) log-probabilities under the policy being trained, with gradient.
        reference_logprob_NT: (N, T) under the reference; taken as constant.
        chosen_K, rejected_K: (K,) int64 rows; a row may be in several pairs.
        weight_KT: (K, T) weights >= 0, exactly 0 where either row has no decision or no pair is
            made; taken as constant.
        denominator: what the sum is divided by; positive.
        beta: positive.
        epsilon: in (0, 1).
        log_ratio_scale: positive.

    Returns:
        The loss, a scalar in the dtype of `logprob_NT` (float32 at least), and sums over the pairs
        and edges with weight, detached:

            pairs       how many there are
            preferred   those whose margin is above 0: the policy leans to the chosen row more than
                        the reference does
            margin      the margin
            clipped     ratios outside the clamp, of two per pair and edge
            nonfinite   pairs and edges with a log-probability that is NaN or infinite

        With no weight anywhere the loss is 0 and so is its gradient. On the reference itself every
        term is log 2.

    Raises:
        ValueError: if shapes do not match, a row is out of range or paired with itself, or a
            setting is out of range.
    """
    check_denominator(denominator)
    check_log_ratio_scale(log_ratio_scale)
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be in (0, 1), got {epsilon}")
    _check_rows(logprob_NT, reference_logprob_NT, chosen_K, rejected_K, weight_KT)
    active_KT = weight_KT != 0
    dtype = torch.promote_types(logprob_NT.dtype, torch.float32)
    low = torch.tensor(1 - epsilon, dtype=dtype, device=logprob_NT.device).log()
    high = torch.tensor(1 + epsilon, dtype=dtype, device=logprob_NT.device).log()

    def log_ratio(rows_K: Tensor) -> Tensor:
        # Selection, not multiplication: what stands where the weight is 0 may be NaN.
        new_KT = torch.where(active_KT, logprob_NT[rows_K].to(dtype), 0.0)
        old_KT = torch.where(active_KT, reference_logprob_NT[rows_K].detach().to(dtype), 0.0)
        return (new_KT - old_KT) * log_ratio_scale

    ratios = [log_ratio(chosen_K), log_ratio(rejected_K)]
    chosen_KT, rejected_KT = (x.clamp(low, high) for x in ratios)
    margin_KT = beta * (chosen_KT - rejected_KT)
    weight_KT = weight_KT.detach().to(dtype)
    loss = (weight_KT * softplus(-margin_KT)).sum() / denominator
    with torch.no_grad():
        outside = sum(((x < low) | (x > high)).int() for x in ratios)
        finite_KT = ratios[0].isfinite() & ratios[1].isfinite()
        statistics = {
            "pairs": count(active_KT, margin_KT),
            "preferred": count(active_KT & (margin_KT > 0), margin_KT),
            "margin": torch.where(active_KT, margin_KT, 0.0).sum(),
            "clipped": torch.as_tensor(outside).sum().to(dtype),
            "nonfinite": count(~finite_KT, margin_KT),
        }
    return loss, statistics


def _check_rows(
    logprob_NT: Tensor,
    reference_logprob_NT: Tensor,
    chosen_K: Tensor,
    rejected_K: Tensor,
    weight_KT: Tensor,
) -> None:
    if logprob_NT.ndim != 2 or reference_logprob_NT.shape != logprob_NT.shape:
        raise ValueError(
            f"logprob_NT and reference_logprob_NT must share one shape (N, T), "
            f"got {tuple(logprob_NT.shape)} and {tuple(reference_logprob_NT.shape)}"
        )
    num_rows, num_steps = logprob_NT.shape
    pairs = chosen_K.shape[:1]
    if chosen_K.ndim != 1 or rejected_K.shape != pairs or weight_KT.shape != (*pairs, num_steps):
        raise ValueError(
            f"chosen_K and rejected_K must be (K,) and weight_KT (K, {num_steps}), got "
            f"{tuple(chosen_K.shape)}, {tuple(rejected_K.shape)} and {tuple(weight_KT.shape)}"
        )
    for name, rows_K in (("chosen_K", chosen_K), ("rejected_K", rejected_K)):
        if len(rows_K) and not (rows_K.min() >= 0 and rows_K.max() < num_rows):
            raise ValueError(f"{name} must lie in 0..{num_rows - 1}, got {rows_K.tolist()}")
    if (chosen_K == rejected_K).any():
        pair = int((chosen_K == rejected_K).nonzero()[0])
        raise ValueError(f"pair {pair} is of row {int(chosen_K[pair])} with itself")
