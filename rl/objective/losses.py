"""Losses: from log-probabilities, advantages and weights to the scalar that is differentiated.

Every loss is  -sum(weight_NT * surrogate_NT) / denominator.  No loss counts its own rows: the
caller states the denominator once per optimizer step, over all processes and micro-batches, so
that the losses of the parts add up to the loss of the whole. A published loss is a function here
or in `rl/objective/sequence_losses.py`, a weight and a denominator, which are chosen independently:

    name      function           ratio      surrogate               weight  over    settings
    grpo      clipped_surrogate  rho_t      min(rho A, clip(rho)A)  w/L     rows    epsilon .2 .2
    dapo      clipped_surrogate  rho_t      the same                w       tokens  epsilon .2 .28
    dr_grpo   clipped_surrogate  rho_t      the same                w/L_max rows    epsilon .2 .2
    raft      raft               none       A log pi, A in {0, 1}   w/L     rows
    raft_pp   raft_pp            rho_t      as grpo, A >= 0         w/L     rows    epsilon .2 .2
    cispo     cispo              rho_t      sg(min(rho, c)) A logpi w       tokens  ratio_cap 5
    sapo      sapo               rho_t      (4/tau) sigmoid(..) A   w/L     rows    tau 1, 1.05
    gspo      gspo               s = mean   min(s A, clip(s) A)     w/L     rows    epsilon 3e-4 4e-4
    gspo_token  gspo_token       s_t        the same                w/L     rows    epsilon 3e-4 4e-4
    luspo     gspo               s = mean   the same                w       rows    epsilon 3e-4 4e-4
    vespo     vespo              v = prod   sg(phi(v)) A log pi     w       tokens  (2, 3), (3, 2)
    rloo      rloo               v = prod   min(v A, clip(v) A)     w/L     rows    epsilon .2 .2

with w a row's weight, L its decisions, L_max the generation limit, s = exp(mean log rho),
v = exp(sum log rho). In the words of `rl/objective/weights.py` w/L is row_mean, w/L_max token_sum, and w
over tokens token_mean; w over rows (luspo) is none of those. No two ratios share a default clip:
GSPO's are some 600 times tighter than DAPO's, because s is a mean over a whole row. Where a
decision is a denoising step, log-probabilities are sums over the D elements of a latent, and
published clips are for ratios of their means: `log_ratio_scale` = 1/D of `clipped_surrogate`.

Beside the loss comes a dict of sums of statistics over the decisions with weight, to be added up
and divided by `tokens`:

    tokens         decisions with a weight other than 0
    ratio          the loss's ratio at the decision; a row's ratio counts at each of its decisions
    kl_old         rho - 1 - log rho, an estimate of KL(pi_old || pi) that is never negative
    clipped_low    decisions whose gradient the lower clip removed
    clipped_high   decisions whose gradient the upper clip removed
    clipped_dual   decisions whose gradient the dual clip removed
    nonfinite      decisions with a log-probability that is NaN or infinite; any is a reason to stop
                   (for a row's ratio also decisions of weight 0, which it contains)
    capped         cispo only: decisions whose ratio exceeds the cap; they keep their gradient
    phi            vespo only: what the decision's gradient is multiplied by

A position of weight 0 is taken out by selection, not by multiplication, so that a NaN or infinity
there reaches neither the loss nor the gradient.

Axes: N rollouts, T decision steps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Statistics = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Statistics]]
"""`loss(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator) -> (loss, sums)`."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp, which leaves ratios of up to 4.9e8 as they are."""


class Aligned(NamedTuple):
    """The arguments of a loss in one dtype and of shape (N, T), 0 wherever the weight is 0."""

    active_NT: Tensor
    logprob_NT: Tensor
    old_NT: Tensor
    advantage_NT: Tensor
    weight_NT: Tensor
    log_ratio_scale: float = 1.0

    @property
    def ratio_NT(self) -> Tensor:
        """rho, with gradient; 1 where the weight is 0."""
        return clamped_exp((self.logprob_NT - self.old_NT) * self.log_ratio_scale)


