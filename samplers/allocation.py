"""Budget allocation: how many rollouts each prompt gets.

An allocator maps one number per prompt to one integer per prompt, and the integers sum to `total`
exactly. The number is `std_P`, the root of what one rollout leaves uncertain about the prompt's
share of the gradient; the scale functions below compute it from a Beta posterior (a_P, b_P), and
each belongs to an objective. A known gradient norm multiplies it. Axes: P prompts.

    objective, estimator           exact scale, p known       scale function
    mean, baselined                sqrt(p (1 - p))            plug_in_std, mean_std, posterior_std
    mean, accepted rows only       sqrt(p)                    accepted_std
    log, baselined                 sqrt((1 - p) / p)          log_plug_in, log_std
    log (EM), accepted rows only   1 / sqrt(p + reg / p)      gvm_plug_in, gvm; inverse_sqrt, live
"""

import functools
import heapq
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

Allocator = Callable[..., IntArray]
"""`allocate(std_P, total, *, minimum, maximum) -> budget_P`. Any function of this shape is one."""

Scale = Callable[[FloatArray, FloatArray], FloatArray]
"""`scale(a_P, b_P) -> std_P` from the parameters of each prompt's Beta posterior."""


def uniform(
    std_P: ArrayLike, total: int, *, minimum: ArrayLike = 0, maximum: ArrayLike | None = None
) -> IntArray:
    """Split `total` evenly, as far as the boxes allow; the first `total % P` get one more.

    Args:
        std_P: (P,) only its length is used.
        total: rollouts to hand out.
        minimum: rollouts every prompt gets, one int or (P,).
        maximum: rollouts no prompt exceeds, one int or (P,); None for no cap.

    Returns:
        (P,) int64 counts that sum to `total`.

    Raises:
        ValueError: if `total` cannot cover the minima or exceeds the maxima.
    """
    return neyman(np.ones(len(_scales(std_P))), total, minimum=minimum, maximum=maximum)


def neyman(
    std_P: ArrayLike, total: int, *, minimum: ArrayLike = 1, maximum: ArrayLike | None = None
) -> IntArray:
    """Spend `total` rollouts so that the prompts' means are known as well as possible.

    Minimises  sum_p c_p / n_p,  c_p = std_p^2,  over integers  minimum <= n_p <= maximum,
    sum_p n_p = total.

    Ignoring integrality and boxes the answer is  n_p proportional to std_p  (Neyman, 1934). The
    objective is separable and convex, so handing out one rollout at a time to the prompt it helps
    most, by  c_p / (n_p (n_p + 1)),  is exact (Fox, 1966); rounding the real solution is not.

    Args:
        std_P: (P,) scales, finite and non-negative, any unit.
        total: rollouts to hand out.
        minimum: rollouts every prompt gets, one int or (P,), at least 0. A first rollout is worth
            more than any other where c > 0, and the larger c comes first.
        maximum: rollouts no prompt exceeds, one int or (P,); None for no cap.

    Returns:
        (P,) int64 counts that sum to `total`. Ties go to the prompt with fewer rollouts so far,
        then to the earlier one. Where every c is 0 the prompts share evenly; where some are not,
        those with c = 0 stay at their minimum until the others are full.

    Raises:
        ValueError: if `total` cannot cover the minima or exceeds the maxima, or `std_P` is not
            finite and non-negative. The solver never guesses a scale.
    """
    cost_P = _costs(std_P)
    lower_P, upper_P = _boxes(len(cost_P), total, minimum, maximum, least=0)
    return _greedy(cost_P, total, lower_P, upper_P, offset=0)


def leave_one_out(
    std_P: ArrayLike, total: int, *, minimum: ArrayLike = 2, maximum: ArrayLike | None = None
) -> IntArray:
    """Spend `total` rollouts for leave-one-out advantages, each group its own baseline.

    Minimises  sum_p c_p / (n_p - 1),  c_p = std_p^2,  over integers  minimum <= n_p <= maximum,
    sum_p n_p = total.  It is `neyman` in n - 1, and exact for the same reason, with the gain
    c_p / (n_p (n_p - 1)).  (VIP, arXiv:2602.01601, read through a digest; the variance is
    re-derived: E|g|^2 = sigma^2 p (1 - p) / (n - 1) if score norms do not depend on the reward.)

    Args:
        std_P: (P,) scales, finite and non-negative, any unit.
        total: rollouts to hand out.
        minimum: rollouts every prompt gets, one int or (P,), at least 2: a lone rollout has
            nothing to be compared with.
        maximum: rollouts no prompt exceeds, one int or (P,); None for no cap.

    Returns:
        (P,) int64 counts that sum to `total`, ties as in `neyman`.

    Raises:
        ValueError: as `neyman`, and if a minimum is below 2.
    """
    cost_P = _costs(std_P)
    lower_P, upper_P = _boxes(len(cost_P), total, minimum, maximum, least=2)
    return _greedy(cost_P, total, lower_P, upper_P, offset=1)


