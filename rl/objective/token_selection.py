"""Select which decisions of the kept rows train: by |advantage| times entropy, or by entropy.

Selection is a pure function of all rows of the step, gathered from all processes, so it depends
neither on their number nor on micro-batches; `step_weights.after_selection` turns its result into
weights and a denominator. It is made once per step, from the entropies of the policy before its
first update, in float64 on the CPU, and nothing in it is differentiated.

Axes: N rollouts (the kept rows), T decision steps, M decisions of the mask.
"""

import numpy as np
import torch
from torch import Tensor

SCOPES = ("batch", "response")
"""What the fraction is taken of: all decisions together, or those of each row."""


def top_tokens(
    advantage_N: Tensor,
    entropy_NT: Tensor,
    mask_NT: Tensor,
    *,
    fraction: float,
    scope: str = "batch",
) -> Tensor:
    """The decisions of largest |advantage| times entropy.

        score_NT = |A_NT| * H_NT;   kept: the m largest,   m = min(M, ceil(fraction * M - 1e-9))

    (The tokens of D3S: arXiv:2509.22115.) The slack is for fractions like 0.07, where 0.07 * 100
    is 7.000000000000001 and its ceiling 8. The paper leaves open whether the fraction is taken of
    the batch or of each response, how it is rounded, and which pass the entropy is of. Taken of the
    batch is the project's default, not from the paper: with one advantage per row, |A| does not
    change the order within a row, so `scope="response"` is `top_entropy`, except in rows with
    advantage 0, where all scores are 0. In the trainer rows without a signal have left before: M counts
    the others' decisions. (Project default, not from the paper: they could count with score 0.)

    For losses with one ratio per row a weight of 0 does not drop a decision: `gspo_token` does.

    Args:
        advantage_N: (N,), or (N, T) where it varies within a row; finite where there is a decision.
        entropy_NT: (N, T) nats, over the full vocabulary; finite where there is a decision.
        mask_NT: (N, T) bool, True where the policy made the decision.
        fraction: share of the decisions to keep, in (0, 1].
        scope: "batch" or "response".

    Returns:
        (N, T) bool on the device of `mask_NT`. Off the mask it is False: padding and tool output
        are never kept. Ties go to the earlier row, then to the earlier step. Decisions of score 0
        come last, and a row may lose all of its own. A fraction of 1 gives the mask.

    Raises:
        ValueError: for shapes that do not match, a setting out of range, or an entropy or
            advantage on the mask that is NaN, infinite or a negative entropy; row and step are
            named.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    entropy_NT = checked_entropy(entropy_NT, mask_NT)
    valid_NT = mask_NT.cpu()
    advantage_NT = advantage_N.detach().cpu().double()
    if tuple(advantage_NT.shape) == (len(mask_NT),):
        advantage_NT = advantage_NT[:, None].expand_as(entropy_NT)
    if advantage_NT.shape != entropy_NT.shape:
        raise ValueError(
            f"advantage_N must be of shape ({len(mask_NT)},) or {tuple(mask_NT.shape)}, "
            f"got {tuple(advantage_N.shape)}"
        )
    _require(advantage_NT.isfinite() | ~valid_NT, advantage_NT, "advantage_N must be finite")
    score_NT = torch.where(valid_NT, advantage_NT.abs() * entropy_NT, -1.0)
    if scope == "batch":
        score_NT, length_N = score_NT.reshape(1, -1), valid_NT.sum().reshape(1)
    else:
        length_N = valid_NT.sum(1)
    # -1 is below any score, so what is not a decision comes last and is never reached.
    order_NT = score_NT.argsort(dim=1, descending=True, stable=True)
    count_N = (fraction * length_N.double() - 1e-9).ceil().clamp(min=0).minimum(length_N.double())
    first_NT = torch.arange(score_NT.shape[1]) < count_N[:, None]
    kept_NT = torch.zeros_like(first_NT).scatter_(1, order_NT, first_NT)
    return kept_NT.reshape(mask_NT.shape).to(mask_NT.device)


def top_entropy(
    entropy_NT: Tensor, mask_NT: Tensor, *, fraction: float, scope: str = "batch"
) -> Tensor:
    """The decisions of largest entropy, where a rollout could have gone another way.

    `top_tokens` with every advantage 1: m decisions, exactly. (Wang et al., 2025, arXiv:2506.01939,
    with a fraction of 0.2.) TRL's `top_entropy_quantile` differs: see `above_quantile`.

    Args, Returns, Raises: as `top_tokens`.
    """
    one_N = torch.ones(len(mask_NT), dtype=torch.float64)
    return top_tokens(one_N, entropy_NT, mask_NT, fraction=fraction, scope=scope)


def above_quantile(entropy_NT: Tensor, mask_NT: Tensor, *, quantile: float) -> Tensor:
    """The decisions whose entropy is at least a quantile of all, however many tie with it.

        kept = H_NT >= the `quantile` of H over the decisions, linear between two of them

    (Wang et al., 2025, arXiv:2506.01939, as TRL's `top_entropy_quantile` = 1 - quantile has it. TRL
    takes it of a micro-batch over all processes and anew in every pass; here it is of the step, which
    is the same where a step is one micro-batch that is passed once.)

    Args:
        entropy_NT, mask_NT: as `top_tokens`.
        quantile: in [0, 1]; 0 keeps all, 1 those of the highest entropy.

    Returns:
        (N, T) bool on the device of `mask_NT`, False off the mask.

    Raises:
        ValueError: for a quantile out of range, or as `top_tokens`.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in [0, 1], got {quantile}")
    value_NT, valid_NT = checked_entropy(entropy_NT, mask_NT), mask_NT.cpu()
    if not valid_NT.any():
        return mask_NT
    # torch.quantile stops at 16 million values.
    threshold = float(np.quantile(value_NT[valid_NT].numpy(), quantile))
    return (valid_NT & (value_NT >= threshold)).to(mask_NT.device)


def checked_entropy(entropy_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Entropies on the CPU in float64, without gradient; 0 off the mask.

    An entropy is at least 0; what rounding has left up to 1e-3 below is 0 here.

    Raises:
        ValueError: if the mask is not bool and of one shape (N, T) with the entropies, or an
            entropy on the mask is NaN, infinite or negative.
    """
    if mask_NT.dtype != torch.bool or mask_NT.ndim != 2 or entropy_NT.shape != mask_NT.shape:
        raise ValueError(
            f"mask_NT must be bool of the shape (N, T) of entropy_NT, got {mask_NT.dtype} of shape "
            f"{tuple(mask_NT.shape)} for {tuple(entropy_NT.shape)}"
        )
    valid_NT = mask_NT.cpu()
    value_NT = torch.where(valid_NT, entropy_NT.detach().cpu().double(), 0.0)
    fine_NT = value_NT.isfinite() & (value_NT >= -1e-3)
    _require(fine_NT, value_NT, "entropy_NT must be finite and not negative")
    return value_NT.clamp(min=0)


def _require(fine_NT: Tensor, value_NT: Tensor, message: str) -> None:
    if not fine_NT.all():
        row, step = (~fine_NT).nonzero()[0].tolist()
        value = value_NT[row, step].item()
        raise ValueError(f"{message}, got {value} in row {row}, step {step}")
