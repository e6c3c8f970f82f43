"""Allocators: from one std per prompt to integer budgets that sum to `total` exactly.

Which allocator and which scale belong to which estimator: see `samplers.allocation`. Axes: P prompts.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.allocation._boxes import MOST, bound_of, boxes, one_per_prompt
from samplers.allocation._greedy import best_first, fill
from samplers.allocation.scales import FloatArray

IntArray = NDArray[np.int64]

Allocator = Callable[..., IntArray]
"""`allocate(std_P, total, *, minimum, maximum) -> budget_P`. Any function of this shape is one.
`knapsack_posterior` takes a_P, b_P in the place of std_P: give the planner `scale=None` with it."""


def align_total(total: int, multiple: int) -> int:
    """The largest multiple of `multiple` that does not exceed `total`.

    Batches, ranks and engines want totals that divide evenly. Align before allocating: what is
    topped up or cut afterwards is not what the allocator decided. Rounding down keeps `total` what
    it says, the most that is spent.

    Raises:
        ValueError: if nothing is left, or a number is below 1.
    """
    if multiple < 1 or total < multiple:
        raise ValueError(f"no positive multiple of multiple={multiple} fits into total={total}")
    return total - total % multiple


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
    lower_P, upper_P = boxes(len(one_per_prompt(std_P)), total, minimum, maximum, least=0)
    return fill(lower_P, upper_P, total - int(lower_P.sum()))


def neyman(
    std_P: ArrayLike, total: int, *, minimum: ArrayLike = 1, maximum: ArrayLike | None = None
) -> IntArray:
    """Spend `total` rollouts so that the prompts' means are known as well as possible.

    Minimises  sum_p c_p / n_p,  c_p = std_p^2,  over integers  minimum <= n_p <= maximum,
    sum_p n_p = total.

    Ignoring integrality and boxes the answer is  n_p proportional to std_p  (Neyman, 1934). The
    objective is separable and convex, so handing out one rollout at a time to the prompt it helps
    most, by  c_p / (n_p (n_p + 1)),  is exact (Fox, 1966); rounding the real solution is not. It
    is computed without taking the rollouts in turn, in a few passes over the prompts, see
    `samplers/allocation/_greedy.py`.

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
    root_P = _roots(std_P)
    lower_P, upper_P = boxes(len(root_P), total, minimum, maximum, least=0)
    return _share(root_P, lower_P, upper_P, total)