def plug_in_std(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """sqrt(m (1 - m)) at the mean m = a / (a + b): as if the mean were the pass rate.

    Also takes pilot counts, (successes, failures). The largest of the three baselined scales.
    """
    mean_P = _mean(a_P, b_P)
    return np.sqrt(mean_P * (1 - mean_P))


def mean_std(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """E[sqrt(p (1 - p))] = B(a + 1/2, b + 1/2) / B(a, b), the expected std of a 0/1 reward.

    The smallest of the three baselined scales; needs a, b > 0.
    """
    a_P, b_P = _beta_parameters(a_P, b_P, least=0)
    ratio_P = [
        math.exp(_log_half_step(a) + _log_half_step(b)) / (a + b)
        for a, b in zip(a_P.tolist(), b_P.tolist(), strict=True)
    ]
    return np.array(ratio_P, dtype=np.float64)


def posterior_std(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """sqrt(E[p (1 - p)]) = sqrt(a b / ((a+b) (a+b+1))), the default.

    Budgets are fixed before the rollouts, so what they minimise is the posterior expectation
    E[sum c(p) / n] = sum E[c(p)] / n: the Bayes choice of scale is sqrt(E[c(p)]). Beta(1, 1) for
    every prompt, no evidence, gives equal scales. Between `mean_std` and `plug_in_std`; equal to
    the latter times sqrt((a+b) / (a+b+1)).
    """
    a_P, b_P = _parameters(a_P, b_P)
    return np.sqrt(_mean(a_P, b_P) * b_P / (a_P + b_P + 1))


def accepted_std(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """sqrt(E[p]) = sqrt(a / (a + b)), for the mean objective with accepted rows only.

    Plug-in and posterior form agree because p enters linearly; takes pilot counts as well.
    """
    return np.sqrt(_mean(a_P, b_P))


def log_plug_in(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """sqrt((1 - m) / m) at the mean m = a / (a + b), for log p with a baseline.

    Infinite where m = 0, which the solvers refuse; `log_std` is the regularised form.
    (Reinforce-Ada, arXiv:2510.04996 v3.)
    """
    mean_P = _mean(a_P, b_P)
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - mean_P) / mean_P)


def log_std(a_P: ArrayLike, b_P: ArrayLike, *, alpha: float = 1e-3) -> FloatArray:
    """sqrt(E[p (1 - p) / (p^2 + alpha)]), for log p with a baseline, kept finite by alpha > 0.

    Without alpha the cost (1 - p) / p has no finite mean for a prompt that never passed.
    Needs a, b >= 1, as every BetaPosterior has; see `gvm` for the quadrature.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    return np.sqrt(_expectation(lambda p: p * (1 - p) / (p * p + alpha), a_P, b_P))


def gvm(a_P: ArrayLike, b_P: ArrayLike, *, alpha: float = 1e-3, beta: float = 2.0) -> FloatArray:
    """sqrt(E[1 / (p + alpha p^(1 - beta))]), GVM's scale under a posterior instead of a pilot.

    With beta = 2 the cost is p / (p^2 + alpha), at most 1 / (2 sqrt(alpha)). Unlike the plug-in no
    prompt gets 0: one that failed 8 of 8 still counts for what it may be.

    (GVM-RAFT, arXiv:2505.02391, Proposition 1, with the posterior expectation of the cost in place
    of the cost at the pilot's pass rate. Its beta >= 2 is required here too.)

    Args:
        a_P, b_P: (P,) parameters of the Beta posteriors, at least 1.
        alpha: positive; the smaller, the more a nearly hopeless prompt weighs.
        beta: at least 2.

    Returns:
        (P,) float64 by quadrature, the expectation with a relative error below 1e-7 up to
        a + b = 2000.

    Raises:
        ValueError: if a parameter is below 1 or not finite, or alpha or beta is out of range.
    """
    _check_gvm(alpha, beta)
    if alpha == 0:
        raise ValueError("alpha must be positive: E[1 / p] is infinite for a prompt never passed")
    return np.sqrt(_expectation(lambda p: p ** (beta - 1) / (p**beta + alpha), a_P, b_P))


def gvm_plug_in(
    a_P: ArrayLike, b_P: ArrayLike, *, alpha: float = 1e-3, beta: float = 2.0
) -> FloatArray:
    """1 / sqrt(m + alpha m^(1 - beta)) at the mean m = a / (a + b), GVM as published; 0 at m = 0.

    Largest at m = (alpha (beta - 1))^(1 / beta), 0.0316 at the published setting. With 8 pilots the
    smallest positive m is 1/8, where alpha does next to nothing: the real cut-off is m = 0.

    (GVM-RAFT, arXiv:2505.02391, Proposition 1; multiply by the gradient norm.)

    Args:
        a_P, b_P: (P,) parameters of a posterior, or pilot counts (successes, failures).
        alpha: at least 0; at 0 this is `inverse_sqrt`.
        beta: at least 2.

    Raises:
        ValueError: if a prompt has no counts at all, or alpha or beta is out of range.
    """
    _check_gvm(alpha, beta)
    mean_P = _mean(a_P, b_P)
    live_P = np.where(mean_P > 0, mean_P, 1.0)
    scale_P = np.sqrt(live_P ** (beta - 1) / (live_P**beta + alpha))
    return np.where(mean_P > 0, scale_P, 0.0)


def inverse_sqrt(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """1 / sqrt(m) at the mean m = a / (a + b), and 0 where m = 0: GVM without its regulariser."""
    mean_P = _mean(a_P, b_P)
    return np.where(mean_P > 0, 1 / np.sqrt(np.where(mean_P > 0, mean_P, 1.0)), 0.0)


def live(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    """1 where the mean is positive, 0 where no pilot passed: drop those and share evenly.

    Under a posterior every mean is positive, so this tells prompts apart by pilot counts only.
    """
    return (_mean(a_P, b_P) > 0).astype(np.float64)


def _greedy(
    cost_P: FloatArray, total: int, lower_P: IntArray, upper_P: IntArray, *, offset: int
) -> IntArray:
    """Minimise sum c / (n - offset) in the boxes: the next rollout goes where it gains most."""
    budget, upper, cost = lower_P.tolist(), upper_P.tolist(), cost_P.tolist()

    def entry(p: int) -> tuple[float, float, int, int]:
        """Sorts first for the prompt the next rollout helps most."""
        n = budget[p] - offset
        if n == 0 and cost[p] > 0:
            return -math.inf, -cost[p], budget[p], p
        return -cost[p] / max(n * (n + 1), 1), 0.0, budget[p], p

    heap = [entry(p) for p in range(len(budget)) if budget[p] < upper[p]]
    heapq.heapify(heap)
    for _ in range(total - sum(budget)):
        p = heap[0][-1]
        budget[p] += 1
        if budget[p] < upper[p]:
            heapq.heapreplace(heap, entry(p))
        else:
            heapq.heappop(heap)
    return np.array(budget, dtype=np.int64)


def _boxes(
    num_prompts: int, total: int, minimum: ArrayLike, maximum: ArrayLike | None, *, least: int
) -> tuple[IntArray, IntArray]:
    """(P,) lower and upper bounds of the budgets, checked to be feasible."""
    lower_P = _bound("minimum", minimum, num_prompts)
    upper_P = _bound("maximum", total if maximum is None else maximum, num_prompts)
    if (lower_P < least).any():
        raise ValueError(f"minimum must be at least {least}, got {int(lower_P.min())}")
    if total < lower_P.sum():
        what = (
            f"{num_prompts} prompts {int(lower_P[0])} rollouts each"
            if (lower_P == lower_P[0]).all()
            else f"{num_prompts} prompts their minima"
        )
        raise ValueError(
            f"total={total} cannot give {what}; it must be at least {int(lower_P.sum())}"
        )
    if maximum is None:
        return lower_P, np.maximum(upper_P, lower_P)
    if (lower_P > upper_P).any():
        p = int(np.flatnonzero(lower_P > upper_P)[0])
        raise ValueError(
            f"minimum={int(lower_P[p])} exceeds maximum={int(upper_P[p])} of prompt {p}"
        )
    if total > upper_P.sum():
        raise ValueError(
            f"total={total} exceeds what {num_prompts} prompts may get; "
            f"it must be at most {int(upper_P.sum())}, the sum of their maxima"
        )
    return lower_P, upper_P


def _bound(name: str, bound: ArrayLike, num_prompts: int) -> IntArray:
    bound = np.asarray(bound)
    if bound.dtype.kind not in "iu" or bound.shape not in [(), (num_prompts,)]:
        raise ValueError(
            f"{name} must be one integer or ({num_prompts},) integers, "
            f"got shape {bound.shape} of {bound.dtype}"
        )
    return np.broadcast_to(bound, (num_prompts,)).astype(np.int64)


def _scales(std_P: ArrayLike) -> FloatArray:
    std_P = np.asarray(std_P, dtype=np.float64)
    if std_P.ndim != 1 or len(std_P) == 0:
        raise ValueError(f"std_P must be 1-d with at least one prompt, got shape {std_P.shape}")
    return std_P


def _costs(std_P: ArrayLike) -> FloatArray:
    """std^2, divided by a power of two near the largest so that no square over- or underflows."""
    std_P = _scales(std_P)
    valid_P = np.isfinite(std_P) & (std_P >= 0)
    if not valid_P.all():
        p = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(f"std_P must be finite and non-negative, got {std_P[p]} for prompt {p}")
    _, exponent = np.frexp(std_P.max())
    return np.square(np.ldexp(std_P, -exponent))


def _parameters(a_P: ArrayLike, b_P: ArrayLike) -> tuple[FloatArray, FloatArray]:
    a_P, b_P = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a_P.ndim != 1 or a_P.shape != b_P.shape:
        raise ValueError(
            f"a_P and b_P must be 1-d and equally long, got {a_P.shape} and {b_P.shape}"
        )
    valid_P = np.isfinite(a_P) & np.isfinite(b_P) & (a_P >= 0) & (b_P >= 0) & (a_P + b_P > 0)
    if not valid_P.all():
        p = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(
            f"a and b must be finite and non-negative with a + b > 0, "
            f"got {a_P[p]} and {b_P[p]} for prompt {p}"
        )
    return a_P, b_P


def _beta_parameters(
    a_P: ArrayLike, b_P: ArrayLike, *, least: float
) -> tuple[FloatArray, FloatArray]:
    """Parameters of proper densities: positive, and at least `least`."""
    a_P, b_P = _parameters(a_P, b_P)
    smallest = min(a_P.min(initial=np.inf), b_P.min(initial=np.inf))
    if smallest <= 0 or smallest < least:
        required = f"at least {least}" if least else "positive"
        raise ValueError(f"a and b must be {required} here, got {smallest}")
    return a_P, b_P


def _mean(a_P: ArrayLike, b_P: ArrayLike) -> FloatArray:
    a_P, b_P = _parameters(a_P, b_P)
    return a_P / (a_P + b_P)


def _check_gvm(alpha: float, beta: float) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and non-negative, got {alpha}")
    if not 2 <= beta < math.inf:
        raise ValueError(f"beta must be at least 2 and finite, got {beta}")


def _log_half_step(x: float) -> float:
    """log(Gamma(x + 1/2) / Gamma(x))."""
    return math.lgamma(x + 0.5) - math.lgamma(x)


@functools.cache
def _nodes() -> tuple[FloatArray, FloatArray, FloatArray]:
    """Nodes p on [0, 1], 1 - p without cancellation, and weights.

    256-node Gauss-Legendre in t with p = t^2 (3 - 2 t). Decayed counts are fractional and their
    density is not smooth where p or 1 - p is 0: with b = 1.02 nodes in p itself are about 1e-4
    off. The substitution smooths both ends.
    """
    node, weight = np.polynomial.legendre.leggauss(256)
    t, rest = (1 + node) / 2, (1 - node) / 2
    return t * t * (3 - 2 * t), rest * rest * (3 - 2 * rest), weight * 3 * t * rest


def _expectation(
    cost: Callable[[FloatArray], FloatArray], a_P: ArrayLike, b_P: ArrayLike
) -> FloatArray:
    """E[cost(p)] under each Beta(a, b), by quadrature; logs keep tall densities in range."""
    a_P, b_P = _beta_parameters(a_P, b_P, least=1)
    p, rest, weight = _nodes()
    log_density = np.outer(a_P - 1, np.log(p)) + np.outer(b_P - 1, np.log(rest))
    density = np.exp(log_density - log_density.max(axis=1, keepdims=True)) * weight
    # Not a matrix product, which may round one row differently from the next: equal posteriors must
    # have equal scales.
    return (density * cost(p)).sum(axis=1) / density.sum(axis=1)