def clipped_surrogate(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    epsilon_low: float | Tensor = 0.2,
    epsilon_high: float | Tensor = 0.2,
    dual_clip: float | None = None,
    log_ratio_scale: float = 1.0,
) -> tuple[Tensor, Statistics]:
    """The clipped policy-gradient loss with one ratio per token.

        rho = exp((logprob - old_logprob) * log_ratio_scale)
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
        epsilon_low, epsilon_high: >= 0, one number or one per decision, (N, T); both infinite give
            the plain policy gradient.
        dual_clip: above 1, or None for no cap.
        log_ratio_scale: positive; 1/D where log-probabilities are sums over D elements and the clip
            is meant for their mean, as in DDPO (arXiv:2305.13301) and those after it. It scales the
            gradient too, by 1/D. Of the statistics `ratio` and the clipped counts follow it,
            `kl_old` is of the policies and does not.

    Returns:
        The loss, a scalar in the dtype of `logprob_NT` (float32 at least), and the sums of this
        module's first lines, detached. With no weight anywhere the loss is 0 and so is its
        gradient.

    Raises:
        ValueError: if shapes do not match or a setting is out of range.
    """
    check_dual_clip(dual_clip)
    check_log_ratio_scale(log_ratio_scale)
    rows = aligned(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator)
    rows = rows._replace(log_ratio_scale=log_ratio_scale)
    low_NT, high_NT = clip_range(epsilon_low, epsilon_high, rows)
    surrogate_NT, counts = clipped(rows.ratio_NT, rows.advantage_NT, low_NT, high_NT, dual_clip)
    statistics = sums(rows) | counts
    return -(rows.weight_NT * surrogate_NT).sum() / denominator, statistics


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
    rows = aligned(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator)
    surrogate_NT = rows.advantage_NT * rows.logprob_NT
    return -(rows.weight_NT * surrogate_NT).sum() / denominator, sums(rows)


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
    advantage_NT = aligned(
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator
    ).advantage_NT
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


def cispo(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    ratio_cap: float,
) -> tuple[Tensor, Statistics]:
    """The policy gradient with its importance ratio capped: no token loses its gradient.

        surrogate = sg(min(rho, ratio_cap)) * A * logprob

    with sg the stop of the gradient. Where the clip of `clipped_surrogate` drops exactly the rare
    tokens that changed most, here they go on learning at the cap. (CISPO, MiniMax-M1:
    arXiv:2506.13585.) The cap is a ratio, not a distance from 1, and has no default: taken for an
    epsilon of 0.2 it would scale every on-policy gradient by 0.2. TRL recommends 5.

    Args:
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator: as `clipped_surrogate`.
        ratio_cap: at least 1, so that on-policy gradients are whole.

    Returns:
        As `clipped_surrogate`, with `capped`; no decision's gradient is removed.

    Raises:
        ValueError: if shapes do not match, or the denominator or the cap is out of range.
    """
    if not ratio_cap >= 1:
        raise ValueError(
            f"ratio_cap must be at least 1, got {ratio_cap}; it caps the ratio itself, "
            f"so an epsilon of 0.2 above 1 is written 1.2"
        )
    rows = aligned(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator)
    ratio_NT = rows.ratio_NT.detach()
    surrogate_NT = ratio_NT.clamp(max=ratio_cap) * rows.advantage_NT * rows.logprob_NT
    statistics = sums(rows) | {"capped": count(ratio_NT > ratio_cap, ratio_NT)}
    return -(rows.weight_NT * surrogate_NT).sum() / denominator, statistics


def sapo(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    *,
    denominator: float,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> tuple[Tensor, Statistics]:
    """A smooth gate in place of the clip.

        surrogate = (4 / tau) sigmoid(tau (rho - 1)) * A
        tau = temperature_positive if A > 0, else temperature_negative

    Its slope in rho is 1 at rho = 1, as without a clip, and fades on both sides, faster the larger
    tau; a decision far off is turned down, never off. On-policy the value is 2 A / tau, not A: the
    loss is not comparable with that of `clipped_surrogate`, its gradient is. (SAPO:
    arXiv:2511.20347; temperatures as in TRL.)

    Args:
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator: as `clipped_surrogate`.
        temperature_positive, temperature_negative: above 0.

    Returns:
        As `clipped_surrogate`; the counts of clipped decisions are 0.

    Raises:
        ValueError: if shapes do not match, or the denominator or a temperature is not positive.
    """
    if not temperature_positive > 0 or not temperature_negative > 0:
        raise ValueError(
            f"temperature_positive and temperature_negative must be positive, "
            f"got {temperature_positive} and {temperature_negative}"
        )
    rows = aligned(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator)
    ratio_NT = rows.ratio_NT
    tau_NT = torch.full_like(ratio_NT, temperature_negative)
    tau_NT = tau_NT.masked_fill(rows.advantage_NT > 0, temperature_positive)
    surrogate_NT = 4 / tau_NT * torch.sigmoid(tau_NT * (ratio_NT - 1)) * rows.advantage_NT
    return -(rows.weight_NT * surrogate_NT).sum() / denominator, sums(rows)


# What `rl/objective/sequence_losses.py` shares.


def clamped_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio clamped to +-MAX_LOG_RATIO, beyond which it has no gradient."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clip_range(
    epsilon_low: float | Tensor, epsilon_high: float | Tensor, rows: Aligned
) -> tuple[Tensor, Tensor]:
    """The ends of [1 - epsilon_low, 1 + epsilon_high], which broadcast to (N, T)."""
    low, least_low = _epsilon(epsilon_low, rows)
    high, least_high = _epsilon(epsilon_high, rows)
    if not least_low >= 0 or not least_high >= 0:
        raise ValueError(
            f"epsilon_low and epsilon_high must be at least 0, got {least_low} and {least_high}"
        )
    bounds = (1 - low, 1 + high)
    low_NT, high_NT = (x if isinstance(x, Tensor) else rows.old_NT.new_full((), x) for x in bounds)
    return low_NT, high_NT


