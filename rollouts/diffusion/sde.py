"""One denoising step as a Gaussian action: its mean, its standard deviation, its log-probability.

Axes: N rows, T denoising steps, D latent elements of one row (any number of dimensions).

A table row `levels` holds (alpha, sigma, alpha', sigma') of this and the next step; a noisy latent
is x = alpha clean + sigma noise. Steps run from noise to image, so sigma' <= sigma. Coefficients are
computed in float64, latents in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""`rule(alpha, sigma, next_alpha, next_sigma, level) -> (std, c)`, see `gaussian_step`."""

VARIANCE_PRESERVING = ("epsilon", "sample", "v_prediction")
"""Predictions of models with alpha^2 + sigma^2 = 1."""
PREDICTIONS = (*VARIANCE_PRESERVING, "flow")


def _ddim(
    alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """DDIM with eta = `level`: 0 is deterministic, 1 is ancestral sampling (2010.02502, eq. 16)."""
    std = level * next_sigma / sigma * (1 - (alpha / next_alpha).square()).clamp(min=0).sqrt()
    return std, _rest(next_sigma, std)


def _flow_sde(
    alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's SDE with a = `level` (2505.05470, released code); converges to the data law."""
    # At sigma = 1 the diffusion coefficient is infinite; the released code takes the next step's.
    remaining = torch.where(sigma < 1, 1 - sigma, 1 - next_sigma)
    return _sde(sigma, next_sigma, level * (sigma / remaining).sqrt())


def _constant_sde(
    alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """DanceGRPO's SDE with eta = `level` (2505.07818, released code); converges to the data law."""
    return _sde(sigma, next_sigma, torch.full_like(sigma, level))


def _sde(sigma: Tensor, next_sigma: Tensor, diffusion: Tensor) -> tuple[Tensor, Tensor]:
    """Euler-Maruyama of the SDE with the ODE's marginals and this diffusion coefficient."""
    std = diffusion * (sigma - next_sigma).sqrt()
    return std, next_sigma - std.square() / (2 * sigma)


def _cps(
    alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """Coefficient-preserving sampling with a = `level` in [0, 1] (2509.05952).

    Every step shrinks the variance: unlike the SDE rules it does not converge to the data law as
    steps are added. At level 1 all noise is fresh.
    """
    std = next_sigma * math.sin(level * math.pi / 2)
    return std, _rest(next_sigma, std)


def _rest(next_sigma: Tensor, std: Tensor) -> Tensor:
    """What of the next noise level is left for the predicted noise."""
    return (next_sigma.square() - std.square()).clamp(min=0).sqrt()


RULES: dict[str, Rule] = {
    "ddim": _ddim,
    "flow_sde": _flow_sde,
    "constant_sde": _constant_sde,
    "cps": _cps,
}
"""The noise rules by name. `ddim` is for variance-preserving models, the others for flow models."""


def step_noise(levels: Tensor, *, rule: str, level: float) -> tuple[Tensor, Tensor]:
    """Standard deviation of every step of a table, and the weight of the predicted noise.

        rule                std                                             c
        ddim (eta)          eta (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2)   sqrt(sigma'^2 - std^2)
        flow_sde (a)        a sqrt(sigma/(1-sigma)) sqrt(sigma - sigma')    sigma' - std^2/(2 sigma)
        constant_sde (eta)  eta sqrt(sigma - sigma')                        sigma' - std^2/(2 sigma)
        cps (a)             sigma' sin(a pi/2)                              sqrt(sigma'^2 - std^2)

    At sigma = 1 `flow_sde` divides by 1 - sigma' instead. A std of 0 marks a deterministic step: any
    rule at level 0, `cps` at sigma' = 0, and `ddim` where the chain closes at alpha' = 1.

    Args:
        levels: (..., 4) alpha, sigma, alpha', sigma'.
        rule: a name of `RULES`.
        level: how much noise; at least 0, and at most 1 for `ddim` and `cps`.

    Returns:
        Two (...) float64 tensors.

    Raises:
        ValueError: if the rule is unknown, the level out of range, or a table row does not run from
            noise to image.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    largest = 1.0 if rule in ("ddim", "cps") else math.inf
    if not 0 <= level <= largest or math.isinf(level):
        bounds = "between 0 and 1" if largest == 1.0 else "finite and at least 0"
        raise ValueError(f"level of {rule} must be {bounds}, got {level}")
    if levels.shape[-1] != 4:
        raise ValueError(
            f"levels must end in 4 columns (alpha, sigma, alpha', sigma'), got shape "
            f"{tuple(levels.shape)}"
        )
    alpha, sigma, next_alpha, next_sigma = levels.double().unbind(-1)
    if not ((sigma > 0) & (next_sigma <= sigma) & (next_sigma >= 0)).all():
        raise ValueError(
            f"levels must run from noise to image, 0 <= sigma' <= sigma and sigma > 0, got sigma "
            f"{sigma.tolist()} and sigma' {next_sigma.tolist()}"
        )
    return RULES[rule](alpha, sigma, next_alpha, next_sigma, level)


def clean_and_noise(
    output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, *, prediction: str
) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a model output stands for.

        epsilon:       noise = out,                       clean = (x - sigma noise) / alpha
        sample:        clean = out,                       noise = (x - alpha clean) / sigma
        v_prediction:  clean = alpha x - sigma out,       noise = alpha out + sigma x
        flow:          clean = x - sigma out,             noise = x + (1 - sigma) out

    Args:
        output: model output, after guidance, in the shape of `x`.
        x: noisy latent.
        alpha: of a shape that broadcasts with `x`.
        sigma: likewise.
        prediction: one of `PREDICTIONS`.
    """
    if prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction == "sample":
        return output, (x - alpha * output) / sigma
    if prediction == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    if prediction == "flow":
        return x - sigma * output, x + (1 - sigma) * output
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def require_fitting_rule(rule: str, prediction: str) -> None:
    """Raise ValueError unless the rule is for models that predict this."""
    if (rule == "ddim") != (prediction in VARIANCE_PRESERVING):
        wanted = ("flow",) if rule != "ddim" else VARIANCE_PRESERVING
        raise ValueError(
            f"rule {rule} is for models that predict {', '.join(wanted)}, got {prediction!r}"
        )


def gaussian_step(
    output: Tensor, x: Tensor, levels: Tensor, *, rule: str, level: float, prediction: str
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next latent: the policy of one denoising step.

        mean = alpha' clean + c noise,      x' = mean + std z,      z ~ N(0, I)

    with clean and noise of `clean_and_noise`, std and c of `step_noise`. One kernel covers every
    method that needs a likelihood: DDPO (2305.13301) uses `ddim`, Flow-GRPO (2505.05470) `flow_sde`,
    DanceGRPO (2505.07818) `constant_sde`; `flow_sde` and `constant_sde` differ in the diffusion
    coefficient alone. The gradient flows through `output` (and `x`).

    Args:
        output: (N, ...) model output after guidance, any floating type.
        x: (N, ...) noisy latent the model saw.
        levels: (4,) or (N, 4) table rows.
        rule: a name of `RULES`.
        level: see `step_noise`.
        prediction: what the model predicts; `flow` with the flow rules, else with `ddim`.

    Returns:
        (N, ...) mean, float32 or the wider type of `output` and `x`, and (N,) std in the same type.

    Raises:
        ValueError: if shapes do not fit, a name is unknown, or the rule is not for this prediction.
    """
    if output.shape != x.shape:
        raise ValueError(
            f"output and x must have one shape, got {tuple(output.shape)} and {tuple(x.shape)}"
        )
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    std, weight = step_noise(levels, rule=rule, level=level)
    require_fitting_rule(rule, prediction)
    if std.ndim > 1 or (std.ndim == 1 and len(std) != len(x)):
        raise ValueError(
            f"levels must have shape (4,) or ({len(x)}, 4) for {len(x)} rows, got {tuple(levels.shape)}"
        )

    dtype = torch.promote_types(torch.promote_types(output.dtype, x.dtype), torch.float32)
    output, x = output.to(dtype), x.to(dtype)

    def column(value: Tensor) -> Tensor:
        value = value.expand(len(x)).to(device=x.device, dtype=dtype)
        return value.view(-1, *(1,) * (x.ndim - 1))

    alpha, sigma, next_alpha, _ = map(column, levels.double().unbind(-1))
    clean, noise = clean_and_noise(output, x, alpha, sigma, prediction=prediction)
    return next_alpha * clean + column(weight) * noise, column(std).flatten()


def step_logprob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-probability of the next latent under the step's Gaussian.

        logprob = sum over D of  -(x' - mean)^2 / (2 std^2) - log std - (1/2) log 2 pi      nats

    Summed, and in float64: at D = 16384 the sum has magnitude 4e4, where float32 is spaced by .004
    nats. `x_next` is the latent as stored: score a half-precision latent after rounding it, or the
    ratio is off by up to 4e-3 before the first update. Published clips on mean-reduced ratios are
    applied to exp((new - old) / D) by the loss.

    This is the density of every rule, `cps` too. Releases differ: the CPS of Flow-GRPO and of MixGRPO
    leaves out 2 std^2 and the constants, so its log-ratios are 2 std^2 times these; the constant SDE of
    DanceGRPO and of MixGRPO leaves out the constants by a parenthesis, which no ratio sees.

    Args:
        x_next: (N, ...) the latents that were drawn, as stored.
        mean: (N, ...) of `gaussian_step`.
        std: (N,), or a scalar.

    Returns:
        (N,) float64.

    Raises:
        ValueError: if a std is not positive and finite: a deterministic step has no density.
    """
    std_N = _positive(std, len(mean), asked="a log-probability")
    residual_ND = (x_next.double() - mean.double()).flatten(1)
    constant_N = std_N.log() + 0.5 * math.log(2 * math.pi)
    return -residual_ND.square().sum(1) / (2 * std_N.square()) - residual_ND.shape[1] * constant_N


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL divergence of one step's Gaussian from the reference policy's, exactly.

        kl = sum over D of  (mean - mean_ref)^2 / (2 std^2)      nats

    The std depends on the table alone, so both policies share it. It is a sum over all D elements of
    a latent, in the unit of `step_logprob`; a mean over elements is kl / D. Flow-GRPO's released code
    takes that mean and divides by the diffusion coefficient g = std / sqrt(|dt|) in the place of the
    std, dt = sigma' - sigma:

        released = mean over D of  (mean - mean_ref)^2 / (2 g^2)  =  |dt| kl / D

    so its beta of .04 is one of .04 |dt| / D here: 1.5e-8 at D = 262,144 and |dt| = .1.
    `rl.objective.denoising_weights.kl_factor` has all three.

    Args:
        mean: (N, ...) of `gaussian_step`.
        mean_ref: (N, ...) of the reference policy at the same latents.
        std: (N,), or a scalar.

    Returns:
        (N,) float64.

    Raises:
        ValueError: if a std is not positive and finite.
    """
    std_N = _positive(std, len(mean), asked="a KL divergence")
    return (mean.double() - mean_ref.double()).flatten(1).square().sum(1) / (2 * std_N.square())


def _positive(std: Tensor, num_rows: int, *, asked: str) -> Tensor:
    std_N = torch.as_tensor(std).double().expand(num_rows)
    if not (std_N.isfinite() & (std_N > 0)).all():
        raise ValueError(
            f"a deterministic step has no density: {asked} needs a positive, finite std, "
            f"got {std_N.tolist()}"
        )
    return std_N
