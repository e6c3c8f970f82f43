"""Importance correction between the engine that sampled and the trainer that differentiates.

An engine in another library or precision gives the tokens it samples log-probabilities that differ
from the trainer's for the same weights. A rollout is then a draw from a slightly other policy, and
its gradient is exact only when weighted by  trainer / engine  before the first update. That ratio
times the loss's own (new / trainer) is the whole one; only the loss's is clipped around 1.
(Yao et al., 2025, fengyao.notion.site/off-policy-rl: truncated importance sampling, TIS.)

Axes: N rollouts, T decision steps.
"""

import torch
from torch import Tensor

from rl.objective.losses import Statistics, clamped_exp, count

LEVELS = ("token", "sequence")
MODES = ("truncate", "mask")
DEFAULT_CAP = 3.0
"""TRL's `vllm_importance_sampling_clip_max`, of all its modes."""


@torch.no_grad()
def correction(
    trainer_logprob_NT: Tensor,
    engine_logprob_NT: Tensor,
    mask_NT: Tensor,
    *,
    level: str,
    mode: str,
    cap: float,
    floor: float | None = None,
) -> tuple[Tensor, Statistics]:
    """Factors to multiply `weight_NT` with, so that the engine's rollouts count as the trainer's.

        u = exp(trainer - engine), per token, or exp of its sum over the row
        truncate:  min(u, cap), and at least `floor` where one is given
        mask:      u where floor <= u <= cap, else 0

    Token ratios have small variance and leave a bias (they ignore how the prefix was drawn); the
    row's ratio is exact and its variance grows with length. Truncation keeps every decision at
    most `cap` times; masking drops those on which the two policies disagree too much, in either
    direction. Token and mask is IcePop (Ring-1T, arXiv:2510.18855; other implementations use 0.5
    and 5), token and truncate TIS, sequence and mask with 3 and no floor TRL's default
    (`vllm_importance_sampling_mode="sequence_mask"`).

    Count the denominator with the weights as they were before: the factors have mean near 1, and
    dividing by their sum instead would change the size of the step with the mismatch. A loss with
    one ratio per row and weights constant in it (`gspo`, `rloo`) takes `level="sequence"` only.

    Args:
        trainer_logprob_NT: (N, T) under the trainer's weights of the moment of sampling, computed
            before the first update.
        engine_logprob_NT: (N, T) as recorded by the engine; NaN where it could not say, which counts
            as the trainer's own.
        mask_NT: (N, T) bool, every decision of the rows.
        level: "token" or "sequence".
        mode: "truncate" or "mask".
        cap: largest ratio that counts in full; at least 1, infinite for none.
        floor: smallest, in [0, 1]; None for none.

    Returns:
        (N, T) factors >= 0, float32 at least, without gradient, exactly 0 off the mask; one value
        per row at the level "sequence". And statistics, sums but for the last two:

            is_count            ratios: decisions, or rows with any at the level "sequence"
            is_ratio            u as found, before cap and floor
            is_above, is_below  ratios above the cap, below the floor
            is_tokens           decisions
            is_unknown          those whose log-probability the engine gave as NaN
            is_difference       |trainer - engine| over the decisions
            is_ratio_max        largest u: to be combined by max, not added
            is_difference_max   largest |trainer - engine|: likewise

    Raises:
        ValueError: if shapes do not match, a setting is out of range, or a log-probability under
            the mask is infinite, or NaN on the trainer's side.
    """
    _check(trainer_logprob_NT, engine_logprob_NT, mask_NT, level, mode, cap, floor)
    dtype = torch.promote_types(trainer_logprob_NT.dtype, torch.float32)
    d_NT = trainer_logprob_NT.to(dtype) - engine_logprob_NT.to(dtype)
    # A token of which the engine could not say it counts as if both agreed: ratio 1.
    unknown_NT = mask_NT & engine_logprob_NT.isnan()
    d_NT = torch.where(mask_NT & ~unknown_NT, d_NT, 0.0)
    finite_NT = d_NT.isfinite() & (trainer_logprob_NT.isfinite() | ~mask_NT)
    if not finite_NT.all():
        row, step = (~finite_NT).nonzero()[0].tolist()
        raise ValueError(
            f"log-probabilities must be finite under the mask, got "
            f"{trainer_logprob_NT[row, step].item()} (trainer) and "
            f"{engine_logprob_NT[row, step].item()} (engine) at row {row}, step {step}"
        )
    if level == "token":
        counted, ratio = mask_NT, clamped_exp(d_NT)
    else:
        counted = mask_NT.any(dim=1, keepdim=True)
        ratio = clamped_exp(d_NT.sum(dim=1, keepdim=True))
    least = 0.0 if floor is None else floor
    above, below = counted & (ratio > cap), counted & (ratio < least)
    factor = ratio.masked_fill(above | below, 0.0) if mode == "mask" else ratio.clamp(least, cap)
    ratio, gap_NT = torch.where(counted, ratio, 0.0), d_NT.abs()
    none = d_NT.new_zeros(())
    return torch.where(mask_NT, factor, 0.0), {
        "is_count": count(counted, d_NT),
        "is_ratio": ratio.sum(),
        "is_above": count(above, d_NT),
        "is_below": count(below, d_NT),
        "is_tokens": count(mask_NT, d_NT),
        "is_unknown": count(unknown_NT, d_NT),
        "is_difference": gap_NT.sum(),
        "is_ratio_max": ratio.max() if ratio.numel() else none,
        "is_difference_max": gap_NT.max() if gap_NT.numel() else none,
    }


def _check(
    trainer_logprob_NT: Tensor,
    engine_logprob_NT: Tensor,
    mask_NT: Tensor,
    level: str,
    mode: str,
    cap: float,
    floor: float | None,
) -> None:
    shape = tuple(trainer_logprob_NT.shape)
    if mask_NT.dtype != torch.bool or trainer_logprob_NT.ndim != 2:
        raise ValueError(
            f"mask_NT must be bool and trainer_logprob_NT (N, T), "
            f"got {mask_NT.dtype} and shape {shape}"
        )
    if not shape == tuple(engine_logprob_NT.shape) == tuple(mask_NT.shape):
        raise ValueError(
            f"trainer_logprob_NT, engine_logprob_NT and mask_NT must share one shape (N, T), got "
            f"{shape}, {tuple(engine_logprob_NT.shape)} and {tuple(mask_NT.shape)}"
        )
    for name, value, choices in (("level", level, LEVELS), ("mode", mode, MODES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if not cap >= 1:
        raise ValueError(f"cap must be at least 1, got {cap}")
    if floor is not None and not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}")