def clipped(
    ratio_NT: Tensor,
    advantage_NT: Tensor,
    low: Tensor,
    high: Tensor,
    dual_clip: float | None = None,
) -> tuple[Tensor, Statistics]:
    """min(ratio A, clip(ratio, low, high) A), at most `dual_clip` A below 0, and what was clipped."""
    surrogate_NT = torch.minimum(ratio_NT * advantage_NT, ratio_NT.clamp(low, high) * advantage_NT)
    dual_NT = torch.zeros_like(advantage_NT, dtype=torch.bool)
    if dual_clip is not None:
        dual_NT = (advantage_NT < 0) & (ratio_NT > dual_clip)
        surrogate_NT = torch.where(dual_NT, dual_clip * advantage_NT, surrogate_NT)
    return surrogate_NT, {
        "clipped_low": count((advantage_NT < 0) & (ratio_NT < low), ratio_NT),
        "clipped_high": count((advantage_NT > 0) & (ratio_NT > high), ratio_NT),
        "clipped_dual": count(dual_NT, ratio_NT),
    }


def check_dual_clip(dual_clip: float | None) -> None:
    """Raise ValueError unless it is None or above 1."""
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")


def check_log_ratio_scale(log_ratio_scale: float) -> None:
    """Raise ValueError unless it is positive and finite."""
    if not (log_ratio_scale > 0 and math.isfinite(log_ratio_scale)):
        raise ValueError(
            f"log_ratio_scale must be positive and finite, got {log_ratio_scale}; "
            f"for a clip on means over D elements write 1 / D"
        )


def aligned(
    logprob_NT: Tensor,
    old_logprob_NT: Tensor,
    advantage_N: Tensor,
    weight_NT: Tensor,
    denominator: float,
) -> Aligned:
    """Check a loss's arguments and bring them to one dtype (float32 at least) and shape."""
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
    check_denominator(denominator)
    active_NT = weight_NT != 0
    dtype = torch.promote_types(logprob_NT.dtype, torch.float32)

    def selected(value_NT: Tensor) -> Tensor:
        return torch.where(active_NT, value_NT.to(dtype), 0.0)

    advantage_NT = advantage_N.detach()
    if advantage_NT.ndim == 1:
        advantage_NT = advantage_NT[:, None]
    return Aligned(
        active_NT=active_NT,
        logprob_NT=selected(logprob_NT),
        old_NT=selected(old_logprob_NT.detach()),
        advantage_NT=selected(advantage_NT),
        weight_NT=weight_NT.detach().to(dtype),
    )


def check_denominator(denominator: float) -> None:
    """Raise ValueError unless it is positive and finite."""
    if not (denominator > 0 and math.isfinite(denominator)):
        raise ValueError(f"denominator must be positive and finite, got {denominator}")


@torch.no_grad()
def sums(rows: Aligned) -> Statistics:
    """The statistics of a loss with one ratio per token, none of them clipped."""
    log_ratio_NT = (rows.logprob_NT - rows.old_NT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    finite_NT = rows.logprob_NT.isfinite() & rows.old_NT.isfinite()
    none = torch.zeros_like(rows.active_NT)
    return {
        "tokens": count(rows.active_NT, log_ratio_NT),
        "ratio": torch.where(rows.active_NT, rows.ratio_NT, 0.0).sum(),
        "kl_old": (torch.expm1(log_ratio_NT) - log_ratio_NT).sum(),
        "clipped_low": count(none, log_ratio_NT),
        "clipped_high": count(none, log_ratio_NT),
        "clipped_dual": count(none, log_ratio_NT),
        "nonfinite": count(~finite_NT, log_ratio_NT),
    }


def count(flag_NT: Tensor, like: Tensor) -> Tensor:
    """How many are True, in the dtype of `like`."""
    return flag_NT.sum().to(like.dtype)


def _epsilon(epsilon: float | Tensor, rows: Aligned) -> tuple[Tensor | float, float]:
    """The clip range as given, 0 where the weight is 0, and its least value."""
    if not isinstance(epsilon, Tensor):
        return epsilon, epsilon
    shape = tuple(rows.active_NT.shape)
    if tuple(epsilon.shape) != shape:
        raise ValueError(
            f"epsilon_low and epsilon_high must be numbers or of shape {shape}, "
            f"got {tuple(epsilon.shape)}"
        )
    epsilon_NT = torch.where(rows.active_NT, epsilon.detach().to(rows.old_NT.dtype), 0.0)
    return epsilon_NT, float(epsilon_NT.min()) if epsilon_NT.numel() else 0.0