def leave_one_out(
    std_P: ArrayLike, total: int, *, minimum: ArrayLike = 2, maximum: ArrayLike | None = None
) -> IntArray:
    """The allocator of the leave-one-out advantage: spend `total` rollouts, each group its own baseline.

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
    root_P = _roots(std_P)
    lower_P, upper_P = boxes(len(root_P), total, minimum, maximum, least=2)
    return 1 + _share(root_P, lower_P - 1, upper_P - 1, total - len(root_P))


def dr_grpo(
    std_P: ArrayLike, total: int, *, minimum: ArrayLike = 3, maximum: ArrayLike | None = None
) -> IntArray:
    """Spend `total` rollouts for Dr.GRPO: each group's own mean as baseline, not divided by a std.

    Minimises  sum_p c_p (n_p - 1) / n_p^2,  c_p = std_p^2,  over integers  3 <= minimum <= n_p <=
    maximum,  sum_p n_p = total.  From 3 on each term is convex, so the greedy is exact; below it
    is not, and gives (5, 3) where (4, 4) is best for c = (.98, .92) and 8 rollouts.

    The estimator shrinks a prompt's gradient by (n - 1) / n, so with uneven budgets it weights
    prompts by their budget. `leave_one_out` has no such bias; this one is here for comparison.
    (VIP, arXiv:2602.01601, read through a digest.)

    Args, Returns: as `leave_one_out`, but `minimum` is at least 3.

    Raises:
        ValueError: as `neyman`, and if a minimum is below 3.
    """
    root_P = _roots(std_P)
    lower_P, upper_P = boxes(len(root_P), total, minimum, maximum, least=3)
    return best_first(
        _dr_grpo_gain,
        (np.square(root_P), root_P),
        lower_P,
        upper_P,
        total - int(lower_P.sum()),
        guess=_dr_grpo_guess,
        levels=_levels(root_P, lower_P + 1, upper_P + 1, total + len(root_P), None),
    )


def inverse_pass_rate(
    pass_rate_P: ArrayLike,
    total: int,
    *,
    minimum: ArrayLike = 2,
    maximum: ArrayLike | None = None,
) -> IntArray:
    """About 1 / p rollouts for a prompt of pass rate p, so that each expects a pass.

        w_p = clip(ceil(1 / p), 2, n_max) if p < 1/2, else 2,    n_p proportional to w_p

    The rule as it is published stops at w_p, which adds up to whatever it adds up to. Here the step's
    rollouts are given, and they are divided in proportion to w_p: exactly, as `neyman` divides with
    w_p for a std, minimising  sum_p w_p^2 / n_p  over the integers in the boxes. Where the w_p of the
    step add up to `total`, n_p = w_p: one more adds w / (w + 1) < 1, one fewer takes w / (w - 1) > 1.
    n_max is `maximum`, or `total` where there is none. Dividing in proportion and both bounds of w
    are project defaults.

    Args:
        pass_rate_P: (P,) expected pass rates in [0, 1]; 0 counts as 1 / n_max.
        total: rollouts to hand out.
        minimum: rollouts every prompt gets, one int or (P,), at least 2.
        maximum: rollouts no prompt exceeds, one int or (P,); None for no cap.

    Returns:
        (P,) int64 counts that sum to `total`. Ties go to the prompt with fewer rollouts so far, then
        to the lower pass rate, then to the earlier one.

    Raises:
        ValueError: as `neyman`, if a minimum is below 2, or a pass rate outside [0, 1].
    """
    pass_rate_P = one_per_prompt(pass_rate_P)
    valid_P = (pass_rate_P >= 0) & (pass_rate_P <= 1)
    if not valid_P.all():
        p = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(f"pass rates must lie in [0, 1], got {pass_rate_P[p]} for prompt {p}")
    lower_P, upper_P = boxes(len(pass_rate_P), total, minimum, maximum, least=2)
    with np.errstate(divide="ignore", over="ignore"):
        wanted_P = np.where(pass_rate_P < 0.5, np.ceil(1 / pass_rate_P), 2.0)
    most_P = upper_P if maximum is None else bound_of("maximum", maximum, len(pass_rate_P))
    root_P = _roots(np.clip(wanted_P, 2, most_P))
    # Many w are equal, whose p are not: the harder prompt comes first.
    order_P = np.argsort(pass_rate_P, kind="stable")
    budget_P = np.empty(len(order_P), dtype=np.int64)
    budget_P[order_P] = _share(root_P[order_P], lower_P[order_P], upper_P[order_P], total)
    return budget_P


def cost_aware(
    std_P: ArrayLike,
    length_P: ArrayLike,
    total: float,
    *,
    minimum: ArrayLike = 1,
    maximum: ArrayLike | None = None,
) -> IntArray:
    """Spend at most `total` tokens, or seconds, where a rollout of prompt p takes length_p of them.

    Minimises  sum_p c_p / n_p,  c_p = std_p^2,  over integers  minimum <= n_p <= maximum,
    sum_p length_p n_p <= total.  Ignoring integrality  n_p ~ std_p / sqrt(length_p).

    This is not an `Allocator`: the budget is in units of length and the number of rollouts is what
    comes out. For a fixed number of rollouts in the same proportions use
    `neyman(std_P / np.sqrt(length_P), total)`. It is a rule of its own because it moves rollouts
    towards short prompts, which is a choice.

    Filling the last gap exactly is a knapsack problem. The greedy hands out rollouts by gain per
    length, c_p / (length_p n_p (n_p + 1)), and ends before the first that does not fit: what it
    returns is optimal for what it spends, and leaves less unspent than that one rollout takes.

    Args:
        std_P: (P,) scales, finite and non-negative, any unit.
        length_P: (P,) expected length of one rollout, finite and positive, in the unit of `total`.
        total: length to spend, at least the minima's.
        minimum: rollouts every prompt gets, one int or (P,), at least 0.
        maximum: rollouts no prompt exceeds, one int or (P,); None for no cap.

    Returns:
        (P,) int64 counts. Ties go to the prompt with fewer rollouts so far, then to the earlier
        one. Prompts with c = 0 get more than their minimum only when the others are full.

    Raises:
        ValueError: if the minima do not fit into `total`, or the arguments are not as above.
    """
    root_P = _roots(std_P)
    length_P = np.asarray(length_P, dtype=np.float64)
    if length_P.shape != root_P.shape:
        raise ValueError(
            f"std_P and length_P must be equally long, got {root_P.shape} and {length_P.shape}"
        )
    valid_P = (length_P > 0) & (length_P < np.inf)
    if not valid_P.all():
        p = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(f"length_P must be finite and positive, got {length_P[p]} for prompt {p}")
    if not 0 <= total < math.inf:
        raise ValueError(f"total must be finite and non-negative, got {total}")
    most_P = np.floor(np.minimum(total / length_P, 2.0**52)).astype(np.int64)
    lower_P = bound_of("minimum", minimum, len(root_P))
    upper_P = np.maximum(most_P, lower_P) if maximum is None else maximum
    capacity = np.sum(bound_of("maximum", upper_P, len(root_P)), dtype=np.float64)
    all_of_it = int(min(max(capacity, np.sum(lower_P, dtype=np.float64)), MOST))
    lower_P, upper_P = boxes(len(root_P), all_of_it, lower_P, upper_P, least=0)
    needed = float(lower_P @ length_P)
    if total < needed:
        raise ValueError(
            f"total={total} cannot give {len(root_P)} prompts their minima; "
            f"it must be at least {needed}"
        )
    return _share(_roots(root_P / np.sqrt(length_P)), lower_P, upper_P, total, weight_P=length_P)


def _share(
    root_P: FloatArray,
    lower_P: IntArray,
    upper_P: IntArray,
    total: float,
    *,
    weight_P: FloatArray | None = None,
) -> IntArray:
    """Minimise sum c / n in the boxes, c = root^2; total counts units of weight_P, or rollouts."""
    cost_P = np.square(root_P)
    room = total - float(lower_P.sum() if weight_P is None else lower_P @ weight_P)
    if not lower_P.all():
        # From nothing to one gains infinitely much, so these go first, the largest cost in front.
        first_K = np.flatnonzero((lower_P == 0) & (upper_P > 0) & (cost_P > 0))
        first_K = first_K[np.argsort(-cost_P[first_K], kind="stable")]
        taken_K = np.cumsum(np.ones(len(first_K)) if weight_P is None else weight_P[first_K])
        fitting = int(np.searchsorted(taken_K, room, side="right"))
        lower_P = lower_P.copy()
        lower_P[first_K[:fitting]] += 1
        if fitting < len(first_K):
            return lower_P
        room -= float(taken_K[-1]) if len(taken_K) else 0.0
    return best_first(
        _share_gain,
        (cost_P,),
        lower_P,
        upper_P,
        room,
        guess=_share_guess,
        levels=_levels(root_P, lower_P, upper_P, total, weight_P),
        weight_P=weight_P,
    )


def _share_gain(n_K: FloatArray, cost_K: FloatArray) -> FloatArray:
    """c / n - c / (n + 1); 0 rollouts are asked about only where c is 0."""
    product_K = n_K + 1
    product_K *= n_K
    return cost_K / np.maximum(product_K, 1, out=product_K)


def _share_guess(level: float, cost_K: FloatArray) -> FloatArray:
    """n (n + 1) < c / level solved for n."""
    if level == 0:
        return np.where(cost_K > 0, np.inf, 0.0)
    with np.errstate(over="ignore"):
        n_K = cost_K / level
    n_K += 0.25
    np.sqrt(n_K, out=n_K)
    n_K -= 0.5
    return np.ceil(n_K, out=n_K)


def _dr_grpo_gain(n_K: FloatArray, cost_K: FloatArray, root_K: FloatArray) -> FloatArray:
    """c (n - 1) / n^2 - c n / (n + 1)^2, without the cancellation."""
    return cost_K * ((n_K * (n_K - 1) - 1) / np.square(n_K * (n_K + 1)))


def _dr_grpo_guess(level: float, cost_K: FloatArray, root_K: FloatArray) -> FloatArray:
    """The gain is c / (n^2 + 3 n + 5 + (8 n + 5) / (n^2 - n - 1)); the last term is small."""
    if level == 0:
        return np.where(cost_K > 0, np.inf, 0.0)
    with np.errstate(over="ignore"):
        inverse_K = cost_K / level - 2.75
    n_K = np.maximum(np.sqrt(np.maximum(inverse_K, 0)) - 1.5, 3)
    inverse_K -= (8 * n_K + 5) / (n_K * (n_K - 1) - 1)
    return np.ceil(np.sqrt(np.maximum(inverse_K, 0)) - 1.5)


def _levels(
    root_P: FloatArray,
    lower_P: IntArray,
    upper_P: IntArray,
    total: float,
    weight_P: FloatArray | None,
) -> list[float]:
    """Gains on either side of the last rollout's, by Newton's method on the rounded real solution.

    At level 1 / t^2 a prompt has clip(round(root t), lower, upper) rollouts.
    """
    slope_P = root_P if weight_P is None else root_P * weight_P
    whole = float(slope_P.sum())
    if whole == 0 or total <= 0:
        return []
    num_prompts = len(root_P)
    lower_P, upper_P = lower_P.astype(np.float64), upper_P.astype(np.float64)
    unit = 1.0 if weight_P is None else float(weight_P.mean())
    low, high, t = 0.0, math.inf, total / whole
    for _ in range(8):
        n_P = np.minimum(np.maximum(np.rint(root_P * t), lower_P), upper_P)
        excess = float(n_P.sum() if weight_P is None else n_P @ weight_P) - total
        low, high = (low, t) if excess > 0 else (t, high)
        free_P = (n_P > lower_P) & (n_P < upper_P)
        slope = float(slope_P @ free_P.astype(np.float64))
        if abs(excess) <= unit * (num_prompts / 16 + 1) or slope == 0:
            break
        t -= excess / slope
        if not low < t < high:
            t = (low + high) / 2 if high < math.inf else 2 * low
    step = (abs(excess) + unit * (num_prompts / 32 + 1)) / (slope or whole)
    multipliers = [t - step, t + step, t - 8 * step, t + 8 * step]
    return [1 / (t * t) for t in multipliers if 1e-100 < t < 1e100]


def _roots(std_P: ArrayLike) -> FloatArray:
    """std, divided by a power of two near the largest so that no square over- or underflows."""
    std_P = one_per_prompt(std_P)
    valid_P = (std_P >= 0) & (std_P < np.inf)
    if not valid_P.all():
        p = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(f"std_P must be finite and non-negative, got {std_P[p]} for prompt {p}")
    exponent = math.frexp(std_P.max())[1]
    if abs(exponent) < 1000:
        return std_P * math.ldexp(1.0, -exponent)
    return np.ldexp(std_P, -exponent)
