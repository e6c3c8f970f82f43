"""Adapt the temperature to each decoding step: hotter where the policy is undecided.

    T_t = T (1 + tau h_t),    h_t = heterogeneity of the entropy H_t at the temperature T

h is signed and lies in [-1, 1]: 0 at the pivot, 1 at the highest and -1 at the lowest entropy of
the rollouts the pivot was taken from, which are those of the step before. (HAPO, part A:
arXiv:2509.16591; for the other parts `rl.objective.hapo`.) What is drawn so is off the policy at T by
the tempering: engines record the log-probability at T_t, which the token was drawn with, and the
trainer recomputes it at T. With the recorded ones in the ratio the mismatch is corrected like any
other; with the trainer's own, as in the paper's released code, it is not.

Axes: N rollouts, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_ENTROPY = 1e-8
"""Entropies are at least this before the logarithm, in nats."""

LEAST_SPREAD = 1e-6
"""A pivot's distance on one side below this is rounding, not spread: h is 0 on that side. A project
default, not from the paper."""


def signed_heterogeneity(
    entropy: Tensor, *, log_quantile: float, above: float, below: float, signed: bool = True
) -> Tensor:
    """Where an entropy lies between the lowest, the pivot and the highest: -1, 0 and 1.

        d = log max(H, 1e-8) - log_quantile
        h = d / above  if d > 0,    d / below  if d <= 0,    clamped to [-1, 1]

    (arXiv:2509.16591.) The spread that the paper divides d by as well cancels. The released code
    divides d <= 0 by -below, so that h is never negative and certain tokens are drawn hotter too;
    the text and the equations that use h need the sign, and it is kept unless `signed` is False.

    Args:
        entropy: nats, of any shape.
        log_quantile: the pivot, in logarithms of nats.
        above, below: distance from the pivot to the highest and to the lowest, >= 0. On a side
            without any spread there is no scale, and h is 0 there.
        signed: False for |h|, which is what the released code computes.

    Returns:
        float64 of the same shape, detached.
    """
    distance = entropy.detach().double().clamp(min=LEAST_ENTROPY).log() - log_quantile
    up = distance / above if above > LEAST_SPREAD else torch.zeros_like(distance)
    down = distance / below if below > LEAST_SPREAD else torch.zeros_like(distance)
    h = torch.where(distance > 0, up, down).clamp(-1, 1)
    h = h if signed else h.abs()
    # Of no entropy, no heterogeneity: NaN stays visible on the side without spread too.
    return torch.where(distance.isnan(), distance, h)


@dataclass(frozen=True, kw_only=True)
class AdaptiveTemperature:
    """How much to temper, and the pivot of an earlier step; JSON-able by `dataclasses.asdict`.

    Raises:
        ValueError: if a setting is out of its range.
    """

    tau: float
    """T_t lies between T (1 - tau) and T (1 + tau); in [0, 1). The paper's 0.1, its scripts' 0.05."""
    log_quantile: float
    """As `signed_heterogeneity`, like the next three."""
    above: float
    below: float
    signed: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau must be at least 0 and below 1, got {self.tau}")
        if not math.isfinite(self.log_quantile):
            raise ValueError(f"log_quantile must be finite, got {self.log_quantile}")
        for name in ("above", "below"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not below 0, got {value}")

    def factor(self, score_NV: Tensor) -> Tensor:
        """T_t / T, (N, 1) in the dtype of `score_NV`, which are the logits divided by T."""
        names = ("log_quantile", "above", "below", "signed")
        pivot: Any = {name: getattr(self, name) for name in names}
        h_N = signed_heterogeneity(entropy(score_NV), **pivot)
        return (1 + self.tau * h_N)[:, None].to(score_NV.dtype)


def entropy(score_NV: Tensor) -> Tensor:
    """Entropy of softmax(score), (N,) nats; a score of -inf leaves its token out."""
    return torch.distributions.Categorical(logits=score_NV, validate_args=False).entropy()
