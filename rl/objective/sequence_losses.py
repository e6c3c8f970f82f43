"""Losses with one ratio per rollout: GSPO, GSPO-token, LUSPO, VESPO, RLOO.

As in `rl/objective/losses.py`, which lists all, a loss is -sum(weight_NT * surrogate_NT) over a
denominator that the caller states, with the same sums of statistics. Two more things are needed.

`mask_NT` says which decisions make up a row. The row's ratio is over all of them, also those that
token selection gave weight 0: a ratio over the kept ones would be that of no event that was
sampled. A row without any weight (padding of a micro-batch) is left out whole.

Weights and advantages must be constant within a row for `gspo` and `rloo`. All decisions of a row
share one ratio, so a weight of 0 on one of them takes nothing from its gradient: it would only
turn down the whole row, silently. `gspo_token` and `vespo` give each decision its own gradient.

Axes: N rollouts, T decision steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rl.objective.losses import (
    MAX_LOG_RATIO,
    Aligned,
    Statistics,
    aligned,
    check_dual_clip,
    clamped_exp,
    clip_range,
    clipped,
    count,
    sums,
)


def gspo(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    mask_NT: Tensor,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
    dual_clip: float | None = None,
) -> tuple[Tensor, Statistics]:
    """The clipped surrogate with the geometric mean of a row's ratios.

        s_i = exp(mean_t (logprob_it - old_it)),  the mean over the decisions of row i
        surrogate_it = min(s_i A_i, clip(s_i, 1 - epsilon_low, 1 + epsilon_high) A_i)

    Rewards are given to whole rollouts, so whole rollouts are clipped. (GSPO: Zheng et al., 2025,
    arXiv:2507.18071.) Being a mean, s_i stays within a few 1e-4 of 1, and so do the clips. With the
    row's weight at each decision instead of shared out among them this is LUSPO (arXiv:2602.05261),
    in which a row counts in proportion to its length.

    Args:
        logprob_NT, old_logprob_NT, denominator: as `clipped_surrogate`.
        advantage_N: (N,), or (N, T) if constant within each row; taken as constant.
        weight_NT: (N, T) weights >= 0, constant over the decisions of a row, 0 elsewhere.
        mask_NT: (N, T) bool, every decision of the rows.
        epsilon_low, epsilon_high: >= 0.
        dual_clip: above 1, or None; caps the loss of a decision with A < 0 at dual_clip |A|.

    Returns:
        As `clipped_surrogate`. A clipped row counts with all its decisions.

    Raises:
        ValueError: as `clipped_surrogate`; if the mask does not cover the weights; if weights or
            advantages vary within a row.
    """
    check_dual_clip(dual_clip)
    rows = aligned(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator)
    low, high = clip_range(epsilon_low, epsilon_high, rows)
    row = _log_ratios(logprob_NT, old_logprob_NT, mask_NT, rows)
    _require_constant(rows, mask_NT)
    ratio_N1 = clamped_exp(row.sum_N1 / row.length_N1)
    return _clipped_loss(rows, row, ratio_N1, low, high, dual_clip, denominator)


def gspo_token(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    mask_NT: Tensor,
    epsilon_low: float | Tensor = 3e-4,
    epsilon_high: float | Tensor = 4e-4,
    dual_clip: float | None = None,
) -> tuple[Tensor, Statistics]:
    """GSPO whose decisions have a weight, an advantage and a gradient of their own.

        s_it = sg[s_i] * pi_it / sg[pi_it]
        surrogate_it = min(s_it A_it, clip(s_it, 1 - epsilon_low, 1 + epsilon_high) A_it)

    with s_i as in `gspo`. In value s_it = s_i; its gradient is s_i times that of its own
    log-probability only, so a decision of weight 0 gets none. With weights and advantages constant
    within rows, loss and gradient equal `gspo`'s. (GSPO-token: arXiv:2507.18071.)

    Args:
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator: as `clipped_surrogate`.
        mask_NT: (N, T) bool, every decision of the rows, those of weight 0 included.
        epsilon_low, epsilon_high: >= 0, one number or one per decision, (N, T).
        dual_clip: as `gspo`.

    Returns:
        As `clipped_surrogate`.

    Raises:
        ValueError: as `clipped_surrogate`, and if the mask does not cover the weights.
    """
    check_dual_clip(dual_clip)
    rows = aligned(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator)
    low, high = clip_range(epsilon_low, epsilon_high, rows)
    row = _log_ratios(logprob_NT, old_logprob_NT, mask_NT, rows)
    ratio_N1 = clamped_exp(row.sum_N1 / row.length_N1).detach()
    own_NT = (rows.logprob_NT - rows.logprob_NT.detach()).exp()  # 1, with the gradient of logprob
    return _clipped_loss(rows, row, ratio_N1 * own_NT, low, high, dual_clip, denominator)


def rloo(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    mask_NT: Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> tuple[Tensor, Statistics]:
    """The clipped surrogate with the ratio of whole rollouts, one value per row.

        v_i = exp(sum_t (logprob_it - old_it))
        surrogate_it = min(v_i A_i, clip(v_i, 1 - epsilon_low, 1 + epsilon_high) A_i)

    The ratio that makes importance sampling of rollouts exact, with the variance that goes with a
    product over all decisions. (As TRL's RLOOTrainer; the estimator is Ahmadian et al., 2024,
    arXiv:2402.14740, the clip is TRL's.) With weights w_i / L_i, which add up to w_i, and advantages
    of `leave_one_out` the on-policy gradient is the unbiased one of the pass rate, not turned by
    length: the sum over decisions is in v_i.

    Args:
        logprob_NT, old_logprob_NT, denominator: as `clipped_surrogate`.
        advantage_N, weight_NT, mask_NT: as `gspo`.
        epsilon_low, epsilon_high: >= 0.

    Returns:
        As `clipped_surrogate`. A clipped row counts with all its decisions.

    Raises:
        ValueError: as `gspo`.
    """
    rows = aligned(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator)
    low, high = clip_range(epsilon_low, epsilon_high, rows)
    row = _log_ratios(logprob_NT, old_logprob_NT, mask_NT, rows)
    _require_constant(rows, mask_NT)
    return _clipped_loss(rows, row, clamped_exp(row.sum_N1), low, high, None, denominator)


def vespo(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    mask_NT: Tensor,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> tuple[Tensor, Statistics]:
    """The policy gradient, each row turned down as its ratio leaves 1, smoothly and for both signs.

        v_i = exp(sum_t (logprob_it - old_it)),    phi(v) = e^lambda v^k e^(-lambda v)
        surrogate_it = sg(phi(v_i)) * A_it * logprob_it

    with (k, lambda) = (power_positive, decay_positive) where A >= 0, else the negative pair.
    phi(1) = 1, so on-policy this is the plain policy gradient; phi has its maximum at v = k / lambda
    and goes to 0 on both sides, which replaces the clip. (VESPO: arXiv:2602.10693; settings as in
    TRL, which calls them vespo_k_* and vespo_lambda_*.)

    Args:
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator: as `clipped_surrogate`.
        mask_NT: as `gspo_token`.
        power_positive, power_negative: k, >= 0.
        decay_positive, decay_negative: lambda, above 0.

    Returns:
        As `clipped_surrogate`, with `phi`; the counts of clipped decisions are 0.

    Raises:
        ValueError: as `gspo_token`, and if a setting is out of range.
    """
    for name, power, decay in (
        ("positive", power_positive, decay_positive),
        ("negative", power_negative, decay_negative),
    ):
        if not power >= 0 or not decay > 0:
            raise ValueError(
                f"power_{name} must be at least 0 and decay_{name} above 0, got {power} and {decay}"
            )
    rows = aligned(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator)
    row = _log_ratios(logprob_NT, old_logprob_NT, mask_NT, rows)
    log_v_N1 = row.sum_N1.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    positive_NT = rows.advantage_NT >= 0
    power_NT = torch.full_like(rows.old_NT, power_negative).masked_fill(positive_NT, power_positive)
    decay_NT = torch.full_like(rows.old_NT, decay_negative).masked_fill(positive_NT, decay_positive)
    # In one exponent: e^(-lambda v) alone would be 0 where v^k overflows.
    phi_NT = (decay_NT + power_NT * log_v_N1 - decay_NT * log_v_N1.exp()).exp()
    surrogate_NT = phi_NT * rows.advantage_NT * rows.logprob_NT
    statistics = _row_sums(rows, row, log_v_N1.exp())
    statistics["phi"] = torch.where(rows.active_NT, phi_NT, 0.0).sum()
    return -(rows.weight_NT * surrogate_NT).sum() / denominator, statistics


class _LogRatios(NamedTuple):
    """Sum of the log-ratios of each row's decisions, (N, 1) with gradient, and their number."""

    sum_N1: Tensor
    length_N1: Tensor
    nonfinite: Tensor


def _log_ratios(
    logprob_NT: Tensor, old_logprob_NT: Tensor, mask_NT: Tensor, rows: Aligned
) -> _LogRatios:
    """Over every decision of the mask, in rows that have any weight; 0 in the others."""
    if mask_NT.dtype != torch.bool or mask_NT.shape != rows.active_NT.shape:
        raise ValueError(
            f"mask_NT must be bool of shape {tuple(rows.active_NT.shape)}, "
            f"got {mask_NT.dtype} of shape {tuple(mask_NT.shape)}"
        )
    if (rows.active_NT & ~mask_NT).any():
        row, step = (rows.active_NT & ~mask_NT).nonzero()[0].tolist()
        raise ValueError(
            f"mask_NT must hold every decision that has weight, "
            f"but is False at row {row}, step {step}, where weight_NT is not 0"
        )
    counted_NT = mask_NT & rows.active_NT.any(dim=1, keepdim=True)
    dtype = rows.old_NT.dtype
    new_NT = torch.where(counted_NT, logprob_NT.to(dtype), 0.0)
    old_NT = torch.where(counted_NT, old_logprob_NT.detach().to(dtype), 0.0)
    finite_NT = new_NT.isfinite() & old_NT.isfinite()
    return _LogRatios(
        sum_N1=(new_NT - old_NT).sum(dim=1, keepdim=True),
        length_N1=counted_NT.sum(dim=1, keepdim=True).clamp(min=1),
        nonfinite=count(~finite_NT, new_NT),
    )


def _require_constant(rows: Aligned, mask_NT: Tensor) -> None:
    """Refuse weights and advantages that vary over the decisions of a row."""
    if not mask_NT.any():
        return
    for name, value_NT in (("weights", rows.weight_NT), ("advantages", rows.advantage_NT)):
        value_NT = value_NT.expand_as(mask_NT)
        high_N = torch.where(mask_NT, value_NT, -torch.inf).amax(dim=1)
        low_N = torch.where(mask_NT, value_NT, torch.inf).amin(dim=1)
        varies_N = mask_NT.any(dim=1) & (high_N > low_N)
        if varies_N.any():
            row = int(varies_N.nonzero()[0])
            raise ValueError(
                f"{name} must be constant within a row, got {low_N[row].item():.6g} to "
                f"{high_N[row].item():.6g} in row {row}: all decisions share the row's ratio, so a "
                f"weight of 0 would not drop one; use gspo_token"
            )


def _clipped_loss(
    rows: Aligned,
    row: _LogRatios,
    ratio_NT: Tensor,
    low: Tensor,
    high: Tensor,
    dual_clip: float | None,
    denominator: float,
) -> tuple[Tensor, Statistics]:
    """The clipped surrogate of a row's ratio, and its statistics; the ratio may be (N, 1)."""
    surrogate_NT, counts = clipped(ratio_NT, rows.advantage_NT, low, high, dual_clip)
    statistics = _row_sums(rows, row, ratio_NT) | counts
    return -(rows.weight_NT * surrogate_NT).sum() / denominator, statistics


@torch.no_grad()
def _row_sums(rows: Aligned, row: _LogRatios, ratio_NT: Tensor) -> Statistics:
    ratio = torch.where(rows.active_NT, ratio_NT, 0.0).sum()
    return sums(rows) | {"ratio": ratio, "nonfinite": row.nonfinite}
